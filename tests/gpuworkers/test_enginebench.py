"""The engine's figures through a clock of their own, on a small model without a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpuworkers import enginebench, engineloop
from gpuworkers.enginebench import (
    PREFILL_REPEATS,
    REPEATS,
    WARMUPS,
    EngineBench,
    StepTime,
    kv_tokens_for,
    run_all,
)
from gpuworkers.gpumodel import BLOCK_TOKENS, place
from gpuworkers.randommodel import SMALL, RandomWeights
from gpuworkers.stepper import Forward
from tests.kernels.bufferedtorch import BufferedTorch

CONFIG = replace(SMALL, num_layers=1, hidden_size=64, intermediate_size=32, vocab_size=64)


class Clock:
    """A tick at each question; sleeping passes its seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds


class Counting(BufferedTorch):
    """Counts samplings that wait and those that do not."""

    counts = {"sample": 0, "sample_ids": 0}

    def sample(self, logits, table):
        self.counts["sample"] += 1
        return super().sample(logits, table)

    def sample_ids(self, logits, params):
        self.counts["sample_ids"] += 1
        return super().sample_ids(logits, params)


def rerun(forward: Forward) -> Forward:
    logits = forward()
    return lambda: logits.copy_(forward())


@pytest.fixture
def rig():
    clock, ops = Clock(), Counting()
    Counting.counts = {"sample": 0, "sample_ids": 0}
    files = RandomWeights("cpu", "cpu")
    stepper, kv = place(CONFIG, files, ops, "cpu", 2048, rerun, (1, 4), torch.float32)
    return EngineBench(stepper, kv, clock, clock.sleep), stepper, clock


def test_a_decode_is_timed_waiting_and_queued(rig):
    bench, stepper, _ = rig
    found = bench.decode(3, 70)
    # the scripted clock: a second for each step that waits, one for all that are queued
    assert found == StepTime("decode", 3, 70, 1.0, 1.0 / REPEATS)
    assert found.host_share == pytest.approx(1 - 1 / REPEATS)
    assert Counting.counts == {"sample": WARMUPS + REPEATS, "sample_ids": REPEATS}
    assert stepper.num_replays == WARMUPS + 2 * REPEATS  # every one from a graph


def test_a_prompt_is_one_eager_step(rig):
    bench, stepper, _ = rig
    found = bench.prefill(130)
    assert (found.kind, found.batch, found.tokens) == ("prefill", 1, 130)
    assert stepper.num_replays == 0
    assert Counting.counts["sample"] == WARMUPS + PREFILL_REPEATS


def test_a_first_token_comes_after_idle_time(rig):
    bench, _, clock = rig
    found = bench.first_token(100)
    assert clock.slept_s == [enginebench.IDLE_S] * PREFILL_REPEATS
    assert found.wall_s == 1.0  # the idle time is not counted


def test_sequences_of_a_batch_share_no_block_and_kv_is_not_zero(rig):
    bench, stepper, _ = rig
    tables = [bench._table(index, BLOCK_TOKENS + 1) for index in range(4)]
    assert len(np.unique(np.concatenate(tables))) == 8
    assert all(layer.std() > 0.5 for layer in stepper.eager.layers)


def test_kv_of_the_largest_shape_in_whole_blocks():
    assert kv_tokens_for([(2, 65), (1, 64)], ()) == 2 * 128
    assert kv_tokens_for([(2, 65)], (300, 1)) == 320


def test_every_shape_is_timed_once(rig):
    bench, _, _ = rig
    found = list(run_all(bench, ((1, 5), (4, 64)), (20,)))
    assert [(t.kind, t.batch, t.tokens) for t in found] == [
        ("first token", 1, enginebench.IDLE_PROMPT_TOKENS),
        ("decode", 1, 5),
        ("decode", 4, 64),
        ("prefill", 1, 20),
    ]


def test_a_loop_of_the_engine_is_timed_with_every_sequence_decoding(rig):
    bench, stepper, clock = rig
    found = engineloop.time_steps(stepper, bench._kv, 4, 50, 0.5, clock)
    assert (found.kind, found.batch, found.tokens, found.device_s) == ("engine loop", 4, 50, 0.5)
    assert found.wall_s == 4.0  # questions to the clock in one step: ours, and the engine's two
    assert stepper.num_replays == WARMUPS + engineloop.REPEATS + 1  # one is ahead of the others
    assert stepper.ops.counts["sample"] == 0  # nothing waits for more than the ids


def test_a_mixed_step_has_its_chunk_behind_the_decodes_in_blocks_of_its_own(rig):
    bench, stepper, _ = rig
    seen = []
    logits = stepper.logits
    stepper.logits = lambda rows: seen.append(rows) or logits(rows)
    assert bench.mixed(20, 30, 2, 10) == 1.0
    *decodes, chunk = seen[-1]
    assert [(row.start, len(row.token_ids)) for row in decodes] == [(9, 1), (9, 1)]
    assert (chunk.start, len(chunk.token_ids)) == (30, 20)
    tables = [set(row.table.tolist()) for row in seen[-1]]
    assert sum(map(len, tables)) == len(set.union(*tables))
