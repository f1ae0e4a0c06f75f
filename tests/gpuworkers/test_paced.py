"""A paced class: its ITL target holds for the mean, and a step may spend what tokens have saved."""

import pytest

from controlplane.latency import LatencyModel
from controlplane.protocol import ClassTargets, Policy
from gpuworkers.scheduler import SchedulerState, plan
from tests.gpuworkers.test_scheduler import MODEL, NOW_S, decode, sequence

PACED = ClassTargets("paced", 0, 2.0, 0.1, gap_s_max=0.4)


def test_tokens_ahead_of_their_pace_let_the_next_come_later_up_to_the_longest_gap():
    row = decode("d", targets=PACED)
    row.last_token_at_s = 0.0
    row.token_came(0.02)
    assert row.saved_s == pytest.approx(0.08)
    assert row.next_token_due_at_s() == pytest.approx(0.02 + 0.16)
    for index in range(2, 20):
        row.token_came(0.02 * index)
    assert row.next_token_due_at_s() == pytest.approx(0.38 + 0.4)


def test_what_was_saved_is_spent_once_and_never_owed():
    row = decode("d", targets=PACED)
    row.last_token_at_s, row.saved_s = 0.0, 0.05
    row.token_came(0.14)
    assert row.saved_s == pytest.approx(0.01)
    row.token_came(0.5)
    assert row.saved_s == 0.0 and row.next_token_due_at_s() == pytest.approx(0.58)


def test_a_strict_class_saves_nothing():
    row = decode("d")
    row.token_came(NOW_S + 0.001)
    assert row.saved_s == 0.0
    assert row.next_token_due_at_s() == pytest.approx(NOW_S + 0.001 + row.targets.itl_s)


@pytest.mark.parametrize(("saved_s", "target_s"), [(0.0, 0.08), (0.1, 0.18), (9.0, 0.4)])
def test_a_step_lasts_as_long_as_the_row_with_the_least_saved_allows(saved_s, target_s):
    least, rich = decode("a", targets=PACED), decode("b", targets=PACED)
    least.last_token_at_s = rich.last_token_at_s = NOW_S
    least.saved_s, rich.saved_s = saved_s, 10.0
    prompt = sequence("p", 900, 0, targets=PACED)
    state = SchedulerState((least, rich), (prompt,))
    made = plan(NOW_S, state, LatencyModel(MODEL), Policy())
    assert made.online_target_s == pytest.approx(target_s)
    assert made.predicted_s <= target_s


def test_one_strict_row_keeps_the_step_of_all_within_its_target():
    paced, strict = decode("a", targets=PACED), decode("b")
    paced.last_token_at_s = strict.last_token_at_s = NOW_S
    paced.saved_s = 10.0
    state = SchedulerState((paced, strict), (sequence("p", 900, 0, targets=PACED),))
    made = plan(NOW_S, state, LatencyModel(MODEL), Policy())
    assert made.online_target_s == pytest.approx(strict.targets.itl_s)


def test_a_paced_row_that_is_late_gets_its_target_and_not_its_longest_gap():
    late = decode("a", targets=PACED)
    late.last_token_at_s = NOW_S - 3.0
    state = SchedulerState((late,), (sequence("p", 900, 0, targets=PACED),))
    made = plan(NOW_S, state, LatencyModel(MODEL), Policy())
    assert made.online_target_s == pytest.approx(PACED.itl_s)
