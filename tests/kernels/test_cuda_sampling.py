"""Sampling on the device draws what the torch backend draws from the same logits and numbers."""

import numpy as np
import pytest
import torch

from kernels.ops import SamplingTable
from kernels.torchops import sampling


def table(rows: int, uniform=0.5, **params: float) -> SamplingTable:
    full = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | params
    columns = {name: np.full(rows, value) for name, value in full.items()}
    draws = np.full(rows, uniform) if np.isscalar(uniform) else np.array(uniform)
    return SamplingTable(**columns, uniform=draws)


MIXED = SamplingTable(
    np.resize([0.0, 1.0, 0.7, 2.0], 42),
    np.resize([1.0, 0.9, 1.0, 0.99, 0.5], 42),
    np.resize([0, 0, 5, 0, 50, 700, 0], 42),
    np.resize([0.0, 0.0, 0.05], 42),
    np.random.default_rng(3).random(42),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.2, 3.0, 12.0])
def test_rows_of_every_kind_are_drawn_as_by_the_torch_backend(kit, spread, dtype):
    """A flat row makes the head longer than the list; a steep one has many weights of zero. The
    vocabulary is no multiple of a vector."""
    logits = torch.randn(42, 1001, generator=torch.Generator().manual_seed(2)) * spread
    logits = logits.to(dtype)
    assert kit.ops.sample(kit.on(logits), MIXED) == sampling.sample(logits.float(), MIXED)


def test_a_head_longer_than_the_list_is_looked_for_in_the_whole_row(kit):
    """All logits equal: the nucleus is nine tenths of the vocabulary, and ties are everywhere."""
    logits = kit.on(torch.zeros(2, 8000))
    draws = [0.5, 0.9999]
    assert kit.ops.sample(logits, table(2, draws, top_p=0.9)) == [3600, 7199]
    assert kit.ops.sample(logits, table(2, draws, top_k=6000)) == [3000, 5999]
    assert kit.ops.sample(logits, table(2, draws, top_k=1)) == [0, 0]
    assert kit.ops.sample(logits, table(2, draws, min_p=0.5)) == [4000, 7999]
    assert kit.ops.sample(logits, table(2, draws)) == [4000, 7999]


def test_greedy_takes_the_lowest_of_equal_ids_and_minus_zero_equals_zero(kit):
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [-0.0, 0.0, 0.0, -1.0], [-2.0, -1.0, -3.0, -1.0]])
    assert kit.ops.sample(kit.on(logits), table(3, temperature=0.0)) == [1, 0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_id_and_leave_other_rows_alone(kit, bad, temperature):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 20.0, 1.0], [-torch.inf] * 3])
    for params in ({}, {"top_k": 2}):
        drawn = kit.ops.sample(kit.on(logits), table(3, temperature=temperature, **params))
        assert drawn == [None, 1, None]


def test_the_draw_walks_the_ids_in_order_and_never_takes_a_forbidden_one(kit):
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])).repeat(6, 1)
    draws = [0.0, 0.2499, 0.2501, 0.7499, 0.9999, 1.0 - 2**-53]
    assert kit.ops.sample(kit.on(logits), table(6, draws)) == [0, 0, 2, 2, 3, 3]
    kept_all = kit.ops.sample(kit.on(logits), table(6, draws, top_k=5))
    assert kept_all == [2, 2, 2, 0, 3, 3]  # likeliest first; of the equal ones the lower id


def test_a_temperature_next_to_zero_is_greedy(kit):
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    assert kit.ops.sample(kit.on(logits), table(1, temperature=1e-300, uniform=0.9)) == [2]
    drawn = kit.ops.sample(kit.on(logits), table(1, temperature=1e-300, top_p=0.9, uniform=0.9))
    assert drawn == [2]


def test_no_rows_give_no_ids(kit):
    assert kit.ops.sample(kit.on(torch.zeros(0, 16)), table(0)) == []


def test_a_long_head_of_many_values_is_drawn_as_by_the_torch_backend(kit):
    """Thousands of values, each several times: cuts fall within them, and between."""
    rows = 12
    logits = torch.randn(rows, 9000, generator=torch.Generator().manual_seed(5)).bfloat16()
    columns = SamplingTable(
        np.resize([0.8, 1.5], rows),
        np.resize([0.9, 1.0, 0.999], rows),
        np.resize([0, 0, 0, 3000], rows),
        np.resize([0.0, 0.1], rows),
        np.random.default_rng(4).random(rows),
    )
    assert kit.ops.sampling_params(columns).is_wide
    assert kit.ops.sample(kit.on(logits), columns) == sampling.sample(logits.float(), columns)


def test_more_equal_logits_than_a_count_can_tell_are_drawn_all_the_same(kit):
    logits = kit.on(torch.zeros(1, 70_000).bfloat16())
    assert kit.ops.sample(logits, table(1, 0.5, top_p=0.9)) == [31_500]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_that_is_none_is_found_among_the_counts_too(kit, sign):
    logits = torch.zeros(2, 100).bfloat16()
    logits[0, 7] = sign * float("nan")
    assert kit.ops.sample(kit.on(logits), table(2, 0.5, min_p=0.5)) == [None, 50]


def test_only_cuts_that_may_keep_many_ids_ask_for_the_counts(kit):
    def is_wide(**params):
        return kit.ops.sampling_params(table(1, **params)).is_wide

    assert is_wide(top_p=0.9) and is_wide(min_p=0.1) and is_wide(top_k=6000)
    assert not (is_wide() or is_wide(top_k=50, top_p=0.9) or is_wide(temperature=0.0, top_p=0.9))
