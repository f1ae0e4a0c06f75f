"""Paged attention against the float64 reference, and its bits across company and chunking."""

import numpy as np
import pytest
import torch

from kernels.ops import Heads, SequenceTokens
from kernels.reference import ReferenceOps
from kernels.torchops import attention
from kernels.torchops.backend import TorchOps

BLOCK = 16
HEADS = Heads(num_q_heads=6, num_kv_heads=2, head_dim=16)
# float32 against float64 over at most a few hundred terms of size 1
TOLERANCE = 2e-5


def cache(num_blocks: int, heads: Heads = HEADS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks, 2, heads.num_kv_heads, BLOCK, heads.head_dim)
    return torch.randn(shape, generator=generator)


def tables(lengths: list[int], seed: int = 0) -> tuple[list[np.ndarray], int]:
    """A scattered block table for each length, and the number of blocks in all."""
    counts = [-(-length // BLOCK) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(counts))
    return np.split(order, np.cumsum(counts)[:-1]), sum(counts)


def queries(rows: int, heads: Heads = HEADS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads.num_q_heads, heads.head_dim, generator=generator)


@pytest.fixture(scope="module")
def rows_min() -> int | None:
    return attention.probe_rows_min(HEADS)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200])
def test_one_token_agrees_with_the_reference_at_block_and_tile_boundaries(length, rows_min):
    (table,), num_blocks = tables([length])
    kv, q = cache(num_blocks), queries(1)
    sequences = [SequenceTokens(length - 1, 1, table)]
    step = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
    reference = ReferenceOps()
    expected = reference.attention(q, kv, reference.plan_step(sequences, HEADS, BLOCK))
    actual = attention.attention(q, kv, step)
    assert torch.allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.parametrize("start,count", [(0, 2), (0, 65), (7, 9), (60, 10), (64, 64), (100, 3)])
def test_a_chunk_agrees_with_the_reference(start, count, rows_min):
    (table,), num_blocks = tables([start + count])
    kv, q = cache(num_blocks), queries(count)
    sequences = [SequenceTokens(start, count, table)]
    reference = ReferenceOps()
    expected = reference.attention(q, kv, reference.plan_step(sequences, HEADS, BLOCK))
    step = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
    assert torch.allclose(attention.attention(q, kv, step), expected, atol=TOLERANCE)


@pytest.mark.parametrize("heads", [Heads(4, 4, 8), Heads(9, 3, 64), Heads(8, 1, 32)])
def test_any_grouping_of_heads_agrees_with_the_reference(heads):
    rows_min = attention.probe_rows_min(heads)
    (first, second), num_blocks = tables([70, 33])
    kv, q = cache(num_blocks, heads), queries(13, heads)
    sequences = [SequenceTokens(69, 1, first), SequenceTokens(21, 12, second)]
    reference = ReferenceOps()
    expected = reference.attention(q, kv, reference.plan_step(sequences, heads, BLOCK))
    step = attention.plan_step(sequences, heads, BLOCK, rows_min)
    assert torch.allclose(attention.attention(q, kv, step), expected, atol=TOLERANCE)


def test_the_answer_is_visible_by_eye_for_one_hot_keys(rows_min):
    """A query that points strongly at one key returns that key's value."""
    heads = Heads(1, 1, 4)
    kv = torch.zeros(1, 2, 1, BLOCK, 4)
    kv[0, 0, 0, 2, 3] = 1000.0
    kv[0, 1, 0, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    q = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])
    step = attention.plan_step([SequenceTokens(4, 1, np.array([0]))], heads, BLOCK, rows_min)
    assert attention.attention(q, kv, step).tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("num_sequences", list(range(1, 34)))
def test_a_token_has_the_same_bits_in_any_batch(num_sequences, rows_min):
    lengths = [1 + (37 * index) % 190 for index in range(33)]
    all_tables, num_blocks = tables(lengths)
    kv, q = cache(num_blocks), queries(33)

    def run(indices: list[int]) -> torch.Tensor:
        sequences = [SequenceTokens(lengths[i] - 1, 1, all_tables[i]) for i in indices]
        step = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
        return attention.attention(q[indices], kv, step)

    alone = torch.cat([run([i]) for i in range(num_sequences)])
    assert torch.equal(run(list(range(num_sequences))), alone)


@pytest.mark.parametrize(
    "cuts", [(), (1,), (64,), (65,), (129, 194), (16, 17, 80), (63, 65, 128), (199,)]
)
def test_a_token_has_the_same_bits_in_any_chunking_and_in_decode(cuts, rows_min):
    length = 200
    (table,), num_blocks = tables([length])
    kv, q = cache(num_blocks), queries(length)

    def run(edges: list[int]) -> torch.Tensor:
        parts = []
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            sequences = [SequenceTokens(start, end - start, table)]
            step = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
            parts.append(attention.attention(q[start:end], kv, step))
        return torch.cat(parts)

    assert torch.equal(run([0, *cuts, length]), run(list(range(length + 1))))


def test_without_a_safe_row_count_chunks_are_computed_token_by_token():
    (table,), num_blocks = tables([90])
    kv, q = cache(num_blocks), queries(90)
    step = attention.plan_step([SequenceTokens(0, 90, table)], HEADS, BLOCK, None)
    assert step.chunks == []
    whole = attention.attention(q, kv, step)
    last = attention.plan_step([SequenceTokens(89, 1, table)], HEADS, BLOCK, None)
    assert torch.equal(attention.attention(q[89:], kv, last), whole[89:])


def test_pairs_beyond_the_maximum_are_computed_in_further_groups(monkeypatch, rows_min):
    monkeypatch.setattr(attention, "PAIRS_MAX", 4)
    lengths = [300, 200, 65, 64, 1, 128]
    all_tables, num_blocks = tables(lengths)
    kv, q = cache(num_blocks), queries(len(lengths))
    sequences = [
        SequenceTokens(n - 1, 1, table) for n, table in zip(lengths, all_tables, strict=True)
    ]
    grouped = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
    assert [len(g.token_rows) * g.tiles for g in grouped.decodes] == [5, 4, 4, 2]
    monkeypatch.setattr(attention, "PAIRS_MAX", 256)
    whole = attention.plan_step(sequences, HEADS, BLOCK, rows_min)
    assert [len(g.token_rows) * g.tiles for g in whole.decodes] == [10, 4, 2]
    assert torch.equal(attention.attention(q, kv, grouped), attention.attention(q, kv, whole))


def test_rows_beyond_the_sequence_in_its_last_block_do_not_count(rows_min):
    (table,), num_blocks = tables([20])
    kv, q = cache(num_blocks), queries(1)
    step = attention.plan_step([SequenceTokens(19, 1, table)], HEADS, BLOCK, rows_min)
    before = attention.attention(q, kv, step)
    kv[table[1], :, :, 4:] = 1e30
    assert torch.equal(attention.attention(q, kv, step), before)


def test_impossible_steps_are_refused():
    table = np.array([0, 1])
    with pytest.raises(ValueError, match="33 tokens need 3"):
        attention.plan_step([SequenceTokens(32, 1, table)], HEADS, BLOCK, 4)
    with pytest.raises(ValueError, match="do not divide"):
        attention.plan_step([SequenceTokens(0, 1, table)], HEADS, 48, 4)
    step = attention.plan_step([SequenceTokens(0, 1, table)], HEADS, BLOCK, 4)
    with pytest.raises(ValueError, match="q has shape"):
        attention.attention(queries(1)[:, :5], cache(2), step)
    with pytest.raises(ValueError, match="contiguous"):
        attention.attention(queries(1), cache(2).transpose(3, 4), step)


def test_rope_writes_each_token_into_its_slot_like_the_reference():
    ops, reference = TorchOps(rows_min=4), ReferenceOps()
    (first, second), num_blocks = tables([20, 40])
    sequences = [SequenceTokens(14, 6, first), SequenceTokens(39, 1, second)]
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(7, (6 + 2 * 2) * 16, generator=generator)
    angles = torch.rand(7, 8, generator=generator) * 6
    cos = torch.cat((angles.cos(), angles.cos()), dim=1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    kv, kv_expected = cache(num_blocks), cache(num_blocks)
    q = ops.rope_write(qkv.clone(), cos, sin, kv, ops.plan_step(sequences, HEADS, BLOCK))
    q_expected = reference.rope_write(
        qkv, cos, sin, kv_expected, reference.plan_step(sequences, HEADS, BLOCK)
    )
    assert torch.allclose(q, q_expected, atol=1e-6)
    assert torch.allclose(kv, kv_expected, atol=1e-6)
    assert not torch.equal(kv, cache(num_blocks))
