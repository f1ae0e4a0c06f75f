"""Guards say what they got and what they expected."""

import numpy as np
import pytest
import torch

from kernels import checks


def test_any_size_matches_where_none_is_given():
    checks.shape("x", torch.zeros(3, 4), (None, 4))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\), expected \(None, 5\)"):
        checks.shape("x", torch.zeros(3, 4), (None, 5))
    with pytest.raises(ValueError, match="x has shape"):
        checks.shape("x", torch.zeros(3, 4), (3, 4, 1))


def test_dtype_must_be_one_of_those_allowed():
    checks.dtype("x", torch.zeros(1), torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x is torch.float64, expected one of"):
        checks.dtype("x", torch.zeros(1, dtype=torch.float64), torch.float32)


def test_strided_views_are_not_contiguous():
    checks.contiguous("x", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        checks.contiguous("x", torch.zeros(3, 4).T)


def test_a_block_table_must_cover_its_tokens():
    checks.block_table("table", np.zeros(2, dtype=np.int64), 32, 16)
    with pytest.raises(ValueError, match="33 tokens need 3"):
        checks.block_table("table", np.zeros(2, dtype=np.int64), 33, 16)
