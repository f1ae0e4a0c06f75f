"""Can a batch be promised its deadline? The demand-bound test of earliest deadline first.

Work and capacity are GPU-seconds, times are seconds from now. Batch lines may be stopped and
divided at will, so EDF is optimal and the test is exact but for the forecast: every deadline D
holds when all work due by D fits into the low estimate of the capacity until D. Source:
algorithms.md 2f; the processor-demand criterion, Baruah, Rosier and Howell 1990.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf, sqrt

Z = 1.645  # one-sided 95 % of a normal sum: many items, nearly independent
QUOTE_S = 60.0  # deadlines that we offer are whole minutes
# Share of past ratios that an interval holds. The shortest one of so few covers about 2 points less
# of the next batches (python -m controlplane.sim deadlines), so that 90 % of them end within it.
INTERVAL = 0.92
KIND_S = (1_800.0, 7_200.0)  # expected seconds that part short from long batches
RATIOS_MAX = 150
RATIOS_MIN = 20
RATIOS_UNKNOWN = (0.5, 2.0)
EXPECTED_S_MIN = 1.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What is left of one batch."""

    deadline_s: float
    mean_s: float
    var_s2: float = 0.0  # of the sum, in seconds squared
    run_s: float = 0.0  # of its longest item alone: no deadline is shorter

    def __post_init__(self) -> None:
        assert min(self.mean_s, self.var_s2, self.run_s) >= 0.0, self


@dataclass(frozen=True, slots=True)
class Forecast:
    """Capacity that batch will have had by the end of each bin; [0] is now, and 0."""

    bin_s: float
    mean_s: tuple[float, ...]
    low_s: tuple[float, ...]  # at 95 %, of the integral and not of each bin
    high_s: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.mean_s) == len(self.low_s) == len(self.high_s) > 1, len(self.mean_s)

    @property
    def horizon_s(self) -> float:
        return self.bin_s * (len(self.mean_s) - 1)


@dataclass(frozen=True, slots=True)
class Admitted:
    """The deadline is promised. `slack` is the least of capacity / need - 1 over the deadlines that
    the batch bears on; infinite when it asks for nothing."""

    slack: float
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The deadline cannot be promised; `earliest_s` can, None when nothing within the horizon."""

    earliest_s: float | None
    need_s: float  # where it fails first: work due by then
    low_s: float  # and capacity until then
    failed_at_s: float


def capacity_at(curve: Sequence[float], bin_s: float, at_s: float) -> float:
    """Of a cumulative curve; constant within a bin, and nothing beyond the last."""
    place = max(0.0, at_s) / bin_s
    index = int(place)
    if index >= len(curve) - 1:
        return curve[-1]
    return curve[index] + (place - index) * (curve[index + 1] - curve[index])


def time_of(curve: Sequence[float], bin_s: float, work_s: float) -> float:
    """When a cumulative curve first reaches that much work; infinite beyond its end."""
    if work_s <= 0.0:
        return 0.0
    index = bisect_left(curve, work_s)
    if index >= len(curve):
        return inf
    below = curve[index - 1]
    return bin_s * (index - 1 + (work_s - below) / (curve[index] - below))


def need_s(mean_s: float, var_s2: float) -> float:
    """Work that is enough at 95 %. Items' errors shrink in the sum: their own 95 % never add up."""
    return mean_s + Z * sqrt(var_s2)


def slack_by(queue: Sequence[Demand], forecast: Forecast) -> list[tuple[float, float]]:
    """(deadline, capacity / need - 1) for each deadline of the queue, in order."""
    found: list[tuple[float, float]] = []
    mean_s = var_s2 = 0.0
    ordered = sorted(queue, key=lambda demand: demand.deadline_s)
    for index, demand in enumerate(ordered):
        mean_s, var_s2 = mean_s + demand.mean_s, var_s2 + demand.var_s2
        if index + 1 < len(ordered) and ordered[index + 1].deadline_s == demand.deadline_s:
            continue
        needed_s = need_s(mean_s, var_s2)
        low_s = capacity_at(forecast.low_s, forecast.bin_s, demand.deadline_s)
        found.append((demand.deadline_s, low_s / needed_s - 1.0 if needed_s > 0.0 else inf))
    return found


def certify(queue: Sequence[Demand], job: Demand, forecast: Forecast) -> Admitted | Refused:
    """Promise `job` its deadline beside what is promised already, or say which one is possible.

    Deadlines before its own are none of its doing: a promise that is in danger already, because the
    forecast has fallen, refuses nobody who comes after it."""
    later = slack_by([*queue, job], forecast)
    bearing = [(at_s, slack) for at_s, slack in later if at_s >= job.deadline_s]
    failed = [at_s for at_s, slack in bearing if slack < 0.0]
    is_long_enough = job.deadline_s >= job.run_s
    if not failed and is_long_enough:
        return Admitted(min(slack for _, slack in bearing), job.deadline_s)
    at_s = failed[0] if failed else job.deadline_s
    due = [demand for demand in (*queue, job) if demand.deadline_s <= at_s]
    needed_s = need_s(sum(d.mean_s for d in due), sum(d.var_s2 for d in due))
    low_s = capacity_at(forecast.low_s, forecast.bin_s, at_s)
    return Refused(earliest(queue, job, forecast), needed_s, low_s, at_s)


def earliest(queue: Sequence[Demand], job: Demand, forecast: Forecast) -> float | None:
    """The first whole minute that can be promised to the job; it is admitted there."""
    ordered = sorted(queue, key=lambda demand: demand.deadline_s)
    mean_s, var_s2 = job.mean_s, job.var_s2
    after: list[tuple[float, float]] = [(0.0, need_s(mean_s, var_s2))]  # due by, with the job
    for demand in ordered:
        mean_s, var_s2 = mean_s + demand.mean_s, var_s2 + demand.var_s2
        after.append((demand.deadline_s, need_s(mean_s, var_s2)))
    # Due after the last deadline that it would break, it breaks none: those that follow have room
    # for it, so what it needs there is all that is left to ask.
    at_s, needed_s = after[0]
    for due_s, due_need_s in after[1:]:
        if capacity_at(forecast.low_s, forecast.bin_s, due_s) < due_need_s:
            at_s, needed_s = due_s, due_need_s
    fits_s = max(time_of(forecast.low_s, forecast.bin_s, needed_s), job.run_s, at_s)
    if fits_s == inf:
        return None
    offered_s = QUOTE_S * ceil(fits_s / QUOTE_S)
    return offered_s if offered_s <= forecast.horizon_s else None


@dataclass(frozen=True, slots=True)
class Lines:
    """A batch as a number of lines of about the same cost, some of them done. GPU-seconds."""

    num_left: int
    line_s: float  # mean, as estimated at submit
    bias: float  # relative error of that estimate, one deviation
    cv: float  # coefficient of variation between lines
    num_done: int = 0
    done_s: float = 0.0  # what the done ones took together

    def left(self) -> tuple[float, float]:
        """(mean, variance) of what is left: the estimate at submit and the lines that are done,
        weighted by their precision. The error of the mean line is one for all lines that are left,
        so that it does not shrink in the sum."""
        line_s, bias = self.line_s, self.bias
        if self.num_done and bias > 0.0:
            weight = bias**2 / (bias**2 + self.cv**2 / self.num_done)
            line_s += weight * (self.done_s / self.num_done - line_s)
            bias *= sqrt(1.0 - weight)
        mean_s = self.num_left * line_s
        return mean_s, self.num_left * (self.cv * line_s) ** 2 + (bias * mean_s) ** 2


@dataclass(frozen=True, slots=True)
class Finish:
    """When a batch is expected to end, and between which times with 90 %; seconds from now."""

    expected_s: float
    from_s: float
    by_s: float


@dataclass(slots=True)
class FinishRatios:
    """How long finished batches took, over what was expected; short and long ones apart, because
    what arrives later passes long ones only. Bounded: the newest RATIOS_MAX of each kind."""

    _kinds: list[deque[float]] = field(
        default_factory=lambda: [deque(maxlen=RATIOS_MAX) for _ in range(len(KIND_S) + 1)]
    )

    def observe(self, expected_s: float, took_s: float) -> None:
        assert expected_s > 0.0 and took_s >= 0.0, (expected_s, took_s)
        self._kinds[bisect_left(KIND_S, expected_s)].append(took_s / expected_s)

    def __len__(self) -> int:
        return sum(len(kind) for kind in self._kinds)

    def interval(self, expected_s: float) -> tuple[float, float]:
        """The shortest interval that holds INTERVAL of the ratios of its kind; of all ratios until
        there are RATIOS_MIN. The share is conformal: of n + 1, the next one included."""
        ratios = sorted(self._kinds[bisect_left(KIND_S, expected_s)])
        if len(ratios) < RATIOS_MIN:
            ratios = sorted(ratio for kind in self._kinds for ratio in kind)
        if len(ratios) < RATIOS_MIN:
            return RATIOS_UNKNOWN
        inside = min(len(ratios), ceil(INTERVAL * (len(ratios) + 1)))
        starts = range(len(ratios) - inside + 1)
        first = min(starts, key=lambda start: ratios[start + inside - 1] - ratios[start])
        return ratios[first], ratios[first + inside - 1]


def finish(
    queue: Sequence[Demand],
    job: Demand,
    forecast: Forecast,
    inflow: Sequence[tuple[float, float]],
    ratios: FinishRatios,
) -> Finish:
    """Of an admitted job, under EDF: what is due before it runs before it. A job that asks for
    nothing has ended.

    `inflow` are (relative deadline in s, GPU-seconds per s) of work that keeps coming; what is due
    sooner than the job passes it."""
    ahead = [demand for demand in queue if demand.deadline_s <= job.deadline_s]
    work_s = job.mean_s + sum(demand.mean_s for demand in ahead)
    expected_s = _passed(forecast, work_s, job.deadline_s, inflow) if job.mean_s > 0.0 else 0.0
    if expected_s == inf:
        expected_s = job.deadline_s
    expected_s = max(expected_s, job.run_s, EXPECTED_S_MIN)
    low, high = ratios.interval(expected_s)
    return Finish(expected_s, low * expected_s, high * expected_s)


def _passed(
    forecast: Forecast, work_s: float, deadline_s: float, inflow: Sequence[tuple[float, float]]
) -> float:
    """When the mean capacity less the work that passes it reaches work_s, which is above 0."""
    curve, bin_s = forecast.mean_s, forecast.bin_s
    passed_s = before_s = 0.0
    for index in range(1, len(curve)):
        at_s = bin_s * (index - 1)
        rate = sum(share for relative_s, share in inflow if at_s + relative_s < deadline_s)
        passed_s += rate * bin_s
        left_s = curve[index] - passed_s
        if left_s >= work_s:
            return at_s + bin_s * (work_s - before_s) / (left_s - before_s)
        before_s = left_s
    return inf
