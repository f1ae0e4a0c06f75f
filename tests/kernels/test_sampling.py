"""Drawing ids: greedy ties, truncation, the inverse distribution, logits that are no numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import SamplingTable
from kernels.reference import ReferenceOps
from kernels.torchops import sampling
from kernels.torchops.sampling import sample


def table(
    rows: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    uniform: float | list[float] = 0.0,
    min_p: float = 0.0,
) -> SamplingTable:
    draws = uniform if isinstance(uniform, list) else [uniform] * rows
    return SamplingTable(
        np.full(rows, temperature),
        np.full(rows, top_p),
        np.full(rows, top_k, dtype=np.int64),
        np.full(rows, min_p),
        np.array(draws, dtype=np.float64),
    )


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, table(2, temperature=0.0)) == [1, 0]


def test_the_draw_walks_the_ids_in_order():
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25]])).repeat(5, 1)
    draws = [0.0, 0.2499, 0.2501, 0.7499, 0.9999]
    assert sample(logits, table(5, uniform=draws)) == [0, 0, 1, 1, 2]


def test_top_k_and_top_p_keep_the_likeliest_ids():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).repeat(4, 1)
    draws = [0.0, 0.5, 0.6, 0.9999]
    assert sample(logits, table(4, top_k=2, uniform=draws)) == [1, 1, 3, 3]
    assert sample(logits, table(4, top_p=0.6, uniform=draws)) == [1, 1, 3, 3]
    assert sample(logits, table(4, top_p=0.0001, uniform=draws)) == [1, 1, 1, 1]


def test_low_temperature_approaches_greedy_and_high_temperature_the_uniform():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    assert sample(logits, table(1, temperature=0.01, uniform=0.999)) == [2]
    even = [sample(logits, table(1, temperature=1e6, uniform=u))[0] for u in (0.1, 0.3, 0.6, 0.9)]
    assert even == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_id_and_leave_other_rows_alone(bad, temperature):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 9.0, 1.0], [-torch.inf] * 3])
    assert sample(logits, table(3, temperature=temperature, uniform=0.5)) == [None, 1, None]


def test_a_forbidden_id_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.4999, 0.5, 0.75, 1.0 - 2**-53):
        assert sample(logits, table(1, uniform=uniform))[0] in (0, 2)


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]])).repeat(4, 1)
    draws = [0.0, 0.5, 0.6, 0.9999]
    assert sample(logits, table(4, min_p=0.7, uniform=draws)) == [1, 1, 3, 3]
    assert sample(logits, table(4, min_p=1.0, uniform=draws)) == [1, 1, 1, 1]


def test_rows_of_every_kind_drawn_together_are_drawn_as_alone():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 3000, generator=generator) * 3
    mixed = SamplingTable(
        np.resize([0.0, 1.0, 0.7, 2.0], 40),
        np.resize([1.0, 0.9, 1.0, 0.99, 0.5], 40),
        np.resize([0, 0, 5, 2000], 40),
        np.resize([0.0, 0.0, 0.05], 40),
        np.linspace(0.0, 0.999, 40),
    )
    alone = [sample(logits[i : i + 1], mixed.rows(np.array([i])))[0] for i in range(len(logits))]
    assert sample(logits, mixed) == alone
    assert ReferenceOps().sample(logits[:8], mixed.rows(np.arange(8))) == alone[:8]


def test_a_head_that_does_not_end_within_the_candidates_is_looked_for_in_the_whole_row():
    """All logits equal: the nucleus is nine tenths of the vocabulary, and ties are everywhere."""
    logits = torch.zeros(2, 4000)
    assert sample(logits, table(2, top_p=0.9, uniform=[0.5, 0.9999])) == [1800, 3599]
    assert sample(logits, table(2, top_k=3000, uniform=[0.5, 0.9999])) == [1500, 2999]
    assert sample(logits, table(2, top_k=1, uniform=[0.5, 0.9999])) == [0, 0]


def test_top_p_is_a_share_of_the_top_k_also_where_these_are_more_than_the_candidates():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(5))
    params = table(1, temperature=0.5, top_p=0.5, top_k=400, uniform=0.999)
    assert sample(logits, params) == ReferenceOps().sample(logits, params)
    assert sample(logits, table(1, 0.5, 0.5, 0, 0.999)) != ReferenceOps().sample(logits, params)


def test_logprobs_agree_with_the_reference_and_sum_to_one():
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(1)) * 2
    logits[1, 7] = logits[1, 3] = 9.0
    mine = sampling.logprobs(logits, [5, 7, 0], [60, 2, 0])
    theirs = ReferenceOps().logprobs(logits, [5, 7, 0], [60, 2, 0])
    for one, other in zip(mine, theirs, strict=True):
        assert one.top_ids == other.top_ids
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-9)
    assert mine[1].top_ids == [3, 7] and mine[2].top_ids == []
    assert np.exp(mine[0].top_logprobs).sum() == pytest.approx(1.0)


def test_shape_and_dtype_are_checked():
    with pytest.raises(ValueError, match="logits has shape"):
        sample(torch.zeros(2, 4), table(1))
    with pytest.raises(ValueError, match="logits is torch.float64"):
        sample(torch.zeros(1, 4, dtype=torch.float64), table(1))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0.05, 0.37, 0.81, 1.0]),
    st.sampled_from([0, 1, 3, 50]),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.floats(0.0, 1.0, exclude_max=True),
    st.sampled_from([2, 5, 256]),
)
def test_any_row_agrees_with_the_reference(
    values, temperature, top_p, top_k, min_p, uniform, candidates
):
    """Logits on a coarse grid, so that ties are common; near a boundary both may round apart."""
    logits = torch.tensor([values], dtype=torch.float32) / 7
    params = table(1, temperature, top_p, top_k, uniform, min_p)
    expected = ReferenceOps().sample(logits, params)
    if temperature > 0 and (top_p < 1.0 or top_k or min_p):
        drawn = sampling._draw_cut(logits, params, candidates).tolist()
    else:
        drawn = sample(logits, params)
    if drawn != expected:
        nudged = [table(1, temperature, top_p + d, top_k, min(max(uniform + d, 0.0), 1 - 2**-53),
                        max(0.0, min_p * (1 + d)))
                  for d in (-1e-9, 1e-9)]  # fmt: skip
        assert drawn[0] in [ReferenceOps().sample(logits, n)[0] for n in nudged]
