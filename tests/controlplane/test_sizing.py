"""Forecasts with measured bands, and how many workers a load needs."""

import heapq
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.forecast import DAY_S, DAYS_KEPT, Forecast
from controlplane.protocol import StepModel
from controlplane.sim.events import Events
from controlplane.sizing import (
    ROWS_MAX,
    WORKERS_MAX,
    DecodeLoad,
    PromptLoad,
    decode_workers,
    erlang_c,
    prefill_workers,
    rows_max,
    wait_s_p99,
)

H200 = StepModel(0.0045, 7e-6, 3.2e-8, (2e-5, 0.0))


@pytest.mark.parametrize(
    ("servers", "load", "expected"),
    [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (5, 4.0, 0.5541), (3, 3.0, 1.0), (4, 9.0, 1.0)],
)
def test_erlang_c_of_known_queues(servers, load, expected):
    assert erlang_c(servers, load) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.7), (2, 0.8), (4, 0.7), (8, 0.85)])
def test_p99_of_waiting_agrees_with_a_simulated_queue(servers, busy):
    """Poisson arrivals, lognormal prompts of cv2 1.04: within a fifth, and rarely below."""
    chance, sigma = Events(servers).random, 0.844
    mean_s = 0.1
    per_s = busy * servers / mean_s
    free = [0.0] * servers
    now_s, waits = 0.0, []
    for _ in range(150_000):
        now_s += chance.expovariate(per_s)
        start_s = max(now_s, heapq.heappop(free))
        service_s = chance.lognormvariate(math.log(mean_s) - sigma**2 / 2, sigma)
        heapq.heappush(free, start_s + service_s)
        waits.append(start_s - now_s)
    measured_s = sorted(waits)[int(0.99 * len(waits))]
    cv2 = math.exp(sigma**2) - 1.0
    predicted_s = wait_s_p99(PromptLoad(per_s, mean_s, 0.5, cv2), servers)
    assert 0.85 <= predicted_s / measured_s <= 1.35, (predicted_s, measured_s)


@given(st.floats(0.1, 200.0), st.floats(0.0, 50.0), st.floats(0.05, 5.0), st.floats(0.0, 5.0))
def test_more_load_or_a_stricter_target_never_needs_fewer(per_s, more, ttft_s, looser_s):
    def need(rate, target_s):
        return prefill_workers(PromptLoad(rate, 0.05, 0.2, 1.0), target_s, 0.02)

    assert need(per_s, ttft_s) <= need(per_s + more, ttft_s)
    assert need(per_s, ttft_s + looser_s) <= need(per_s, ttft_s) or ttft_s <= 0.22
    assert 1 <= need(per_s, ttft_s) <= WORKERS_MAX


def test_no_load_needs_nobody_and_any_load_at_least_one():
    assert prefill_workers(PromptLoad(0.0, 0.1, 0.1, 1.0), 1.0, 0.0) == 0
    assert decode_workers(DecodeLoad(0.0, 100.0, 1000.0), H200, 0.03, 10**6) == 0
    assert decode_workers(DecodeLoad(1e-3, 100.0, 1000.0), H200, 0.03, 10**6) == 1
    assert prefill_workers(PromptLoad(1e6, 1.0, 1.0, 1.0), 1.0, 0.0) == WORKERS_MAX


def test_rows_are_bound_by_step_time_by_kv_and_by_the_engine():
    loose = rows_max(H200, 1_000.0, 10.0, 10**9)
    assert loose == ROWS_MAX
    by_kv = rows_max(H200, 1_000.0, 10.0, 50_000)
    assert by_kv == 50
    by_time = rows_max(H200, 1_000.0, 0.01, 10**9)
    assert 1 < by_time < ROWS_MAX
    assert rows_max(H200, 1_000.0, 1e-6, 10**9) == 1


@given(st.floats(0.1, 100.0), st.floats(0.0, 50.0), st.floats(0.011, 0.05), st.floats(0.0, 0.05))
def test_decode_workers_grow_with_load_and_with_a_stricter_target(per_s, more, itl_s, looser_s):
    def need(rate, target_s):
        return decode_workers(DecodeLoad(rate, 200.0, 1_500.0), H200, target_s, 800_000)

    assert need(per_s, itl_s) <= need(per_s + more, itl_s)
    assert 1 <= need(per_s, itl_s + looser_s) <= WORKERS_MAX


# --- forecast ------------------------------------------------------------------------------------


def daily(bin_s: float, days: int, seed: int):
    """(time, amount) of a day's curve with noise that has a memory."""
    chance, noise = Events(seed).random, 0.0
    for index in range(int(days * DAY_S / bin_s)):
        at_s = index * bin_s
        noise = 0.8 * noise + chance.gauss(0.0, 2.0)
        rate = 50.0 + 40.0 * math.sin(2.0 * math.pi * at_s / DAY_S) + noise
        yield at_s, max(0.0, rate) * bin_s


def test_upper_bound_holds_95_of_100_times_and_follows_the_day():
    bin_s, ahead = 600.0, 2
    target, bounds, actual = Forecast(bin_s, ahead * bin_s), [], []
    for at_s, amount in daily(bin_s, 6, seed=1):
        if at_s >= 2 * DAY_S:
            target.advance(at_s)
            bounds.append((target.upper(), target.mean()))
        actual.append(amount / bin_s)
        target.add(amount, at_s + 1.0)
    first = len(actual) - len(bounds)
    pairs = [
        (bounds[i], actual[first + i + ahead - 1])
        for i in range(len(bounds) - ahead)
        if first + i + ahead - 1 < len(actual)
    ]
    held = sum(value <= upper for (upper, _), value in pairs) / len(pairs)
    assert 0.92 <= held <= 0.98
    error = sum(abs(value - mean) for (_, mean), value in pairs) / len(pairs)
    assert error < 6.0, "a day's swing is 40"


def test_forecast_before_a_day_has_passed_is_the_running_level_with_a_wide_band():
    target = Forecast(10.0, 20.0)
    for index in range(12):
        target.add(50.0, 10.0 * index)
    assert target.mean() == pytest.approx(5.0, rel=0.05)
    assert target.upper() == pytest.approx(1.5 * target.mean())


def test_forecast_of_silence_falls_to_nothing_and_its_history_is_bounded():
    target = Forecast(60.0, 120.0)
    for index in range(100):
        target.add(60.0, 60.0 * index)
    target.advance(20 * DAY_S)
    assert target.num_bins <= DAYS_KEPT * DAY_S / 60.0
    assert target.mean() < 0.1
