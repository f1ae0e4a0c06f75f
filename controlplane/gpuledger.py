"""Every worker's GPU seconds against our own clock: interactive + batch + measured idle = wall.

Workers tell what they measured since their start; this side measures nothing but the time between
two reports. What is missing is time that a worker lost count of, and shows up here.
Source of the split: algorithms.md 2i.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite

from controlplane.protocol import GpuSeconds

LOSS_MAX = 0.01  # of the wall time, either way
WALL_S_MIN = 20.0  # below it the delay of two frames is more than LOSS_MAX of the time
MARK_S = 60.0  # between two marks of the window in which a loss is looked for
MARKS_MAX = 60


@dataclass(frozen=True, slots=True)
class GpuView:
    """One worker since it joined, and how the last hour adds up."""

    worker_id: str
    model_id: str
    spent: GpuSeconds
    wall_s: float  # of the window, by our clock
    accounted_s: float  # of it, by the worker

    @property
    def loss(self) -> float | None:
        """Share of the wall time that is in no lane; None while there is too little of it."""
        if self.wall_s < WALL_S_MIN:
            return None
        return 1.0 - self.accounted_s / self.wall_s

    @property
    def is_balanced(self) -> bool | None:
        loss = self.loss
        return None if loss is None else abs(loss) <= LOSS_MAX


@dataclass(slots=True)
class _Meter:
    model_id: str
    spent: GpuSeconds
    marks: deque[tuple[float, float]] = field(default_factory=deque)  # our time, accounted seconds
    newest: tuple[float, float] = (0.0, 0.0)


class GpuLedger:
    """Meters of the workers that report; forgotten when the plane forgets the worker."""

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}

    def observe(
        self, worker_id: str, model_id: str, spent: GpuSeconds, busy_s: float, now_s: float
    ) -> None:
        """A report with a step of that age in hand. Frames that come late or twice say nothing
        new: totals only grow. Numbers that cannot be are left aside."""
        lanes = [spent.online_prefill_s, spent.online_decode_s, spent.batch_prefill_s]
        lanes += [spent.batch_decode_s, spent.batch_fixed_s, spent.idle_s, busy_s]
        if not isfinite(sum(lanes)) or min(lanes) < 0.0:
            return
        meter = self._meters.get(worker_id)
        if meter is None:
            meter = self._meters[worker_id] = _Meter(model_id, spent)
        if spent.total_s < meter.spent.total_s:
            return
        meter.model_id, meter.spent = model_id, spent
        meter.newest = (now_s, spent.total_s + busy_s)
        if not meter.marks or now_s - meter.marks[-1][0] >= MARK_S:
            meter.marks.append(meter.newest)
            if len(meter.marks) > MARKS_MAX:
                meter.marks.popleft()

    def forget(self, worker_ids: Iterable[str]) -> None:
        for worker_id in worker_ids:
            self._meters.pop(worker_id, None)

    def __len__(self) -> int:
        return len(self._meters)

    def views(self) -> tuple[GpuView, ...]:
        views = []
        for worker_id, meter in self._meters.items():
            began_s, before_s = meter.marks[0]
            now_s, accounted_s = meter.newest
            views.append(
                GpuView(
                    worker_id, meter.model_id, meter.spent, now_s - began_s, accounted_s - before_s
                )
            )
        return tuple(views)
