"""The control plane: one object that holds all serving state and turns events into commands.

`handle` is the only way in. It is deterministic: the same events at the same times with the same
chance give the same commands. Requests in == completed + failed + cancelled + rejected + tracked.
"""

from collections import deque
from collections.abc import Callable

from controlplane import decisions, domain, protocol, views
from controlplane.admission import (
    DRAINING_RETRY_S,
    RETRY_S,
    WaitingRoom,
    refuse_worker,
)
from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates
from controlplane.domain import Command, Decided, Rejected
from controlplane.failover import Tracked
from controlplane.planner import Planner
from controlplane.prefixes import PrefixIndex
from controlplane.registry import Registry, Reservation, Worker
from controlplane.router import Route, route
from controlplane.scorers import Ask, blocks_needed

REFUSALS_FINAL = ("too_long", "unknown_model")  # reasons that waiting does not mend


class ControlPlane:
    """Owner of workers, requests and queues. Not thread-safe; called from one loop."""

    def __init__(self, config: ControlPlaneConfig, secret: bytes) -> None:
        assert len(secret) >= 16, f"secret of {len(secret)} bytes, at least 16"
        self._config = config
        self._registry = Registry(config, secret)
        self._requests: dict[str, Tracked] = {}
        self._num_by_tenant: dict[str, int] = {}  # online requests, waiting ones included
        self._room = WaitingRoom(config)
        self._prefixes = PrefixIndex(config.prefix_blocks_max, config.prefix_holders_max)
        self._rates = TransferRates(config)
        self._planner = Planner(config)
        self._plans: deque[domain.PlanChanged] = deque(maxlen=config.plans_max)
        self._is_draining = False
        self._ticked_at_s: float | None = None
        self._passed_at_s = float("-inf")  # last pass over waiting requests that found no room
        self._commands: list[Command] = []

    def handle(
        self, event: domain.Event, now_s: float, uniform: Callable[[], float]
    ) -> list[Command]:
        """What the driver shall do about `event`, in order. `uniform` draws from [0, 1)."""
        assert not self._commands, "handle was entered twice"
        match event:
            case domain.WorkerHello():
                self._on_hello(event, now_s, uniform)
            case domain.WorkerMessage():
                self._on_message(event, now_s)
            case domain.WorkerClosed():
                if worker := self._registry.current(event.worker_id, event.epoch):
                    self._lose(worker, f"{worker.worker_id} closed its connection", now_s)
            case domain.Submit():
                self._on_submit(event.request, now_s)
            case domain.FirstToken():
                self._on_first_token(event, now_s)
            case domain.Finished():
                self._on_finished(event)
            case domain.Stalled():
                self._on_stalled(event, now_s)
            case domain.RoleOrdered():
                self._on_role(event, now_s)
            case domain.DrainOrdered():
                self._on_drain(event)
            case domain.ServerDraining():
                self._is_draining = True
            case domain.Tick():
                self._on_tick(now_s)
        self._start_waiting(now_s)
        commands, self._commands = self._commands, []
        return commands

    def view(self, now_s: float) -> domain.ClusterView:
        """What live pages show."""
        return domain.ClusterView(
            workers=views.workers(self._registry.workers.values(), now_s, self._config),
            requests=views.requests(self._requests.values(), now_s, self._config.requests_view_max),
            queued_by_class=self._room.counts(),
            plans=tuple(self._plans),
        )

    # --- workers ---------------------------------------------------------------------------------

    def _on_hello(
        self, event: domain.WorkerHello, now_s: float, uniform: Callable[[], float]
    ) -> None:
        hello = event.hello
        before = self._registry.workers.get(hello.resume.worker_id) if hello.resume else None
        was_live = before is not None and before.status != "lost"
        worker = self._registry.join(event, now_s, uniform)
        if isinstance(worker, protocol.Refused):
            self._commands.append(domain.Greet(event.connection_id, worker))
            return
        if was_live:  # the driver still maps the id to the older connection here
            self._commands.append(
                domain.CloseWorker(worker.worker_id, "joined again on a new connection")
            )
        self._commands.append(domain.Greet(event.connection_id, self._registry.welcome(worker)))
        if worker.role != hello.role:
            self._commands.append(domain.SendRole(worker.worker_id, worker.role))
        if worker.is_drain_ordered:
            self._commands.append(domain.SendDrain(worker.worker_id))
        self._reattach(worker, now_s)

    def _reattach(self, worker: Worker, now_s: float) -> None:
        """Go on with the sequences that it still holds and that still count, drop the others."""
        going_on = set()
        for live in worker.hello.sequences:
            tracked = self._requests.get(live.request_id)
            is_current = tracked is not None and tracked.epoch == live.epoch
            if tracked is not None and is_current and tracked.resumable_on == worker.worker_id:
                self._room.take(tracked.request)
                tracked.resumable_on = tracked.lost_worker = tracked.move_reason = ""
                tracked.enter_phase("decode", now_s)
                self._reserve(worker, tracked, "full", 0, is_reported=True)
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
            tracked = self._requests[request_id]
            self._move(tracked, worker.worker_id, f"{worker.worker_id} came back without it", now_s)

    def _on_message(self, event: domain.WorkerMessage, now_s: float) -> None:
        worker = self._registry.current(event.worker_id, event.epoch)
        if worker is None:  # fenced, or an older incarnation: it changes nothing
            return
        worker.heard_at_s = now_s
        match event.message:
            case protocol.WorkerLoad() as load:
                self._on_load(worker, load, 0.0, now_s)
            case protocol.Heartbeat() as beat:
                self._on_load(worker, beat.load, beat.busy_s, now_s)
            case protocol.Drained():
                if worker.status == "draining":
                    worker.status = "drained"
            case protocol.Goodbye() as goodbye:
                self._lose(worker, f"{worker.worker_id} left: {goodbye.reason}", now_s)
                del self._registry.workers[worker.worker_id]
            case message:
                tracked = self._requests.get(message.request_id)
                if (
                    tracked is not None
                    and tracked.epoch == message.epoch
                    and worker.worker_id in tracked.workers()
                ):
                    self._on_work(worker, tracked, message, now_s)

    def _on_load(
        self, worker: Worker, load: protocol.WorkerLoad, busy_s: float, now_s: float
    ) -> None:
        worker.report(load)
        worker.busy_s = busy_s
        if worker.role != "prefill":
            self._planner.observe_decode(now_s, load.online_s)

    def _on_work(
        self,
        worker: Worker,
        tracked: Tracked,
        message: protocol.Accepted
        | protocol.Rejected
        | protocol.HandoffReady
        | protocol.HandoffDone
        | protocol.HandoffFailed,
        now_s: float,
    ) -> None:
        """An answer about the current epoch of a request from a worker that holds it."""
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
                    tracked.recompute_s = now_s - tracked.phase_at_s
                    self._move(tracked, "", why, now_s)

    def _on_refused(
        self, worker: Worker, tracked: Tracked, message: protocol.Rejected, now_s: float
    ) -> None:
        """The worker is the authority on its KV: ask the next candidate."""
        is_final = message.reason in REFUSALS_FINAL
        self._leave(tracked, worker.worker_id)
        tracked.refused_by(worker.worker_id, is_final, now_s, self._config)
        tracked.move_reason = f"{worker.worker_id} refused it: {message.reason}"
        tracked.enter_phase("queued", now_s)
        serving = [
            other.worker_id
            for other in self._registry.workers.values()
            if other.has_model(tracked.request.model_id)
        ]
        if all(tracked.avoid_until_s.get(name) == float("inf") for name in serving):
            code = "prompt_too_long" if message.reason == "too_long" else "model_not_served"
            text = f"every worker refused it, {worker.worker_id} last: {message.reason}"
            self._reject(tracked, Rejected(code, text, None), now_s)
            return
        self._room.enter_moving(tracked.request, now_s)

    def _on_handoff_done(
        self, worker: Worker, tracked: Tracked, message: protocol.HandoffDone, now_s: float
    ) -> None:
        placement = tracked.placement
        assert placement is not None
        if not tracked.is_split_open or worker.worker_id != placement.decode_worker:
            return
        if prefill := self._registry.workers.get(placement.prefill_worker):
            prefill.release(tracked.request_id)
        pair = (placement.prefill_worker, placement.decode_worker)
        if tracked.handoff_ready_at_s is not None:
            # The message may count the wait for the prefill as well.
            seconds = min(message.seconds, now_s - tracked.handoff_ready_at_s)
            self._rates.observe(pair, message.bytes, seconds)
        self._prefixes.insert(placement.decode_worker, tracked.request.block_hashes)
        tracked.enter_phase("decode", now_s)
        self._commands.append(
            domain.HandoffCounted(tracked.request_id, message.bytes, message.seconds, 0)
        )

    def _on_role(self, event: domain.RoleOrdered, now_s: float) -> None:
        worker = self._registry.workers.get(event.worker_id)
        if worker is None or worker.role == event.role:
            return
        if event.role == "prefill" and worker.hello.handoff_address is None:
            return  # peers could not fetch its KV
        worker.held_until_s = now_s + self._config.operator_hold_s
        self._change_role(worker, event.role, event.by, f"ordered by {event.by}", now_s)

    def _change_role(
        self, worker: Worker, role: protocol.Role, by: str, reason: str, now_s: float
    ) -> None:
        """An admission mask changes at once; requests in hand go on where they are."""
        changed = domain.PlanChanged(worker.worker_id, worker.role, role, by, reason)
        worker.role, worker.role_since_s = role, now_s
        self._plans.appendleft(changed)
        if worker.status != "lost":
            self._commands.append(domain.SendRole(worker.worker_id, role))
        self._commands.append(changed)

    def _on_drain(self, event: domain.DrainOrdered) -> None:
        worker = self._registry.workers.get(event.worker_id)
        if worker is None or worker.status not in ("live", "suspect"):
            return
        worker.is_drain_ordered = True
        worker.status = "draining"
        self._commands.append(domain.SendDrain(worker.worker_id))

    def _lose(self, worker: Worker, why: str, now_s: float) -> None:
        """From here on nothing that this incarnation says counts."""
        worker.status = "lost"
        held = sorted(
            (self._requests[request_id] for request_id in worker.reservations),
            key=lambda item: (item.request.slo.rank, item.request.arrived_at_s, item.request_id),
        )
        for tracked in held:
            self._move(tracked, worker.worker_id, why, now_s)
        worker.load = None

    # --- requests --------------------------------------------------------------------------------

    def _on_submit(self, request: domain.GenerateRequest, now_s: float) -> None:
        assert request.request_id not in self._requests, f"{request.request_id} submitted twice"
        tracked = Tracked(request, "queued", now_s)
        if refused := self._refuse(request):
            self._decide_rejected(tracked, refused, now_s)
            return
        self._requests[request.request_id] = tracked
        if not request.slo.is_batch:
            count = self._num_by_tenant.get(request.tenant_id, 0)
            self._num_by_tenant[request.tenant_id] = count + 1
        self._room.enter(request, now_s)
        self._start_waiting(now_s)
        if request.request_id in self._room:
            self._decide_queued(tracked, now_s)

    def _refuse(self, request: domain.GenerateRequest) -> Rejected | None:
        if self._is_draining:
            return Rejected("draining", "the console is shutting down", DRAINING_RETRY_S)
        running = self._num_by_tenant.get(request.tenant_id, 0)
        if not request.slo.is_batch and running >= request.tenant_concurrency_max:
            return Rejected(
                "tenant_concurrency",
                f"{running} requests of {request.tenant_id} are running or waiting, at most"
                f" {request.tenant_concurrency_max}",
                RETRY_S,
            )
        if len(self._requests) >= self._config.requests_max:
            return Rejected(
                "queue_full",
                f"{len(self._requests)} requests are running or waiting, at most"
                f" {self._config.requests_max}",
                RETRY_S,
            )
        return refuse_worker(request, self._registry.workers.values()) or self._room.refuse_queue(
            request.slo
        )

    def _on_first_token(self, event: domain.FirstToken, now_s: float) -> None:
        tracked = self._requests.get(event.request_id)
        if tracked is not None and tracked.phase == "prefill":
            tracked.enter_phase("transfer" if tracked.is_split_open else "decode", now_s)

    def _on_finished(self, event: domain.Finished) -> None:
        """Cancelling is free where nothing runs any more, and a stop string ends a sequence that
        its worker would go on with."""
        tracked = self._requests.get(event.request_id)
        if tracked is None:
            return
        self._leave(tracked)
        if event.request_id in self._room:
            self._room.remove(tracked.request)
        self._forget(tracked)

    def _on_stalled(self, event: domain.Stalled, now_s: float) -> None:
        tracked = self._requests.get(event.request_id)
        if tracked is None or tracked.epoch != event.epoch or not tracked.workers():
            return
        worker_id = tracked.workers()[-1]
        tracked.refused_by(worker_id, False, now_s, self._config)
        self._move(tracked, worker_id, f"ids from {worker_id} stopped arriving", now_s)

    def _leave(self, tracked: Tracked, without: str = "") -> None:
        """Release what the current epoch holds, cancelling it everywhere but on `without`."""
        for worker_id in tracked.workers():
            worker = self._registry.workers.get(worker_id)
            if worker is None or not worker.release(tracked.request_id):
                continue
            if worker_id != without and worker.status != "lost":
                self._commands.append(
                    domain.CancelSequence(worker_id, tracked.request_id, tracked.epoch)
                )

    def _move(self, tracked: Tracked, lost: str, why: str, now_s: float) -> None:
        """Its worker (or its handoff) failed: it waits, in front of all new work, for another."""
        is_alone = not tracked.is_split_open
        worker = self._registry.workers.get(lost)
        is_gone = worker is not None and worker.status == "lost"
        self._leave(tracked, lost if is_gone else "")
        tracked.resumable_on = lost if is_gone and is_alone else ""
        tracked.lost_worker, tracked.move_reason = lost, why
        tracked.num_moves += 1
        tracked.handoff_ready_at_s = None
        tracked.enter_phase("orphaned", now_s)
        if tracked.num_moves > self._config.moves_max:
            text = f"lost its worker {tracked.num_moves} times, at most {self._config.moves_max}"
            self._reject(tracked, Rejected("retries_exhausted", f"{text}; {why}", None), now_s)
            return
        self._room.enter_moving(tracked.request, now_s)

    def _reject(self, tracked: Tracked, outcome: Rejected, now_s: float) -> None:
        self._decide_rejected(tracked, outcome, now_s)
        self._forget(tracked)

    def _forget(self, tracked: Tracked) -> None:
        del self._requests[tracked.request_id]
        if tracked.request.slo.is_batch:
            return
        tenant_id = tracked.request.tenant_id
        self._num_by_tenant[tenant_id] -= 1
        if not self._num_by_tenant[tenant_id]:
            del self._num_by_tenant[tenant_id]

    # --- placement -------------------------------------------------------------------------------

    def _start_waiting(self, now_s: float) -> None:
        """Start whatever can start, in the order of the waiting room.

        A pass costs workers times requests, so passes that find nothing are kept apart; a request
        that waits alone is tried at each event."""
        is_early = now_s - self._passed_at_s < self._config.retry_every_s
        if not len(self._room) or (is_early and len(self._room) > 1):
            return
        has_started = True
        while has_started:
            has_started = False
            for request in self._room.next_up():
                tracked = self._requests[request.request_id]
                found = self._route(tracked, now_s)
                if found.placement is not None:
                    self._start(tracked, found, now_s)
                    has_started = True
        if len(self._room):
            self._passed_at_s = now_s

    def _route(self, tracked: Tracked, now_s: float) -> Route:
        request = tracked.request
        ask = Ask(
            request=request,
            now_s=now_s,
            ttft_s_left=request.slo.ttft_s_p99 - (now_s - request.arrived_at_s),
            cached_blocks=self._prefixes.matched(request.block_hashes),
            avoid=tracked.avoided(now_s),
        )
        serving = [
            worker
            for worker in self._registry.workers.values()
            if worker.has_model(request.model_id)
        ]
        return route(ask, serving, self._rates, self._config, can_split=tracked.num_moves == 0)

    def _start(self, tracked: Tracked, found: Route, now_s: float) -> None:
        placement = found.placement
        assert placement is not None
        request = tracked.request
        waited_s = self._room.waited_s(request.request_id, now_s)
        self._room.take(request)
        tracked.epoch += 1
        tracked.placement = placement
        tracked.resumable_on = ""
        tracked.enter_phase("prefill", now_s)
        if not request.slo.is_batch and tracked.epoch == 1:
            self._observe(found, now_s)
        self._dispatch(tracked, placement, found.uncached_tokens)
        self._count_move(tracked, found)
        record = decisions.placed(
            request.request_id, tracked.epoch, found, waited_s, tracked.move_reason
        )
        outcome = domain.Placed(placement, tracked.epoch)
        self._commands.append(Decided(request.request_id, outcome, record))
        tracked.move_reason = ""

    def _observe(self, found: Route, now_s: float) -> None:
        assert found.placement is not None
        first = next(
            row for row in found.candidates if row.worker_id == found.placement.prefill_worker
        )
        floor = max(found.threshold_tokens, self._config.handoff_tokens_min)
        self._planner.observe_request(now_s, first.prefill_s, found.uncached_tokens >= floor)

    def _dispatch(self, tracked: Tracked, placement: domain.Placement, uncached: int) -> None:
        request_id, epoch = tracked.request_id, tracked.epoch
        decode = self._registry.workers[placement.decode_worker]
        hashes = tracked.request.block_hashes
        self._prefixes.insert(placement.prefill_worker, hashes)
        if placement.split == "local":
            self._reserve(decode, tracked, "full", uncached)
            self._commands.append(domain.Dispatch(decode.worker_id, request_id, epoch, "full"))
            return
        prefill = self._registry.workers[placement.prefill_worker]
        address = prefill.hello.handoff_address
        assert address is not None, prefill.worker_id
        shown = self._registry.capability(request_id, epoch, prefill.worker_id, decode.worker_id)
        self._reserve(prefill, tracked, "prefill", uncached)
        self._reserve(decode, tracked, "decode", 0)
        self._commands += [
            domain.Dispatch(
                prefill.worker_id,
                request_id,
                epoch,
                "prefill",
                handoff_out=protocol.HandoffOut(shown),
            ),
            domain.Dispatch(
                decode.worker_id,
                request_id,
                epoch,
                "decode",
                handoff_in=protocol.HandoffIn(address, shown),
            ),
        ]

    def _reserve(
        self,
        worker: Worker,
        tracked: Tracked,
        stage: protocol.Stage,
        prefill_tokens: int,
        is_reported: bool = False,
    ) -> None:
        request = tracked.request
        reserved = min(request.output_tokens_max, self._config.output_tokens_reserved)
        output = 1 if stage == "prefill" else reserved
        worker.reserve(
            Reservation(
                request_id=request.request_id,
                stage=stage,
                is_batch=request.slo.is_batch,
                prefill_tokens=prefill_tokens,
                blocks=blocks_needed(worker, request, output),
                context_tokens=request.prompt_tokens,
                is_accepted=is_reported,
                is_reported=is_reported,
            )
        )

    def _count_move(self, tracked: Tracked, found: Route) -> None:
        if tracked.lost_worker:
            self._commands.append(
                domain.FailoverCounted(tracked.request_id, tracked.lost_worker, tracked.epoch)
            )
            tracked.lost_worker = ""
        if tracked.recompute_s is not None:
            self._commands.append(
                domain.HandoffCounted(
                    tracked.request_id, 0, tracked.recompute_s, found.uncached_tokens
                )
            )
            tracked.recompute_s = None

    def _decide_queued(self, tracked: Tracked, now_s: float) -> None:
        found = self._route(tracked, now_s)
        position = self._room.position(tracked.request)
        per_start_s = min((row.prefill_s for row in found.candidates), default=0.0)
        start_s = found.queue_s + (position - 1) * per_start_s
        record = decisions.queued(
            tracked.request_id, tracked.epoch, found, 0.0, tracked.move_reason
        )
        outcome = domain.Queued(position, start_s)
        self._commands.append(Decided(tracked.request_id, outcome, record))

    def _decide_rejected(self, tracked: Tracked, outcome: Rejected, now_s: float) -> None:
        waited_s = max(0.0, now_s - tracked.request.arrived_at_s)
        record = decisions.rejected(tracked.request_id, tracked.epoch, outcome, waited_s)
        self._commands.append(Decided(tracked.request_id, outcome, record))

    # --- time ------------------------------------------------------------------------------------

    def _on_tick(self, now_s: float) -> None:
        if self._ticked_at_s is not None:
            gap_s = now_s - self._ticked_at_s
            if gap_s > self._config.stall_s:
                self._registry.forgive(gap_s)
        self._ticked_at_s = now_s
        for worker, why in self._registry.dead(now_s):
            self._commands.append(domain.CloseWorker(worker.worker_id, why))
            self._lose(worker, f"{worker.worker_id} was given up: {why}", now_s)
        self._registry.forget_lost(now_s)
        for request in self._room.overdue(now_s):
            tracked = self._requests[request.request_id]
            waited_s = self._room.waited_s(request.request_id, now_s)
            self._room.remove(request)
            text = f"waited {waited_s:.1f} s for a worker, the most its class allows"
            self._reject(tracked, Rejected("queue_timeout", text, RETRY_S), now_s)
        flip = self._planner.plan(now_s, list(self._registry.workers.values()))
        if flip is not None:
            self._change_role(flip.worker, flip.role, "planner", flip.reason, now_s)

    def check_integrity(self) -> None:
        """Conservation laws that hold between any two events."""
        for worker in self._registry.workers.values():
            worker.check_integrity()
            assert worker.status != "lost" or not worker.reservations, worker.worker_id
            for request_id in worker.reservations:
                assert worker.worker_id in self._requests[request_id].workers(), request_id
        for tracked in self._requests.values():
            is_waiting = tracked.request_id in self._room
            assert is_waiting == (tracked.phase in ("queued", "orphaned")), tracked
            for worker_id in tracked.workers():
                held = self._registry.workers[worker_id].reservations
                assert tracked.request_id in held, (tracked.request_id, worker_id)
        online = [item for item in self._requests.values() if not item.request.slo.is_batch]
        assert sum(self._num_by_tenant.values()) == len(online), self._num_by_tenant
