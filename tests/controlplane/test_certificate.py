"""The demand-bound test against EDF itself, and the figures of what it promises."""

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.certificate import (
    EXPECTED_S_MIN,
    INTERVAL,
    RATIOS_MAX,
    RATIOS_MIN,
    RATIOS_UNKNOWN,
    Admitted,
    Demand,
    FinishRatios,
    Forecast,
    Refused,
    capacity_at,
    certify,
    finish,
    slack_by,
    time_of,
)

BIN_S = 60.0


def forecast_of(rates):
    """Exact: the same curve for every estimate."""
    curve = [0.0]
    for rate in rates:
        curve.append(curve[-1] + BIN_S * rate)
    return Forecast(BIN_S, tuple(curve), tuple(curve), tuple(curve))


def edf_keeps_all(demands, rates):
    """Plays EDF in steps of one second; True when nothing is late by more than rounding."""
    left = {index: demand.mean_s for index, demand in enumerate(demands)}
    for second in range(int(BIN_S) * len(rates)):
        room = rates[second // int(BIN_S)]
        for index in sorted(left, key=lambda i: (demands[i].deadline_s, i)):
            given = min(room, left[index])
            left[index] -= given
            room -= given
        for index, demand in enumerate(demands):
            if demand.deadline_s <= second + 1 and left[index] > 1e-6:
                return False
    return all(work <= 1e-6 for work in left.values())


rates_of = st.lists(st.sampled_from((0.0, 0.25, 1.0, 2.0, 5.0)), min_size=4, max_size=8)
demand_of = st.builds(
    Demand, deadline_s=st.integers(1, 480).map(float), mean_s=st.integers(1, 120).map(float)
)


@settings(max_examples=200, deadline=None)
@given(rates_of, st.lists(demand_of, max_size=5), demand_of)
def test_the_test_agrees_with_edf_on_known_capacity(rates, queue, job):
    forecast = forecast_of(rates)
    queue = [item for item in queue if item.deadline_s <= forecast.horizon_s]
    if job.deadline_s > forecast.horizon_s or not edf_keeps_all(queue, rates):
        return
    admitted = isinstance(certify(queue, job, forecast), Admitted)
    assert admitted == edf_keeps_all([*queue, job], rates)


@settings(max_examples=200, deadline=None)
@given(rates_of, st.lists(demand_of, max_size=5), demand_of, st.integers(0, 7))
def test_more_supply_never_refuses_what_less_admitted(rates, queue, job, place):
    more = [rate + (index == place) for index, rate in enumerate(rates)]
    if isinstance(certify(queue, job, forecast_of(rates)), Admitted):
        assert isinstance(certify(queue, job, forecast_of(more)), Admitted)


@settings(max_examples=300, deadline=None)
@given(rates_of, st.lists(demand_of, max_size=5), demand_of)
def test_the_deadline_that_is_offered_is_admitted_and_no_minute_sooner(rates, queue, job):
    forecast = forecast_of(rates)
    outcome = certify(queue, job, forecast)
    if not isinstance(outcome, Refused) or outcome.earliest_s is None:
        return
    offered_s = outcome.earliest_s
    offer = Demand(offered_s, job.mean_s)
    assert isinstance(certify(queue, offer, forecast), Admitted)
    assert offered_s > job.deadline_s or offered_s % 60.0 == 0.0
    for earlier_s in range(60, int(offered_s), 60):
        earlier = Demand(float(earlier_s), job.mean_s)
        assert isinstance(certify(queue, earlier, forecast), Refused)


def test_a_job_must_not_break_a_promise_that_is_due_later():
    forecast = forecast_of([1.0] * 10)
    queue = [Demand(300.0, 290.0)]
    refused = certify(queue, Demand(100.0, 20.0), forecast)
    assert isinstance(refused, Refused)
    assert (refused.failed_at_s, refused.need_s, refused.low_s) == (300.0, 310.0, 300.0)
    assert refused.earliest_s == 360.0


def test_a_promise_in_danger_refuses_nobody_who_is_due_later():
    forecast = forecast_of([0.0] + [2.0] * 9)
    late = Demand(30.0, 10.0)
    assert slack_by([late], forecast) == [(30.0, -1.0)]
    assert isinstance(certify([late], Demand(300.0, 100.0), forecast), Admitted)


def test_errors_of_items_shrink_in_the_sum():
    """100 items of mean 1 and deviation 1 need 116 s at 95 %; each at its own 95 % would be 264."""
    job = Demand(120.0, mean_s=100.0, var_s2=100.0)
    assert isinstance(certify([], job, forecast_of([1.0] * 3)), Admitted)
    assert isinstance(certify([], job, forecast_of([0.96] * 3)), Refused)


def test_no_deadline_is_shorter_than_one_item_alone():
    job = Demand(30.0, mean_s=1.0, run_s=45.0)
    refused = certify([], job, forecast_of([10.0] * 3))
    assert isinstance(refused, Refused) and refused.earliest_s == 60.0


def test_an_offer_may_be_due_together_with_another_batch():
    job = Demand(60.0, mean_s=1.0, run_s=120.0)
    refused = certify([Demand(120.0, 1.0)], job, forecast_of([10.0] * 3))
    assert isinstance(refused, Refused) and refused.earliest_s == 120.0


def test_beyond_the_horizon_nothing_is_offered():
    refused = certify([], Demand(60.0, 1_000.0), forecast_of([1.0] * 3))
    assert isinstance(refused, Refused) and refused.earliest_s is None


def test_an_empty_job_has_all_the_slack():
    assert certify([], Demand(60.0, 0.0), forecast_of([1.0] * 3)) == Admitted(inf, 60.0)


def test_curves_are_read_within_bins_and_at_their_ends():
    curve = (0.0, 60.0, 60.0, 120.0)
    assert [capacity_at(curve, BIN_S, at) for at in (0.0, 30.0, 90.0, 150.0, 999.0)] == [
        0.0, 30.0, 60.0, 90.0, 120.0,
    ]  # fmt: skip
    assert [time_of(curve, BIN_S, work) for work in (0.0, 30.0, 60.0, 90.0, 121.0)] == [
        0.0, 30.0, 60.0, 150.0, inf,
    ]  # fmt: skip


# --- the quoted finish ---------------------------------------------------------------------------


def test_what_is_due_before_runs_before_and_what_comes_sooner_passes():
    forecast = forecast_of([2.0] * 20)
    queue = [Demand(100.0, 120.0), Demand(1_000.0, 500.0)]
    alone = finish(queue, Demand(500.0, 240.0), forecast, (), FinishRatios())
    assert alone.expected_s == pytest.approx(180.0)
    passed = finish(queue, Demand(500.0, 240.0), forecast, ((60.0, 1.0),), FinishRatios())
    assert passed.expected_s == pytest.approx(360.0)
    assert (passed.from_s, passed.by_s) == tuple(
        pytest.approx(360.0 * ratio) for ratio in RATIOS_UNKNOWN
    )


def test_a_job_that_asks_for_nothing_is_expected_to_have_ended():
    forecast, inflow = forecast_of([1.0] * 20), ((60.0, 2.0),)  # more comes than there is
    found = finish([Demand(100.0, 50.0)], Demand(900.0, 0.0), forecast, inflow, FinishRatios())
    assert found.expected_s == EXPECTED_S_MIN


def test_the_interval_is_the_shortest_that_holds_its_share():
    ratios = FinishRatios()
    for index in range(100):
        ratios.observe(60.0, 60.0 * (1.0 + index / 1000.0 if index < 95 else 5.0))
    low, high = ratios.interval(60.0)
    assert (low, high) == (1.0, pytest.approx(1.092))  # 93 of 100
    assert ratios.interval(100_000.0) == (low, high)  # no long one yet: those of all


def test_few_ratios_say_nothing_and_old_ones_are_forgotten():
    ratios = FinishRatios()
    for _ in range(RATIOS_MIN - 1):
        ratios.observe(60.0, 60.0)
    assert ratios.interval(60.0) == RATIOS_UNKNOWN
    for _ in range(RATIOS_MAX + 1):
        ratios.observe(60.0, 120.0)
    assert len(ratios) == RATIOS_MAX and ratios.interval(60.0) == (2.0, 2.0)
    assert 0.85 <= INTERVAL <= 0.95
