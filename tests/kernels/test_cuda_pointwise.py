"""CUDA kernels that work row by row, against float64 at and around the size of a vector."""

import pytest
import torch

from kernels.ops import Heads
from kernels.reference import ReferenceOps
from tests.kernels.cudakit import BLOCK, assert_near, cache, sequences, values

EPS = 1e-5


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("hidden", [8, 520, 576])
def test_rms_norm_agrees_with_the_reference(kit, rows, hidden):
    x, weight = values(rows, hidden), values(hidden, seed=1)
    made = kit.ops.rms_norm(kit.on(x), kit.on(weight), EPS)
    assert_near(made, ReferenceOps().rms_norm(x.double(), weight, EPS))


def test_a_row_longer_than_all_threads_times_two_vectors_is_normed(kit):
    x, weight = values(2, 24_576), values(24_576, seed=1)
    made = kit.ops.rms_norm(kit.on(x), kit.on(weight), EPS)
    exact = x.double() * (x.double().square().mean(1, keepdim=True) + EPS).rsqrt()
    assert_near(made, exact * weight.double())


def test_add_rms_norm_norms_what_it_leaves_in_the_residual(kit):
    x, residual, weight = values(5, 576), values(5, 576, seed=1), values(576, seed=2)
    on_device = kit.on(residual)
    made = kit.ops.add_rms_norm(kit.on(x), on_device, kit.on(weight), EPS)
    assert torch.equal(on_device.cpu(), residual + x)
    assert_near(made, ReferenceOps().rms_norm((residual + x).double(), weight, EPS))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("width", [8, 2056])
def test_silu_mul_agrees_with_the_reference(kit, rows, width):
    gate_up = values(rows, 2 * width) * 3
    made = kit.ops.silu_mul(kit.on(gate_up))
    assert_near(made, ReferenceOps().silu_mul(gate_up.double()))


def test_silu_of_large_gates_is_zero_or_the_gate(kit):
    gate_up = torch.tensor([[-200.0, 200.0] * 4 + [1.0] * 8]).bfloat16()
    assert kit.ops.silu_mul(kit.on(gate_up)).tolist() == [[0.0, 200.0] * 4]


@pytest.mark.parametrize("heads", [Heads(6, 2, 64), Heads(3, 1, 128)])
def test_query_and_key_heads_are_normed_and_values_are_not(kit, heads):
    width = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv, q_weight, k_weight = (values(n, seed=n) for n in (7 * width, *[heads.head_dim] * 2))
    qkv = qkv.view(7, width)
    exact = qkv.double()
    ReferenceOps().norm_heads(exact, q_weight, k_weight, heads, EPS)
    made = kit.on(qkv)
    kit.ops.norm_heads(made, kit.on(q_weight), kit.on(k_weight), heads, EPS)
    assert_near(made, exact)
    first_value = width - heads.num_kv_heads * heads.head_dim
    assert torch.equal(made[:, first_value:].cpu(), qkv[:, first_value:])


def angles(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(rows, dim // 2, generator=torch.Generator().manual_seed(4)) * 6
    cos, sin = half.cos(), half.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


@pytest.mark.parametrize("heads", [Heads(6, 2, 64), Heads(2, 1, 16)])
def test_rope_turns_queries_and_writes_every_token_into_its_slot(kit, heads):
    steps, num_blocks = sequences([(14, 6), (39, 1), (0, 1), (15, 2)])
    qkv = values(10, (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    cos, sin = angles(10, heads.head_dim)
    exact_kv = cache(num_blocks, heads).double()
    reference = ReferenceOps()
    exact_q = reference.rope_write(
        qkv.double(), cos, sin, exact_kv, reference.plan_step(steps, heads, BLOCK)
    )
    ops, kv = kit.ops, kit.on(cache(num_blocks, heads))
    step = ops.plan_step(steps, heads, BLOCK)
    q = ops.rope_write(kit.on(qkv), kit.on(cos), kit.on(sin), kv, step)
    assert_near(q, exact_q)
    assert_near(kv, exact_kv)
    is_written = (kv.cpu() != cache(num_blocks, heads)).flatten(3).any(3).sum()
    assert int(is_written) == 2 * heads.num_kv_heads * 6  # planes of the six blocks written to


def test_rows_without_a_sequence_write_no_kv(kit):
    heads = Heads(2, 1, 16)
    (steps, num_blocks), ops = sequences([(20, 1)]), kit.ops
    step = ops.decode_bucket(4, 2, heads, BLOCK)
    ops.refill(step, steps)
    cos, sin = angles(4, heads.head_dim)
    kv = kit.on(cache(num_blocks, heads))
    ops.rope_write(kit.on(values(4, 64)), kit.on(cos), kit.on(sin), kv, step)
    changed = (kv.cpu() != cache(num_blocks, heads)).nonzero()
    assert {(b, offset) for b, _, _, offset, _ in changed.tolist()} == {(steps[0].table[1], 4)}


def test_impossible_shapes_are_refused_with_the_numbers(kit):
    ops = kit.ops
    with pytest.raises(ValueError, match="hidden size 12"):
        ops.rms_norm(kit.on(values(1, 12)), kit.on(values(12)), EPS)
    with pytest.raises(ValueError, match="hidden size 40960"):
        ops.rms_norm(kit.on(values(1, 40_960)), kit.on(values(40_960)), EPS)
    with pytest.raises(ValueError, match=r"gate_up has shape \(1, 24\)"):
        ops.silu_mul(kit.on(values(1, 24)))
    with pytest.raises(ValueError, match="torch.float32, expected one of"):
        ops.silu_mul(kit.on(values(1, 32).float()))
    with pytest.raises(ValueError, match="expected contiguous"):
        ops.rms_norm(kit.on(values(8, 8)).T, kit.on(values(8)), EPS)
    with pytest.raises(ValueError, match="not a multiple of 16"):
        ops.silu_mul(kit.on(values(17))[1:].view(1, 16))
    for heads in (Heads(2, 1, 80), Heads(17, 1, 64), Heads(3, 2, 64)):
        with pytest.raises(ValueError, match="expected"):
            ops.plan_step([], heads, BLOCK)
    with pytest.raises(ValueError, match="blocks of 8 tokens"):
        ops.plan_step([], Heads(2, 1, 64), 8)
