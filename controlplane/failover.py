"""A request while the plane knows it: where it is, which epoch counts, how often it has moved; and
how many requests may be recovering at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.calibration import Bucket
from controlplane.config import ControlPlaneConfig
from controlplane.domain import Cause, Demotion, GenerateRequest, Phase, Placement, Tier


@dataclass(slots=True)
class Tracked:
    """The plane's only mutable record of a request; it leaves with its terminal state.

    `epoch` is that of the last dispatch; only its reports count. An orphaned request keeps epoch
    and placement, so a worker that comes back with the same sequence can go on with it.
    """

    request: GenerateRequest
    phase: Phase
    phase_at_s: float
    epoch: int = 0
    placement: Placement | None = None
    has_first_token: bool = False
    num_moves: int = 0
    num_strikes: int = 0  # workers that died with it, since it last made progress
    left_worker: str = ""  # it was moved away from before it started, as far as we know
    left_at_s: float = 0.0
    is_blamed: bool = False  # the last one had nothing else that could be why
    is_lost: bool = False  # something went wrong, and it has not gone on since
    failed_on: list[str] = field(default_factory=list)  # errors in a row: the workers
    num_refusals: int = 0
    num_replaced: int = 0  # before it started, to a worker that starts it sooner
    avoid_until_s: dict[str, float] = field(default_factory=dict)
    lost_worker: str = ""  # whose loss the next dispatch answers
    move_reason: str = ""
    cause: Cause = "submitted"  # of the next decision
    recompute_s: float | None = None  # seconds a failed handoff took, until it is counted
    handoff_ready_at_s: float | None = None
    handoff_due_at_s: float = 0.0  # when what is reserved for an open transfer is given back
    resumable_on: str = ""  # the lost worker that may come back with the sequence
    demotion: Demotion | None = None  # why it is in the surplus tier
    has_share: bool = False  # it comes under a contract
    placed_at_s: float = 0.0
    bucket: Bucket | None = None  # kind of the TTFT prediction, while it will be scored
    ttft_s: float | None = None  # as the client saw it

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def tier(self) -> Tier:
        return "surplus" if self.demotion else "guaranteed"

    def is_lent(self, now_s: float) -> bool:
        """It takes only what others leave. Within the share of a contract it may use what is kept
        free for such, however late it is predicted to be, until it is late."""
        is_own = self.has_share and self.worker_tier(now_s) == "guaranteed"
        return self.tier == "surplus" and not is_own

    def worker_tier(self, now_s: float) -> Tier:
        """What a worker that gets it now is told. One that is only predicted to be late keeps its
        deadline there until that has passed: the worker orders by time left, and often proves the
        prediction wrong."""
        if self.demotion is None or self.demotion.code != "late":
            return self.tier
        request = self.request
        is_in_time = now_s - request.arrived_at_s < request.slo.ttft_s_p99
        return "guaranteed" if is_in_time or self.has_first_token else "surplus"

    def enter_phase(self, phase: Phase, now_s: float) -> None:
        self.phase, self.phase_at_s = phase, now_s

    @property
    def is_split_open(self) -> bool:
        """Handed off, and the decode worker does not hold the KV yet."""
        return (
            self.placement is not None
            and self.placement.split == "handoff"
            and self.phase in ("prefill", "transfer")
        )

    def workers(self) -> tuple[str, ...]:
        """Workers that hold the current epoch: one, or the two of a handoff that is not done."""
        if self.placement is None or self.phase in ("queued", "orphaned"):
            return ()
        if self.is_split_open:
            return (self.placement.prefill_worker, self.placement.decode_worker)
        return (self.placement.decode_worker,)

    def refused_by(
        self,
        worker_id: str,
        is_final: bool,
        now_s: float,
        config: ControlPlaneConfig,
    ) -> None:
        """Do not ask this worker again for a while, or ever when no room would help."""
        wait_s = min(config.avoid_s * 2.0**self.num_refusals, config.avoid_s_max)
        self.num_refusals += 1
        self.avoid_until_s[worker_id] = float("inf") if is_final else now_s + wait_s

    def avoided(self, now_s: float) -> frozenset[str]:
        return frozenset(
            worker_id for worker_id, until_s in self.avoid_until_s.items() if until_s > now_s
        )


def start_by_s(tracked: Tracked, recompute_s: float, now_s: float) -> float:
    """When a request that lost its worker has to start again to be in time: what is left of its
    first token's target, or one gap of its stream, less the time to compute its prompt again."""
    request, slo = tracked.request, tracked.request.slo
    is_open = tracked.has_first_token
    due_at_s = now_s + slo.itl_s_p99 if is_open else request.arrived_at_s + slo.ttft_s_p99
    return due_at_s - recompute_s


@dataclass(slots=True)
class Recoveries:
    """Requests that started again after something went wrong and have not gone on yet.

    Their number is bounded, so that a loss brings no storm of prompts and a fault that follows
    requests around costs little: at most recovery_share of the live ones, and recoveries_min
    always; batch lines take only what online ones leave. Source: retry budget of Envoy."""

    config: ControlPlaneConfig
    _online: set[str] = field(default_factory=set)
    _batch: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._online) + len(self._batch)

    def has_room(self, tracked: Tracked, num_live: int) -> bool:
        limit = max(self.config.recoveries_min, int(self.config.recovery_share * num_live))
        held = len(self) if tracked.request.slo.is_batch else len(self._online)
        return not tracked.is_lost or held < limit

    def began(self, tracked: Tracked) -> None:
        if tracked.is_lost:
            kind = self._batch if tracked.request.slo.is_batch else self._online
            kind.add(tracked.request_id)

    def check_integrity(self, tracked: Mapping[str, Tracked]) -> None:
        """Who is counted is lost, runs, and is of that lane."""
        for is_batch, names in ((False, self._online), (True, self._batch)):
            for name in names:
                item = tracked[name]
                assert item.is_lost and item.workers(), item
                assert item.request.slo.is_batch == is_batch, item

    def ended(self, request_id: str) -> None:
        """It goes on, has ended, or waits again."""
        self._online.discard(request_id)
        self._batch.discard(request_id)
