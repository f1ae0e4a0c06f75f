"""Interactive and batch work on one simulated worker: the figures, their bound, the KV room."""

import json

import pytest

from controlplane import kappas
from controlplane.latency import LatencyModel
from controlplane.sim import __main__ as sim
from controlplane.sim import coserve, coverage, steptable
from controlplane.sim.coserve import Scene
from controlplane.sim.station import SeenStep
from controlplane.sim.workload import Noise, arrivals
from gpuworkers import scheduler
from tests.controlplane import harvest_reference

NAME = "llama-3.1-8b-bf16-tp1"
SECONDS = 60.0


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(steptable.load(NAME), itl_s=0.05, rate_per_s=3.0, seconds=SECONDS)


def test_arrivals_are_repeatable_bursty_and_of_the_stated_medians():
    work = arrivals(1, 3.0, 2000.0)
    assert work == arrivals(1, 3.0, 2000.0) and work != arrivals(2, 3.0, 2000.0)
    assert len(work) == pytest.approx(6000, rel=0.1)
    assert sorted(a.prompt_tokens for a in work)[len(work) // 2] == pytest.approx(1020, rel=0.1)
    assert sorted(a.output_tokens for a in work)[len(work) // 2] == pytest.approx(129, rel=0.1)
    counts = [0] * 100
    for arrival in work:
        counts[int(arrival.at_s // 20)] += 1
    mean = sum(counts) / 100
    assert sum((c - mean) ** 2 for c in counts) / 100 > 2 * mean


def test_noise_is_repeatable_and_has_stalls_and_clock_steps():
    one, two = Noise(3, has_clock_steps=True), Noise(3, has_clock_steps=True)
    seconds = [one.measured_s(0.02) for _ in range(20_000)]
    assert seconds == [two.measured_s(0.02) for _ in range(20_000)]
    calm, slow = seconds[:10_000], seconds[10_000:]
    assert sum(slow) / sum(calm) == pytest.approx(1.08, rel=0.01)
    assert 5 <= sum(s > 0.0225 for s in calm) <= 40


def test_the_harvest_is_the_one_of_a_reference_written_apart(scene):
    bound = scene.reference(1)
    work_per_s = harvest_reference.batch_work_per_s(
        harvest_reference.Table(NAME), arrivals(1, 3.0, SECONDS), 0.05, SECONDS, coserve.WARM_S
    )
    assert bound.batch_work / bound.seconds == pytest.approx(work_per_s, rel=0.02)


def test_batch_is_harvested_beside_interactive_work_that_keeps_its_gaps(scene):
    ours, bound = scene.ours(0.7, 1), scene.reference(1)
    assert 0.9 < ours.batch_work / bound.batch_work < 1.0
    assert coserve.itl_miss(ours) <= 0.001
    assert len(ours.ttft_s) > 50 and ours.preempted == 0


def test_a_run_is_repeatable(scene):
    assert coserve.row(scene.ours(0.6, 2)) == coserve.row(scene.ours(0.6, 2))


def test_more_kappa_is_more_batch(scene):
    work = [scene.ours(kappa, 1).batch_work for kappa in (0.4, 0.7, 1.0)]
    assert work == sorted(work)


def test_without_kv_room_batch_rows_give_way_and_nothing_is_overcommitted(scene):
    model = LatencyModel(coserve.ROOFLINE_8B)
    policy = scene.policy(1.0)

    def planner(now_s, state):
        return scheduler.plan(now_s, state, model, policy)

    station = scene.run(1, planner, model, noise=Noise(1), kv_tokens=24_000)
    assert station.outcome.preempted > 0
    assert len(station.outcome.ttft_s) > 30
    held = station.pool.num_blocks - station.pool.num_free
    assert 0 < held <= 24_000 // 64


def test_the_fixed_chunk_is_tuned_on_misses_first():
    def outcome(work: int, missed: int) -> coserve.Outcome:
        return coserve.Outcome(gaps=10_000, gaps_missed=missed, batch_prompt_tokens=work)

    grid = {16: outcome(10, 0), 64: outcome(50, 10), 256: outcome(90, 11), 512: outcome(99, 900)}
    assert coserve._tuned(grid) == 64
    assert coserve._tuned({16: outcome(1, 500), 64: outcome(9, 400)}) == 64
    assert coserve._equal(grid, outcome(90, 0)) == 256
    assert coserve._equal(grid, outcome(200, 0)) == 512


# --- kappas


def test_the_shipped_kappas_are_measured_and_found_by_the_nearest_targets():
    rows = kappas.load()
    for row in rows:
        assert 0.3 <= row.kappa <= 1.0
        if row.ttft_s == 0.5:  # a GPU's, from the sweep
            assert row.harvest >= 0.94
            assert row.ttft_p99_inflation <= 0.05 and row.itl_miss <= 0.001
        else:  # a CPU's, beside kappa 1
            assert row.harvest >= 0.80 and row.itl_miss <= 0.01
        assert kappas.kappa_for(rows, row.ttft_s, row.itl_s) == row.kappa
    assert kappas.kappa_for(rows, 0.5, 0.08) == kappas.kappa_for(rows, 0.5, 0.05)
    assert kappas.kappa_for(rows, 2.0, 0.15) == kappas.kappa_for(rows, 1.5, 0.1)


def test_a_sweep_chooses_most_harvest_within_the_limits(tmp_path):
    def row(kappa: float, harvest: float, inflation: float, miss: float = 0.0) -> dict[str, float]:
        names = ("kappa", "harvest", "ttft_p99_inflation", "itl_miss")
        return dict(zip(names, (kappa, harvest, inflation, miss), strict=True))

    rows = [row(0.5, 0.9, 0.01), row(0.7, 0.95, 0.03), row(0.8, 0.97, 0.04), row(1, 0.99, 0, 0.01)]
    assert kappas.choose(rows)["kappa"] == 0.7
    assert kappas.choose(rows[2:3] + [row(1, 0.99, 0.2)])["kappa"] == 0.8
    kept = [kappas.KappaRow(0.5, 0.03, **kappas.choose(rows))]
    path = tmp_path / "kappa.json"
    other = kappas.KappaRow(1.5, 0.1, **kappas.choose(rows))
    path.write_bytes(kappas.PATH.read_bytes())
    kappas.write([other], path)
    kappas.write(kept, path)
    assert kappas.load(path)[:2] == [*kept, other]
    assert len(kappas.load(path)) == len(kappas.load())


# --- coverage of the latency model


def test_the_worst_window_is_found():
    def step(is_miss: bool) -> SeenStep:
        return SeenStep("mixed", 1.0, 1.1, 1.2 if is_miss else 1.0)

    seen = [step(False)] * 3000 + [step(True)] * 20 + [step(False)] * 3000
    assert coverage.worst_window(seen) == pytest.approx(0.99)
    figures = coverage.figures(seen[2990:3030])
    assert figures["coverage"] == 0.5 and figures["mape"] == pytest.approx(0.1)


@pytest.mark.slow
def test_the_latency_model_is_honest_on_steps_of_the_production_planner():
    long = Scene(steptable.load(NAME), itl_s=0.05, rate_per_s=3.0, seconds=800.0)
    audit = coverage.audit(long, kappa=0.7, seed=1)
    assert audit["steps"] >= 20_000
    assert 0.985 <= audit["coverage"] <= 0.995
    assert audit["worst_window_coverage"] >= 0.95
    assert audit["over_prediction"] <= 0.06


# --- the process


def test_the_process_prints_one_json_object(capsys):
    assert sim.main(["latency", "--seconds", "120"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["table"] == NAME and answer["steps"] >= 2000
    assert set(answer["buckets"]) <= {"decode", "mixed", "prefill"}


def test_coserve_gives_the_worse_of_both_targets_at_the_top(capsys):
    assert sim.main(["coserve", "--seeds", "1", "--seconds", "45"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["harvest"] == min(target["harvest"] for target in answer["targets"])
    assert answer["itl_miss"] == max(target["itl_miss"] for target in answer["targets"])
    assert [target["itl_target_ms"] for target in answer["targets"]] == [30.0, 50.0]
    assert "reference" in err
