"""Feeding: rooms of workers, order of batches, levels that reach workers as a policy."""

from hypothesis import given
from hypothesis import strategies as st

from controlplane import domain
from controlplane.backfill import (
    AHEAD_MAX,
    AHEAD_MIN,
    ENDED_WINDOW_S,
    GROUP_LINES,
    Backfill,
    OpenBatch,
    allot,
)
from controlplane.batchroom import Lengths, blocks_left, lines_left
from controlplane.config import ControlPlaneConfig
from controlplane.escalation import LOOSE_KAPPAS
from tests.controlplane.rig import Rig, of
from tests.factories import BATCH, MODEL, make_load

TEN_BLOCKS = {"prompt_tokens": 16, "output_tokens_max": 145}
ROW = st.tuples(st.integers(0, 50), st.integers(1, 9_999), st.sampled_from("abc"))


def batch(batch_id, deadline_s=3_600.0, tenant="acme", pending=100, in_flight=0, weight=1.0):
    return OpenBatch(batch_id, tenant, weight, MODEL.model_id, deadline_s, pending, in_flight)


def given_of(allotments):
    return {item.batch_id: item.lines for item in allotments}


# --- which batch ---------------------------------------------------------------------------------


def test_short_of_time_the_earliest_deadline_gets_all_it_can_use():
    found = allot([batch(1, 900.0), batch(2, 60.0, pending=10)], 16, is_tight=True)
    assert given_of(found) == {2: 10, 1: 6}


def test_with_slack_tenants_share_whatever_their_deadlines():
    batches = [batch(1, 60.0, "acme"), batch(2, 90.0, "acme"), batch(3, 9_000.0, "bolt")]
    found = allot(batches, 4 * GROUP_LINES, is_tight=False)
    assert given_of(found) == {1: 2 * GROUP_LINES, 3: 2 * GROUP_LINES}


def test_lines_in_flight_count_for_a_tenants_share():
    batches = [batch(1, tenant="acme", in_flight=3 * GROUP_LINES), batch(2, tenant="bolt")]
    assert given_of(allot(batches, 2 * GROUP_LINES, is_tight=False)) == {2: 2 * GROUP_LINES}


def test_a_tenant_of_twice_the_weight_gets_twice_the_lines():
    batches = [batch(1, tenant="acme", weight=2.0), batch(2, tenant="bolt")]
    found = given_of(allot(batches, 9 * GROUP_LINES, is_tight=False))
    assert found == {1: 6 * GROUP_LINES, 2: 3 * GROUP_LINES}


@given(st.lists(ROW, max_size=8), st.integers(0, 200), st.booleans())
def test_all_room_is_used_and_none_twice(rows, lines, is_tight):
    batches = [batch(i, float(d), t, pending) for i, (pending, d, t) in enumerate(rows)]
    found = allot(batches, lines, is_tight)
    assert sum(item.lines for item in found) == min(lines, sum(item.pending for item in batches))
    assert all(item.lines <= batches[item.batch_id].pending for item in found)


# --- how many ------------------------------------------------------------------------------------


def wanted(rig, *batches):
    found = rig.plane.lines_wanted(batches or [batch(1, pending=9_999)], rig.now_s)
    return sum(item.lines for item in found)


def test_without_a_worker_a_few_lines_wait():
    assert wanted(Rig()) == AHEAD_MIN


def test_rows_bound_the_lines_of_a_worker():
    rig = Rig(batch_rows_max=6)
    rig.join()
    assert wanted(rig) == 6 + AHEAD_MIN
    rig.submit("b1", slo=BATCH)
    assert wanted(rig) == 5 + AHEAD_MIN


def test_lines_never_ask_for_more_kv_than_they_may_come_to_hold():
    """Each may grow to 10 blocks; an eighth of the 2,048 is kept for online work."""
    rig = Rig(batch_rows_max=10_000)
    worker = rig.plane._registry.workers[rig.join(num_blocks=2_048)]
    for index in range(20):
        rig.submit(f"b{index}", slo=BATCH, **TEN_BLOCKS)
    assert worker.num_batch == 20 and worker.batch_blocks == 200
    assert lines_left(worker, Lengths(), rig.plane._config) == (2_048 - 256 - 200) // 10


def test_lines_start_until_they_could_fill_the_kv_though_they_hold_little_now():
    rig = Rig(batch_rows_max=10_000)
    name = rig.join(num_blocks=2_048)
    worker = rig.plane._registry.workers[name]
    for index in range(300):
        commands = rig.submit(f"b{index}", slo=BATCH, **TEN_BLOCKS)
        for dispatch in of(domain.Dispatch, commands):
            rig.accept(dispatch)
        rig.send(name, make_load(kv_blocks_total=2_048, kv_blocks_free=2_000, step_index=index))
    assert worker.num_batch == (2_000 - 256) // 10
    assert blocks_left(worker, Lengths(), rig.plane._config) < 10
    assert wanted(rig) == 0  # those that wait in the plane are enough
    rig.finish("b0")
    rig.tick(rig.plane._config.retry_every_s)
    assert (2_000 - 256) // 10 <= worker.num_batch < 190  # others have started


def test_a_worker_without_lines_is_offered_one_however_small_it_is():
    rig = Rig()
    worker = rig.plane._registry.workers[rig.join(num_blocks=8)]
    assert lines_left(worker, Lengths(), rig.plane._config) == 1


def test_online_work_that_grows_stops_the_lines():
    rig = Rig()
    name = rig.join(num_blocks=2_048)
    rig.send(name, make_load(kv_blocks_total=2_048, kv_blocks_free=200))
    assert wanted(rig) == AHEAD_MIN


def test_lines_that_end_early_make_room_for_more():
    lengths = Lengths()
    lengths.observe(0.25)
    assert lengths.share(100) > 0.95
    for _ in range(400):
        lengths.observe(0.25)
    assert lengths.share(1) < 0.3
    assert Lengths().share(100) == 1.0


def test_more_lines_wait_where_more_end():
    feeding = Backfill(ControlPlaneConfig())
    for index in range(500):
        feeding.ended("m", 10, 20, 0.02 * index)
    assert feeding.lines_wanted("m", [], 0, 10.0) == 50
    assert feeding.lines_wanted("m", [], 45, 10.0) == 5
    assert feeding.lines_wanted("m", [], 0, 10.0 + 2 * ENDED_WINDOW_S) == AHEAD_MIN
    for _ in range(5_000):
        feeding.ended("m", 10, 20, 40.0)
    assert feeding.lines_wanted("m", [], 0, 40.0) == AHEAD_MAX


def test_asking_changes_nothing():
    rig = Rig()
    rig.join()
    assert wanted(rig) == wanted(rig)


# --- levels --------------------------------------------------------------------------------------


def test_a_level_reaches_the_workers_of_its_model_and_those_that_join_later():
    rig = Rig()
    first = rig.join()
    commands = rig.handle(domain.SlackAssessed(MODEL.model_id, 0.3))
    assert of(domain.Escalated, commands) == [domain.Escalated(MODEL.model_id, 1, 0.3)]
    (sent,) = of(domain.SendPolicy, commands)
    assert (sent.worker_id, sent.policy.loose_kappa) == (first, LOOSE_KAPPAS[1])
    assert rig.plane.batch_level(MODEL.model_id) == 1
    before = len(of(domain.SendPolicy, rig.commands))
    second = rig.join()
    (later,) = of(domain.SendPolicy, rig.commands)[before:]
    assert (later.worker_id, later.policy.loose_kappa) == (second, LOOSE_KAPPAS[1])


def test_plenty_of_slack_changes_nothing():
    rig = Rig()
    rig.join()
    rig.tick(heard=())
    assert rig.handle(domain.SlackAssessed(MODEL.model_id, 2.0)) == []
