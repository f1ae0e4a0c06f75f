"""The plan of a step: order, targets, and that batch never changes its online part."""

import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from controlplane.latency import LatencyModel, StepFeatures
from controlplane.protocol import ClassTargets, Policy, StepModel
from gpuworkers import scheduler
from gpuworkers.scheduler import SchedulerState, plan
from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.enginekit import BATCH, assign

NOW_S = 50.0
LOWER = ClassTargets("standard", 1, 2.0, 0.1)
QUEUES = ("decoding", "prefilling", "batch_decoding", "batch_prefilling")
MODEL = StepModel(base_s=0.010, per_token_s=0.0005, per_context_token_s=2e-6)


def sequence(
    name: str,
    prompt: int,
    computed: int,
    outputs: int = 0,
    *,
    targets: ClassTargets | None = None,
    arrived_ago_s: float = 0.0,
    token_ago_s: float = 0.0,
) -> Sequence:
    made = from_assign(assign(name, prompt, 100), NOW_S - arrived_ago_s)
    made.targets = targets or ClassTargets("interactive", 0, 1.0, 0.1)
    made.token_ids += [60] * outputs
    made.computed_tokens = computed
    made.phase = "running"
    made.last_token_at_s = NOW_S - token_ago_s if outputs else None
    return made


def decode(name: str, context: int = 50, **kwargs: object) -> Sequence:
    return sequence(name, context, context, outputs=1, **kwargs)


def planned(state: SchedulerState, policy: Policy = Policy()) -> scheduler.Plan:  # noqa: B008
    return plan(NOW_S, state, LatencyModel(MODEL), policy)


def shape(result: scheduler.Plan) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.request_id, row.start, row.count, row.samples) for row in result.rows]


def test_nothing_to_do_gives_an_empty_plan():
    result = planned(SchedulerState())
    assert result.rows == () and result.predicted_s == 0.0


def test_decodes_come_first_then_the_whole_prompt_when_it_fits():
    result = planned(SchedulerState((decode("d"),), (sequence("p", 40, 0),)))
    assert shape(result) == [("d", 50, 1, True), ("p", 0, 40, True)]
    assert result.num_online == 2


def test_a_long_prompt_gets_a_chunk_that_keeps_the_step_within_the_target():
    result = planned(SchedulerState((decode("d"),), (sequence("p", 900, 16),)))
    _, chunk = result.rows
    assert chunk.count % scheduler.CHUNK_TOKENS_MIN == 0 and not chunk.samples
    model = LatencyModel(MODEL)
    one = StepFeatures().with_tokens(50, 1)
    assert model.plan_s(one.with_tokens(16, chunk.count)) <= 0.1
    assert model.plan_s(one.with_tokens(16, chunk.count + 16)) > 0.1


def test_with_nobody_decoding_a_step_may_take_half_of_the_ttft_target():
    result = planned(SchedulerState(prefilling=(sequence("p", 900, 0),)))
    assert result.online_target_s == pytest.approx(0.5)
    assert result.rows[0].count > 200


def test_the_prompt_with_least_time_left_goes_first_and_a_lost_one_last():
    lost = sequence("lost", 300, 0, arrived_ago_s=5.0)
    tight = sequence("tight", 300, 0, arrived_ago_s=0.8)
    fresh = sequence("fresh", 300, 0)
    result = planned(SchedulerState((decode("d"),), (lost, fresh, tight)))
    assert [row.sequence.request_id for row in result.rows][:2] == ["d", "tight"]
    assert "lost" not in [row.sequence.request_id for row in result.rows]


def test_a_step_with_another_prompt_has_none_of_the_surplus_tier():
    lost = sequence("lost", 100, 0, arrived_ago_s=5.0)
    given_up = ClassTargets("interactive", 0, 0.0, 0.1)
    surplus = sequence("surplus", 16, 0, targets=given_up, arrived_ago_s=9.0)
    rows = planned(SchedulerState(prefilling=(surplus, lost))).rows
    assert [row.sequence.request_id for row in rows] == ["lost"]
    rows = planned(SchedulerState(prefilling=(surplus,))).rows
    assert [row.sequence.request_id for row in rows] == ["surplus"]


def test_a_prompt_that_moved_after_its_deadline_is_not_of_the_surplus_tier():
    moved = sequence("moved", 100, 0, targets=ClassTargets("interactive", 0, -2.0, 0.1))
    surplus = sequence("surplus", 16, 0, targets=ClassTargets("interactive", 0, 0.0, 0.1))
    rows = planned(SchedulerState(prefilling=(surplus, moved))).rows
    assert [row.sequence.request_id for row in rows] == ["moved"]


def test_a_late_decode_is_paced_and_does_not_block_prefill():
    late = decode("d", token_ago_s=3.0)
    result = planned(SchedulerState((late,), (sequence("p", 300, 0),)))
    assert [row.sequence.request_id for row in result.rows] == ["d", "p"]
    assert result.online_target_s == pytest.approx(0.1)


def test_a_device_too_slow_for_its_target_still_prefills_beside_decodes():
    slow = LatencyModel(StepModel(0.3, 0.001, 0.0))
    result = plan(NOW_S, SchedulerState((decode("d"),), (sequence("p", 300, 0),)), slow, Policy())
    assert [row.sequence.request_id for row in result.rows] == ["d", "p"]


def test_prompts_given_up_on_get_chunks_as_long_as_those_in_time():
    given_up = ClassTargets("interactive", 0, 0.0, 0.1)
    alone = planned(SchedulerState((), (sequence("late", 800, 0, targets=given_up),)))
    assert alone.online_target_s == pytest.approx(0.5 * Policy().tau_idle_s / 0.05)
    in_time = sequence("p", 800, 0, targets=ClassTargets("interactive", 0, 2.0, 0.1))
    late = sequence("late", 800, 0, targets=given_up)
    assert planned(SchedulerState((), (in_time, late))).online_target_s == pytest.approx(1.0)


def test_batch_fills_only_kappa_of_the_target():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(64))
    result = planned(SchedulerState((decode("d"),), batch_decoding=batch), Policy(kappa=0.5))
    rows_batch = len(result.rows) - 1
    assert 0 < rows_batch < 64 and result.batch_target_s == pytest.approx(0.05)
    assert LatencyModel(MODEL).plan_s(result.features) <= 0.05
    assert [row.sequence for row in result.rows[1:]] == list(batch[:rows_batch])


def test_batch_fills_the_whole_target_when_nobody_has_come_for_long():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(64))
    policy = Policy(kappa=0.5)
    for quiet_s, target_s in ((scheduler.QUIET_S - 0.01, 0.05), (scheduler.QUIET_S, 0.1)):
        state = SchedulerState((decode("d"),), batch_decoding=batch, quiet_s=quiet_s)
        assert planned(state, policy).batch_target_s == pytest.approx(target_s)


def test_short_of_time_batch_fills_more_only_where_no_top_class_row_is_online():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(64))
    policy = Policy(kappa=0.3, tau_idle_s=0.08, loose_kappa=1.0, top_rank=0)
    top, lower = decode("top"), decode("lower", targets=LOWER)

    def target_s(decoding: tuple[Sequence, ...], prefilling: tuple[Sequence, ...] = ()) -> float:
        state = SchedulerState(decoding, prefilling, batch)
        return planned(state, policy).batch_target_s

    assert target_s((lower,)) == pytest.approx(0.1)
    assert target_s((lower, top)) == target_s((top,)) == pytest.approx(0.03)
    crowd = tuple(decode(f"d{i}", targets=LOWER) for i in range(110))
    prompt = sequence("top", 400, 0)
    crowded = planned(SchedulerState(crowd, (prompt,), batch), policy)
    assert prompt not in [row.sequence for row in crowded.rows]  # online all the same
    assert crowded.batch_target_s == pytest.approx(0.03)


def test_a_longer_step_makes_no_token_late_and_delays_an_arrival_by_a_tenth_of_its_target():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(64))
    policy = Policy(kappa=0.3, tau_idle_s=0.08, loose_kappa=2.0)
    due_soon = decode("d", targets=LOWER, token_ago_s=0.05)
    result = planned(SchedulerState((due_soon,), batch_decoding=batch), policy)
    assert result.batch_target_s == pytest.approx(0.05)
    alone = SchedulerState((), (sequence("p", 900, 0, targets=LOWER),), batch)
    assert planned(alone, policy).batch_target_s == pytest.approx(2 * policy.tau_idle_s)


def test_batch_gets_nothing_when_online_rows_fill_the_step():
    online = tuple(decode(f"d{i}") for i in range(120))
    batch = (decode("b", targets=BATCH),)
    result = planned(SchedulerState(online, batch_decoding=batch))
    assert len(result.rows) == 120


def test_alone_batch_runs_to_the_idle_target_and_always_one_row():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(3))
    assert len(planned(SchedulerState(batch_decoding=batch)).rows) == 3
    snail = LatencyModel(StepModel(9.0, 0.1, 0.0))
    result = plan(NOW_S, SchedulerState(batch_decoding=batch), snail, Policy())
    assert len(result.rows) >= 1
    prompt = SchedulerState(batch_prefilling=(sequence("b", 300, 0, targets=BATCH),))
    assert plan(NOW_S, prompt, snail, Policy()).rows[0].count >= scheduler.CHUNK_TOKENS_MIN


def test_batch_rows_stop_at_the_policys_maximum():
    batch = tuple(decode(f"b{i}", context=1, targets=BATCH) for i in range(40))
    policy = Policy(batch_rows_max=7, tau_idle_s=10.0)
    assert len(planned(SchedulerState(batch_decoding=batch), policy).rows) == 7


def test_a_step_has_at_most_its_maximum_of_tokens():
    prompts = tuple(sequence(f"p{i}", 900, 0) for i in range(5))
    fast = LatencyModel(StepModel(1e-6, 0.0, 0.0))
    result = plan(NOW_S, SchedulerState(prefilling=prompts), fast, Policy())
    assert sum(row.count for row in result.rows) == Policy().step_tokens_max
    assert max(row.count for row in result.rows) == Policy().chunk_tokens_max


def test_short_prompts_pass_a_long_one_until_its_deadline_is_near():
    roomy = ClassTargets("interactive", 0, 5.0, 0.1)
    long = sequence("long", 2000, 0, targets=roomy)
    short = sequence("short", 100, 0, targets=roomy)
    state = SchedulerState((decode("d"),), (long, short))
    assert [row.sequence for row in planned(state).rows] == [state.decoding[0], short, long]
    near = sequence("long", 2000, 0, targets=roomy, arrived_ago_s=3.5)
    rows = planned(SchedulerState((decode("d"),), (near, short))).rows
    assert rows[1].sequence is near


def test_a_loose_row_skips_a_step_that_strict_decodes_fill():
    loose = decode("loose", targets=ClassTargets("loose", 2, 10.0, 0.5))
    strict = tuple(decode(f"d{i}") for i in range(105))
    rows = planned(SchedulerState((*strict, loose))).rows
    assert [row.sequence for row in rows] == list(strict)
    late = decode("late", targets=ClassTargets("loose", 2, 10.0, 0.5), token_ago_s=0.45)
    assert late in [row.sequence for row in planned(SchedulerState((*strict, late))).rows]
    assert loose in [row.sequence for row in planned(SchedulerState((*strict[:20], loose))).rows]


def test_where_every_row_could_wait_all_of_them_run():
    """Resumed here, with the first token's deadline far away; one step takes nearly the target."""
    resumed = decode("resumed", targets=ClassTargets("slow step", 0, 10.0, 0.016))
    resumed.last_token_at_s = None
    result = planned(SchedulerState((resumed,)))
    assert result.features.rows == 1
    step_s = LatencyModel(MODEL).plan_s(result.features)
    assert scheduler.FULL_SHARE * result.online_target_s < step_s
    assert [row.sequence for row in result.rows] == [resumed]


def test_host_time_is_taken_off_both_targets():
    model = LatencyModel(MODEL)
    for _ in range(2000):
        model.observe_host(0.02)
    result = plan(NOW_S, SchedulerState((decode("d"),)), model, Policy(kappa=0.5))
    assert result.online_target_s == pytest.approx(0.08)
    assert result.batch_target_s == pytest.approx(0.03)


def test_a_step_that_yields_a_first_token_is_kept_short():
    batch = tuple(decode(f"b{i}", targets=BATCH) for i in range(64))
    last, more = sequence("p", 40, 20), sequence("p", 900, 20)
    policy = Policy(kappa=0.8, first_token_share=0.5)
    ends = planned(SchedulerState((decode("d"),), (last,), batch), policy)
    goes_on = planned(SchedulerState((decode("d"),), (more,), batch), policy)
    assert ends.rows[1].samples and ends.batch_target_s == pytest.approx(0.04)
    assert not goes_on.rows[1].samples and goes_on.batch_target_s == pytest.approx(0.08)


def test_batch_fills_a_step_with_the_end_of_one_prompt_and_the_start_of_the_next():
    ending = sequence("b1", 300, 280, targets=BATCH)
    next_one = sequence("b2", 300, 0, targets=BATCH)
    result = planned(SchedulerState((decode("d"),), batch_prefilling=(ending, next_one)))
    assert [row.sequence for row in result.rows[1:]] == [ending, next_one]
    assert result.rows[1].samples and not result.rows[2].samples


# --- the baseline


def fixed(state: SchedulerState, tokens_max: int) -> scheduler.Plan:
    return scheduler.plan_fixed_chunk(state, LatencyModel(MODEL), Policy(), tokens_max)


def test_the_baseline_fills_its_tokens_online_first_and_looks_at_no_time():
    state = SchedulerState(
        (decode("d"),),
        (sequence("p", 40, 0),),
        (decode("bd", targets=BATCH),),
        (sequence("bp", 900, 0, targets=BATCH),),
    )
    assert shape(fixed(state, 100)) == [
        ("d", 50, 1, True),
        ("p", 0, 40, True),
        ("bd", 50, 1, True),
        ("bp", 0, 58, False),
    ]
    assert shape(fixed(state, 16)) == [("d", 50, 1, True), ("p", 0, 15, False)]
    assert fixed(state, 100).num_online == 2


# --- properties

targets = st.builds(
    ClassTargets,
    st.just("c"),
    st.integers(0, 1),
    st.floats(0.05, 20.0),
    st.floats(0.01, 0.5),
)


@st.composite
def sequences(draw: st.DrawFn, prefix: str, decoding: bool, batch: bool) -> tuple[Sequence, ...]:
    made = []
    for index in range(draw(st.integers(0, 6))):
        prompt = draw(st.integers(1, 700))
        computed = prompt if decoding else draw(st.integers(0, prompt - 1))
        made.append(
            sequence(
                f"{prefix}{index}",
                prompt,
                computed,
                outputs=int(decoding),
                targets=BATCH if batch else draw(targets),
                arrived_ago_s=draw(st.floats(0.0, 10.0)),
                token_ago_s=draw(st.floats(0.0, 1.0)),
            )
        )
    return tuple(made)


states = st.builds(
    SchedulerState,
    sequences("d", decoding=True, batch=False),
    sequences("p", decoding=False, batch=False),
    sequences("bd", decoding=True, batch=True),
    sequences("bp", decoding=False, batch=True),
)
policies = st.builds(
    Policy,
    st.floats(0.1, 1.0),
    st.floats(0.05, 0.5),
    st.integers(1, 8),
    loose_kappa=st.sampled_from((0.0, 1.0, 2.0)),
)


@settings(max_examples=2000, deadline=None)
@given(states, policies)
def test_the_online_part_is_the_same_with_the_batch_queues_emptied(state, policy):
    without = dataclasses.replace(state, batch_decoding=(), batch_prefilling=())
    full, online = planned(state, policy), planned(without, policy)
    assert full.rows[: full.num_online] == online.rows
    assert all(not row.sequence.is_batch for row in online.rows)
    assert all(row.sequence.is_batch for row in full.rows[full.num_online :])


@settings(max_examples=500, deadline=None)
@given(states, policies)
def test_urgent_batch_changes_no_step_of_a_worker_with_a_top_class_row(state, policy):
    ranks = [item.targets.rank for item in (*state.decoding, *state.prefilling)]
    usual = planned(state, structs.replace(policy, loose_kappa=0.0))
    if 0 in ranks:
        assert planned(state, policy) == usual
    else:
        assert planned(state, policy).batch_target_s >= usual.batch_target_s


@settings(max_examples=200, deadline=None)
@given(states, policies)
def test_a_plan_keeps_its_targets_and_serves_every_decode(state, policy):
    result, model = planned(state, policy), LatencyModel(MODEL)
    ran = {row.sequence for row in result.rows}
    skipped = [decode for decode in state.decoding if decode not in ran]
    for loose in skipped:
        assert loose.next_token_due_at_s() >= NOW_S + 2 * result.online_target_s
    decodes = [decode for decode in state.decoding if decode in ran]
    assert [row.sequence for row in result.rows[: len(decodes)]] == decodes
    online = StepFeatures()
    for row in result.rows[: result.num_online]:
        online = online.with_tokens(row.start, row.count)
    is_more_than_decodes = result.num_online > max(1, len(decodes))
    if is_more_than_decodes:
        assert model.plan_s(online) <= result.online_target_s
    if len(result.rows) > max(1, result.num_online):
        first_batch = result.rows[result.num_online]
        alone = model.plan_s(StepFeatures().with_tokens(first_batch.start, first_batch.count))
        assert model.plan_s(result.features) <= max(result.batch_target_s, alone)
    has_any = any(getattr(state, queue) for queue in QUEUES)
    has_online = bool(state.decoding or state.prefilling)
    assert bool(result.rows) == has_any or has_online


@settings(max_examples=100, deadline=None)
@given(states, policies)
def test_a_plan_is_repeatable_and_changes_nothing(state, policy):
    before = copy.deepcopy(state)
    first, second = planned(state, policy), planned(state, policy)
    assert first == second
    for queue in QUEUES:
        for now, then in zip(getattr(state, queue), getattr(before, queue), strict=True):
            assert dataclasses.asdict(now) == dataclasses.asdict(then)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 600), st.integers(1, 900), st.integers(0, 300), st.floats(0.0, 1.0))
def test_a_chunk_is_as_long_as_brute_force_finds(start, pending, rows, target_s):
    model, features = LatencyModel(MODEL), StepFeatures(rows, rows * 100)
    going = sequence("p", start + pending, start)
    most = min(pending, Policy().chunk_tokens_max, Policy().step_tokens_max - rows)
    candidates = [n for n in range(1, most + 1) if n % 16 == 0 or n == pending]
    fitting = [n for n in candidates if model.plan_s(features.with_tokens(start, n)) <= target_s]
    assert scheduler.chunk_tokens(target_s, features, going, model, Policy()) == max(
        fitting, default=0
    )


@settings(max_examples=100, deadline=None)
@given(states, policies, st.floats(0.1, 1.0))
def test_a_larger_kappa_never_gives_fewer_batch_decodes(state, policy, other):
    low, high = sorted((policy.kappa, other))

    def batch_decodes(kappa: float) -> int:
        result = planned(state, Policy(kappa, policy.tau_idle_s, policy.batch_rows_max))
        return sum(row.sequence in state.batch_decoding for row in result.rows)

    assert batch_decodes(low) <= batch_decodes(high)
