"""Laws of the certificate, tried on drawn batches: what is promised fits, what is refused does not,
and the deadline offered instead is the first whole minute that could be promised.

Everything is counted again the plain way, minute by minute.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isclose, sqrt

from controlplane import certificate
from controlplane.certificate import Admitted, Demand, FinishRatios, Forecast
from controlplane.sim.events import Chance

BINS, BIN_S = 20, 300.0
BATCHES = 10
MINUTE_S = 60.0
RATIOS = 40
STEP_S = 1.0


def check(chance: Chance) -> None:
    """One queue that grows batch by batch."""
    forecast = _forecast(chance)
    _check_curve(forecast, chance)
    ratios = _ratios(chance)
    queue: list[Demand] = []
    for _ in range(BATCHES):
        job = _batch(chance, queue)
        if _check_answer(queue, job, forecast):
            if job.mean_s > 0.0:
                _check_finish(queue, job, forecast, ratios, chance)
            queue.append(job)
        if chance.random() < 0.2:  # capacity is less than it was thought to be
            share = chance.uniform(0.6, 1.0)
            forecast = replace(forecast, low_s=tuple(share * low for low in forecast.low_s))


def _forecast(chance: Chance) -> Forecast:
    """Some bins give batch nothing."""
    mean_s, low_s, high_s = [0.0], [0.0], [0.0]
    for _ in range(BINS):
        gain_s = chance.choice((0.0, chance.uniform(0.0, 4.0 * BIN_S)))
        mean_s.append(mean_s[-1] + gain_s)
        low_s.append(low_s[-1] + chance.uniform(0.5, 1.0) * gain_s)
        high_s.append(high_s[-1] + chance.uniform(1.0, 1.5) * gain_s)
    return Forecast(BIN_S, tuple(mean_s), tuple(low_s), tuple(high_s))


def _batch(chance: Chance, queue: Sequence[Demand]) -> Demand:
    """Often due together with one that is promised already."""
    deadline_s = chance.uniform(0.0, 1.1 * BINS * BIN_S)
    if queue and chance.random() < 0.3:
        deadline_s = chance.choice(queue).deadline_s
    mean_s = chance.choice((0.0, chance.uniform(1.0, 1_500.0)))
    run_s = chance.choice((0.0, 0.0, chance.uniform(0.0, 2.0 * BIN_S)))
    return Demand(deadline_s, mean_s, (chance.uniform(0.0, 0.2) * mean_s) ** 2, run_s)


def _ratios(chance: Chance) -> FinishRatios:
    ratios = FinishRatios()
    for _ in range(RATIOS):
        ratios.observe(chance.uniform(60.0, 20_000.0), chance.uniform(10.0, 20_000.0))
    assert len(ratios) == RATIOS, f"promise: {len(ratios)} of {RATIOS} ratios are kept"
    return ratios


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


def _check_answer(queue: Sequence[Demand], job: Demand, forecast: Forecast) -> bool:
    answer = certificate.certify(queue, job, forecast)
    least = min(_slacks(queue, job, forecast))
    is_close = isclose(least, 0.0, abs_tol=1e-9)
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
    _check_offer(queue, job, forecast, answer.earliest_s)
    return False


def _check_offer(
    queue: Sequence[Demand], job: Demand, forecast: Forecast, offered_s: float | None
) -> None:
    last = int(forecast.horizon_s / MINUTE_S)
    minutes = [MINUTE_S * index for index in range(last + 1)]
    fitting = [at_s for at_s in minutes if _fits(queue, replace(job, deadline_s=at_s), forecast)]
    first_s = fitting[0] if fitting else None
    if offered_s == first_s:
        return
    sooner_s = min(inf if at_s is None else at_s for at_s in (offered_s, first_s))
    slack = min(_slacks(queue, replace(job, deadline_s=sooner_s), forecast))
    is_rounding = isclose(slack, 0.0, abs_tol=1e-9)
    assert is_rounding, f"promise: {offered_s} is offered, {first_s} is the first: {job} {queue}"


def _check_finish(
    queue: Sequence[Demand],
    job: Demand,
    forecast: Forecast,
    ratios: FinishRatios,
    chance: Chance,
) -> None:
    """Second by second: what is due before it goes before it, and what keeps coming passes it."""
    inflow = [(chance.uniform(0.0, 3_000.0), chance.uniform(0.0, 0.3))]
    found = certificate.finish(queue, job, forecast, inflow, ratios)
    work_s = job.mean_s + sum(d.mean_s for d in queue if d.deadline_s <= job.deadline_s)
    left_s = at_s = 0.0
    while left_s < work_s and at_s < forecast.horizon_s:
        index = int(at_s // BIN_S)
        gain_s = (forecast.mean_s[index + 1] - forecast.mean_s[index]) / BIN_S
        # An inflow passes by its deadline as of the bin's beginning.
        passing = [rate for due_s, rate in inflow if BIN_S * index + due_s < job.deadline_s]
        left_s += STEP_S * (gain_s - sum(passing))
        at_s += STEP_S
    expected_s = at_s if left_s >= work_s else job.deadline_s
    expected_s = max(expected_s, job.run_s, certificate.EXPECTED_S_MIN)
    assert abs(found.expected_s - expected_s) <= BIN_S, f"promise: {found}, counted {expected_s}"
    low, high = ratios.interval(found.expected_s)
    assert 0.0 < low <= high, f"promise: ratios from {low} to {high}"
    assert isclose(found.from_s, low * found.expected_s), f"promise: {found} from {low}"
    assert isclose(found.by_s, high * found.expected_s), f"promise: {found} by {high}"


def _check_curve(forecast: Forecast, chance: Chance) -> None:
    """Time and work of a cumulative curve are each other's inverse."""
    curve = forecast.low_s
    assert certificate.time_of(curve, BIN_S, 2.0 * curve[-1] + 1.0) == inf
    for _ in range(5):
        work_s = chance.uniform(0.0, curve[-1])
        at_s = certificate.time_of(curve, BIN_S, work_s)
        there_s = certificate.capacity_at(curve, BIN_S, at_s)
        assert isclose(there_s, work_s, abs_tol=1e-6), f"promise: {work_s} s of work, {there_s}"
        before_s = certificate.capacity_at(curve, BIN_S, max(0.0, at_s - 1e-3))
        assert before_s <= work_s, f"promise: {work_s} s of work are there before {at_s}"
