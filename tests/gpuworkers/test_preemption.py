"""Preempted batch sequences lose nothing; random work on a small pool always ends."""

import random

import pytest

from controlplane import protocol
from gpuworkers.engine import EngineConfig
from gpuworkers.fake import FakeKV, FakeRunner
from tests.gpuworkers.enginekit import BATCH, STEP_MODEL, EngineBench
from tests.gpuworkers.tinyllama import bench_of, write_tiny

PREEMPTIONS = 100
SAMPLINGS = [{}, {"temperature": 0.9, "seed": 77, "top_p": 0.95}]


def fake_bench(num_blocks: int, **config: object) -> EngineBench:
    runner = FakeRunner(FakeKV(num_blocks, 16), STEP_MODEL)
    model = protocol.ModelFacts("tiny", "", 1000, 1024, 8)
    return EngineBench(runner, EngineConfig(**config), model)


def prompt(index: int, length: int) -> list[int]:
    return [3 + (31 * index + 17 * i + i * i) % 500 for i in range(length)]


def rows(bench: EngineBench, sampling: dict) -> None:
    for index in range(4):
        ids = prompt(index, 20 + 23 * index)
        answer = bench.assign(f"b{index}", ids, 40, targets=BATCH, ignore_eos=True, **sampling)
        assert isinstance(answer, protocol.Accepted), answer


def outputs(bench: EngineBench) -> list[list[int]]:
    return [bench.output(f"b{index}") for index in range(4)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_hundred_random_preemptions_change_no_id_and_recompute_nothing(tmp_path, sampling):
    """A real forward pass; an online sequence in between overwrites the blocks given up."""
    folder = write_tiny(tmp_path)
    quiet = bench_of(folder, kv_tokens=640)
    rows(quiet, sampling)
    quiet.run_dry()
    rng = random.Random(4)
    bench = bench_of(folder, kv_tokens=640)
    done = 0
    while done < PREEMPTIONS:
        bench.reports.clear()
        rows(bench, sampling)
        while bench.engine.has_work():
            bench.step()
            if rng.random() < 0.4 and done < PREEMPTIONS:
                bench.engine.preempt(f"b{rng.randrange(4)}", 1)
                bench.engine.check_integrity()
            if rng.random() < 0.05:
                bench.assign(f"o{bench.now_s}", prompt(9, 300), 2, salt=b"%d" % rng.randrange(99))
            done = bench.engine.kv_counts.preemptions
        assert outputs(bench) == outputs(quiet)
        for index in range(4):
            bench.engine.abandon(f"b{index}", 1)
    counts = bench.engine.kv_counts
    assert counts.preemptions >= PREEMPTIONS
    assert counts.recomputed_tokens == 0 and counts.restored_tokens > 20 * PREEMPTIONS


def test_without_a_host_tier_what_is_lost_is_computed_again():
    quiet = fake_bench(64)
    quiet.assign("b", prompt(1, 100), 40, targets=BATCH)
    quiet.run_dry()
    bench = fake_bench(10, host_blocks_ratio=0.0)
    bench.assign("b", prompt(1, 100), 30, targets=BATCH)
    for _ in range(10):
        bench.step()
    assert isinstance(bench.assign("o", prompt(2, 140), 4), protocol.Accepted)
    bench.run_dry()
    assert bench.output("b") == quiet.output("b")[:30]
    assert bench.engine.kv_counts.recomputed_tokens == 93


def test_ten_thousand_steps_of_random_work_on_64_blocks_end_and_conserve_blocks():
    """Online, batch, handed-off work, cancels and preemptions; what the engine takes it ends."""
    rng = random.Random(11)
    bench = fake_bench(64, host_blocks_ratio=0.25, sequences_max=24)
    accepted: set[str] = set()
    cancelled: set[str] = set()
    num_steps = index = 0
    while num_steps < 10_000:
        if rng.random() < 0.25:
            index += 1
            name, is_batch = f"r{index}", rng.random() < 0.6
            stage = rng.choice(["full", "full", "full", "prefill", "decode"])
            kwargs = {"targets": BATCH} if is_batch else {}
            ids = prompt(rng.randrange(6), rng.randint(1, 400))
            output = rng.choice([1, 5, 60, 200])
            kwargs |= {"temperature": rng.choice([0.0, 1.0]), "seed": index}
            if isinstance(
                bench.assign(name, ids, output, stage=stage, **kwargs), protocol.Accepted
            ):
                accepted.add(name)
        for live in bench.engine.live_sequences():
            name = live.request_id
            if rng.random() < 0.02:
                bench.engine.preempt(name, 1)
            elif rng.random() < 0.05:
                bench.engine.installed(name, 1, [60], bench.now_s)
                bench.engine.handed_off(name, 1)
            elif rng.random() < 0.001 and name in accepted:
                bench.engine.cancel(name, 1)
                cancelled.add(name)
        bench.step()
        num_steps += 1
    for _ in range(100):
        bench.run_dry(steps_max=20_000)
        for live in bench.engine.live_sequences():
            bench.engine.installed(live.request_id, 1, [60], bench.now_s)
            bench.engine.handed_off(live.request_id, 1)
        if bench.engine.is_idle():
            break
    assert bench.engine.is_idle() and bench.engine.pool.num_available == 64
    ended = {r.request_id for r in bench.reports if r.finish_reason}
    assert accepted - cancelled <= ended and len(ended) > 500
    counts = bench.engine.kv_counts
    assert counts.preemptions > 100 and counts.restored_tokens > 1000
