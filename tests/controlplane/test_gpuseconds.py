"""Charging executed steps to their rows: everything is charged, once, by marginal cost."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gpuledger import MARK_S, MARKS_MAX, GpuLedger
from controlplane.gpuseconds import GpuMeter, decode_s, prompt_s, request_s, split_step
from controlplane.latency import StepFeatures, step_s
from controlplane.protocol import GpuSeconds, StepModel
from tests.controlplane.rig import Rig
from tests.factories import make_load

H200 = StepModel(4.8e-3, 18e-6, 29e-9, (9e-6, 0.0), 1e-6, 15e-9)
rows_of_steps = st.lists(
    st.tuples(st.integers(0, 8_000), st.one_of(st.just(1), st.integers(2, 600))), min_size=1
)


def test_a_large_prompt_costs_what_the_step_model_adds_for_it():
    beside = StepFeatures(rows=600, context_tokens=1_000)
    added_s = step_s(H200, beside.with_tokens(64, 512)) - step_s(H200, beside)
    assert prompt_s(H200, 64, 512) == pytest.approx(added_s - H200.per_sequence_s)


def test_decoded_tokens_add_up_one_by_one():
    one_by_one = sum(decode_s(H200, 100 + index) for index in range(20))
    assert decode_s(H200, 100, 20) == pytest.approx(one_by_one)


def test_a_decoded_token_costs_more_than_a_prompt_token_and_more_so_with_context():
    prompt_token_s = prompt_s(H200, 0, 16) / 16
    assert 1.5 < decode_s(H200, 1_000) / prompt_token_s < 3.0
    assert decode_s(H200, 4_000) > 1.8 * decode_s(H200, 1_000)


def test_cached_prompt_tokens_are_free_but_read_as_context():
    whole, half = request_s(H200, 1_000, 1_000, 0), request_s(H200, 500, 1_000, 0)
    assert whole / 2 < half < whole
    # The prompt's last row gives the first output token.
    assert request_s(H200, 0, 1_000, 10) == pytest.approx(decode_s(H200, 1_001, 9))


@given(rows_of_steps, st.floats(0.0, 1.0))
def test_every_second_of_a_step_is_charged_once(rows, measured_s):
    charged, fixed_s = split_step(H200, rows, measured_s)
    assert sum(charged) == pytest.approx(measured_s)
    assert min(charged) >= 0.0 and fixed_s >= 0.0


def test_the_fixed_cost_is_split_over_token_rows_batch_and_interactive_alike():
    charged, fixed_s = split_step(H200, [(100, 1), (100, 1), (0, 48)], 0.01)
    assert charged[0] == charged[1] == pytest.approx(decode_s(H200, 101) + fixed_s)
    assert charged[2] == pytest.approx(prompt_s(H200, 0, 48) + 48 * fixed_s)


@given(st.lists(st.tuples(rows_of_steps, st.integers(0, 20), st.floats(0.001, 0.1)), max_size=20))
def test_lanes_add_up_to_the_steps_and_the_host_time_around_them(steps):
    meter, total_s = GpuMeter(), 0.0
    for rows, num_online, seconds in steps:
        decodes = [count == 1 for _, count in rows]
        meter.add_step(H200, rows, min(num_online, len(rows)), decodes, seconds)
        meter.add_host(0.1 * seconds)
        total_s += 1.1 * seconds
    spent = meter.spent(2.0)
    assert spent.online_s + spent.batch_s == pytest.approx(total_s)
    assert spent.total_s == pytest.approx(total_s + 2.0)
    assert 0.0 <= spent.batch_fixed_s <= spent.batch_s + 1e-9


def test_batch_rows_are_charged_to_batch_and_prompts_to_prefill():
    meter = GpuMeter()
    meter.add_step(H200, [(10, 1), (0, 100), (10, 1), (0, 50)], 2, [True, False] * 2, 0.02)
    spent = meter.spent(0.0)
    lanes = (spent.online_prefill_s, spent.online_decode_s)
    lanes += (spent.batch_prefill_s, spent.batch_decode_s)
    assert all(seconds > 0.0 for seconds in lanes)
    assert spent.online_prefill_s > spent.batch_prefill_s
    assert spent.online_decode_s == pytest.approx(spent.batch_decode_s)


# --- against a clock elsewhere -------------------------------------------------------------------


def observe(ledger: GpuLedger, seconds: int, lost_share: float = 0.0) -> None:
    """A worker that works half of each second and counts all but a share of that."""
    for second in range(seconds + 1):
        busy_s = 0.5 * second * (1.0 - lost_share)
        spent = GpuSeconds(online_decode_s=busy_s, idle_s=0.5 * second)
        ledger.observe("w1", "m", spent, 0.0, 100.0 + second)


def test_interactive_batch_and_idle_add_up_to_the_wall_time():
    ledger = GpuLedger()
    observe(ledger, 300)
    (view,) = ledger.views()
    assert view.loss == pytest.approx(0.0) and view.is_balanced


def test_a_loss_of_two_percent_is_found():
    ledger = GpuLedger()
    observe(ledger, 300, lost_share=0.04)  # 4 % of the half that it works
    (view,) = ledger.views()
    assert view.loss == pytest.approx(0.02) and view.is_balanced is False


def test_time_that_is_counted_twice_is_found_too():
    ledger = GpuLedger()
    observe(ledger, 300, lost_share=-0.04)
    assert ledger.views()[0].is_balanced is False


def test_the_step_in_hand_counts_and_a_short_time_says_nothing():
    ledger = GpuLedger()
    for second in range(30):
        ledger.observe("w1", "m", GpuSeconds(), float(second), float(second))
        assert ledger.views()[0].is_balanced in (None, True)
    assert ledger.views()[0].loss == 0.0


def test_a_loss_shows_after_days_without_one():
    ledger, spent_s = GpuLedger(), 0.0
    for minute in range(3_000):
        spent_s += MARK_S * (1.0 if minute < 3_000 - MARKS_MAX else 0.98)
        ledger.observe("w1", "m", GpuSeconds(spent_s), 0.0, MARK_S * minute)
    assert ledger.views()[0].is_balanced is False
    assert len(ledger._meters["w1"].marks) == MARKS_MAX


def test_late_double_and_impossible_reports_change_nothing():
    ledger = GpuLedger()
    observe(ledger, 60)
    before = ledger.views()
    nan = float("nan")
    for spent in (GpuSeconds(1.0), GpuSeconds(nan), GpuSeconds(-1.0, 500.0), GpuSeconds(1e400)):
        ledger.observe("w1", "m", spent, 0.0, 500.0)
    assert ledger.views() == before
    ledger.forget(["w1", "unknown"])
    assert ledger.views() == ()


def test_plane_keeps_the_meters_of_its_workers_and_forgets_them_with_them():
    rig = Rig(lost_kept_s=5.0)
    worker_id = rig.join()
    load = make_load()
    for second in range(30):
        rig.now_s = float(second)
        rig.send(worker_id, load.__class__(**_fields(load) | {"spent": GpuSeconds(second * 0.98)}))
    (view,) = rig.plane.gpu_seconds()
    assert view.worker_id == worker_id and view.loss == pytest.approx(0.02)
    assert replace(view, wall_s=1.0).loss is None
    rig.close(worker_id)
    rig.tick(6.0)
    assert rig.plane.gpu_seconds() == ()


def _fields(load) -> dict[str, object]:
    return {name: getattr(load, name) for name in load.__struct_fields__}
