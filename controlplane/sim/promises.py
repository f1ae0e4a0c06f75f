"""Laws of the certificate, tried on drawn batches: what is promised fits, what is refused does not,
and the deadline offered instead is the first whole minute that could be promised.

Everything is counted again the plain way, minute by minute. Some problems are of round numbers, for
which every sum is exact, so that what just fits is seen to fit.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, isclose, sqrt

from controlplane import certificate
from controlplane.certificate import Admitted, Demand, FinishRatios, Forecast
from controlplane.sim.events import Chance

BINS, BIN_S = 20, 300.0
BATCHES = 10
MINUTE_S = 60.0
RATIOS = (0, 19, 20, 21, 40)
ROUND_SHARE = 0.3
STEP_S = 1.0


def check(chance: Chance) -> None:
    """One queue that grows batch by batch."""
    is_round = chance.random() < ROUND_SHARE
    forecast = _forecast(chance, is_round)
    _check_curve(forecast, chance)
    ratios = _Ratios(chance)
    queue: list[Demand] = []
    for _ in range(BATCHES):
        job = _round_batch(chance) if is_round else _batch(chance, queue)
        if _check_answer(queue, job, forecast, is_round):
            inflow = _inflow(chance, is_round)
            _check_finish(queue, job, forecast, inflow, ratios)
            queue.append(job)
        if not is_round and chance.random() < 0.2:  # capacity is less than it was thought to be
            share = chance.uniform(0.6, 1.0)
            forecast = replace(forecast, low_s=tuple(share * low for low in forecast.low_s))


def _forecast(chance: Chance, is_round: bool) -> Forecast:
    """Some bins give batch nothing; some forecasts give it nothing at all."""
    mean_s, low_s, high_s = [0.0], [0.0], [0.0]
    is_empty = chance.random() < 0.05
    for _ in range(BINS):
        gain_s = chance.choice((0.0, chance.uniform(0.0, 4.0 * BIN_S)))
        low, high = chance.uniform(0.5, 1.0), chance.uniform(1.0, 1.5)
        if is_round:
            gain_s, low, high = BIN_S * chance.choice((0.0, 0.0, 1.0, 2.0)), 1.0, 1.0
        gain_s = 0.0 if is_empty else gain_s
        mean_s.append(mean_s[-1] + gain_s)
        low_s.append(low_s[-1] + low * gain_s)
        high_s.append(high_s[-1] + high * gain_s)
    return Forecast(BIN_S, tuple(mean_s), tuple(low_s), tuple(high_s))


def _round_batch(chance: Chance) -> Demand:
    deadline_s = BIN_S * chance.randint(1, BINS)
    run_s = BIN_S * chance.choice((0, 0, chance.randint(1, BINS)))
    return Demand(deadline_s, BIN_S * chance.randint(0, 3), 0.0, run_s)


def _inflow(chance: Chance, is_round: bool) -> list[tuple[float, float]]:
    """One kind of work that keeps coming: due in, share of the time."""
    if is_round:
        return [(BIN_S * chance.randint(0, BINS), chance.choice((0.0, 0.5, 1.0)))]
    return [(chance.uniform(0.0, 3_000.0), chance.uniform(0.0, 0.3))]


def _batch(chance: Chance, queue: Sequence[Demand]) -> Demand:
    """Often due together with one that is promised already, or on a whole minute."""
    deadline_s = chance.uniform(0.0, 1.1 * BINS * BIN_S)
    if chance.random() < 0.3:
        deadline_s = MINUTE_S * round(deadline_s / MINUTE_S)
    if queue and chance.random() < 0.3:
        deadline_s = chance.choice(queue).deadline_s
    mean_s = chance.choice((0.0, chance.uniform(1.0, 1_500.0)))
    run_s = chance.choice((0.0, 0.0, chance.uniform(0.0, 2.0 * BIN_S)))
    if queue and chance.random() < 0.1:  # as long as there is until another one is due
        run_s = chance.choice(queue).deadline_s
    return Demand(deadline_s, mean_s, (chance.uniform(0.0, 0.2) * mean_s) ** 2, run_s)


class _Ratios:
    """FinishRatios and what it was told."""

    def __init__(self, chance: Chance) -> None:
        self.kept = FinishRatios()
        self._seen: list[tuple[float, float]] = []
        for _ in range(chance.choice(RATIOS)):
            expected_s = chance.choice((chance.uniform(60.0, 20_000.0), *certificate.KIND_S))
            took_s = chance.uniform(10.0, 20_000.0)
            self.kept.observe(expected_s, took_s)
            self._seen.append((expected_s, took_s / expected_s))
        assert len(self.kept) == len(self._seen), f"promise: {len(self.kept)} ratios are kept"

    def check(self, expected_s: float) -> tuple[float, float]:
        """The narrowest of all intervals that hold enough of them."""
        low, high = self.kept.interval(expected_s)
        kind = _kind(expected_s)
        found = sorted(ratio for other_s, ratio in self._seen if _kind(other_s) == kind)
        if len(found) < certificate.RATIOS_MIN:
            found = sorted(ratio for _, ratio in self._seen)
        if len(found) < certificate.RATIOS_MIN:
            assert (low, high) == certificate.RATIOS_UNKNOWN, f"promise: {len(found)} ratios known"
            return low, high
        least = min(len(found), ceil(certificate.INTERVAL * (len(found) + 1)))
        inside = sum(low <= ratio <= high for ratio in found)
        assert inside >= least, f"promise: {inside} of {len(found)} ratios from {low} to {high}"
        narrowest = min(end - start for start, end in zip(found, found[least - 1 :], strict=False))
        assert high - low == narrowest, f"promise: ratios from {low} to {high}, not {narrowest}"
        return low, high


def _kind(expected_s: float) -> int:
    return sum(expected_s > limit_s for limit_s in certificate.KIND_S)


def _low_s(forecast: Forecast, at_s: float) -> float:
    """Capacity until then, read off the curve."""
    end_s = BIN_S * (len(forecast.low_s) - 1)
    if at_s >= end_s:
        return forecast.low_s[-1]
    index = int(at_s // BIN_S)
    share = at_s / BIN_S - index
    return (1.0 - share) * forecast.low_s[index] + share * forecast.low_s[index + 1]


def _need_s(due: Sequence[Demand]) -> float:
    return sum(d.mean_s for d in due) + 1.645 * sqrt(sum(d.var_s2 for d in due))


def _slacks(queue: Sequence[Demand], job: Demand, forecast: Forecast) -> list[float]:
    """Capacity over need, less one, at the job's deadline and at each after it."""
    found = []
    for at_s in {d.deadline_s for d in (*queue, job) if d.deadline_s >= job.deadline_s}:
        need_s = _need_s([d for d in (*queue, job) if d.deadline_s <= at_s])
        found.append(_low_s(forecast, at_s) / need_s - 1.0 if need_s > 0.0 else inf)
    return found


def _fits(queue: Sequence[Demand], job: Demand, forecast: Forecast) -> bool:
    return job.deadline_s >= job.run_s and min(_slacks(queue, job, forecast)) >= 0.0


def _check_answer(queue: Sequence[Demand], job: Demand, forecast: Forecast, is_exact: bool) -> bool:
    answer = certificate.certify(queue, job, forecast)
    least = min(_slacks(queue, job, forecast))
    is_close = not is_exact and isclose(least, 0.0, abs_tol=1e-9)
    if isinstance(answer, Admitted):
        assert _fits(queue, job, forecast) or is_close, f"promise: {job} of {queue} does not fit"
        assert answer.slack == least or isclose(answer.slack, least, abs_tol=1e-9), (
            f"promise: a slack of {answer.slack}, it is {least}"
        )
        assert answer.deadline_s == job.deadline_s, f"promise: {answer} for {job}"
        return True
    assert not _fits(queue, job, forecast) or is_close, f"promise: {job} would fit {queue}"
    due = [d for d in (*queue, job) if d.deadline_s <= answer.failed_at_s]
    assert isclose(answer.need_s, _need_s(due), rel_tol=1e-9), f"promise: {answer} for {due}"
    low_s = _low_s(forecast, answer.failed_at_s)
    assert isclose(answer.low_s, low_s, abs_tol=1e-6), f"promise: {answer}, capacity {low_s}"
    _check_offer(queue, job, forecast, answer.earliest_s, is_exact)
    return False


def _check_offer(
    queue: Sequence[Demand],
    job: Demand,
    forecast: Forecast,
    offered_s: float | None,
    is_exact: bool,
) -> None:
    last = int(forecast.horizon_s / MINUTE_S)
    minutes = [MINUTE_S * index for index in range(last + 1)]
    fitting = [at_s for at_s in minutes if _fits(queue, replace(job, deadline_s=at_s), forecast)]
    first_s = fitting[0] if fitting else None
    if offered_s == first_s:
        return
    sooner_s = min(inf if at_s is None else at_s for at_s in (offered_s, first_s))
    slack = min(_slacks(queue, replace(job, deadline_s=sooner_s), forecast))
    is_rounding = not is_exact and isclose(slack, 0.0, abs_tol=1e-9)
    assert is_rounding, f"promise: {offered_s} is offered, {first_s} is the first: {job} {queue}"


def _check_finish(
    queue: Sequence[Demand],
    job: Demand,
    forecast: Forecast,
    inflow: Sequence[tuple[float, float]],
    ratios: _Ratios,
) -> None:
    """Second by second: what is due before it goes before it, and what keeps coming passes it."""
    found = certificate.finish(queue, job, forecast, inflow, ratios.kept)
    work_s = job.mean_s + sum(d.mean_s for d in queue if d.deadline_s <= job.deadline_s)
    left_s = at_s = 0.0
    while job.mean_s > 0.0 and left_s < work_s and at_s < forecast.horizon_s:
        index = int(at_s // BIN_S)
        gain_s = (forecast.mean_s[index + 1] - forecast.mean_s[index]) / BIN_S
        # An inflow passes by its deadline as of the bin's beginning.
        passing = [rate for due_s, rate in inflow if BIN_S * index + due_s < job.deadline_s]
        left_s += STEP_S * (gain_s - sum(passing))
        at_s += STEP_S
    expected_s = at_s if at_s == 0.0 or left_s >= work_s else job.deadline_s
    expected_s = max(expected_s, job.run_s, certificate.EXPECTED_S_MIN)
    error_s = abs(found.expected_s - expected_s)
    assert error_s <= 2.0 * STEP_S, f"promise: {found}, counted {expected_s}"
    low, high = ratios.check(found.expected_s)
    assert isclose(found.from_s, low * found.expected_s), f"promise: {found} from {low}"
    assert isclose(found.by_s, high * found.expected_s), f"promise: {found} by {high}"


def _check_curve(forecast: Forecast, chance: Chance) -> None:
    """Time and work of a cumulative curve are each other's inverse."""
    curve = forecast.low_s
    assert certificate.time_of(curve, BIN_S, 0.0) == 0.0
    assert certificate.time_of(curve, BIN_S, 2.0 * curve[-1] + 1.0) == inf
    for _ in range(5):
        work_s = chance.uniform(0.0, curve[-1])
        at_s = certificate.time_of(curve, BIN_S, work_s)
        there_s = certificate.capacity_at(curve, BIN_S, at_s)
        assert isclose(there_s, work_s, abs_tol=1e-6), f"promise: {work_s} s of work, {there_s}"
        before_s = certificate.capacity_at(curve, BIN_S, max(0.0, at_s - 1e-3))
        assert before_s <= work_s, f"promise: {work_s} s of work are there before {at_s}"
