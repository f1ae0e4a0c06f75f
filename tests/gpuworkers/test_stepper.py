"""Captured decode steps, through a capture that runs on the CPU: buckets, padding, what changes
between replays, and that their logits are those of the eager step."""

import numpy as np
import pytest
import torch

from controlplane import protocol
from gpuworkers import memory, stepper
from gpuworkers.engine import SEQUENCES_MAX
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.stepper import (
    BlockTables,
    DecodeGraphs,
    Forward,
    GraphStepper,
    Stepper,
    StepRow,
)
from gpuworkers.weights import WeightFiles
from tests.gpuworkers.tinyllama import write_tiny
from tests.kernels.bufferedtorch import BufferedTorch

BLOCK_TOKENS = 16
NUM_BLOCKS = 12
BUCKETS = (1, 2, 4)


class Recorder:
    """A capture: runs the pass once as CUDA would, then again with the same buffer at a replay."""

    def __init__(self) -> None:
        self.captured_rows: list[int] = []

    def __call__(self, forward: Forward) -> Forward:
        logits = forward()
        self.captured_rows.append(len(logits))
        return lambda: logits.copy_(forward())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("stepper"))


class Rig:
    """The same model twice: eager, and with captured decodes over KV of its own."""

    def __init__(self, folder) -> None:
        ops = BufferedTorch(tile=None)
        model = load_llama(read_config(folder), WeightFiles(folder), torch.float32, ops)
        self.caches = [
            TorchKVCache(2, NUM_BLOCKS, BLOCK_TOKENS, model.heads, torch.float32) for _ in range(2)
        ]
        self.eager, other = (Stepper(model, ops, kv.layers, BLOCK_TOKENS) for kv in self.caches)
        self.recorder = Recorder()
        self.graphs = GraphStepper(other, ops, self.recorder, 64, BUCKETS)

    def both(self, rows: list[StepRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.eager.logits(rows), self.graphs.logits(rows)


@pytest.fixture
def rig(folder):
    with torch.inference_mode():
        yield Rig(folder)


TABLES = [np.array(table) for table in ([3, 0], [7, 5], [1, 2], [8, 4], [9, 10])]


def prompts(count: int, length: int) -> list[StepRow]:
    return [StepRow([5 + i] * length, 0, TABLES[i], False) for i in range(count)]


def decodes(count: int, start: int) -> list[StepRow]:
    return [StepRow([40 + i], start, TABLES[i], True) for i in range(count)]


def test_buckets_are_captured_once_the_largest_first(rig):
    assert rig.recorder.captured_rows == [4, 2, 1]
    rig.both(prompts(3, 9))
    rig.both(decodes(3, 9))
    rig.both(decodes(2, 10))
    assert rig.recorder.captured_rows == [4, 2, 1] and rig.graphs.num_replays == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_replayed_step_has_the_logits_and_writes_the_kv_of_an_eager_one(rig, count):
    rig.both(prompts(count, 15))
    for start in (15, 16):  # the last slot of a block, and the first of the next
        eager, replayed = rig.both(decodes(count, start))
        assert replayed.shape == eager.shape == (count, 512)
        assert torch.equal(replayed, eager)
    assert rig.graphs.num_replays == 2
    for mine, other in zip(*(kv.layers for kv in rig.caches), strict=True):
        assert torch.equal(mine, other)


def test_padding_writes_no_kv(rig):
    rig.both(prompts(3, 9))
    for layer in rig.caches[1].layers:
        layer[NUM_BLOCKS - 1] = 7.0  # of no sequence
    rig.both(decodes(3, 9))
    for mine, other in zip(*(kv.layers for kv in rig.caches), strict=True):
        assert torch.equal(mine[:-1], other[:-1]) and (other[-1] == 7.0).all()


def test_rows_of_other_sequences_leave_no_trace_in_the_next_step(rig):
    rig.both(prompts(5, 15))
    rig.both(decodes(4, 15))
    swapped = [StepRow([77], 15, TABLES[4], True), StepRow([78], 16, TABLES[0], True)]
    eager, replayed = rig.both(swapped)
    assert torch.equal(replayed, eager)
    three = [StepRow([9], 17, TABLES[0], True), *decodes(4, 16)[1:3]]
    eager, replayed = rig.both(three)
    assert torch.equal(replayed, eager) and rig.graphs.num_replays == 3


@pytest.mark.parametrize(
    "rows",
    [
        decodes(5, 3),  # more than the largest bucket
        [*decodes(1, 3), StepRow([1, 2], 3, TABLES[1], True)],  # a chunk among them
        [*decodes(1, 3), StepRow([1], 3, TABLES[1], False)],  # a chunk of one token
    ],
    ids=["too many", "chunk", "chunk of one"],
)
def test_other_steps_run_eagerly(rig, rows):
    rig.both(prompts(5, 3))
    eager, other = rig.both(rows)
    assert torch.equal(eager, other) and rig.graphs.num_replays == 0


def test_the_smallest_bucket_that_holds_the_rows_is_taken():
    made = []
    graphs = DecodeGraphs(lambda bucket: made.append(bucket) or (lambda: bucket), (8, 1, 4))
    assert made == [8, 4, 1]
    found = [graphs.bucket_for(rows) for rows in (1, 2, 4, 5, 8, 9)]
    assert found == [1, 4, 4, 8, 8, None]
    assert graphs.replay(4) == 4


def test_every_decode_step_of_an_engine_has_a_bucket():
    largest = SEQUENCES_MAX + protocol.Policy().batch_rows_max
    assert stepper.BUCKETS[-1] == memory.SAMPLED_ROWS == largest


def test_tables_are_made_again_only_where_the_list_grew_or_is_another():
    tables = BlockTables()
    mine, other = [1, 2], [3]
    first = tables.take([mine, other])
    assert [table.tolist() for table in first] == [[1, 2], [3]]
    mine.append(4)
    second = tables.take([mine, other])
    assert second[0].tolist() == [1, 2, 4] and second[1] is first[1]
    assert tables.take([[3]])[0] is not first[1]
