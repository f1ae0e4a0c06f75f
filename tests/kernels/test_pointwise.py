"""Row-wise operations against the reference, and their bits across numbers of rows."""

import pytest
import torch

from kernels.ops import Heads
from kernels.reference import ReferenceOps
from kernels.torchops import pointwise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("width", [8, 63, 64, 65, 576])
def test_rms_norm_agrees_with_the_reference(rows, width):
    x, weight = random(rows, width), random(width, seed=1)
    expected = ReferenceOps().rms_norm(x, weight, 1e-5)
    assert torch.allclose(pointwise.rms_norm(x, weight, 1e-5), expected, atol=1e-4)


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4.0]])
    expected = torch.tensor([[3.0, 8.0]]) / 12.5**0.5
    actual = pointwise.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    assert torch.allclose(actual, expected)


def test_add_rms_norm_adds_into_the_residual():
    x, residual, weight = random(3, 16), random(3, 16, seed=1), random(16, seed=2)
    total = x + residual
    out = pointwise.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(out, pointwise.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_silu_mul_agrees_with_the_reference(rows):
    gate_up = random(rows, 2 * 37)
    expected = ReferenceOps().silu_mul(gate_up)
    assert torch.allclose(pointwise.silu_mul(gate_up), expected, atol=1e-5)


def test_a_row_has_the_same_bits_among_any_other_rows():
    x, gate_up, weight = random(64, 576), random(64, 3072), random(576, seed=1)
    norms, gated = pointwise.rms_norm(x, weight, 1e-5), pointwise.silu_mul(gate_up)
    for rows in (1, 2, 3, 4, 5, 8, 33):
        for start in (0, 17):
            part = slice(start, start + rows)
            assert torch.equal(pointwise.rms_norm(x[part], weight, 1e-5), norms[part])
            assert torch.equal(pointwise.silu_mul(gate_up[part]), gated[part])


def test_query_and_key_heads_are_normed_each_by_itself_and_values_are_not():
    heads = Heads(num_q_heads=4, num_kv_heads=2, head_dim=8)
    qkv, q_weight, k_weight = random(3, 64), random(8, seed=1), random(8, seed=2)
    expected = qkv.clone()
    ReferenceOps().norm_heads(expected, q_weight, k_weight, heads, 1e-6)
    actual = qkv.clone()
    pointwise.norm_heads(actual, q_weight, k_weight, 4, 1e-6)
    assert torch.allclose(actual, expected, atol=1e-5)
    assert torch.equal(actual[:, 48:], qkv[:, 48:]) and not torch.equal(actual, qkv)


def test_rotation_by_a_quarter_turn_swaps_the_halves():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.zeros(1, 4), torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    assert pointwise.rotate_(x, cos, sin).tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


def test_wrong_shapes_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), expected \(4,\)"):
        pointwise.rms_norm(random(2, 4), random(3), 1e-5)
    with pytest.raises(ValueError, match="residual has shape"):
        pointwise.add_rms_norm(random(2, 4), random(3, 4), random(4), 1e-5)
    with pytest.raises(ValueError, match="expected contiguous"):
        pointwise.rms_norm(random(4, 8).T, random(4), 1e-5)
