"""What the planner measures of a model: window, burstiness, sizes, corrections."""

import pytest

from controlplane.config import ControlPlaneConfig
from controlplane.demand import COUNT_S, DISPERSION_MAX, PRIORS, SAMPLES_MIN, Demand, Ratio
from controlplane.sim.events import Events
from tests.factories import make_request


def demand(**settings: float) -> Demand:
    return Demand(ControlPlaneConfig(**settings))


def admit(target: Demand, at_s: float, is_long: bool = False, prefill_s: float = 0.1) -> None:
    target.admitted(make_request(prompt_tokens=100), prefill_s, is_long, False, at_s)


def test_prior_holds_until_more_than_its_samples_were_seen():
    ratio = Ratio(1.8)
    for _ in range(SAMPLES_MIN):
        ratio.observe(1.0, 1.2)
    assert ratio.value == 1.8
    ratio.observe(1.0, 1.2)
    assert ratio.value == pytest.approx(1.2)


def test_corrections_begin_with_the_published_priors_and_bad_numbers_teach_nothing():
    target = demand()
    found = target.corrections()
    assert (found.prefill, found.decode, found.ttft) == pytest.approx((0.90, 0.92, 1.8))
    target.ttft_ratio.observe(0.0, 5.0)
    target.ttft_ratio.observe(1.0, 0.0)
    assert target.ttft_ratio.num_samples == 0 and PRIORS.ttft == 1.8


def test_window_counts_what_came_in_it():
    target = demand(plan_window_s=30.0)
    for second in range(60):
        admit(target, float(second), is_long=second % 4 == 0, prefill_s=0.5)
    window = target.window(59.0)
    assert (window.num_requests, window.num_long) == (30, 7)
    assert window.long_s == pytest.approx(3.5) and window.short_s == pytest.approx(11.5)
    assert target.window(200.0).num_requests == 0


def arrivals(kind: str, seed: int = 1):
    """600 s at 3 per second: regular, Poisson, in bursts of ten, or with a step in the rate."""
    chance, at_s = Events(seed).random, 0.0
    while at_s < 600.0:
        if kind == "regular":
            at_s += 1.0 / 3.0
        elif kind == "bursts":
            at_s += chance.expovariate(0.3)
        else:
            at_s += chance.expovariate(1.5 if kind == "step" and at_s < 300.0 else 3.0)
        for _ in range(10 if kind == "bursts" else 1):
            yield at_s


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("regular", 1.0, 1.0), ("poisson", 1.0, 1.6), ("step", 1.0, 1.9), ("bursts", 5.0, 8.0)],
)
def test_dispersion_tells_bursts_from_a_change_of_the_rate(kind, low, high):
    target = demand()
    for at_s in arrivals(kind):
        admit(target, at_s)
    assert low <= target.dispersion() <= min(high, DISPERSION_MAX)


def test_dispersion_of_little_history_is_poisson_s():
    target = demand()
    admit(target, 0.0)
    target.advance(5 * COUNT_S)
    assert target.dispersion() == 1.0


def test_outputs_are_as_long_as_they_may_be_until_one_has_ended():
    target = demand()
    target.admitted(make_request(prompt_tokens=100, output_tokens_max=64), 0.1, False, False, 0.0)
    assert target.outputs(1.0).output_tokens == 64.0
    target.ended(100, 10)
    assert target.outputs(1.0).output_tokens == 10.0
    assert target.outputs(1.0).context_tokens == 105.0


def test_load_is_at_least_the_forecast_for_a_cold_start_from_now():
    target = demand(forecast_bin_s=10.0, forecast_horizon_s=20.0, node_horizon_s=40.0,
                    forecast_s_min=60.0)  # fmt: skip
    for second in range(200):
        for _ in range(4):
            admit(target, float(second))
    assert target.load(200.0).outputs.per_s == pytest.approx(4.0, rel=0.1)
    quiet_s = 205.0 + 30.0  # the window has emptied, the forecast remembers
    assert target.load(quiet_s).outputs.per_s == 0.0
    assert target.load(quiet_s, 0.99).outputs.per_s > 0.5
