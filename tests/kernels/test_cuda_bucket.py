"""Numbers of a decode bucket filled step by step: those of a step that is laid out afresh."""

import numpy as np
import pytest

from kernels.cuda import plan
from kernels.cuda.bucket import DecodeBucket
from kernels.ops import Heads, SequenceTokens

HEADS = Heads(4, 2, 64)
BLOCK = 16
LANES = 4
ROWS, BLOCKS_MAX = 6, 64


def bucket() -> tuple[DecodeBucket, plan.StepShape]:
    shape = plan.StepShape.of_bucket(ROWS, BLOCKS_MAX, LANES)
    return DecodeBucket(shape, is_pinned=False), shape


def sequences(starts: list[int], seed: int = 0) -> list[SequenceTokens]:
    order = np.random.default_rng(seed).permutation(ROWS * BLOCKS_MAX).reshape(ROWS, BLOCKS_MAX)
    tables = zip(starts, order, strict=False)
    return [SequenceTokens(start, 1, table[: start // BLOCK + 2]) for start, table in tables]


def check(filled: DecodeBucket, shape: plan.StepShape, steps: list[SequenceTokens]) -> None:
    """Every number that a kernel reads is that of a fresh layout."""
    fresh = plan.lay_out(steps, HEADS, BLOCK, LANES)
    mine, other = plan.split(filled.numbers, shape), plan.split(fresh.numbers, fresh.shape)
    count, used = len(steps), fresh.shape.blocks_max
    slots, tables, pieces, lane_first, _ = mine
    assert slots[:count].tolist() == other[0].tolist() and (slots[count:] == -1).all()
    for row, step in enumerate(steps):
        blocks = step.start // BLOCK + 1
        assert tables[row, :blocks].tolist() == other[1][row, :blocks].tolist(), used
    assert lane_first.tolist() == other[3].tolist()
    assert pieces[: len(other[2])].tolist() == other[2].tolist()


def test_steps_of_changing_sequences_have_the_numbers_of_fresh_ones():
    filled, shape = bucket()
    for index, starts in enumerate(
        ([5, 700, 64], [6, 701, 65], [0], [900, 3, 15, 16, 17, 1000], [7, 7], [31, 32])
    ):
        steps = sequences(starts, seed=index)
        filled.fill(steps, BLOCK)
        check(filled, shape, steps)


def test_the_same_sequences_go_on_a_token_at_a_time():
    filled, shape = bucket()
    steps = sequences([100, 15, 500])
    for _ in range(10):  # over the end of a block
        filled.fill(steps, BLOCK)
        tables = [step.table for step in steps]
        check(filled, shape, steps)
        steps = [
            SequenceTokens(step.start + 1, 1, table)
            for step, table in zip(steps, tables, strict=True)
        ]


def test_a_refused_fill_changes_nothing():
    filled, shape = bucket()
    steps = sequences([5, 700])
    filled.fill(steps, BLOCK)
    before = filled.numbers.copy()
    short = SequenceTokens(16, 1, np.array([3]))
    for wrong, reason in (
        (sequences([1] * 6) + sequences([1]), "bucket of 6 rows"),
        ([SequenceTokens(0, 2, np.array([1]))], "bucket of 6 rows"),
        ([SequenceTokens(BLOCK * BLOCKS_MAX, 1, np.arange(70))], "65 blocks"),
        ([short], "17 tokens need 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            filled.fill(wrong, BLOCK)
    assert np.array_equal(filled.numbers, before)
    filled.fill(steps, BLOCK)
    check(filled, shape, steps)
