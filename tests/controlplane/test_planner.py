"""The planner moves one worker when the mix has shifted, and none while it is steady."""

import random

import pytest

from controlplane import domain, protocol
from tests.controlplane.rig import Rig, of
from tests.factories import make_load

LONG, SHORT = 400, 40


def cluster(*roles: str) -> Rig:
    rig = Rig()
    for role in roles:
        rig.join(role)
    return rig


def run(rig: Rig, seconds: float, prompts, per_s: float = 0.5, online_s: float = 0.0):
    """Requests at a steady pace that take 3 s each; returns the role changes."""
    workers = [view.worker_id for view in rig.plane.view(rig.now_s).workers]
    before = len(rig.commands)
    until_s, due_s, ends = rig.now_s + seconds, rig.now_s, []
    while rig.now_s < until_s:
        for worker_id in workers:
            role = rig.worker(worker_id).role
            rig.send(worker_id, make_load(role, online_s=online_s * 0.1))
        if prompts and rig.now_s >= due_s:
            request_id = f"r{len(rig.commands)}-{rig.now_s:.1f}"
            rig.submit(request_id, prompt_tokens=prompts())
            ends.append((rig.now_s + 3.0, request_id))
            due_s += 1.0 / per_s
        while ends and ends[0][0] <= rig.now_s:
            rig.finish(ends.pop(0)[1])
        rig.tick(0.1)
    for _, request_id in ends:
        rig.finish(request_id)
    return of(domain.PlanChanged, rig.commands[before:])


def steady_mix(seed: int):
    chance = random.Random(seed)
    return lambda: chance.randint(256, 600) if chance.random() < 0.5 else chance.randint(8, 48)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_s", [0.5, 1.0])
def test_steady_half_and_half_mix_moves_nobody(seed, per_s):
    assert run(cluster("prefill", "decode"), 180.0, steady_mix(seed), per_s) == []


def test_shift_to_short_prompts_and_back_moves_one_worker_each_time():
    rig = cluster("prefill", "decode")
    assert run(rig, 60.0, steady_mix(1)) == []
    (flip,) = run(rig, 60.0, lambda: SHORT)
    assert (flip.worker_id, flip.role_before, flip.role_after) == ("w1", "prefill", "decode")
    assert flip.by == "planner"
    assert flip.reason.startswith("in 30 s 0 of 15 prompts were long, asking for 0.00 s/s")
    assert flip.reason.endswith("w1 decodes from now on")
    assert domain.SendRole("w1", "decode") in rig.commands
    (back,) = run(rig, 60.0, lambda: LONG)
    assert (back.role_before, back.role_after, back.by) == ("decode", "prefill", "planner")
    assert back.reason.endswith(f"{back.worker_id} prefills from now on")
    assert "s/s of prefill from 0 prefill workers" in back.reason
    roles = {view.role for view in rig.plane.view(rig.now_s).workers}
    assert roles == {"prefill", "decode"}
    assert [plan.role_after for plan in rig.plane.view(0.0).plans] == ["prefill", "decode"]
    assert run(rig, 120.0, steady_mix(2)) == []


def test_idle_cluster_keeps_its_plan():
    assert run(cluster("prefill", "decode"), 200.0, None) == []


def test_few_requests_are_no_mix():
    assert run(cluster("prefill", "decode"), 200.0, lambda: SHORT, per_s=0.05) == []


def test_nobody_moves_before_a_whole_window_was_seen():
    assert run(cluster("prefill", "decode"), 29.0, lambda: SHORT) == []


def test_single_worker_is_left_alone():
    assert run(cluster("prefill"), 100.0, lambda: SHORT) == []
    assert run(cluster("decode"), 100.0, lambda: LONG) == []


def test_last_decode_worker_stays_however_long_the_prompts():
    rig = cluster("prefill", "decode")
    assert run(rig, 120.0, lambda: 600, per_s=1.0) == []


def test_two_prefill_workers_without_a_decode_worker_give_one():
    rig = cluster("prefill", "prefill")
    (flip,) = run(rig, 60.0, steady_mix(3))
    assert flip.role_after == "decode"
    assert {view.role for view in rig.plane.view(0.0).workers} == {"prefill", "decode"}


def test_overloaded_prefill_gets_one_more_when_decode_can_spare_it():
    rig = cluster("prefill", "decode", "decode")
    (flip,) = run(rig, 55.0, lambda: 600, per_s=0.8)
    assert flip.role_after == "prefill"


def test_prompts_that_spill_over_do_not_make_decode_look_busy():
    rig = cluster("prefill", "decode", "decode")
    flips = run(rig, 85.0, lambda: 600, per_s=1.2, online_s=0.75)
    assert [flip.role_after for flip in flips] == ["prefill"]
    assert "sequences need 1" in flips[0].reason


def test_overloaded_prefill_gets_none_when_decode_is_busy():
    rig = cluster("prefill", "decode", "decode")
    assert run(rig, 55.0, lambda: 600, per_s=0.5, online_s=0.6) == []


def test_busy_decode_takes_a_prefill_worker_that_the_others_can_replace():
    rig = cluster("prefill", "prefill", "decode")
    (flip,) = run(rig, 45.0, steady_mix(4), per_s=0.5, online_s=0.9)
    assert flip.role_after == "decode"


def test_moved_worker_dwells():
    rig = cluster("prefill", "decode")
    run(rig, 60.0, steady_mix(1))
    run(rig, 40.0, lambda: SHORT)
    times = []
    for prompts in (LONG, SHORT, LONG, SHORT):
        for _ in range(12):
            if run(rig, 10.0, lambda size=prompts: size, per_s=1.0):
                times.append(rig.now_s)
    assert all(later - earlier >= 30.0 for earlier, later in zip(times, times[1:], strict=False))


def test_planner_leaves_alone_what_an_operator_ordered():
    rig = cluster("decode", "decode")
    rig.handle(domain.RoleOrdered("w1", "prefill", "ann"))
    assert run(rig, 200.0, lambda: SHORT) == []
    rig.now_s += 600.0
    rig.handle(domain.Tick())
    assert [flip.worker_id for flip in run(rig, 60.0, lambda: SHORT)] == ["w1"]


def test_batch_lines_are_no_demand():
    rig = cluster("prefill", "decode")
    slo = domain.SLOClass("batch", 3, 60.0, 10.0, is_batch=True, deadline_s=1e6)
    rig.tick(31.0, heard=("w1", "w2"))
    for index in range(40):
        rig.submit(f"b{index}", slo=slo, prompt_tokens=SHORT)
        rig.tick(1.0, heard=("w1", "w2"))
        rig.finish(f"b{index}")
    assert of(domain.PlanChanged, rig.commands) == []


def test_models_are_planned_apart():
    rig = cluster("prefill", "decode")
    other = protocol.ModelFacts("modelled-8b", "c" * 64, 8192, 128_000, 131_072)
    for role in ("prefill", "prefill", "decode", "decode"):
        rig.join(role, models=(other,))
    assert run(rig, 90.0, steady_mix(2)) == [], "no request asked for the other model"
    (flip,) = run(rig, 45.0, lambda: SHORT)
    assert flip.worker_id == "w1"


# --- shadow mode and rollback --------------------------------------------------------------------


def test_shadow_mode_records_what_the_planner_would_do_once_and_changes_nothing():
    rig = cluster("prefill", "decode")
    rig.handle(domain.PlannerOrdered("shadow", "ann"))
    plans = run(rig, 120.0, lambda: SHORT)
    assert [(plan.worker_id, plan.role_after, plan.is_shadow) for plan in plans] == [
        ("w1", "decode", True)
    ]
    assert plans[0].reason.startswith("shadow: in 30 s")
    assert rig.worker("w1").role == "prefill" and of(domain.SendRole, rig.commands) == []
    assert rig.plane.view(rig.now_s).planner_mode == "shadow"
    rig.handle(domain.PlannerOrdered("auto", "ann"))
    (flip,) = run(rig, 30.0, lambda: SHORT)
    assert not flip.is_shadow and rig.worker("w1").role == "decode"


def test_rollback_undoes_the_planners_newest_change_and_keeps_it_undone():
    rig = cluster("prefill", "decode")
    run(rig, 60.0, steady_mix(1))
    (flip,) = run(rig, 60.0, lambda: SHORT)
    (undone,) = of(domain.PlanChanged, rig.handle(domain.PlanRolledBack("ann")))
    assert (undone.worker_id, undone.role_after, undone.by) == (flip.worker_id, "prefill", "ann")
    assert undone.reason.startswith("rolled back by ann: in 30 s")
    assert of(domain.SendRole, rig.commands)[-1] == domain.SendRole("w1", "prefill")
    assert run(rig, 200.0, lambda: SHORT) == [], "an operator's word holds"
    assert rig.handle(domain.PlanRolledBack("ann")) == [], "nothing of the planner's stands"


def test_rollback_leaves_alone_what_was_changed_again_since():
    rig = cluster("prefill", "decode")
    run(rig, 60.0, steady_mix(1)), run(rig, 60.0, lambda: SHORT)
    rig.handle(domain.RoleOrdered("w1", "mixed", "bob"))
    assert rig.handle(domain.PlanRolledBack("ann")) == []
    assert rig.worker("w1").role == "mixed"


# --- the forecast's floor ------------------------------------------------------------------------


def test_floor_adds_a_prefill_worker_before_the_load_is_there():
    """Of each 100 s the first 20 are heavy: the forecast's band has seen that."""
    rig = Rig(forecast_bin_s=10.0, forecast_horizon_s=20.0, forecast_s_min=60.0, plan_window_s=30.0)
    for role in ("prefill", "decode", "decode", "decode"):
        rig.join(role)
    workers = ("w1", "w2", "w3", "w4")
    plans = []
    for second in range(400):
        is_heavy = second % 100 < 20
        for index in range(2 if is_heavy else 0):
            rig.submit(f"r{second}-{index}", prompt_tokens=600)
            rig.handle(domain.FirstToken(f"r{second}-{index}", 1.0))
            rig.finish(f"r{second}-{index}")
        plans += of(domain.PlanChanged, rig.tick(1.0, heard=workers))
    floors = [plan for plan in plans if plan.reason.startswith("forecast for 20 s from now")]
    assert floors and floors[0].role_after == "prefill"
    assert "long prompts/s" in floors[0].reason and "prefill workers (" in floors[0].reason


def test_floor_needs_history_and_never_takes_the_last_decode_worker():
    rig = Rig(forecast_bin_s=10.0, forecast_horizon_s=20.0, forecast_s_min=1e6)
    rig.join("prefill"), rig.join("decode"), rig.join("decode")
    for second in range(200):
        rig.submit(f"r{second}", prompt_tokens=600)
        rig.handle(domain.FirstToken(f"r{second}", 1.0))
        rig.finish(f"r{second}")
        rig.tick(1.0, heard=("w1", "w2", "w3"))
    assert not any("forecast" in plan.reason for plan in rig.plane.view(rig.now_s).plans)
    roles = [worker.role for worker in rig.plane.view(rig.now_s).workers]
    assert roles.count("prefill") <= 2


def test_long_prompts_that_still_wait_after_the_shift_do_not_delay_the_flip():
    """They start late, but they came before the mix changed; and what waits counts as it comes."""
    rig = Rig(sequences_max=1)  # a worker takes one request at a time: nearly all have to wait
    for role in ("prefill", "decode"):
        rig.join(role)
    assert run(rig, 60.0, steady_mix(1)) == []
    for index in range(20):
        rig.submit(f"long{index}", prompt_tokens=LONG)
    rig.tick(1.0, heard=("w1", "w2"))
    shift_at_s, plans, num_short = rig.now_s, [], 0
    while not plans and rig.now_s < shift_at_s + 60.0:
        num_short += 1
        rig.submit(f"short{num_short}", prompt_tokens=SHORT)
        if num_short % 3 == 0:  # the backlog ends slowly
            rig.finish(f"long{num_short // 3}")
        plans = of(domain.PlanChanged, rig.tick(1.0, heard=("w1", "w2")))
    assert [(plan.worker_id, plan.role_after) for plan in plans] == [("w1", "decode")]
    assert rig.now_s - shift_at_s <= 45.0


def test_floor_acts_at_once_on_a_predicted_violation_and_moves_a_tenth_at_most():
    """Nobody prefills and long prompts are common: the forecast asks for many at once."""
    rig = Rig(
        forecast_bin_s=10.0, forecast_horizon_s=20.0, forecast_s_min=60.0, plan_window_s=200.0,
        plan_dwell_s=1.0,
    )  # fmt: skip
    names = tuple(rig.join("prefill" if index == 0 else "decode") for index in range(20))
    for second in range(240):
        for index in range(6):
            rig.submit(f"r{second}-{index}", prompt_tokens=600)
            rig.finish(f"r{second}-{index}")
        plans = of(domain.PlanChanged, rig.tick(1.0, heard=names))
        if plans:
            break
    assert len(plans) == 2, "a tenth of 20"
    assert all(plan.role_after == "prefill" for plan in plans)


def test_fast_workers_prefill_and_those_with_much_memory_decode():
    fast = protocol.StepModel(base_s=0.045, per_token_s=0.0015, per_context_token_s=1e-6)
    rig = Rig()
    rig.join("decode"), rig.join("decode", step_model=fast), rig.join("decode")
    while not (plans := of(domain.PlanChanged, rig.commands)) and rig.now_s < 60.0:
        rig.submit(f"r{rig.now_s:.1f}", prompt_tokens=LONG)
        rig.finish(f"r{rig.now_s:.1f}")
        for worker_id, step_model in (("w1", None), ("w2", fast), ("w3", None)):
            rig.send(worker_id, make_load(**({"step_model": step_model} if step_model else {})))
        rig.tick(1.0)
    assert (plans[0].worker_id, plans[0].role_after) == ("w2", "prefill")
    rig = Rig()
    rig.join("prefill", num_blocks=512), rig.join("prefill", num_blocks=4096), rig.join("decode")
    flip = run(rig, 41.0, lambda: SHORT, per_s=0.5)[0]
    assert (flip.worker_id, flip.role_after) == ("w2", "decode")


def test_silent_worker_holds_the_plan():
    rig = Rig(dead_s_min=1e6)
    rig.join("prefill"), rig.join("decode")
    run(rig, 60.0, steady_mix(1))
    for index in range(60):
        rig.submit(f"q{index}", prompt_tokens=SHORT)
        rig.tick(1.0, heard=("w1",))  # w2 says nothing
        rig.finish(f"q{index}")
    assert of(domain.PlanChanged, rig.commands) == []
