"""I11 from outside: over any minute in which two equal tenants both have requests of one class
waiting, what they were given differs by no more than a few requests.

Reliability.md allows one maximal request and 10 %; the locality quantum of fairqueue.py comes on
top. Cost is what the request takes of the worker that it went to, in seconds, all output included.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane import domain
from controlplane.fairqueue import QUANTUM_COSTS
from controlplane.gpuseconds import request_s
from controlplane.protocol import StepModel, Welcome

WINDOW_S = 60.0
SHARE = 0.1
REQUESTS = 1.0 + QUANTUM_COSTS
Line = tuple[str, bool]  # class, and whether it is the surplus tier


@dataclass(slots=True)
class _Side:
    """One tenant in one line."""

    waiting: set[str] = field(default_factory=set)
    since_s: float = 0.0  # it has had something waiting since then
    served: deque[tuple[float, float]] = field(default_factory=deque)
    total: float = 0.0
    largest: float = 0.0

    def serve(self, cost: float, now_s: float) -> None:
        self.served.append((now_s, cost))
        self.total += cost
        self.largest = max(self.largest, cost)
        while self.served[0][0] <= now_s - WINDOW_S:
            self.total -= self.served.popleft()[1]


class Fairness:
    """Give it every event with its commands, in order."""

    def __init__(self) -> None:
        self._sides: dict[Line, dict[str, _Side]] = {}
        self._place: dict[str, tuple[Line, domain.GenerateRequest]] = {}  # of those that wait
        self._models: dict[str, StepModel] = {}  # by worker, as it joined
        self.num_compared = 0

    def after(self, event: domain.Event, commands: Sequence[domain.Command], now_s: float) -> None:
        if isinstance(event, domain.Submit):
            request = event.request
            self._enter(request, (request.slo.name, False), now_s)
        elif isinstance(event, domain.Finished):
            self._leave(event.request_id, now_s)
        for command in commands:
            if isinstance(command, domain.Greet) and isinstance(command.message, Welcome):
                assert isinstance(event, domain.WorkerHello), event
                self._models[command.message.worker_id] = event.hello.step_model
            elif isinstance(command, domain.Dispatch) and command.epoch == 1:
                self._started(command.request_id, command.worker_id, now_s)
            elif isinstance(command, domain.Decided):
                self._decided(command.request_id, command.outcome, now_s)

    def _enter(self, request: domain.GenerateRequest, line: Line, now_s: float) -> None:
        side = self._sides.setdefault(line, {}).setdefault(request.tenant_id, _Side())
        if not side.waiting:
            side.since_s = now_s
        side.waiting.add(request.request_id)
        self._place[request.request_id] = (line, request)

    def _leave(self, name: str, now_s: float) -> domain.GenerateRequest | None:
        """It waits no more, or in another line."""
        line, request = self._place.pop(name, (None, None))
        if line is None or request is None:
            return None
        self._sides[line][request.tenant_id].waiting.discard(name)
        return request

    def _decided(self, name: str, outcome: object, now_s: float) -> None:
        if isinstance(outcome, domain.Rejected):
            self._leave(name, now_s)
        elif (
            isinstance(outcome, domain.Queued)
            and outcome.demotion is not None
            and (request := self._leave(name, now_s)) is not None
        ):
            self._enter(request, (request.slo.name, True), now_s)

    def _started(self, name: str, worker_id: str, now_s: float) -> None:
        if name not in self._place:  # the second stage of a handoff
            return
        line, request = self._place[name]
        sides = self._sides[line]
        side = sides[request.tenant_id]
        tokens, output_tokens = request.prompt_tokens, request.output_tokens_max
        cost = request_s(self._models[worker_id], tokens, tokens, output_tokens)
        side.serve(cost, now_s)
        self._compare(line, request.tenant_id, now_s)
        self._leave(name, now_s)

    def _compare(self, line: Line, tenant_id: str, now_s: float) -> None:
        own = self._sides[line][tenant_id]
        for other_id, other in self._sides[line].items():
            since_s = max(own.since_s, other.since_s)
            if other is own or not other.waiting or now_s - since_s < WINDOW_S:
                continue
            other.serve(0.0, now_s)
            limit = REQUESTS * max(own.largest, other.largest) + SHARE * max(own.total, other.total)
            self.num_compared += 1
            assert abs(own.total - other.total) <= limit, (
                f"I11: in a minute {tenant_id} got {own.total:.2f} s of {line}, {other_id}"
                f" {other.total:.2f} s, may differ by {limit:.2f} s"
            )
