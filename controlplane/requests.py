"""Every request from its submission to its one terminal state: answers, moves, releases.

Requests submitted == completed + failed + cancelled + rejected + tracked here.
"""

from collections.abc import Callable
from dataclasses import replace

from controlplane import domain, protocol
from controlplane.admission import (
    DRAINING_RETRY_S,
    RETRY_S,
    RetryBook,
    late_by_s,
    late_text,
    refuse_worker,
    retry_key,
)
from controlplane.backfill import Backfill
from controlplane.calibration import TTFTCalibration
from controlplane.config import ControlPlaneConfig
from controlplane.decisions import DecisionBook
from controlplane.domain import Command, Demotion, Rejected
from controlplane.ejection import Ejector
from controlplane.evacuation import Evacuation
from controlplane.failover import Tracked
from controlplane.ledger import Account, Ledger, worst_case
from controlplane.moving import Mover
from controlplane.overload import NO_BATCH, NO_SURPLUS, SHARES_ONLY, Overload
from controlplane.placing import Placer
from controlplane.planner import Planner
from controlplane.prefixes import PrefixIndex
from controlplane.registry import Registry, Worker
from controlplane.replacing import not_started
from controlplane.router import Route

REFUSALS_FINAL = (
    "too_long",
    "unknown_model",
    "bad_token_ids",
)  # reasons that waiting does not mend
SWEEP_S = 1.0  # between two looks for outliers
NOT_OURS = (
    "contract_rate",
    "contract_budget",
    "contract_concurrency",
    "tenant_concurrency",
    "prompt_too_long",
    "draining",
    "cancelled",
)  # ends that count neither for nor against a contract's attainment
Answer = (
    protocol.Accepted
    | protocol.Rejected
    | protocol.HandoffReady
    | protocol.HandoffDone
    | protocol.HandoffFailed
)


class Requests:
    """Owner of the tracked requests; appends to `commands`."""

    def __init__(
        self,
        config: ControlPlaneConfig,
        registry: Registry,
        planner: Planner,
        backfill: Backfill,
        commands: list[Command],
    ) -> None:
        self._config = config
        self._registry = registry
        self._planner = planner
        self._commands = commands
        self._num_by_tenant: dict[str, int] = {}  # online requests, waiting ones included
        self.tracked: dict[str, Tracked] = {}
        self._placer = Placer(config, registry, planner, backfill, self.tracked, commands)
        self._room = self._placer.room
        self._book = RetryBook(config)
        self._ejector = Ejector(config)
        self.mover = Mover(
            config,
            registry,
            self._placer,
            self._ejector,
            self.tracked,
            commands,
            self._reject,
        )
        self.evacuation = Evacuation(
            config, registry, self._placer, self.mover, self.tracked, commands
        )
        self._swept_at_s = 0.0
        self.ledger = Ledger()
        self.overload = Overload()
        self.is_draining = False

    @property
    def prefixes(self) -> PrefixIndex:
        return self._placer.prefixes

    @property
    def decisions(self) -> DecisionBook:
        return self._placer.decisions

    @property
    def calibration(self) -> TTFTCalibration:
        return self._placer.calibration

    def set_chance(self, uniform: Callable[[], float]) -> None:
        """Chance for the event in hand."""
        self._placer.uniform = uniform

    def start_waiting(self, now_s: float) -> None:
        """Start whatever can start now."""
        self._placer.start_waiting(now_s)

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {
            "requests": (len(self.tracked), self._config.requests_max),
            "promises": (len(self._book), self._config.promises_max),
            "quarantined": (len(self.mover.quarantine), self._config.quarantined_max),
            **self._placer.sizes(),
        }

    def batch_lines_waiting(self, model_id: str) -> int:
        return self._room.num_batch_lines(model_id)

    def batch_models_waiting(self) -> frozenset[str]:
        return self._room.batch_models()

    def waiting_by_class(self) -> tuple[tuple[str, int], ...]:
        return self._room.counts()

    def submit(self, request: domain.GenerateRequest, now_s: float) -> None:
        assert request.request_id not in self.tracked, f"{request.request_id} submitted twice"
        tracked = Tracked(request, "queued", now_s)
        account = self.ledger.account(request)
        tracked.has_share = account is not None
        found: Route | None = None
        refused = self.mover.quarantine.refuse(request, now_s) or self._refuse(request, now_s)
        if refused is None:
            found = self._placer.route(tracked, now_s)
            refused = self._admit(tracked, found, account, now_s)
        if refused is not None:
            self._placer.decide_rejected(tracked, refused, found, now_s)
            self._judge(tracked, False, refused.code, now_s)
            return
        self.tracked[request.request_id] = tracked
        if not request.slo.is_batch:
            assert found is not None, request.request_id
            self._placer.observe(request, found, now_s)
            count = self._num_by_tenant.get(request.tenant_id, 0)
            self._num_by_tenant[request.tenant_id] = count + 1
        if account is not None:
            self.ledger.reserve(account, request, tracked.tier, now_s)
        is_held = request.slo.is_batch and self._room.is_batch_held
        is_next = not is_held and not self._room.has_before(request.slo, tracked.tier)
        self._room.enter(request, tracked.tier, now_s)
        if is_next and found is not None and found.placement is not None and not tracked.demotion:
            self._placer.start_now(tracked, found, now_s)
            return
        self._placer.start_waiting(now_s)
        if request.request_id in self._room:
            self._placer.decide_queued(tracked, now_s)

    def _admit(
        self, tracked: Tracked, found: Route, account: Account | None, now_s: float
    ) -> Rejected | None:
        """Its contract, then the prediction: refused, or `tracked` says why it is surplus."""
        request = tracked.request
        if account is not None:
            tokens, usd = worst_case(account.contract, request)
            if refused := account.refuse_hard(tokens, usd):
                is_moving = refused.code == "contract_concurrency"
                return replace(refused, retry_after_s=RETRY_S) if is_moving else refused
            over = None if request.slo.is_batch else account.over_rate(tokens, now_s)
            if over is not None and account.contract.over_limit == "reject":
                return over
            if over is not None:
                tracked.demotion = Demotion(over.code, over.message)
            elif not request.slo.is_batch and self._is_contended(request, found):
                tracked.demotion = account.ahead_of_pace(now_s)
        if request.weight <= 0.0 and tracked.demotion is None and not request.slo.is_batch:
            text = f"{request.tenant_id} has weight 0: it is served in what others leave"
            tracked.demotion = Demotion("no_weight", text)
        is_judged = tracked.demotion is None and not request.slo.is_batch
        if is_judged and (refused := self._judge_late(tracked, found, account, now_s)):
            return refused
        refused = self._room.refuse_queue(request.slo, tracked.tier)
        if refused is not None and tracked.tier == "surplus":
            return self._displace(request, refused, now_s)
        return refused

    def _displace(
        self, request: domain.GenerateRequest, refused: Rejected, now_s: float
    ) -> Rejected | None:
        """Room in a full surplus queue at the cost of the tenant that has most of it."""
        other = self._room.in_the_way(request)
        if other is None:
            return refused
        self._room.remove(other)
        text = f"{refused.message}: it gave its place to a tenant with fewer"
        self._reject(self.tracked[other.request_id], replace(refused, message=text), now_s)
        return None

    def _is_contended(self, request: domain.GenerateRequest, found: Route) -> bool:
        """Does somebody wait, or would this one? Shares are lent as long as nobody does."""
        is_waiting = len(self._room) > 0 or found.placement is None
        return is_waiting or found.queue_s > request.slo.itl_s_p99

    def _judge_late(
        self, tracked: Tracked, found: Route, account: Account | None, now_s: float
    ) -> Rejected | None:
        """The calibrated prediction against the class's targets, before anything is spent. Room
        that was promised to earlier refusals is not there for others."""
        request, slo = tracked.request, tracked.request.slo
        outlook = self._placer.outlook(found)
        if outlook is None:
            return None  # nobody can take it now: it waits, and is late when it is
        key = retry_key(request)
        waited_s = max(0.0, now_s - request.arrived_at_s)
        if self._book.redeem(key, now_s):
            promised_s, margin = 0.0, 0.0
        else:
            promised_s = self._book.ahead_s(outlook.ttft_s, outlook.num_workers, now_s)
            margin = self._config.late_margin
        late_s = late_by_s(outlook, slo, waited_s, margin) + promised_s
        if late_s <= 0.0 and outlook.itl_s <= slo.itl_s_p99:
            return None
        text = late_text(outlook, slo, waited_s, promised_s)
        if account is None or account.contract.when_late == "surplus":
            tracked.demotion = Demotion("late", text)
            return None
        wait_s = max(late_s, self._config.retry_s_min)
        retry_s = self._book.promise(key, wait_s, outlook.work_s, outlook.num_workers, now_s)
        return Rejected("late", text, retry_s)

    def _judge(self, tracked: Tracked, is_met: bool, code: str, now_s: float) -> None:
        """Count a guaranteed request for its contract's attainment; the tenant's own limits, its
        own cancellations and a shutdown say nothing about us."""
        account = self.ledger.account(tracked.request)
        is_ours = code not in NOT_OURS
        if account is not None and is_ours and tracked.tier == "guaranteed":
            account.objective.observe(is_met, now_s)

    def _refuse(self, request: domain.GenerateRequest, now_s: float) -> Rejected | None:
        if self.is_draining:
            return Rejected("draining", "the console is shutting down", DRAINING_RETRY_S)
        running = self._num_by_tenant.get(request.tenant_id, 0)
        if not request.slo.is_batch and running >= request.tenant_concurrency_max:
            return Rejected(
                "tenant_concurrency",
                f"{running} requests of {request.tenant_id} are running or waiting, at most"
                f" {request.tenant_concurrency_max}",
                RETRY_S,
            )
        if len(self.tracked) >= self._config.requests_max:
            return Rejected(
                "queue_full",
                f"{len(self.tracked)} requests are running or waiting, at most"
                f" {self._config.requests_max}",
                RETRY_S,
            )
        if refused := self._refuse_overload(request, now_s):
            return refused
        pool = self._placer.pools.pool(request.model_id)
        return refuse_worker(request, pool, len(self._registry.workers))

    def _refuse_overload(self, request: domain.GenerateRequest, now_s: float) -> Rejected | None:
        """Equal shares of what runs and waits, over the tenants that have some of it."""
        if self.overload.rung < SHARES_ONLY:
            return None
        held = self._num_by_tenant.get(request.tenant_id, 0)
        tenants = len(self._num_by_tenant) + (held == 0)
        fair_share = (sum(self._num_by_tenant.values()) + 1) / tenants
        oldest_s = self._room.oldest_s(now_s, self._is_served)
        chance = self._placer.uniform()
        return self.overload.refuse(request, held, fair_share, oldest_s, chance)

    def _is_served(self, model_id: str) -> bool:
        """Some worker that is here could take it; waiting for one that is not is no overload."""
        pool = self._placer.pools.pool(model_id)
        return pool is not None and len(pool.decoders) + len(pool.prefillers) > 0

    def watch_overload(self, now_s: float) -> None:
        """At each tick: the plane's own signals, and what the rung holds back."""
        if self.overload.is_due(now_s):
            blocks = [(w.blocks_online, w.hello.num_blocks) for w in self._registry.workers.values()
                      if w.status == "live"]  # fmt: skip
            total = sum(num_blocks for _, num_blocks in blocks)
            signals = {
                "queue": self._room.wait_share(now_s, self._is_served),
                "kv": sum(held for held, _ in blocks) / total if total else 0.0,
            }
            self.overload.observe(signals, now_s)
        self._room.is_batch_held = self.overload.rung >= NO_BATCH
        self._room.is_surplus_held = self.overload.rung >= NO_SURPLUS

    def first_token(self, event: domain.FirstToken, now_s: float) -> None:
        tracked = self.tracked.get(event.request_id)
        if tracked is None:
            return
        if not tracked.has_first_token:
            tracked.ttft_s = event.ttft_s
            self.decisions.first_token(tracked.request_id, tracked.epoch, event.ttft_s)
            self._placer.observe_ttft(tracked, now_s)
        tracked.has_first_token = True
        self.mover.goes_on(tracked)
        for worker_id in tracked.workers():
            self._ejector.succeeded(self._registry.workers[worker_id])
        if tracked.phase == "prefill":
            tracked.enter_phase("transfer" if tracked.is_split_open else "decode", now_s)

    def progressed(self, event: domain.Progressed) -> None:
        tracked = self.tracked.get(event.request_id)
        if tracked is None or tracked.epoch != event.epoch:
            return
        self.mover.goes_on(tracked)

    def finished(self, event: domain.Finished, now_s: float) -> None:
        """Cancelling is free where nothing runs any more, and a stop string ends a sequence that
        its worker would go on with."""
        tracked = self.tracked.get(event.request_id)
        if tracked is None:
            return
        if event.status == "failed" and tracked.workers():
            self._ejector.failed(self._registry.workers[tracked.workers()[-1]])
        self.mover.leave(tracked, now_s)
        if event.request_id in self._room:
            self._room.remove(tracked.request)
        slo, ttft_s = tracked.request.slo, tracked.ttft_s
        is_in_time = ttft_s is not None and ttft_s <= slo.ttft_s_p99
        is_met = is_in_time and event.itl_s_p99 <= slo.itl_s_p99 and event.status == "completed"
        self.decisions.end(tracked.request_id, event.status, is_met, event)
        self._judge(tracked, is_met, event.status, now_s)
        if event.status == "completed" and not slo.is_batch:
            self._planner.observe_end(tracked.request, event.output_tokens)
        output_tokens = event.output_tokens if event.status != "failed" else None
        self._forget(tracked, output_tokens, now_s)

    def _reject(self, tracked: Tracked, outcome: Rejected, now_s: float) -> None:
        self._placer.decide_rejected(tracked, outcome, None, now_s)
        self._judge(tracked, False, outcome.code, now_s)
        self._forget(tracked, None, now_s)

    def _forget(self, tracked: Tracked, output_tokens: int | None, now_s: float) -> None:
        """None: given up, and not billed. A request that no worker had is not billed either."""
        del self.tracked[tracked.request_id]
        is_billed = output_tokens is not None and tracked.epoch > 0
        self.ledger.settle(tracked.request_id, output_tokens or 0, is_billed, now_s)
        self._room.settle(tracked.request_id, output_tokens)
        if tracked.request.slo.is_batch:
            return
        tenant_id = tracked.request.tenant_id
        self._num_by_tenant[tenant_id] -= 1
        if not self._num_by_tenant[tenant_id]:
            del self._num_by_tenant[tenant_id]

    def answered(self, worker: Worker, message: Answer, now_s: float) -> None:
        """A worker's word about a request; it counts when the worker holds the current epoch."""
        tracked = self.tracked.get(message.request_id)
        if (
            tracked is None
            or tracked.epoch != message.epoch
            or worker.worker_id not in tracked.workers()
        ):
            return
        match message:
            case protocol.Accepted():
                worker.accepted(tracked.request_id)
            case protocol.Rejected():
                self._on_refused(worker, tracked, message, now_s)
            case protocol.HandoffReady():
                tracked.handoff_ready_at_s = now_s
                if tracked.phase == "prefill":
                    tracked.enter_phase("transfer", now_s)
            case protocol.HandoffDone():
                self._on_handoff_done(worker, tracked, message, now_s)
            case protocol.HandoffFailed():
                why = f"handoff to {worker.worker_id} failed: {message.reason}"
                if tracked.is_split_open:
                    source = self._registry.workers.get(tracked.workers()[0])
                    if source is not None:
                        self._ejector.failed(source)
                    if message.reason == "unreachable" and not tracked.has_first_token:
                        tracked.num_strikes += 1  # it may have died of it; the news is on its way
                    tracked.recompute_s = now_s - tracked.phase_at_s
                    self.mover.move(tracked, "", why, now_s)

    def _expire_handoffs(self, now_s: float) -> None:
        """KV that is reserved for a transfer is not reserved for ever: both sides give it back when
        the decode worker, which gives up first, has not said how the transfer went."""
        for tracked in list(self.tracked.values()):
            if tracked.is_split_open and now_s >= tracked.handoff_due_at_s:
                waited_s = now_s - tracked.placed_at_s
                tracked.recompute_s = now_s - tracked.phase_at_s
                self.mover.move(tracked, "", f"its KV was not there after {waited_s:.1f} s", now_s)

    def _on_refused(
        self, worker: Worker, tracked: Tracked, message: protocol.Rejected, now_s: float
    ) -> None:
        """The worker is the authority on its KV: ask the next candidate."""
        is_final = message.reason in REFUSALS_FINAL
        if message.reason == "draining" and worker.status == "live":
            worker.status = "draining"  # ordered by an earlier console: it will not change
            worker.is_drain_ordered = True
            self._placer.pools.refile(worker)
        tracked.refused_by(worker.worker_id, is_final, now_s, self._config)
        pool = self._placer.pools.pool(tracked.request.model_id)
        serving = list(pool.max_model_len) if pool else []
        if all(tracked.avoid_until_s.get(name) == float("inf") for name in serving):
            code = "prompt_too_long" if message.reason == "too_long" else "model_not_served"
            text = f"every worker refused it, {worker.worker_id} last: {message.reason}"
            self.mover.leave(tracked, now_s, worker.worker_id)
            tracked.enter_phase("queued", now_s)
            self._reject(tracked, Rejected(code, text, None), now_s)
            return
        why = f"{worker.worker_id} refused it: {message.reason}"
        self.mover.refused(tracked, worker, why, now_s)

    def _on_handoff_done(
        self, worker: Worker, tracked: Tracked, message: protocol.HandoffDone, now_s: float
    ) -> None:
        placement = tracked.placement
        assert placement is not None
        if not tracked.is_split_open or worker.worker_id != placement.decode_worker:
            return
        if prefill := self._registry.workers.get(placement.prefill_worker):
            prefill.release(tracked.request_id)
            self._placer.pools.refile(prefill)
        pair = (placement.prefill_worker, placement.decode_worker)
        if tracked.handoff_ready_at_s is not None:
            # Not more than passed here. Bytes are those that the prediction counts with.
            seconds = min(message.seconds, now_s - tracked.handoff_ready_at_s)
            per_token = worker.model(tracked.request.model_id).kv_bytes_per_token
            num_bytes = max(1, per_token * tracked.request.prompt_tokens)
            self._placer.rates.observe(pair, num_bytes, seconds, now_s)
        self._placer.prefixes.insert(placement.decode_worker, tracked.request.block_hashes)
        tracked.enter_phase("decode", now_s)
        self.decisions.moved(tracked.request_id, tracked.epoch, message.bytes, message.seconds)
        self._commands.append(
            domain.HandoffCounted(tracked.request_id, message.bytes, message.seconds, 0)
        )

    def reattach(self, worker: Worker, now_s: float) -> None:
        """Go on with the sequences that it still holds and that still count, drop the others."""
        going_on = set()
        for live in worker.hello.sequences:
            tracked = self.tracked.get(live.request_id)
            is_current = tracked is not None and tracked.epoch == live.epoch
            if tracked is not None and is_current and tracked.resumable_on == worker.worker_id:
                self._room.take_moving(tracked.request)
                tracked.resumable_on = tracked.lost_worker = tracked.move_reason = ""
                tracked.is_lost = False
                tracked.enter_phase("decode", now_s)
                self._placer.reserve(worker, tracked, "full", 0, is_reported=True)
            if is_current and live.request_id in worker.reservations:
                going_on.add(live.request_id)
                self._commands.append(
                    domain.Reattach(worker.worker_id, live.request_id, live.epoch)
                )
            else:
                self._commands.append(
                    domain.CancelSequence(worker.worker_id, live.request_id, live.epoch)
                )
        for request_id in [key for key in worker.reservations if key not in going_on]:
            tracked = self.tracked[request_id]
            self.mover.move(
                tracked, worker.worker_id, f"{worker.worker_id} came back without it", now_s
            )

    def joined(self, worker: Worker, now_s: float) -> None:
        """A member, or one that is back, with what it still holds."""
        self._placer.joined(worker)
        self.reattach(worker, now_s)

    def models_changed(self, worker: Worker) -> None:
        """It serves other models, with empty KV."""
        self._placer.forgotten(worker)
        self._placer.joined(worker)

    def refile(self, worker: Worker) -> None:
        """Its status, role or load has changed."""
        self._placer.pools.refile(worker)

    def forgotten(self, worker: Worker) -> None:
        self._placer.forgotten(worker)
        self._ejector.forget(worker.worker_id)

    def balance(self, now_s: float) -> None:
        """At each tick: who gets no work, and which requests start sooner elsewhere."""
        workers = self._registry.workers
        if now_s - self._swept_at_s >= SWEEP_S:
            self._swept_at_s = now_s
            models = {model.model_id for item in workers.values() for model in item.hello.models}
            for model_id in sorted(models):
                pool = [item for item in workers.values() if item.has_model(model_id)]
                self._ejector.sweep(pool, now_s)
            self._expire_handoffs(now_s)
        for worker in workers.values():
            is_out = not worker.is_accepting(now_s, self._config) or worker.is_ejected(now_s)
            if is_out != worker.is_out:
                worker.is_out = is_out
                self.refile(worker)
        for waiting in not_started(workers.values(), self.tracked, self._config, now_s):
            found = self._placer.sooner(waiting, now_s)
            if found is None:
                continue
            tracked = waiting.tracked
            self.mover.leave(tracked, now_s)
            tracked.num_replaced += 1
            tracked.cause = "replaced"
            there = "is silent" if waiting.is_silent else f"in {waiting.wait_s * 1000.0:.0f} ms"
            tracked.move_reason = (
                f"{found.candidates[0].worker_id} starts it in {found.queue_s * 1000.0:.0f} ms,"
                f" {waiting.worker_id} {there}"
            )
            tracked.enter_phase("queued", now_s)
            self._room.enter_moving(tracked.request, now_s, now_s)
            self._placer.start_now(tracked, found, now_s)

    def expire(self, now_s: float) -> None:
        """End requests that have waited for longer than their class allows."""
        for request in self._room.overdue(now_s):
            waited_s = self._room.waited_s(request.request_id, now_s)
            self._room.remove(request)
            text = f"waited {waited_s:.1f} s for a worker, the most its class allows"
            outcome = Rejected("queue_timeout", text, RETRY_S)
            self._reject(self.tracked[request.request_id], outcome, now_s)

    def check_integrity(self) -> None:
        """Conservation laws that hold between any two events."""
        self._placer.pools.check_integrity(self._registry.workers)
        for worker in self._registry.workers.values():
            worker.check_integrity()
            assert worker.status != "lost" or not worker.reservations, worker.worker_id
            for request_id in worker.reservations:
                assert worker.worker_id in self.tracked[request_id].workers(), request_id
        for tracked in self.tracked.values():
            is_waiting = tracked.request_id in self._room
            assert is_waiting == (tracked.phase in ("queued", "orphaned")), tracked
            for worker_id in tracked.workers():
                held = self._registry.workers[worker_id].reservations
                assert tracked.request_id in held, (tracked.request_id, worker_id)
        self.ledger.check_integrity(self.tracked)
        self._placer.recoveries.check_integrity(self.tracked)
        self.decisions.check_integrity(self.tracked)
        online = [item for item in self.tracked.values() if not item.request.slo.is_batch]
        assert sum(self._num_by_tenant.values()) == len(online), self._num_by_tenant
