"""How many workers run: up at once, down slowly, within bounds, never for missing telemetry."""

from dataclasses import replace

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.protocol import Role
from controlplane.sim.cluster import Backend, Cluster
from controlplane.sizing import (
    Corrections,
    DecodeLoad,
    ModelLoad,
    PromptLoad,
    Station,
    decode_workers,
    prefill_workers,
    strain,
)
from tests.controlplane.rig import Rig, of
from tests.factories import CPU_STEP, MODEL, make_hello, make_load, make_request

LIMITS = (1, 4)


def offered(rig: Rig, low: int = LIMITS[0], high: int = LIMITS[1], *names: str) -> Rig:
    rig.handle(domain.FleetOffered(low, high, names))
    return rig


def busy(rig: Rig, seconds: int, per_s: int, *names: str, prompt_tokens: int = 150) -> None:
    """Requests that end at once, so that only the measured demand counts."""
    for _ in range(seconds):
        for _ in range(per_s):
            name = f"r{len(rig.commands)}-{rig.now_s:.2f}"
            rig.submit(name, prompt_tokens=prompt_tokens, output_tokens_max=4)
            rig.finish(name)
        rig.tick(1.0, heard=names)


# --- decisions -----------------------------------------------------------------------------------


def test_nobody_is_started_without_a_backend():
    rig = Rig()
    rig.join("mixed")
    busy(rig, 60, 8, "w1")
    assert of(domain.StartWorker, rig.commands) == []


def test_predicted_violation_starts_workers_at_the_first_plan_with_its_reason():
    rig = offered(Rig())
    rig.join("mixed")
    busy(rig, 31, 4, "w1")
    starts = of(domain.StartWorker, rig.commands)
    expected = [(f"auto-{number}", "mixed", MODEL.model_id) for number in (1, 2, 3)]
    assert [(start.name, start.role, start.model_id) for start in starts] == expected
    plans = of(domain.PlanChanged, rig.commands)
    assert [(plan.worker_id, plan.role_after, plan.model_after) for plan in plans] == expected
    assert {plan.kind for plan in plans} == {"start"}
    assert "of its limits with 1 workers and 0 coming" in plans[0].reason
    assert plans[0].reason.endswith("in about 20 s: auto-1 starts")


def test_workers_that_are_starting_count_and_the_maximum_holds():
    rig = offered(Rig(), 1, 3)
    rig.join("mixed")
    busy(rig, 60, 8, "w1")
    assert len(of(domain.StartWorker, rig.commands)) == 2, "3 at most, 1 is there"
    assert rig.plane.sizes()["starts"] == (2, 64)


def test_too_few_workers_are_filled_up_to_the_minimum():
    rig = offered(Rig(), 3, 4)
    rig.join("mixed")
    rig.tick(31.0, heard=("w1",))
    assert len(of(domain.StartWorker, rig.commands)) == 2


def test_start_that_failed_or_takes_too_long_is_stopped_and_tried_again_after_a_pause():
    rig = offered(Rig(start_s_max=20.0, start_pause_s=25.0), 2, 2)
    rig.join("mixed")
    rig.tick(31.0, heard=("w1",))
    rig.handle(domain.StartFailed("auto-1", "exit code 2"))
    rig.tick(20.0, heard=("w1",))
    assert len(of(domain.StartWorker, rig.commands)) == 1
    rig.tick(10.0, heard=("w1",))
    assert [start.name for start in of(domain.StartWorker, rig.commands)] == ["auto-1", "auto-2"]
    rig.tick(21.0, heard=("w1",))
    assert of(domain.StopWorker, rig.commands) == [domain.StopWorker("auto-2")]


def spare(rig: Rig, seconds: int, *names: str) -> None:
    busy(rig, seconds, 1, *names, prompt_tokens=20)


def three(**settings: object) -> Rig:
    """Three workers where one would do; two of them are ours to stop."""
    rig = Rig(cold_start_s=1.0, **settings)
    for name in ("a", "b", "c"):
        rig.join("mixed", name=name)
    return offered(rig, 1, 4, "b", "c")


def test_spare_worker_drains_after_six_plans_and_stops_when_it_is_empty():
    rig = three()
    spare(rig, 79, "w1", "w2", "w3")
    assert of(domain.SendDrain, rig.commands) == [], "six plans, the first after 30 s"
    spare(rig, 2, "w1", "w2", "w3")
    (drain,) = of(domain.SendDrain, rig.commands)
    assert drain.worker_id in ("w2", "w3")
    (plan,) = [plan for plan in of(domain.PlanChanged, rig.commands) if plan.kind == "drain"]
    assert "it drains and stops" in plan.reason and plan.by == "planner"
    rig.send(drain.worker_id, protocol.Drained())
    rig.tick(0.1, heard=("w1",))
    name = rig.worker(drain.worker_id).name
    assert of(domain.StopWorker, rig.commands) == [domain.StopWorker(name)]
    rig.tick(5.0, heard=("w1",))
    assert len(of(domain.StopWorker, rig.commands)) == 1


def test_workers_that_are_not_ours_and_the_minimum_stay():
    rig = Rig(cold_start_s=1.0)
    for name in ("a", "b"):
        rig.join("mixed", name=name)
    offered(rig, 1, 4)
    spare(rig, 150, "w1", "w2")
    assert of(domain.SendDrain, rig.commands) == []
    offered(rig, 2, 4, "a", "b")
    spare(rig, 150, "w1", "w2")
    assert of(domain.SendDrain, rig.commands) == []


def test_missing_telemetry_stops_nobody():
    rig = three(dead_s_min=1e6)
    spare(rig, 200, "w1", "w2")  # w3 is silent
    assert rig.worker("w3").status == "suspect"
    assert of(domain.SendDrain, rig.commands) == []


def test_lost_worker_delays_a_drain():
    rig = three()
    spare(rig, 75, "w1", "w2", "w3")
    rig.close("w3")
    spare(rig, 25, "w1", "w2")
    assert of(domain.SendDrain, rig.commands) == []


def test_young_worker_stays_for_ten_cold_starts():
    rig = Rig(cold_start_s=20.0)
    for name in ("a", "b", "c"):
        rig.join("mixed", name=name)
    offered(rig, 1, 4, "a", "b", "c")
    spare(rig, 199, "w1", "w2", "w3")
    assert of(domain.SendDrain, rig.commands) == []
    spare(rig, 70, "w1", "w2", "w3")
    assert of(domain.SendDrain, rig.commands)


def test_shadow_mode_starts_and_drains_nobody():
    rig = offered(Rig())
    rig.handle(domain.PlannerOrdered("shadow", "ann"))
    rig.join("mixed")
    busy(rig, 60, 4, "w1")
    assert of(domain.StartWorker, rig.commands) == []
    plans = of(domain.PlanChanged, rig.commands)
    assert plans and all(plan.is_shadow and plan.kind == "start" for plan in plans)


# --- sizing --------------------------------------------------------------------------------------

STATION = Station(0.003, CPU_STEP, 32_768)


def load_of(per_s: float, ttft_s: float = 2.0, itl_s: float = 0.2) -> ModelLoad:
    return ModelLoad(
        long=PromptLoad(per_s / 2, 1.2, 1.8, 0.3),
        short=PromptLoad(per_s / 2, 0.1, 0.15, 0.3),
        outputs=DecodeLoad(per_s, 30.0, 200.0),
        ttft_s=ttft_s,
        itl_s=itl_s,
    )


def test_strain_falls_with_workers_and_rises_with_load_and_stricter_targets():
    def worst(per_s, count, **targets):
        return strain(load_of(per_s, **targets), [STATION] * count, 0.003, 0.02).worst

    for per_s in (0.2, 1.0, 3.0, 20.0):
        series = [worst(per_s, count) for count in range(1, 12)]
        assert all(
            later <= earlier + 1e-9 for earlier, later in zip(series, series[1:], strict=False)
        )
    for count in (1, 3, 8):
        series = [worst(0.3 * step, count) for step in range(1, 20)]
        assert series == sorted(series)
        assert worst(1.0, count, itl_s=0.1) >= worst(1.0, count)
        assert worst(1.0, count, ttft_s=1.9) >= worst(1.0, count)


def test_twice_as_fast_workers_carry_as_much_as_twice_as_many():
    fast = Station(0.0015, CPU_STEP, 32_768)
    load = replace(load_of(2.0), outputs=DecodeLoad(2.0, 1.0, 10.0))  # prompts decide
    two_fast = strain(load, [fast] * 2, 0.003, 0.02)
    assert two_fast.busy == pytest.approx(strain(load, [STATION] * 4, 0.003, 0.02).busy, rel=0.3)
    assert two_fast.busy < strain(load, [STATION] * 2, 0.003, 0.02).busy


def test_large_pools_share_the_load_and_none_is_needed_for_nothing():
    one = strain(load_of(64.0), [STATION] * 64, 0.003, 0.02)
    two = strain(load_of(128.0), [STATION] * 128, 0.003, 0.02)
    assert two == one
    assert strain(load_of(0.0), [], 0.003, 0.02).worst == 0.0
    assert strain(load_of(1.0), [], 0.003, 0.02).worst == float("inf")


def test_priors_ask_for_more_than_exact_models():
    prompts = PromptLoad(4.0, 0.3, 0.4, 1.0)
    assert prefill_workers(prompts, 1.5, 0.02, Corrections()) > prefill_workers(prompts, 1.5, 0.02)
    outputs = DecodeLoad(4.0, 200.0, 1000.0)
    exact = decode_workers(outputs, CPU_STEP, 0.1, 10**6)
    assert decode_workers(outputs, CPU_STEP, 0.1, 10**6, Corrections()) > exact


# --- in virtual time -----------------------------------------------------------------------------


def test_fleet_grows_with_a_wave_and_shrinks_after_it_without_a_failure():
    target = Cluster(9, ControlPlaneConfig.from_mapping({"cold_start_s": 4.0}))

    def hello(name: str, role: Role, model_id: str):
        assert model_id == MODEL.model_id
        address = f"127.0.0.1:{len(target.members) + 1}"
        return make_hello(role, name=name, handoff_address=address)

    target.backend = Backend(hello, cold_start_s=8.0)
    for name in ("a", "b"):
        target.add(hello(name, "mixed", MODEL.model_id))
    target.handle(domain.FleetOffered(1, 6, ("a", "b")))
    chance, at_s, index = target.events.random, 0.0, 0
    while at_s < 700.0:
        at_s += chance.expovariate(4.0 if 100.0 <= at_s < 300.0 else 0.3)
        index += 1

        def arrive(name=f"r{index}"):
            target.submit(
                make_request(
                    name,
                    prompt_tokens=chance.randint(60, 160),
                    output_tokens_max=chance.randint(4, 24),
                    arrived_at_s=target.events.now_s,
                )
            )

        target.events.at(at_s, arrive)
    sizes = {}
    for second in range(0, 760, 10):
        target.events.run(float(second))
        view = target.plane.view(target.events.now_s)
        sizes[second] = sum(worker.status == "live" for worker in view.workers)
    assert sizes[90] <= 2
    assert max(sizes.values()) >= 4 and max(sizes.values()) <= 6
    grown_at_s = min(second for second, count in sizes.items() if count > 2)
    assert grown_at_s <= 150, sizes
    assert sizes[750] < max(sizes.values())
    assert {stream.end for stream in target.streams.values()} == {"completed"}
    kinds = [plan.kind for plan in of(domain.PlanChanged, target.commands)]
    assert kinds.count("start") >= 2 and kinds.count("drain") >= 1
    stops = of(domain.StopWorker, target.commands)
    assert len(stops) == kinds.count("drain")


def test_measured_cold_start_is_used():
    rig = offered(Rig(cold_start_s=10.0), 2, 2)
    rig.join("mixed")
    rig.tick(31.0, heard=("w1",))
    (start,) = of(domain.StartWorker, rig.commands)
    rig.tick(20.0, heard=("w1",))
    rig.join("mixed", name=start.name)
    assert rig.plane.sizes()["starts"][0] == 0
    rig.send("w2", make_load())
    offered(rig, 1, 3)
    busy(rig, 30, 12, "w1", "w2")
    (plan,) = [plan for plan in of(domain.PlanChanged, rig.commands) if plan.worker_id == "auto-2"]
    assert "in about 13 s" in plan.reason, "10 s, and 3 tenths of what it took longer"
