"""Workers change their model: step by step, back where that fails, and by plan."""

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.sim.cluster import Cluster
from tests.controlplane.rig import Rig, of
from tests.factories import CPU_STEP, MODEL, make_hello, make_load, make_request

OTHER = protocol.ModelFacts("other-1b", "b" * 64, 2048, 49_152, 46_080)
BOTH = (MODEL.model_id, OTHER.model_id)


def changed(*models: protocol.ModelFacts, seconds: float = 4.0) -> protocol.ModelsChanged:
    return protocol.ModelsChanged(list(models), 16, 1024, CPU_STEP, seconds)


def two_models(**settings: object) -> Rig:
    rig = Rig(**settings)
    rig.join("mixed", loadable=BOTH)
    rig.join("mixed", models=(OTHER,), loadable=BOTH)
    return rig


# --- one swap ------------------------------------------------------------------------------------


def test_worker_empties_unloads_loads_and_serves_the_other_model():
    rig = two_models()
    rig.submit("r1")
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    assert rig.worker("w1").status == "loading"
    assert of(domain.SendUnload, rig.commands) == [], "a request is in hand"
    (plan,) = of(domain.PlanChanged, rig.commands)
    assert (plan.kind, plan.model_before, plan.model_after) == ("model", *BOTH)
    assert (plan.by, plan.reason) == ("ann", "ordered by ann")
    rig.finish("r1")
    rig.tick(0.1, heard=("w1",))
    assert of(domain.SendUnload, rig.commands) == [domain.SendUnload("w1", MODEL.model_id)]
    rig.send("w1", changed())
    assert of(domain.SendLoad, rig.commands) == [domain.SendLoad("w1", OTHER.model_id)]
    assert rig.worker("w1").status == "loading"
    rig.send("w1", changed(OTHER))
    view = rig.worker("w1")
    assert (view.status, view.models, view.num_blocks) == ("live", (OTHER,), 1024)
    rig.submit("r2", model_id=OTHER.model_id)
    assert of(domain.Dispatch, rig.commands)[-1].worker_id in ("w1", "w2")


def test_loading_worker_gets_no_work_of_either_model():
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    for index in range(8):
        rig.submit(f"r{index}", model_id=OTHER.model_id)
    assert {item.worker_id for item in of(domain.Dispatch, rig.commands)} == {"w2"}


def test_request_that_stays_too_long_goes_on_elsewhere():
    rig = two_models(swap_move_s=5.0)
    rig.join("mixed", loadable=BOTH)
    rig.submit("r1")
    first = of(domain.Dispatch, rig.commands)[0].worker_id
    rig.handle(domain.ModelOrdered(first, OTHER.model_id, "ann"))
    rig.tick(4.9, heard=("w1", "w2", "w3"))
    assert len(of(domain.Dispatch, rig.commands)) == 1
    rig.tick(0.3, heard=("w1", "w2", "w3"))
    moved = of(domain.Dispatch, rig.commands)[-1]
    assert moved.worker_id != first and moved.epoch == 2
    assert domain.CancelSequence(first, "r1", 1) in rig.commands
    assert domain.SendUnload(first, MODEL.model_id) in rig.commands


def test_busy_worker_is_asked_again_after_a_pause():
    rig = two_models(swap_retry_s=1.0)
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.send("w1", protocol.ModelRefused(MODEL.model_id, "1 sequence is in hand"))
    rig.tick(0.8, heard=("w1", "w2"))
    assert len(of(domain.SendUnload, rig.commands)) == 1
    rig.tick(0.4, heard=("w1", "w2"))
    assert len(of(domain.SendUnload, rig.commands)) == 2


def test_worker_that_cannot_load_goes_back_and_the_record_says_why():
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.send("w1", changed())
    rig.send("w1", protocol.ModelRefused(OTHER.model_id, "no such folder"))
    assert of(domain.SendLoad, rig.commands)[-1] == domain.SendLoad("w1", MODEL.model_id)
    assert rig.plane.view(rig.now_s).plans[0].reason == "other-1b was not loaded: no such folder"
    rig.send("w1", changed(MODEL))
    assert rig.worker("w1").status == "live"


def test_worker_that_can_load_neither_is_drained():
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.send("w1", changed())
    for model_id in (OTHER.model_id, MODEL.model_id):
        rig.send("w1", protocol.ModelRefused(model_id, "out of memory"))
    assert domain.SendDrain("w1") in rig.commands
    assert rig.worker("w1").status == "draining"


def test_other_weights_under_a_served_name_end_the_membership():
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.send("w1", changed())
    wrong = protocol.ModelFacts(OTHER.model_id, "c" * 64, 2048, 49_152, 46_080)
    rig.send("w1", changed(wrong))
    assert rig.worker("w1").status == "lost"
    assert "has weights cccccccccccc" in of(domain.CloseWorker, rig.commands)[0].reason


@pytest.mark.parametrize("models", [(), (OTHER,)])
def test_swap_goes_on_after_a_reconnect(models):
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.close("w1")
    rig.rejoin("w1", models=models, loadable=BOTH)
    if models:
        assert rig.worker("w1").status == "live"
    else:
        assert rig.worker("w1").status == "loading"
        assert of(domain.SendLoad, rig.commands) == [domain.SendLoad("w1", OTHER.model_id)]
        rig.send("w1", changed(OTHER))
        assert rig.worker("w1").status == "live"


def test_a_model_that_the_worker_cannot_load_is_not_ordered():
    rig = Rig()
    rig.join("mixed")
    assert rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann")) == []
    assert rig.handle(domain.ModelOrdered("w9", OTHER.model_id, "ann")) == []


def test_drain_of_a_loading_worker_ends_its_swap():
    rig = two_models()
    rig.handle(domain.ModelOrdered("w1", OTHER.model_id, "ann"))
    rig.handle(domain.DrainOrdered("w1", "ann"))
    rig.send("w1", changed(OTHER))
    assert rig.worker("w1").status == "draining"


# --- by plan, in virtual time --------------------------------------------------------------------

FAST = CPU_STEP
SLOW = protocol.StepModel(base_s=0.06, per_token_s=0.006, per_context_token_s=1e-6)


def cluster() -> Cluster:
    """Per model one fast worker with much KV and one at half the speed with a quarter of it."""
    target = Cluster(3, ControlPlaneConfig.from_mapping({"swap_s": 3.0}))
    target.models = {MODEL.model_id: MODEL, OTHER.model_id: OTHER}
    for model in (MODEL, OTHER):
        for step, num_blocks in ((FAST, 1024), (SLOW, 256)):
            target.add(
                make_hello(
                    "mixed",
                    models=(model,),
                    step_model=step,
                    num_blocks=num_blocks,
                    loadable=BOTH,
                    handoff_address=f"127.0.0.1:{len(target.members) + 1}",
                )
            )
    return target


def offer(
    target: Cluster, rates: dict[str, tuple[float, float]], shift_at_s: float, until_s: float
):
    """Requests per second of each model before and after the shift."""
    chance = target.events.random
    for model_id, (before, after) in rates.items():
        at_s, index = 0.0, 0
        while at_s < until_s:
            at_s += chance.expovariate(before if at_s < shift_at_s else after)
            index += 1

            def arrive(name=f"{model_id}-{index}", model_id=model_id):
                target.submit(
                    make_request(
                        name,
                        model_id=model_id,
                        prompt_tokens=chance.randint(40, 120),
                        output_tokens_max=chance.randint(8, 24),
                        arrived_at_s=target.events.now_s,
                    )
                )

            target.events.at(at_s, arrive)


def test_workers_follow_the_mix_of_two_models_and_no_request_fails():
    target = cluster()
    offer(
        target,
        {MODEL.model_id: (1.2, 0.1), OTHER.model_id: (0.1, 2.4)},
        shift_at_s=120.0,
        until_s=420.0,
    )
    target.events.run(480.0)
    plans = of(domain.PlanChanged, target.commands)
    shifts = [plan for plan in plans if plan.kind == "model"]
    assert [(plan.model_before, plan.model_after, plan.by) for plan in shifts] == [
        (*BOTH, "planner")
    ], [plan.reason for plan in plans]
    assert "of its limits with 2 workers" in shifts[0].reason
    view = target.plane.view(target.events.now_s)
    serving = [worker.models[0].model_id for worker in view.workers if worker.status == "live"]
    assert sorted(serving) == sorted([MODEL.model_id] + 3 * [OTHER.model_id])
    ends = {stream.end for stream in target.streams.values()}
    assert ends == {"completed"}
    assert len(target.streams) > 500


def test_steady_mix_of_two_models_moves_nobody():
    target = cluster()
    offer(target, {MODEL.model_id: (0.5, 0.5), OTHER.model_id: (0.5, 0.5)}, 60.0, 300.0)
    target.events.run(330.0)
    assert [plan for plan in of(domain.PlanChanged, target.commands) if plan.kind == "model"] == []
    assert {stream.end for stream in target.streams.values()} == {"completed"}


def test_planned_shift_is_only_recorded_in_shadow_mode():
    target = cluster()
    target.handle(domain.PlannerOrdered("shadow", "ann"))
    offer(target, {MODEL.model_id: (0.1, 0.1), OTHER.model_id: (2.4, 2.4)}, 60.0, 120.0)
    target.events.run(150.0)
    plans = [plan for plan in of(domain.PlanChanged, target.commands) if plan.kind == "model"]
    assert plans and all(plan.is_shadow for plan in plans)
    assert of(domain.SendUnload, target.commands) == []


def test_rollback_brings_the_model_back():
    rig = two_models(swap_s=1.0)
    rig.join("mixed", loadable=BOTH)
    names = ("w1", "w2", "w3")
    for second in range(60):
        for index in range(8):
            name = f"r{second}-{index}"
            rig.submit(name, model_id=OTHER.model_id, prompt_tokens=200)
            rig.finish(name)
        for name in names:
            rig.send(name, make_load())
        rig.tick(1.0, heard=names)
        if of(domain.SendUnload, rig.commands):
            break
    (unload,) = of(domain.SendUnload, rig.commands)
    rig.send(unload.worker_id, changed())
    rig.send(unload.worker_id, changed(OTHER))
    (undone,) = of(domain.PlanChanged, rig.handle(domain.PlanRolledBack("ann")))
    assert (undone.kind, undone.model_after, undone.by) == ("model", MODEL.model_id, "ann")
    assert undone.reason.startswith("rolled back by ann: other-1b is at")
