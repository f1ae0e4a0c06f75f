"""The waiting room: who may enter, who is next, and who has waited too long.

Requests that have lost their worker go before all that have not started, class by class, the one
with the least time left first; then classes by rank, fair
over tenants inside a class; then the surplus tier in the same order; batch lines come last.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest, Rejected, SLOClass, Tier
from controlplane.fairqueue import FairQueue, Hits
from controlplane.protocol import StepModel

RETRY_S = 1.0  # a full queue moves by then
Line = tuple[bool, int, str]  # is surplus, rank, class: the order in which queues are tried


@dataclass(slots=True)
class WaitingRoom:
    """Bounded queues per class, and the requests that move between workers."""

    config: ControlPlaneConfig
    _queues: dict[Line, FairQueue] = field(default_factory=dict)
    _line_of: dict[str, Line] = field(default_factory=dict)  # of requests that have not started
    _started_in: dict[str, Line] = field(default_factory=dict)  # of requests that run
    _moving: OrderedDict[str, GenerateRequest] = field(default_factory=OrderedDict)
    _start_by_s: dict[str, float] = field(default_factory=dict)  # of those that move
    _since_s: dict[str, float] = field(default_factory=dict)
    is_batch_held: bool = False  # none of it starts (overload.py)
    is_surplus_held: bool = False

    def __len__(self) -> int:
        return len(self._since_s)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._since_s

    def refuse_queue(self, slo: SLOClass, tier: Tier) -> Rejected | None:
        """The class already has as many waiting as it may; batch is bounded by its feeder."""
        queue = self._queues.get(_line(slo, tier))
        if slo.is_batch or queue is None or len(queue) < self.config.queue_max:
            return None
        return Rejected(
            "queue_full",
            f"{len(queue)} requests of class {slo.name} are waiting, at most"
            f" {self.config.queue_max}",
            RETRY_S,
        )

    def in_the_way(self, request: GenerateRequest) -> GenerateRequest | None:
        """Who gives up a place in the full surplus queue: one tenant does not fill it alone.
        Nobody there was promised to be served."""
        queue = self._queues.get(_line(request.slo, "surplus"))
        return None if queue is None else queue.newest_of_longest(request.tenant_id)

    def has_before(self, slo: SLOClass, tier: Tier) -> bool:
        """Does anyone wait who would be tried before a new one?"""
        own = _line(slo, tier)
        if self._moving or slo.is_batch:
            return len(self) > 0
        return any(len(queue) > 0 for line, queue in self._queues.items() if line <= own)

    def num_guaranteed(self) -> int:
        """Those that wait before the surplus tier."""
        surplus = sum(len(queue) for line, queue in self._queues.items() if line[0])
        return len(self) - surplus

    def enter(self, request: GenerateRequest, tier: Tier, now_s: float) -> None:
        self._push(request, _line(request.slo, tier))
        self._since_s[request.request_id] = now_s

    def _push(self, request: GenerateRequest, line: Line) -> None:
        queue = self._queues.get(line)
        if queue is None:
            queue = self._queues[line] = FairQueue(self.config.tenants_max)
        queue.push(request)
        self._line_of[request.request_id] = line

    def can_demote(self, request: GenerateRequest) -> bool:
        """The surplus queue of its class has room; else it stays where it is, late as it is."""
        queue = self._queues.get(_line(request.slo, "surplus"))
        return request.request_id not in self._moving and (
            queue is None or len(queue) < self.config.queue_max
        )

    def demote(self, request: GenerateRequest) -> None:
        """From now on it waits in the surplus tier; its time limit goes on."""
        assert self.can_demote(request), request
        self._queue(request).remove(request.request_id)
        self._push(request, _line(request.slo, "surplus"))

    def enter_moving(self, request: GenerateRequest, start_by_s: float, now_s: float) -> None:
        """It had a worker before: it goes on before anything new starts."""
        assert request.request_id not in self._since_s, request.request_id
        self._moving[request.request_id] = request
        self._start_by_s[request.request_id] = start_by_s
        self._since_s[request.request_id] = now_s

    def next_up(self, hits: Hits, has_surplus: bool = True) -> list[GenerateRequest]:
        """Requests to try now, in order; at most scan_max of each queue. `hits`: prompt tokens that
        a worker has cached. Without the surplus tier when it had its turn a moment ago."""
        limit = self.config.scan_max
        moving = sorted(
            self._moving.values(),
            key=lambda request: (
                request.slo.rank,
                self._start_by_s[request.request_id],
                request.arrived_at_s,
                request.request_id,
            ),
        )
        heads = [head for head in moving if not head.slo.is_batch][:limit]
        batch = [head for head in moving if head.slo.is_batch][:limit]
        for line in sorted(self._queues):
            if line[0] and (self.is_surplus_held or not has_surplus):
                continue
            if self.is_batch_held and self._queues[line].is_batch:
                continue
            for head in self._queues[line].heads(limit, hits):
                (batch if head.slo.is_batch else heads).append(head)
        return heads + batch

    def take(self, request: GenerateRequest, model: StepModel, uncached_tokens: int) -> None:
        """The request starts, on a worker of that model; the first time it is charged for."""
        if request.request_id in self._moving:
            self.take_moving(request)
            return
        del self._since_s[request.request_id]
        self._queue(request).take(request.request_id, model, uncached_tokens)
        self._started_in[request.request_id] = self._line_of.pop(request.request_id)

    def take_moving(self, request: GenerateRequest) -> None:
        """It goes on, on a worker that has it."""
        del self._moving[request.request_id]
        del self._since_s[request.request_id]
        del self._start_by_s[request.request_id]

    def settle(self, request_id: str, output_tokens: int | None) -> None:
        """The end of a request that started; None when it was given up. See FairQueue."""
        line = self._started_in.pop(request_id, None)
        if line is not None:
            self._queues[line].settle(request_id, output_tokens)

    def remove(self, request: GenerateRequest) -> None:
        """The request ends without (another) start."""
        del self._since_s[request.request_id]
        self._start_by_s.pop(request.request_id, None)
        if self._moving.pop(request.request_id, None) is None:
            self._queue(request).remove(request.request_id)
            del self._line_of[request.request_id]

    def _queue(self, request: GenerateRequest) -> FairQueue:
        return self._queues[self._line_of[request.request_id]]

    def position(self, request: GenerateRequest) -> int:
        if request.request_id in self._moving:
            return list(self._moving).index(request.request_id) + 1
        own = self._line_of[request.request_id]
        before = sum(len(queue) for line, queue in self._queues.items() if line < own)
        return len(self._moving) + before + self._queue(request).position(request.request_id)

    def waited_s(self, request_id: str, now_s: float) -> float:
        return now_s - self._since_s[request_id]

    def _guaranteed(self, is_served: Callable[[str], bool]) -> Iterator[GenerateRequest]:
        """Online requests of the guaranteed tier that wait for a worker which is there."""
        for (is_surplus, _, _), queue in self._queues.items():
            if not is_surplus and len(queue) and not queue.is_batch:
                yield from (item for item in queue.requests() if is_served(item.model_id))

    def oldest_s(self, now_s: float, is_served: Callable[[str], bool]) -> float:
        """How long the oldest of them has waited; 0 without any."""
        waits = (self.waited_s(item.request_id, now_s) for item in self._guaranteed(is_served))
        return max(waits, default=0.0)

    def wait_share(self, now_s: float, is_served: Callable[[str], bool]) -> float:
        """The longest wait over what its class allows."""
        shares = (
            self.waited_s(item.request_id, now_s) / item.slo.queue_s_max
            for item in self._guaranteed(is_served)
        )
        return max(shares, default=0.0)

    def overdue(self, now_s: float) -> list[GenerateRequest]:
        """Requests that have waited longer than their class allows."""
        late = [
            request
            for request in self._all()
            if self.waited_s(request.request_id, now_s) > _wait_s_max(request.slo)
        ]
        return sorted(late, key=lambda request: request.request_id)

    def _all(self) -> list[GenerateRequest]:
        waiting = list(self._moving.values())
        for queue in self._queues.values():
            waiting += queue.requests()
        return waiting

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Online queues; demoted requests of a full queue may join a full surplus queue."""
        limit = self.config.queue_max
        return {
            f"queue {name}{' surplus' if is_surplus else ''}": (
                len(queue),
                limit * (1 + is_surplus),
            )
            for (is_surplus, rank, name), queue in self._queues.items()
            if not queue.is_batch
        }

    def num_batch_lines(self, model_id: str) -> int:
        """Batch lines of a model that wait, moving ones included."""
        return sum(item.slo.is_batch and item.model_id == model_id for item in self._all())

    def batch_models(self) -> frozenset[str]:
        """Models of which batch lines wait for a first start."""
        queues = [queue for queue in self._queues.values() if queue.is_batch]
        return frozenset(request.model_id for queue in queues for request in queue.requests())

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Requests waiting for a first start, by class in order of rank, both tiers together."""
        numbers: dict[tuple[int, str], int] = {}
        for (_, rank, name), queue in self._queues.items():
            numbers[rank, name] = numbers.get((rank, name), 0) + len(queue)
        return tuple((name, numbers[rank, name]) for rank, name in sorted(numbers))


def _line(slo: SLOClass, tier: Tier) -> Line:
    return (tier == "surplus", slo.rank, slo.name)


def _wait_s_max(slo: SLOClass) -> float:
    if slo.is_batch and slo.deadline_s is not None:
        return slo.deadline_s
    return slo.queue_s_max
