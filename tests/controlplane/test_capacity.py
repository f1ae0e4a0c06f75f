"""The forecast of what batch gets: monotone, honest about days, silent about what it never saw."""

import pytest

from controlplane import capacity
from controlplane.capacity import DAYS_MAX, Day, Supply, fit

BIN_S = 21_600.0  # four bins a day: tests can be checked by hand
SUPPLY = Supply(num_workers=10.0, ceiling=0.9, phi=1.0)


def days_of(factors, usual=(0.2, 0.4, 0.6, 0.4)):
    return [
        Day(index % 7, tuple(factor * share for share in usual))
        for index, factor in enumerate(factors)
    ]


def test_nothing_seen_gives_no_profile():
    assert fit([], BIN_S) is None
    assert fit([Day(0, (None, None, None, None))], BIN_S) is None


def test_equal_days_are_forecast_exactly():
    profile = fit(days_of([1.0] * 28), BIN_S)
    forecast = profile.forecast(0, 0.0, (), SUPPLY, 2 * capacity.DAY_S)
    gained = [b - a for a, b in zip(forecast.mean_s, forecast.mean_s[1:], strict=False)]
    assert gained == pytest.approx([10 * BIN_S * s for s in (0.7, 0.5, 0.3, 0.5)] * 2)
    assert forecast.low_s == pytest.approx(forecast.mean_s)
    assert forecast.high_s == pytest.approx(forecast.mean_s)


def test_the_low_estimate_of_a_day_is_that_of_its_worst_factor_and_days_add_in_squares():
    factors = [1.0 + 0.1 * (-1) ** (index // 7) for index in range(28)]
    profile = fit(days_of(factors), BIN_S)
    forecast = profile.forecast(0, 0.0, (), SUPPLY, 4 * capacity.DAY_S)
    lost = [mean - low for mean, low in zip(forecast.mean_s, forecast.low_s, strict=True)]
    assert lost[4] > 0.0
    assert lost[16] == pytest.approx(2.0 * lost[4], rel=1e-6)  # not four times
    for curve in (forecast.mean_s, forecast.low_s, forecast.high_s):
        assert list(curve) == sorted(curve)


def test_the_morning_tells_what_kind_of_day_it_is():
    factors = [1.0 + 0.2 * (-1) ** (index // 7) for index in range(28)]
    profile = fit(days_of(factors), BIN_S)
    busy = profile.factor_today(0, (0.3, 0.6))
    assert busy[0] == pytest.approx(1.5, rel=0.05) and busy[1] < 0.2
    assert profile.factor_today(0, ()) == (profile.factor_mean, 1.0)
    seen = profile.forecast(0, 2 * BIN_S, (0.3, 0.6), SUPPLY, capacity.DAY_S)
    unseen = profile.forecast(0, 2 * BIN_S, (None, None), SUPPLY, capacity.DAY_S)
    assert seen.mean_s[2] < unseen.mean_s[2]
    assert seen.mean_s[2] - seen.low_s[2] < unseen.mean_s[2] - unseen.low_s[2]


def test_less_than_a_week_knows_the_hour_but_not_the_weekday():
    profile = fit(days_of([1.0, 1.0]), BIN_S)
    assert profile.week[6] == pytest.approx((0.2, 0.4, 0.6, 0.4))
    assert profile.factor_sd == capacity.FACTOR_SD_UNKNOWN  # a wide band


def test_a_day_is_judged_by_the_others():
    """One odd Monday of two: against their mean it would look half as odd as it is."""
    factors = [1.0] * 14
    factors[7] = 2.0
    profile = fit(days_of(factors), BIN_S)
    assert profile.factor_high >= 2.0


def test_bins_nobody_saw_get_the_mean_of_the_others():
    profile = fit([Day(0, (0.2, None, 0.4, None))], BIN_S)
    assert profile.week[0] == pytest.approx((0.2, 0.3, 0.4, 0.3))


def test_history_is_bounded():
    old = [Day(0, (0.9, 0.9, 0.9, 0.9))]
    profile = fit([*old, *days_of([1.0] * DAYS_MAX)], BIN_S)
    assert profile.week[0] == pytest.approx((0.2, 0.4, 0.6, 0.4))


def test_failures_and_harvest_take_their_share():
    profile = fit(days_of([1.0] * 28), BIN_S)
    less = Supply(10.0, 0.9, phi=0.8, failed=0.5)
    whole = profile.forecast(0, 0.0, (), SUPPLY, capacity.DAY_S).mean_s[-1]
    part = profile.forecast(0, 0.0, (), less, capacity.DAY_S).mean_s[-1]
    assert part == pytest.approx(0.4 * whole)
