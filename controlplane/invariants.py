"""The laws of the plane, checked from outside: by the simulator after every event, by tests, and
cheap enough for production.

`Watch` sees events and the commands that answered them, keeps its own small books and never asks
the plane; `scan` reads the plane's state and compares it with those books. A broken law is an
AssertionError whose message begins with its number in reliability.md section 10. Laws about blocks,
salts and step plans (I7, I8, I10) need the workers and live in controlplane/sim/laws.py; I2, I4,
I15 and I17 are about the database and are tested where it is.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane import domain, protocol
from controlplane.domain import Command, Contract, ContractKey, Event, GenerateRequest
from controlplane.ledger import AccountView, price_usd
from controlplane.plane import ControlPlane

TICK_S = 0.1
SLACK_S = 2.0 * TICK_S  # the plane notices a time limit at its next tick
MINUTE_S = 60.0
BILLED = ("completed", "cancelled")


@dataclass(slots=True)
class _Life:
    """One request as the outside saw it."""

    request: GenerateRequest
    waits_since_s: float | None
    epoch: int = 0
    stages: list[str] = field(default_factory=list)  # dispatched in this epoch
    key: ContractKey | None = None
    tokens: int = 0  # that count for the contract's rate
    is_guaranteed: bool = False


@dataclass(slots=True)
class _Book:
    """One contract, counted again."""

    contract: Contract
    admitted: deque[tuple[float, str]] = field(default_factory=deque)  # guaranteed, last minute
    tokens: dict[str, int] = field(default_factory=dict)  # of those
    running: set[str] = field(default_factory=set)
    billed_tokens: int = 0
    billed_usd: float = 0.0


class Watch:
    """Give it every event with its commands, in order."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret.decode(errors="replace")
        self._lives: dict[str, _Life] = {}
        self._ended: dict[str, str] = {}
        self._no_more: set[str] = set()  # workers that were told to drain, or are gone
        self._worker_epochs: dict[str, int] = {}
        self._books: dict[ContractKey, _Book] = {}
        self._last_s = 0.0

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
                    self._books.setdefault(contract.key, _Book(contract)).contract = contract
        for command in commands:
            self._command(command, now_s)
        if isinstance(event, domain.Submit):
            name = event.request.request_id
            assert name in self._ended or self._lives[name].stages or self._is_waiting(name), (
                f"I1: {name} got no answer"
            )

    def _is_waiting(self, name: str) -> bool:
        return self._lives[name].waits_since_s is not None

    def _command(self, command: Command, now_s: float) -> None:
        match command:
            case domain.Dispatch():
                self._dispatched(command, now_s)
            case domain.Decided(request_id, outcome, record):
                assert self._secret not in record.reason, f"I20: a secret in {request_id}'s record"
                self._decided(request_id, outcome, now_s)
            case domain.Greet(_, protocol.Welcome(worker_id, epoch)):
                before = self._worker_epochs.get(worker_id, 0)
                assert epoch == before + 1, f"I18: {worker_id} went from epoch {before} to {epoch}"
                self._worker_epochs[worker_id] = epoch
            case domain.SendDrain(worker_id):
                self._no_more.add(worker_id)

    def _dispatched(self, command: domain.Dispatch, now_s: float) -> None:
        name, worker_id = command.request_id, command.worker_id
        assert name in self._lives, f"I1: {name} was dispatched after its end {self._ended}"
        assert worker_id in self._worker_epochs, f"I9: {worker_id} never joined"
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
        if life.waits_since_s is not None:
            waited_s, limit_s = now_s - life.waits_since_s, _wait_s_max(life.request)
            assert waited_s <= limit_s + SLACK_S, f"I12: {name} started after {waited_s:.1f} s"
        life.waits_since_s = None

    def _decided(self, name: str, outcome: object, now_s: float) -> None:
        assert name in self._lives, f"I1: {name} was decided after its end {self._ended.get(name)}"
        life = self._lives[name]
        match outcome:
            case domain.Rejected(code):
                self._end(name, code)
                self._settle(name, life, 0, is_billed=False)
            case domain.Placed(_, _, demotion) | domain.Queued(_, _, demotion):
                if life.key is None:
                    self._admitted(name, life, demotion, now_s)
                if isinstance(outcome, domain.Queued):
                    assert outcome.position >= 1 and outcome.predicted_start_s >= 0.0, outcome

    def _admitted(
        self, name: str, life: _Life, demotion: domain.Demotion | None, now_s: float
    ) -> None:
        """Its first decision: the contract's limits must have had room for it."""
        request = life.request
        life.key = (request.tenant_id, request.model_id, request.slo.name)
        book = self._books.get(life.key)
        if book is None:
            return
        contract = book.contract
        life.tokens = request.prompt_tokens + request.output_tokens_max
        book.running.add(name)
        if contract.budget_tokens is not None:
            held = sum(self._lives[other].tokens for other in book.running)
            assert book.billed_tokens + held <= contract.budget_tokens, (
                f"I5: {contract.name} has used {book.billed_tokens} and holds {held} tokens"
            )
        if request.slo.is_batch:
            return
        assert len(book.running) <= contract.concurrency_max, (
            f"I5: {len(book.running)} requests of {contract.name} run"
        )
        if demotion is not None:
            return
        life.is_guaranteed = True
        book.admitted.append((now_s, name))
        book.tokens[name] = life.tokens
        while book.admitted[0][0] <= now_s - MINUTE_S:
            del book.tokens[book.admitted.popleft()[1]]
        assert len(book.admitted) <= contract.requests_per_min, f"I5: requests of {contract.name}"
        total = sum(book.tokens.values())
        assert total <= contract.tokens_per_min, f"I5: {total} tokens a minute of {contract.name}"

    def _finished(self, name: str, status: str, output_tokens: int) -> None:
        life = self._lives.get(name)
        if life is None:
            return
        self._end(name, status)
        is_billed = status in BILLED and life.epoch > 0
        self._settle(name, life, output_tokens, is_billed)

    def _settle(self, name: str, life: _Life, output_tokens: int, is_billed: bool) -> None:
        book = self._books.get(life.key) if life.key else None
        if book is None:
            return
        book.running.discard(name)
        prompt = life.request.prompt_tokens
        tokens = prompt + output_tokens if is_billed else 0
        book.billed_tokens += tokens
        if is_billed:
            book.billed_usd += price_usd(book.contract, prompt, output_tokens)
        if name in book.tokens:
            book.tokens[name] = tokens

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
        held = sum(worker.requests for worker in view.workers)
        running = [item for item in tracked.values() if item.phase not in ("queued", "orphaned")]
        assert len(running) <= held <= 2 * len(running), f"I6: {held} held, {len(running)} run"
        for account in plane.accounts(now_s):
            self._scan_account(account.contract.key, account)

    def _scan_account(self, key: ContractKey, account: AccountView) -> None:
        book = self._books[key]
        spent, usd = account.spent_tokens, account.spent_usd
        running = account.num_running
        assert spent == book.billed_tokens, f"I6: billed {spent}, delivered {book.billed_tokens}"
        assert abs(usd - book.billed_usd) < 1e-6, f"I6: billed ${usd}, delivered {book.billed_usd}"
        assert running == len(book.running), f"I6: {running} held, {len(book.running)} run"

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
