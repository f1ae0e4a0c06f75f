"""Starts waiting requests: routes them, debits the workers, writes dispatches and decisions."""

from collections.abc import Mapping
from dataclasses import replace

from controlplane import decisions, domain, protocol
from controlplane.admission import WaitingRoom
from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates
from controlplane.domain import Command, Decided
from controlplane.failover import Tracked
from controlplane.planner import Planner
from controlplane.prefixes import PrefixIndex
from controlplane.registry import Registry, Reservation, Worker
from controlplane.router import Route, route
from controlplane.scorers import Ask, blocks_needed


class Placer:
    """Owner of the waiting room and of what routing learns; appends to `commands`."""

    def __init__(
        self,
        config: ControlPlaneConfig,
        registry: Registry,
        planner: Planner,
        tracked: Mapping[str, Tracked],
        commands: list[Command],
    ) -> None:
        self._config = config
        self._registry = registry
        self._planner = planner
        self._tracked = tracked
        self._commands = commands
        self._passed_at_s = float("-inf")  # last pass over waiting requests that found no room
        self.room = WaitingRoom(config)
        self.prefixes = PrefixIndex(config.prefix_blocks_max, config.prefix_holders_max)
        self.rates = TransferRates(config)

    def start_waiting(self, now_s: float) -> None:
        """Start whatever can start, in the order of the waiting room.

        A pass costs workers times requests: with many waiting, passes that found no room for some
        are kept apart."""
        is_early = now_s - self._passed_at_s < self._config.retry_every_s
        if not len(self.room) or (is_early and len(self.room) > self._config.scan_max):
            return
        has_started = True
        while has_started:
            has_started = False
            for request in self.room.next_up():
                tracked = self._tracked[request.request_id]
                found = self._route(tracked, now_s)
                if found.placement is not None:
                    self._start(tracked, found, now_s)
                    has_started = True
        if len(self.room):
            self._passed_at_s = now_s

    def _route(self, tracked: Tracked, now_s: float) -> Route:
        request = tracked.request
        ask = Ask(
            request=request,
            now_s=now_s,
            ttft_s_left=request.slo.ttft_s_p99 - (now_s - request.arrived_at_s),
            cached_blocks=self.prefixes.matched(request.block_hashes),
            avoid=tracked.avoided(now_s),
        )
        serving = [
            worker
            for worker in self._registry.workers.values()
            if worker.has_model(request.model_id)
        ]
        return route(ask, serving, self.rates, self._config, can_split=tracked.num_moves == 0)

    def _start(self, tracked: Tracked, found: Route, now_s: float) -> None:
        placement = found.placement
        assert placement is not None
        request = tracked.request
        waited_s = self.room.waited_s(request.request_id, now_s)
        self.room.take(request)
        tracked.epoch += 1
        tracked.placement = placement
        tracked.resumable_on = ""
        is_going_on = tracked.has_first_token and placement.split == "local"
        tracked.enter_phase("decode" if is_going_on else "prefill", now_s)
        if not request.slo.is_batch and tracked.epoch == 1:
            self._observe(request.model_id, found, now_s)
        self._dispatch(tracked, placement, found.uncached_tokens)
        self._count_move(tracked, found)
        record = decisions.placed(
            request.request_id, tracked.epoch, found, waited_s, tracked.move_reason
        )
        outcome = domain.Placed(placement, tracked.epoch)
        self._commands.append(Decided(request.request_id, outcome, record))
        tracked.move_reason = ""

    def _observe(self, model_id: str, found: Route, now_s: float) -> None:
        assert found.placement is not None
        first = next(
            row for row in found.candidates if row.worker_id == found.placement.prefill_worker
        )
        floor = max(found.threshold_tokens, self._config.handoff_tokens_min)
        self._planner.observe_request(
            now_s, model_id, first.prefill_s, found.uncached_tokens >= floor
        )

    def _dispatch(self, tracked: Tracked, placement: domain.Placement, uncached: int) -> None:
        request_id, epoch = tracked.request_id, tracked.epoch
        decode = self._registry.workers[placement.decode_worker]
        hashes = tracked.request.block_hashes
        self.prefixes.insert(placement.prefill_worker, hashes)
        if placement.split == "local":
            self.reserve(decode, tracked, "full", uncached)
            self._commands.append(domain.Dispatch(decode.worker_id, request_id, epoch, "full"))
            return
        prefill = self._registry.workers[placement.prefill_worker]
        address = prefill.hello.handoff_address
        assert address is not None, prefill.worker_id
        shown = self._registry.capability(request_id, epoch, prefill.worker_id, decode.worker_id)
        timeout_s = self._config.transfer_timeout_s + 4.0 * placement.predicted_ttft_s
        self.reserve(prefill, tracked, "prefill", uncached)
        self.reserve(decode, tracked, "decode", 0)
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
                handoff_in=protocol.HandoffIn(address, shown, timeout_s),
            ),
        ]

    def reserve(
        self,
        worker: Worker,
        tracked: Tracked,
        stage: protocol.Stage,
        prefill_tokens: int,
        is_reported: bool = False,
    ) -> None:
        request = tracked.request
        output = 1 if stage == "prefill" else request.output_tokens_max
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

    def decide_queued(self, tracked: Tracked, now_s: float) -> None:
        """Says that a new request waits; the record shows what it would have got now."""
        found = self._route(tracked, now_s)
        if found.placement is not None:
            why = f"{len(self.room) - 1} requests are before it"
            found = replace(found, placement=None, reason=why)
        position = self.room.position(tracked.request)
        per_start_s = min((row.prefill_s for row in found.candidates), default=0.0)
        start_s = found.queue_s + (position - 1) * per_start_s
        record = decisions.queued(
            tracked.request_id, tracked.epoch, found, 0.0, tracked.move_reason
        )
        outcome = domain.Queued(position, start_s)
        self._commands.append(Decided(tracked.request_id, outcome, record))
