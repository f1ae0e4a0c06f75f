"""The overload ladder: what is given up first when the cluster or the console runs full.

Signals are shares of a limit, 1.0 at the limit; they count online demand only, so KV that batch
holds and step time that it fills are free. The highest signal decides the rung:
70 %: no batch line starts. 80 %: no surplus request starts. 90 %: a tenant above its share of what
runs and waits is refused. 95 %: only work in flight goes on.
Full KV alone never refuses anybody: there the prediction decides request by request (admission.py).
Source: reliability.md section 8; rungs and signals as Envoy's overload manager.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.domain import GenerateRequest, Rejected

RUNGS = (0.70, 0.80, 0.90, 0.95)
RELEASE = 0.05  # below a rung's threshold, until it is left
EVERY_S = 0.25
SOFT_SIGNALS = ("kv",)  # these hold batch back and no more: KV is reserved for the worst case
SOFT_MAX = 0.79
RETRY_S_MIN = 1.0
NO_BATCH, NO_SURPLUS, SHARES_ONLY, IN_FLIGHT_ONLY = 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class OverloadView:
    """For metrics and pages."""

    rung: int  # 0: all is well
    signals: Mapping[str, float]
    bound: str  # the highest signal


@dataclass(slots=True)
class Overload:
    """Holds the rung between two looks at the signals."""

    rung: int = 0
    signals: dict[str, float] = field(default_factory=dict)
    _observed_at_s: float = float("-inf")

    def is_due(self, now_s: float) -> bool:
        return now_s - self._observed_at_s >= EVERY_S

    def observe(self, signals: Mapping[str, float], now_s: float) -> None:
        """Signals of this moment; those that are not named keep their value. Rungs are climbed at
        once and left one by one."""
        self._observed_at_s = now_s
        for name, share in signals.items():
            assert share >= 0.0, (name, share)
            self.signals[name] = min(share, SOFT_MAX) if name in SOFT_SIGNALS else share
        highest = max(self.signals.values(), default=0.0)
        rung = sum(highest >= threshold for threshold in RUNGS)
        if rung < self.rung and highest >= RUNGS[self.rung - 1] - RELEASE:
            return
        self.rung = max(rung, self.rung - 1)

    @property
    def bound(self) -> str:
        return max(self.signals, key=lambda name: (self.signals[name], name), default="")

    def refuse(
        self, request: GenerateRequest, held: int, fair_share: float, wait_s: float, chance: float
    ) -> Rejected | None:
        """A new online request; `held` requests of its tenant run or wait, of which fair_share is
        its part. `wait_s`: how long the oldest has waited; retries are spread over as much again.
        Batch has its own feeder and waits."""
        if request.slo.is_batch or self.rung < SHARES_ONLY:
            return None
        is_above = held + 1 > fair_share
        if self.rung < IN_FLIGHT_ONLY and not is_above:
            return None
        retry_s = max(RETRY_S_MIN, wait_s) * (1.0 + chance)
        why = f"{self.bound} at {self.signals[self.bound]:.0%}"
        if self.rung >= IN_FLIGHT_ONLY:
            return Rejected("overloaded", f"{why}: only work in flight goes on", retry_s)
        text = f"{why}: {held} requests of {request.tenant_id} run or wait, its share is"
        return Rejected("overload_share", f"{text} {fair_share:.1f}", retry_s)

    def view(self) -> OverloadView:
        return OverloadView(self.rung, dict(self.signals), self.bound)
