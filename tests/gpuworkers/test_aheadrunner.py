"""A runner one step ahead gives the ids of one that is not, whatever becomes of the sequences."""

import random

import pytest
import torch

from controlplane import protocol
from gpuworkers.aheadrunner import AheadRunner
from gpuworkers.engine import EngineConfig
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.runner import TorchRunner
from gpuworkers.stepper import Forward, GraphStepper, Stepper
from gpuworkers.weights import WeightFiles
from tests.gpuworkers.enginekit import BATCH, EngineBench
from tests.gpuworkers.tinyllama import write_tiny
from tests.kernels.bufferedtorch import BufferedTorch

BLOCK_TOKENS = 16
NUM_BLOCKS = 40
STEPS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("ahead"))


def rerun(forward: Forward) -> Forward:
    """Into one buffer, as a graph's replay: what is kept of an earlier one is overwritten."""
    logits = forward()
    return lambda: logits.copy_(forward())


def bench_with(folder, kind: type[TorchRunner], num_blocks: int = NUM_BLOCKS) -> EngineBench:
    ops = BufferedTorch(tile=None, rows_min=None)  # a row's bits are its own
    with torch.no_grad():
        model = load_llama(read_config(folder), WeightFiles(folder), torch.float32, ops)
        kv = TorchKVCache(2, num_blocks, BLOCK_TOKENS, model.heads, torch.float32)
        stepper = GraphStepper(
            Stepper(model, ops, kv.layers, BLOCK_TOKENS), ops, rerun, 512, (1, 2, 4, 8)
        )
    facts = protocol.ModelFacts("tiny", "", 512, 512, kv_bytes_per_token=512)
    return EngineBench(kind(stepper, kv), EngineConfig(), facts)


def both(folder, play, **options) -> tuple[EngineBench, EngineBench]:
    """The same play on a plain runner and on one ahead, each with an engine of its own."""
    plain, ahead = (bench_with(folder, kind, **options) for kind in (TorchRunner, AheadRunner))
    for bench in (plain, ahead):
        play(bench)
        bench.run_dry()
    names = {report.request_id for report in plain.reports}
    assert names == {report.request_id for report in ahead.reports}
    for name in names:
        assert ahead.output(name) == plain.output(name), name
        assert ahead.finish_reasons(name) == plain.finish_reasons(name)
    return plain, ahead


def test_decodes_of_the_same_sequences_are_all_taken_from_the_step_ahead(folder):
    def play(bench):
        for number in range(3):
            bench.assign(f"r{number}", 20 + number, 12, ignore_eos=True)

    _, ahead = both(folder, play)
    runner = ahead.runner
    assert runner.num_ahead >= 10
    assert runner.num_taken == 3 * 11  # every id but each sequence's first
    assert runner.stepper.num_replays == runner.num_ahead  # none was computed twice


def test_rows_that_end_are_left_out_and_the_others_taken(folder):
    def play(bench):
        for number, output in enumerate((3, 6, 9, 6)):
            bench.assign(f"r{number}", 20, output, ignore_eos=True, seed=number, temperature=0.8)

    _, ahead = both(folder, play)
    assert ahead.runner.num_taken == 2 + 5 + 8 + 5
    assert ahead.runner.stepper.num_replays == ahead.runner.num_ahead == 8


def test_a_stop_id_that_nobody_foresaw_costs_one_row_of_a_step(folder):
    plain = bench_with(folder, TorchRunner)
    plain.assign("r", 20, 12, ignore_eos=True)
    plain.run_dry()
    stop = plain.output("r")[4]

    def play(bench):
        bench.assign("r", 20, 12, stop_token_ids=[stop], ignore_eos=True)
        bench.assign("other", 33, 12, ignore_eos=True)

    _, ahead = both(folder, play)
    assert ahead.finish_reasons("r") == ["stop"]
    assert ahead.runner.stepper.num_replays == ahead.runner.num_ahead


def test_an_arrival_is_computed_beside_the_rows_that_are_there(folder):
    def play(bench):
        bench.assign("first", 20, 20, ignore_eos=True)
        for _ in range(5):
            bench.step()
        bench.assign("second", 37, 8, ignore_eos=True)

    _, ahead = both(folder, play)
    assert ahead.runner.num_taken == 19 + 7


def test_logprobs_are_those_of_the_step_and_nothing_is_launched_ahead(folder):
    def play(bench):
        bench.assign("asks", 20, 6, logprobs=2, ignore_eos=True)
        bench.assign("does not", 20, 6, ignore_eos=True)

    plain, ahead = both(folder, play)
    assert ahead.runner.num_ahead == 0
    asked = [
        [r.logprobs for r in bench.reports if r.request_id == "asks"] for bench in (plain, ahead)
    ]
    assert asked[0] == asked[1]


def test_a_preempted_sequence_does_not_take_what_was_computed_in_its_old_blocks(folder):
    def play(bench):
        bench.assign("batch", 40, 30, targets=BATCH, ignore_eos=True)
        for _ in range(6):
            bench.step()
        bench.engine.preempt("batch", 1)
        bench.assign("online", 60, 10, ignore_eos=True)

    _, ahead = both(folder, play)
    assert ahead.engine.kv_counts.preemptions == 1 and ahead.runner.num_taken > 20


def test_weights_that_give_no_numbers_end_the_request_with_an_error(folder):
    bench = bench_with(folder, AheadRunner)
    bench.assign("r", 20, 8, ignore_eos=True)
    bench.step()
    bench.runner.model._norm[:] = torch.nan
    bench.run_dry()
    assert bench.finish_reasons("r") == ["error"] and len(bench.output("r")) == 2


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_arrivals_cancellations_and_preemptions_gives_the_same_ids(folder, seed):
    """Replay with the seed in the test's name."""

    def play(bench):
        rng = random.Random(seed)
        alive: list[str] = []
        for number in range(STEPS // 8):
            name = f"r{number}"
            is_batch = rng.random() < 0.4
            options = {"targets": BATCH} if is_batch else {}
            if rng.random() < 0.5:
                options |= {"temperature": 0.9, "seed": number, "top_k": 20}
            if rng.random() < 0.1:
                options |= {"logprobs": 1}
            answer = bench.assign(
                name, rng.randint(1, 90), rng.randint(1, 25), ignore_eos=rng.random() < 0.5,
                **options,
            )  # fmt: skip
            if isinstance(answer, protocol.Accepted):
                alive.append(name)
            for _ in range(rng.randint(0, 8)):
                bench.step()
            victim = rng.choice(alive) if alive else name
            if rng.random() < 0.2:
                bench.engine.preempt(victim, 1)

    _, ahead = both(folder, play, num_blocks=24)
    assert ahead.runner.num_taken > 100
