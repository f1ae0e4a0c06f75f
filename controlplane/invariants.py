"""The laws of the plane, checked from outside: by the simulator after every event, by tests, and
cheap enough for production.

`Watch` sees events and the commands that answered them, keeps its own small books and never asks
the plane; `scan` reads the plane's state and compares it with those books. A broken law is an
AssertionError whose message begins with its number in reliability.md section 10. Laws about blocks,
salts and step plans (I7, I8, I10) need the workers and live in controlplane/sim/laws.py; I2, I4,
I15 and I17 are about the database and are tested where it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.contractbook import ContractBook
from controlplane.domain import Command, ContractKey, Event, GenerateRequest
from controlplane.plane import ControlPlane

TICK_S = 0.1
SLACK_S = 2.0 * TICK_S  # the plane notices a time limit at its next tick
SILENT_FACTOR = 2.0  # of a step, for which a worker may be silent and get work (registry.py)
GUILTY_DEATHS = 2  # of workers, before a request is to blame
BILLED = ("completed", "cancelled")


@dataclass(slots=True)
class _Life:
    """One request as the outside saw it."""

    request: GenerateRequest
    waits_since_s: float | None
    epoch: int = 0
    stages: list[str] = field(default_factory=list)  # dispatched in this epoch
    key: ContractKey | None = None
    tier: str = ""  # as its worker was told in this epoch
    held_by: set[str] = field(default_factory=set)  # every worker that was ever given it
    links: "dict[str, _Link]" = field(default_factory=dict)  # through which it went there last
    num_deaths: int = 0  # of those
    num_moved: int = 0  # off workers that were lost or failed it
    num_replaced: int = 0  # before its start
    is_failover: bool = False  # counted as one, and its decision is not here yet

    @property
    def tokens_max(self) -> int:
        return self.request.prompt_tokens + self.request.output_tokens_max


@dataclass(slots=True)
class _Link:
    """A worker as the outside sees it."""

    epoch: int
    is_open: bool
    heard_at_s: float
    step_s: float = 0.0  # the longer of predicted and measured, as it last said
    busy_s: float = 0.0  # age of the step in hand, as it last said
    role: str = ""  # of the last change


class Watch:
    """Give it every event with its commands, in order."""

    def __init__(self, secret: bytes, config: ControlPlaneConfig) -> None:
        self._secret = secret.decode(errors="replace")
        self._config = config
        self._lives: dict[str, _Life] = {}
        self._ended: dict[str, str] = {}
        self._no_more: set[str] = set()  # workers that were told to drain
        self._links: dict[str, _Link] = {}
        self._books: dict[ContractKey, ContractBook] = {}
        self._guilty: dict[bytes, float] = {}  # fingerprints of prompts, until when
        self._last_s = 0.0
        self._ticked_at_s: float | None = None

    def after(self, event: Event, commands: Sequence[Command], now_s: float) -> None:
        assert now_s >= self._last_s, f"I18: time went from {self._last_s} back to {now_s}"
        self._last_s = now_s
        match event:
            case domain.Submit(request):
                name = request.request_id
                assert name not in self._lives and name not in self._ended, f"I1: {name} twice"
                self._lives[name] = _Life(request, now_s)
            case domain.Finished(request_id, status, output_tokens):
                self._finished(request_id, status, output_tokens)
            case domain.ContractsSet(contracts):
                for contract in contracts:
                    book = self._books.setdefault(contract.key, ContractBook(contract))
                    book.change(contract)
            case domain.WorkerMessage():
                self._heard(event, commands, now_s)
            case domain.WorkerClosed(worker_id, epoch):
                if (link := self._links.get(worker_id)) and link.epoch == epoch:
                    link.is_open = False
                    for life in self._lives.values():
                        life.num_deaths += worker_id in life.held_by
            case domain.Tick():
                self._ticked(now_s)
        for command in commands:
            self._command(command, now_s)
        if isinstance(event, domain.Submit):
            name = event.request.request_id
            assert name in self._ended or self._lives[name].stages or self._is_waiting(name), (
                f"I1: {name} got no answer"
            )
            is_guilty = now_s < self._guilty.get(event.request.fingerprint, now_s)
            is_admitted = name in self._lives
            assert not (is_guilty and is_admitted), f"I13: {name} has cost workers before"

    def _heard(
        self, event: domain.WorkerMessage, commands: Sequence[Command], now_s: float
    ) -> None:
        """A worker spoke. What an older incarnation says moves nothing."""
        link = self._links.get(event.worker_id)
        if link is None or link.epoch != event.epoch or not link.is_open:
            for item in commands:  # what its worker lost before may find room just now
                if isinstance(item, domain.FailoverCounted) and item.from_worker == event.worker_id:
                    held_on = self._lives[item.request_id].links.get(event.worker_id)
                    is_lost = held_on is not link or link is None or not link.is_open
                    assert is_lost, f"I9: {event} of an older epoch moves {item}"
            return
        link.heard_at_s = now_s
        match event.message:
            case protocol.WorkerLoad() as load:
                link.step_s, link.busy_s = max(load.predicted_s, load.measured_s), 0.0
            case protocol.Heartbeat(load, busy_s):
                link.step_s, link.busy_s = max(load.predicted_s, load.measured_s), busy_s
            case protocol.Goodbye():
                link.is_open = False
            case protocol.HandoffFailed(request_id=name, reason="unreachable"):
                if life := self._lives.get(name):  # its peer is dead, and that will be heard later
                    life.num_deaths += 1
            case _:
                pass

    def _ticked(self, now_s: float) -> None:
        """While our own loop stood still nobody could be heard."""
        gap_s = 0.0 if self._ticked_at_s is None else now_s - self._ticked_at_s
        self._ticked_at_s = now_s
        if gap_s > self._config.stall_s:
            for link in self._links.values():
                link.heard_at_s = min(now_s, link.heard_at_s + gap_s)

    def _is_waiting(self, name: str) -> bool:
        return self._lives[name].waits_since_s is not None

    def _command(self, command: Command, now_s: float) -> None:
        match command:
            case domain.Dispatch():
                self._dispatched(command, now_s)
            case domain.Decided(request_id, outcome, record):
                assert self._secret not in record.reason, f"I20: a secret in {request_id}'s record"
                self._decided(request_id, outcome, record.cause, now_s)
            case domain.Greet(_, protocol.Welcome(worker_id, epoch)):
                link = self._links.get(worker_id)
                before = link.epoch if link else 0
                assert epoch == before + 1, f"I18: {worker_id} went from epoch {before} to {epoch}"
                self._links[worker_id] = _Link(epoch, True, now_s, role=link.role if link else "")
            case domain.PlanChanged(worker_id, _, role, is_shadow=False, kind="role"):
                self._links[worker_id].role = role
            case domain.CloseWorker(worker_id, reason):
                assert self._secret not in reason, f"I20: a secret about {worker_id}"
                self._links[worker_id].is_open = False
            case domain.SendDrain(worker_id):
                self._no_more.add(worker_id)
                self._reaches(worker_id, command)
            case domain.SendRole(worker_id) | domain.Reattach(worker_id):
                self._reaches(worker_id, command)
            case domain.FailoverCounted(request_id):
                life = self._lives[request_id]
                life.num_moved, life.is_failover = life.num_moved + 1, True
                limit = self._config.moves_max
                assert life.num_moved <= limit, f"I13: {request_id} moved {life.num_moved} times"
            case _:
                pass

    def _reaches(self, worker_id: str, command: Command) -> _Link:
        """Commands go to workers with a connection."""
        link = self._links.get(worker_id)
        assert link is not None and link.is_open, f"I9: {command} to a worker that is gone"
        return link

    def _dispatched(self, command: domain.Dispatch, now_s: float) -> None:
        name, worker_id = command.request_id, command.worker_id
        assert name in self._lives, f"I1: {name} was dispatched after its end {self._ended}"
        link = self._reaches(worker_id, command)
        silent_s, step_s = now_s - link.heard_at_s, SILENT_FACTOR * link.step_s
        assert silent_s <= max(self._config.suspect_s_min, step_s), (
            f"I14: {name} went to {worker_id}, silent for {silent_s:.1f} s"
        )
        assert link.busy_s <= max(self._config.stuck_s_min, step_s), (
            f"I14: {name} went to {worker_id}, {link.busy_s:.1f} s in one step"
        )
        assert worker_id not in self._no_more, f"I14: {name} went to draining {worker_id}"
        life = self._lives[name]
        if command.epoch == life.epoch:
            assert life.stages == ["prefill"] and command.stage == "decode", (
                f"I9: {name} epoch {command.epoch} has stages {life.stages} and {command.stage}"
            )
        else:
            assert command.epoch == life.epoch + 1, (
                f"I18: {name} went from epoch {life.epoch} to {command.epoch}"
            )
            assert command.stage in ("full", "prefill"), f"I9: {name} began with {command.stage}"
            life.epoch, life.stages = command.epoch, []
        life.stages.append(command.stage)
        life.tier = command.tier
        life.held_by.add(worker_id)
        life.links[worker_id] = link
        if life.waits_since_s is not None:
            waited_s, limit_s = now_s - life.waits_since_s, _wait_s_max(life.request)
            assert waited_s <= limit_s + SLACK_S, f"I12: {name} started after {waited_s:.1f} s"
        life.waits_since_s = None

    def _decided(self, name: str, outcome: object, cause: str, now_s: float) -> None:
        assert name in self._lives, f"I1: {name} was decided after its end {self._ended.get(name)}"
        life = self._lives[name]
        if cause == "replaced":
            life.num_replaced += 1
            limit = self._config.replaces_max
            assert life.num_replaced <= limit, f"I13: {name} replaced {life.num_replaced} times"
        match outcome:
            case domain.Rejected():
                self._refused(name, life, outcome, now_s)
                self._end(name, outcome.code)
                self._settle(name, life, 0, is_billed=False)
            case domain.Placed(_, _, demotion) | domain.Queued(_, _, demotion):
                if life.key is None:
                    self._admitted(name, life, demotion, now_s)
                if isinstance(outcome, domain.Queued):
                    assert outcome.position >= 1 and outcome.predicted_start_s >= 0.0, outcome
                    return
                assert not life.is_failover or cause == "failover", f"I18: {name} moved by {cause}"
                life.is_failover = False
                request = life.request
                is_past = now_s - request.arrived_at_s >= request.slo.ttft_s_p99
                if demotion is None or (demotion.code == "late" and not is_past):
                    tiers = ["guaranteed"]
                else:  # a late one that was streaming when it moved goes on as it was
                    tiers = ["surplus", "guaranteed"] if demotion.code == "late" else ["surplus"]
                assert life.tier in tiers, f"I5: {name} runs as {life.tier}, demoted: {demotion}"

    def _refused(self, name: str, life: _Life, outcome: domain.Rejected, now_s: float) -> None:
        """A refusal names a limit that has been reached."""
        request, code = life.request, outcome.code
        book = self._books.get(_key(request))
        if book is not None and life.key is None:
            book.refused(outcome, life.tokens_max, now_s)
        if code == "tenant_concurrency":
            running = sum(
                other.request.tenant_id == request.tenant_id and not other.request.slo.is_batch
                for other in self._lives.values()
            )
            limit = request.tenant_concurrency_max
            assert running > limit, f"I5: {name} refused with {running - 1} of {limit} running"
        elif code == "queue_full":
            waiting = sum(
                other.waits_since_s is not None and other.request.slo.name == request.slo.name
                for other in self._lives.values()
            )
            assert waiting > self._config.queue_max, f"I16: {name} refused, {waiting} wait"
        elif code == "poison_request" and life.epoch:
            deaths = life.num_deaths
            assert deaths >= GUILTY_DEATHS, f"I13: {name} is blamed for {deaths} deaths"
        elif code == "poison_request":
            assert request.fingerprint in self._guilty, f"I13: {name} has cost nothing"
        if code in ("poison_request", "worker_error") and life.epoch and request.fingerprint:
            self._guilty[request.fingerprint] = now_s + self._config.quarantine_s
        if code == "queue_timeout" and life.waits_since_s is not None:
            waited_s, limit_s = now_s - life.waits_since_s, _wait_s_max(request)
            assert waited_s > limit_s, f"I12: {name} expired after {waited_s:.1f} s"

    def _admitted(
        self, name: str, life: _Life, demotion: domain.Demotion | None, now_s: float
    ) -> None:
        """Its first decision."""
        life.key = _key(life.request)
        if book := self._books.get(life.key):
            if demotion is not None:
                book.demoted(demotion.code, now_s)
            book.admitted(name, life.tokens_max, demotion is None, now_s)

    def _finished(self, name: str, status: str, output_tokens: int) -> None:
        life = self._lives.get(name)
        if life is None:
            return
        self._end(name, status)
        is_billed = status in BILLED and life.epoch > 0
        self._settle(name, life, output_tokens, is_billed)

    def _settle(self, name: str, life: _Life, output_tokens: int, is_billed: bool) -> None:
        book = self._books.get(life.key) if life.key else None
        if book is not None:
            book.settled(name, life.request.prompt_tokens, output_tokens, is_billed, self._last_s)

    def _end(self, name: str, how: str) -> None:
        assert name not in self._ended, f"I1: {name} ended as {self._ended[name]} and as {how}"
        self._ended[name] = how
        del self._lives[name]

    # --- the whole state

    def scan(self, plane: ControlPlane, now_s: float) -> None:
        """Compare the plane with the books; O(state)."""
        plane.check_integrity()
        for name, (size, limit) in plane.sizes().items():
            assert size <= limit, f"I16: {size} of {name}, at most {limit}"
        view = plane.view(now_s)
        meters = plane.sizes()["GPU meters"][0]
        assert meters <= len(view.workers), f"I16: {meters} GPU meters, {len(view.workers)} workers"
        tracked = {item.request_id: item for item in view.requests}
        if len(tracked) < len(self._lives):  # the view is bounded
            return
        assert set(tracked) == set(self._lives), (
            f"I1: plane and books differ in {set(tracked) ^ set(self._lives)}"
        )
        for name, item in tracked.items():
            life = self._lives[name]
            assert item.epoch == life.epoch, f"I18: {name} {item.epoch} {life.epoch}"
            is_waiting = item.phase in ("queued", "orphaned")
            limit_s = _wait_s_max(life.request) + SLACK_S
            assert not is_waiting or item.phase_s <= limit_s, f"I12: {name} waits {item.phase_s}"
        for worker in view.workers:
            role = self._links[worker.worker_id].role
            assert not role or worker.role == role, f"I18: {worker.worker_id} lost its role {role}"
        held = sum(worker.requests for worker in view.workers)
        running = [item for item in tracked.values() if item.phase not in ("queued", "orphaned")]
        assert len(running) <= held <= 2 * len(running), f"I6: {held} held, {len(running)} run"
        for account in plane.accounts(now_s):
            self._books[account.contract.key].compare(account, now_s)

    def at_rest(self, plane: ControlPlane, now_s: float) -> None:
        """After the end of all work nothing is held anywhere."""
        self.scan(plane, now_s)
        assert not self._lives, f"I1: no end for {sorted(self._lives)[:5]}"
        view = plane.view(now_s)
        assert not view.requests and not any(worker.requests for worker in view.workers), "I6"
        for account in plane.accounts(now_s):
            assert (account.num_running, account.held_tokens) == (0, 0), f"I6: {account}"


def _wait_s_max(request: GenerateRequest) -> float:
    slo = request.slo
    return slo.deadline_s if slo.is_batch and slo.deadline_s is not None else slo.queue_s_max


def _key(request: GenerateRequest) -> ContractKey:
    return (request.tenant_id, request.model_id, request.slo.name)
