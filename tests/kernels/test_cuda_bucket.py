"""Numbers of a decode bucket filled step by step: those of a step that is laid out afresh."""

import numpy as np
import pytest

from kernels.cuda import plan
from kernels.cuda.bucket import STEPS_PER_CUT, DecodeBucket
from kernels.ops import Heads, SequenceTokens

HEADS = Heads(4, 2, 64)
BLOCK = 16
NUM_BLOCKS = 8  # of threads at a time: 4 lanes of a KV head
LANES = NUM_BLOCKS // HEADS.num_kv_heads
ROWS, BLOCKS_MAX = 6, 64


def bucket() -> tuple[DecodeBucket, plan.StepShape]:
    pieces = plan.pieces_max(ROWS, NUM_BLOCKS, HEADS)
    shape = plan.StepShape.of_bucket(ROWS, BLOCKS_MAX, pieces)
    return DecodeBucket(shape, is_pinned=False), shape


def sequences(starts: list[int], seed: int = 0) -> list[SequenceTokens]:
    order = np.random.default_rng(seed).permutation(ROWS * BLOCKS_MAX).reshape(ROWS, BLOCKS_MAX)
    tables = zip(starts, order, strict=False)
    return [SequenceTokens(start, 1, table[: start // BLOCK + 2]) for start, table in tables]


def check(filled: DecodeBucket, shape: plan.StepShape, steps: list[SequenceTokens]) -> None:
    """Every number that a kernel reads is that of a fresh layout."""
    fresh = plan.lay_out(steps, HEADS, BLOCK, NUM_BLOCKS)
    mine, other = plan.split(filled.numbers, shape), plan.split(fresh.numbers, fresh.shape)
    count, used = len(steps), fresh.shape.blocks_max
    slots, tables, pieces, num_pieces, places, _ = mine
    assert slots[:count].tolist() == other[0].tolist() and (slots[count:] == -1).all()
    for row, step in enumerate(steps):
        blocks = step.start // BLOCK + 1
        assert tables[row, :blocks].tolist() == other[1][row, :blocks].tolist(), used
    assert num_pieces.tolist() == other[3].tolist()
    assert pieces[: len(other[2])].tolist() == other[2].tolist()
    assert (
        places[: len(other[4])].tolist() == other[4].tolist() and not places[len(other[4]) :].any()
    )


def test_steps_of_changing_sequences_have_the_numbers_of_fresh_ones():
    filled, shape = bucket()
    for index, starts in enumerate(
        ([5, 700, 64], [6, 701, 65], [0], [900, 3, 15, 16, 17, 1000], [7, 7], [31, 32])
    ):
        steps = sequences(starts, seed=index)
        filled.fill(steps, BLOCK, LANES)
        check(filled, shape, steps)


def test_the_same_sequences_go_on_a_token_at_a_time():
    filled, shape = bucket()
    steps = sequences([100, 15, 500])
    for _ in range(10):  # over the end of a block
        filled.fill(steps, BLOCK, LANES)
        tables = [step.table for step in steps]
        check(filled, shape, steps)
        steps = [
            SequenceTokens(step.start + 1, 1, table)
            for step, table in zip(steps, tables, strict=True)
        ]


def test_pieces_cover_every_context_while_their_size_is_kept():
    filled, shape = bucket()
    tables = [step.table for step in sequences([1000, 1000])]
    assert 4 * STEPS_PER_CUT < 1000 // 5
    sizes = set()
    for start in range(10, 1000, 5):
        steps = [SequenceTokens(start, 1, table) for table in tables]
        filled.fill(steps, BLOCK, LANES)
        _, _, pieces, num_pieces, _, _ = plan.split(filled.numbers, shape)
        pieces = pieces.reshape(-1, plan.PIECE_FIELDS)[: num_pieces[0]]
        covered = [(first, end) for _, row, first, end, _ in pieces.tolist() if row == 0]
        assert sorted(covered)[0][0] == 0 and max(end for _, end in covered) == start + 1
        assert sum(end - first for first, end in covered) == start + 1
        sizes.add(filled._size)
    assert len(sizes) > 1  # chosen again from time to time


def test_a_refused_fill_changes_nothing():
    filled, shape = bucket()
    steps = sequences([5, 700])
    filled.fill(steps, BLOCK, LANES)
    before = filled.numbers.copy()
    short = SequenceTokens(16, 1, np.array([3]))
    for wrong, reason in (
        (sequences([1] * 6) + sequences([1]), "bucket of 6 rows"),
        ([SequenceTokens(0, 2, np.array([1]))], "bucket of 6 rows"),
        ([SequenceTokens(BLOCK * BLOCKS_MAX, 1, np.arange(70))], "65 blocks"),
        ([short], "17 tokens need 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            filled.fill(wrong, BLOCK, LANES)
    assert np.array_equal(filled.numbers, before)
    filled.fill(steps, BLOCK, LANES)
    check(filled, shape, steps)
