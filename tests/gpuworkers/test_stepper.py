"""Captured decode steps, through a capture that runs on the CPU: buckets, padding, what changes
between replays, and that their logits are those of the eager step."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.stepper import (
    BlockTables,
    DecodeBuffers,
    DecodeGraphs,
    Forward,
    GraphStepper,
    Stepper,
    StepRow,
)
from gpuworkers.weights import WeightFiles
from kernels.ops import Heads
from kernels.reference import ReferenceOps
from tests.gpuworkers.tinyllama import write_tiny

BLOCK_TOKENS = 16
NUM_BLOCKS = 12
BUCKETS = (1, 2, 4)


@dataclass
class BufferedStep:
    """A reference step that reads its buffers when it runs, as captured kernels do."""

    tables: torch.Tensor
    lengths: torch.Tensor
    heads: Heads
    block_tokens: int

    def tokens(self) -> list[tuple[int, np.ndarray]]:
        tables, lengths = self.tables.numpy(), self.lengths.tolist()
        return [(length - 1, table) for length, table in zip(lengths, tables, strict=True)]


class BufferedOps(ReferenceOps):
    def plan_decodes(self, tables, lengths, heads, block_tokens) -> BufferedStep:
        return BufferedStep(tables, lengths, heads, block_tokens)


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
        ops = BufferedOps()
        model = load_llama(read_config(folder), WeightFiles(folder), torch.float32, ops)
        self.caches = [
            TorchKVCache(2, NUM_BLOCKS, BLOCK_TOKENS, model.heads, torch.float32, num_spare=1)
            for _ in range(2)
        ]
        self.eager, other = (Stepper(model, ops, kv.layers, BLOCK_TOKENS) for kv in self.caches)
        self.recorder = Recorder()
        self.graphs = GraphStepper(other, ops, NUM_BLOCKS, self.recorder, 64, BUCKETS)

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
        assert torch.equal(mine[:NUM_BLOCKS], other[:NUM_BLOCKS])


def test_padding_touches_the_scratch_block_alone(rig):
    rig.both(prompts(3, 9))
    scratch = [kv.layers[0][NUM_BLOCKS].clone() for kv in rig.caches]
    rig.both(decodes(3, 9))
    eager, graphs = (kv.layers[0] for kv in rig.caches)
    assert torch.equal(eager[NUM_BLOCKS], scratch[0]) and not scratch[0].any()
    assert graphs[NUM_BLOCKS].any() and torch.equal(graphs[:NUM_BLOCKS], eager[:NUM_BLOCKS])


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


def test_numbers_of_a_step_and_its_padding():
    buffers = DecodeBuffers(torch.device("cpu"), blocks_max=3, scratch_block=99, bucket_max=4)
    ids, lengths, tables = buffers.views(4)
    rows = [StepRow([11], 20, np.array([5, 6]), True), StepRow([12], 0, np.array([7]), True)]
    buffers.fill(rows, 4)
    assert ids.tolist() == [11, 12, 0, 0] and lengths.tolist() == [21, 1, 1, 1]
    assert tables[:, 0].tolist() == [5, 7, 99, 99] and tables[0, :2].tolist() == [5, 6]
    addresses = [view.data_ptr() for view in (ids, lengths, tables)]
    buffers.fill(rows[1:], 4)
    again = buffers.views(4)
    assert [view.data_ptr() for view in again] == addresses
    assert again[0].tolist() == [12, 0, 0, 0] and again[2][:, 0].tolist() == [7, 99, 99, 99]


def test_a_bucket_of_another_size_gets_every_table_again():
    buffers = DecodeBuffers(torch.device("cpu"), blocks_max=2, scratch_block=9, bucket_max=4)
    row = StepRow([11], 20, np.array([5, 6]), True)
    for bucket in (2, 4, 2):
        buffers.fill([row], bucket)
        _, _, tables = buffers.views(bucket)
        assert tables[0].tolist() == [5, 6]
        assert tables[1:, 0].tolist() == [9] * (bucket - 1)


def test_tables_are_made_again_only_where_the_list_grew_or_is_another():
    tables = BlockTables()
    mine, other = [1, 2], [3]
    first = tables.take([mine, other])
    assert [table.tolist() for table in first] == [[1, 2], [3]]
    mine.append(4)
    second = tables.take([mine, other])
    assert second[0].tolist() == [1, 2, 4] and second[1] is first[1]
    assert tables.take([[3]])[0] is not first[1]
