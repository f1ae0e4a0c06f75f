"""Starts waiting requests: routes them, debits the workers, writes dispatches and decisions."""

from collections.abc import Callable, Mapping
from math import inf

from msgspec.structs import replace

from controlplane import decisions, domain, protocol
from controlplane.admission import Outlook, late_by_s, late_text
from controlplane.backfill import Backfill
from controlplane.calibration import TTFTCalibration, bucket_of
from controlplane.config import ControlPlaneConfig
from controlplane.decisions import DecisionBook
from controlplane.disagg import TransferRates
from controlplane.domain import Command, Decided, GenerateRequest
from controlplane.failover import Recoveries, Tracked
from controlplane.planner import Planner
from controlplane.pools import Pools
from controlplane.prefixes import PrefixIndex
from controlplane.registry import Registry, Reservation, Worker
from controlplane.replacing import Waiting
from controlplane.router import Route, route
from controlplane.scorers import Ask, blocks_needed
from controlplane.waiting import WaitingRoom


class Placer:
    """Owner of the waiting room and of what routing learns; appends to `commands`."""

    def __init__(
        self,
        config: ControlPlaneConfig,
        registry: Registry,
        planner: Planner,
        backfill: Backfill,
        tracked: Mapping[str, Tracked],
        commands: list[Command],
    ) -> None:
        self._config = config
        self._registry = registry
        self._planner = planner
        self._backfill = backfill
        self._tracked = tracked
        self._commands = commands
        self.pools = Pools(config)
        self.uniform: Callable[[], float] = lambda: 0.5  # of the event in hand
        self._passed_at_s = float("-inf")  # last pass over waiting requests that found no room
        self.room = WaitingRoom(config)
        self.prefixes = PrefixIndex(config.prefix_blocks_max, config.prefix_holders_max)
        self.rates = TransferRates(config)
        self.calibration = TTFTCalibration()
        self.decisions = DecisionBook(config)
        self.recoveries = Recoveries(config)

    def start_waiting(self, now_s: float) -> None:
        """Start whatever can start, in the order of the waiting room.

        A pass costs workers times requests: with many waiting, passes that found no room for some
        are kept apart. However many of the surplus tier wait, no other waits for that."""
        is_early = now_s - self._passed_at_s < self._config.retry_every_s
        has_surplus = not is_early or len(self.room) <= self._config.scan_max
        num_tried = len(self.room) if has_surplus else self.room.num_guaranteed()
        if not num_tried or (is_early and num_tried > self._config.scan_max):
            return
        has_changed = True
        while has_changed:
            has_changed = False
            for request in self.room.next_up(self._hit_tokens, has_surplus):
                tracked = self._tracked[request.request_id]
                if not self.recoveries.has_room(tracked, len(self._tracked)):
                    continue
                found = self.route(tracked, now_s)
                late = self._late(tracked, found, now_s)
                if late is not None and self.room.can_demote(request):
                    self.demote(tracked, domain.Demotion("late", late))
                    has_changed = True
                elif found.placement is not None:
                    self._start(tracked, found, now_s)
                    has_changed = True
        if len(self.room) and has_surplus:
            self._passed_at_s = now_s

    def _hit_tokens(self, request: GenerateRequest) -> int:
        """Prompt tokens on the worker that has cached most of them."""
        hits = self.prefixes.matched(request.block_hashes).values()
        blocks = max((hit.device_blocks + hit.host_blocks for hit in hits), default=0)
        return blocks * self._config.prefix_block_tokens

    def outlook(self, found: Route) -> Outlook | None:
        """Of the placement, or of the best worker when so much is queued there that it waits."""
        if found.placement is not None:
            first = found.first
            ttft_s, itl_s = found.placement.predicted_ttft_s, found.placement.predicted_itl_s
            is_handoff = found.placement.split == "handoff"
        else:
            rows = [row for row in found.candidates if row.eligible]
            if not rows:
                return None
            first = min(rows, key=lambda row: (row.ttft_s, row.worker_id))
            ttft_s, itl_s, is_handoff = first.ttft_s, first.itl_s, False
        bucket = bucket_of(first.queue_s, first.prefill_s, first.cached_tokens, is_handoff)
        return Outlook(
            worker_id=first.worker_id,
            ttft_s=ttft_s,
            ttft_s_p99=self.calibration.margin(bucket) * ttft_s,
            itl_s=itl_s,
            work_s=first.prefill_s,
            num_workers=max(1, found.num_first),
        )

    def _late(self, tracked: Tracked, found: Route, now_s: float) -> str | None:
        """Why a waiting request of the guaranteed tier cannot be in time any more. A request that
        has had a worker goes on as it is."""
        request, slo = tracked.request, tracked.request.slo
        if slo.is_batch or tracked.tier == "surplus" or tracked.epoch or tracked.num_refusals:
            return None
        waited_s = now_s - request.arrived_at_s
        outlook = self.outlook(found)
        if outlook is None:
            is_late = waited_s > slo.ttft_s_p99
            text = f"has waited {waited_s:.1f} s, target {slo.ttft_s_p99:.1f} s"
            return text if is_late else None
        is_late = late_by_s(outlook, slo, waited_s, self._config.late_margin) > 0.0
        if is_late or outlook.itl_s > slo.itl_s_p99:
            return late_text(outlook, slo, waited_s, 0.0)
        return None

    def demote(self, tracked: Tracked, demotion: domain.Demotion) -> None:
        tracked.demotion = demotion
        self.room.demote(tracked.request)

    def observe_ttft(self, tracked: Tracked, now_s: float) -> None:
        """The first token is out: score the prediction of its placement."""
        placement = tracked.placement
        if placement is not None and tracked.bucket is not None:
            actual_s = now_s - tracked.placed_at_s
            self.calibration.observe(tracked.bucket, placement.predicted_ttft_s, actual_s)
            model_id = tracked.request.model_id
            self._planner.observe_ttft(model_id, placement.predicted_ttft_s, actual_s)
        tracked.bucket = None

    def route(self, tracked: Tracked, now_s: float) -> Route:
        """Where the request would go now."""
        request = tracked.request
        return route(
            self._ask(tracked, tracked.avoided(now_s), now_s),
            self.pools.pool(request.model_id),
            self.rates,
            self._config,
            self.uniform,
            can_split=tracked.num_moves == 0,
        )

    def _ask(self, tracked: Tracked, avoid: frozenset[str], now_s: float) -> Ask:
        request = tracked.request
        return Ask(
            request=request,
            now_s=now_s,
            ttft_s_left=request.slo.ttft_s_p99 - (now_s - request.arrived_at_s),
            hits=self.prefixes.matched(request.block_hashes),
            avoid=avoid,
            is_surplus=tracked.is_lent(now_s),
            hold_s=self._hold_s(tracked, now_s),
            is_struck=tracked.num_strikes > 0,
            margin=self.calibration.margin,
            lengths=self._backfill.lengths(request.model_id),
        )

    def _hold_s(self, tracked: Tracked, now_s: float) -> float:
        """Seconds of prompts before it at which it waits here. One without a deadline is bound to
        a worker late, when about one step of prompts is there: whoever comes meanwhile goes first.
        Batch never waits for prompts."""
        slo = tracked.request.slo
        if slo.is_batch:
            return inf
        if tracked.worker_tier(now_s) == "guaranteed":
            return max(self._config.hold_s_min, slo.ttft_s_p99)
        return slo.itl_s_p99

    def sizes(self) -> dict[str, tuple[int, int]]:
        config = self._config
        return {
            "prefix blocks": (len(self.prefixes), config.prefix_blocks_max),
            "transfer pairs": (len(self.rates), config.pairs_max),
            **self.decisions.sizes(),
            **self.room.sizes(),
        }

    def joined(self, worker: Worker) -> None:
        """A new member or one that is back."""
        self.pools.join(worker)
        tokens, size = worker.hello.block_tokens, self._config.prefix_block_tokens
        device, host = worker.hello.num_blocks, worker.hello.host_blocks
        self.prefixes.join(worker.worker_id, device * tokens // size, host * tokens // size)

    def forgotten(self, worker: Worker) -> None:
        self.pools.forget(worker)
        self.prefixes.leave(worker.worker_id)

    def sooner(self, waiting: Waiting, now_s: float) -> Route | None:
        """Another worker that would start the request within replace_gain of its present time."""
        tracked = waiting.tracked
        avoid = tracked.avoided(now_s) | {waiting.worker_id}
        pool = self.pools.pool(tracked.request.model_id)
        ask = self._ask(tracked, avoid, now_s)
        found = route(ask, pool, self.rates, self._config, self.uniform, can_split=True)
        placement, former = found.placement, tracked.placement
        assert former is not None
        if placement is None:
            return None
        if placement.split != former.split and not waiting.is_silent:
            return None  # whether a prompt is computed apart was decided on other grounds
        limit_s = self._config.replace_gain * waiting.ttft_s
        is_sooner = found.queue_s <= self._config.replace_gain * waiting.wait_s
        return found if is_sooner and placement.predicted_ttft_s <= limit_s else None

    def elsewhere(self, tracked: Tracked, worker_id: str, now_s: float) -> Route:
        """Where a running stream could go on instead."""
        pool = self.pools.pool(tracked.request.model_id)
        ask = self._ask(tracked, tracked.avoided(now_s) | {worker_id}, now_s)
        return route(ask, pool, self.rates, self._config, self.uniform, can_split=False)

    def start_elsewhere(self, tracked: Tracked, found: Route, now_s: float) -> None:
        """Goes on there; it has left its worker and did not wait."""
        self._place(tracked, found, 0.0, now_s)

    def start_now(self, tracked: Tracked, found: Route, now_s: float) -> None:
        """Start a request of the waiting room by a route that has just been found."""
        self._start(tracked, found, now_s)

    def _start(self, tracked: Tracked, found: Route, now_s: float) -> None:
        placement = found.placement
        assert placement is not None
        request = tracked.request
        waited_s = self.room.waited_s(request.request_id, now_s)
        step_model = self._registry.workers[placement.prefill_worker].step_model
        self.room.take(request, step_model, found.uncached_tokens)
        self.recoveries.began(tracked)
        self._place(tracked, found, waited_s, now_s)

    def _place(self, tracked: Tracked, found: Route, waited_s: float, now_s: float) -> None:
        placement, request = found.placement, tracked.request
        assert placement is not None
        tracked.epoch += 1
        tracked.placement = placement
        tracked.resumable_on = ""
        tracked.placed_at_s = now_s
        tracked.bucket = None
        if tracked.epoch == 1 and tracked.tier == "guaranteed" and not request.slo.is_batch:
            first, is_handoff = found.first, placement.split == "handoff"
            tracked.bucket = bucket_of(
                first.queue_s, first.prefill_s, first.cached_tokens, is_handoff
            )
        is_going_on = tracked.has_first_token and placement.split == "local"
        tracked.enter_phase("decode" if is_going_on else "prefill", now_s)
        if found.threshold_tokens and found.uncached_tokens >= self._config.handoff_tokens_min:
            pair = (placement.prefill_worker, placement.decode_worker)
            self.rates.chosen(pair, placement.split == "handoff", now_s)
        self._dispatch(tracked, placement, found.uncached_tokens)
        self._count_move(tracked, found)
        record = decisions.placed(tracked, found, waited_s, now_s)
        self._decided(tracked, domain.Placed(placement, tracked.epoch, tracked.demotion), record)
        tracked.move_reason, tracked.cause = "", "submitted"

    def observe(self, request: GenerateRequest, found: Route, now_s: float) -> None:
        """Tells the planner of an online request that was admitted, whether it starts or waits."""
        floor = max(found.threshold_tokens, self._config.handoff_tokens_min)
        if found.placement is not None:
            prefill_s, uncached = found.first.prefill_s, found.uncached_tokens
        else:  # nobody can take it now: what the workers that were asked would need
            prefill_s = min((row.prefill_s for row in found.candidates), default=0.0)
            uncached = found.uncached_tokens or request.prompt_tokens
        is_local = found.placement is not None and found.placement.split == "local"
        self._planner.observe_request(now_s, request, prefill_s, uncached >= floor, is_local)

    def _dispatch(self, tracked: Tracked, placement: domain.Placement, uncached: int) -> None:
        request_id, epoch = tracked.request_id, tracked.epoch
        tier = tracked.worker_tier(tracked.placed_at_s)
        decode = self._registry.workers[placement.decode_worker]
        hashes = tracked.request.block_hashes
        self.prefixes.insert(placement.prefill_worker, hashes)
        if placement.split == "local":
            self.reserve(decode, tracked, "full", uncached)
            self._commands.append(
                domain.Dispatch(decode.worker_id, request_id, epoch, "full", tier=tier)
            )
            return
        prefill = self._registry.workers[placement.prefill_worker]
        address = prefill.hello.handoff_address
        assert address is not None, prefill.worker_id
        shown = self._registry.capability(request_id, epoch, prefill.worker_id, decode.worker_id)
        timeout_s = self._config.transfer_timeout_s + 4.0 * placement.predicted_ttft_s
        tracked.handoff_due_at_s = tracked.placed_at_s + timeout_s + self._config.transfer_grace_s
        self.reserve(prefill, tracked, "prefill", uncached)
        self.reserve(decode, tracked, "decode", 0)
        self._commands += [
            domain.Dispatch(
                prefill.worker_id,
                request_id,
                epoch,
                "prefill",
                handoff_out=protocol.HandoffOut(shown),
                tier=tier,
            ),
            domain.Dispatch(
                decode.worker_id,
                request_id,
                epoch,
                "decode",
                handoff_in=protocol.HandoffIn(address, shown, timeout_s),
                tier=tier,
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
                is_surplus=tracked.worker_tier(tracked.placed_at_s) == "surplus",
                is_prefilling=not is_reported,
                is_struck=tracked.num_strikes > 0 and not is_reported,
            )
        )
        self.pools.refile(worker)

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
        found = self.route(tracked, now_s)
        if found.placement is not None:
            why = f"{len(self.room) - 1} requests are before it"
            found = replace(found, placement=None, reason=why, bound="order")
        position = self.room.position(tracked.request)
        per_start_s = min((row.prefill_s for row in found.candidates), default=0.0)
        start_s = found.queue_s + (position - 1) * per_start_s
        record = decisions.queued(tracked, found, 0.0, now_s)
        self._decided(tracked, domain.Queued(position, start_s, tracked.demotion), record)

    def decide_rejected(
        self, tracked: Tracked, outcome: domain.Rejected, found: Route | None, now_s: float
    ) -> None:
        """Its end; `found` is where it would have gone."""
        record = decisions.rejected(tracked, outcome, found, now_s)
        self._decided(tracked, outcome, record)
        self.decisions.end(tracked.request_id, outcome.code, False, None)

    def _decided(
        self,
        tracked: Tracked,
        outcome: domain.Placed | domain.Queued | domain.Rejected,
        record: domain.DecisionRecord,
    ) -> None:
        self.decisions.add(tracked.request, record)
        self._commands.append(Decided(tracked.request_id, outcome, record))
