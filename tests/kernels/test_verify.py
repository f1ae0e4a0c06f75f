"""The checks that run on a GPU machine, here on torch: they pass what is right and name what is
not."""

from dataclasses import replace

import pytest
import torch

from kernels.ops import Heads
from kernels.verify import Check, Sizes, checks
from tests.kernels.bufferedtorch import BufferedTorch

SIZES = Sizes(
    block_tokens=16,
    context_max=130,
    rows=(1, 3),
    hidden=(64,),
    widths=(48,),
    heads=(Heads(4, 2, 16), Heads(3, 1, 8)),
    vocabs=(512,),
)
CPU = torch.device("cpu")
KERNELS = {
    "rms_norm", "add_rms_norm", "silu_mul", "norm_heads", "rope_write", "decode attention",
    "ragged attention", "sample",
}  # fmt: skip


def found(ops: BufferedTorch, dtype: torch.dtype = torch.float32) -> list[Check]:
    return list(checks(ops, CPU, dtype, SIZES))


def wrong(ops: BufferedTorch) -> set[str]:
    return {check.kernel for check in found(ops) if not check.is_right}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_backend_passes_every_check_of_every_kernel(dtype):
    made = found(BufferedTorch(), dtype)
    assert {check.kernel for check in made} == KERNELS
    assert [check for check in made if not check.is_right] == []
    assert any(check.error > 0 for check in made)


class WrongEps(BufferedTorch):
    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, 0.01)


class NoResidual(BufferedTorch):
    def add_rms_norm(self, x, residual, weight, eps):
        return super().add_rms_norm(x, residual.clone(), weight, eps)


class KeysNotNormed(BufferedTorch):
    def norm_heads(self, qkv, q_weight, k_weight, heads, eps):
        super().norm_heads(qkv, q_weight, q_weight, heads, eps)


class HalvesSwapped(BufferedTorch):
    def silu_mul(self, gate_up):
        return super().silu_mul(torch.cat(gate_up.chunk(2, 1)[::-1], 1))


class ValueNotWritten(BufferedTorch):
    def rope_write(self, qkv, cos, sin, kv_layer, step):
        values = kv_layer[:, 1].clone()
        q = super().rope_write(qkv, cos, sin, kv_layer, step)
        kv_layer[:, 1] = values
        return q


class LastTokenForgotten(BufferedTorch):
    def refill(self, step, sequences):
        super().refill(step, [replace(s, start=max(0, s.start - 1)) for s in sequences])


class NotCausal(BufferedTorch):
    def attention(self, q, kv_layer, step):
        out = super().attention(q, kv_layer, step)
        return out if len(q) == 1 else out.roll(1, 0)


class NotANumber(BufferedTorch):
    def silu_mul(self, gate_up):
        return super().silu_mul(gate_up) * torch.nan


class NeverDraws(BufferedTorch):
    def sample(self, logits, table):
        return [None if row.isnan().any() else int(row.argmax()) for row in logits]


@pytest.mark.parametrize(
    ("ops", "kernels"),
    [
        (WrongEps(), {"rms_norm"}),
        (NoResidual(), {"add_rms_norm"}),
        (KeysNotNormed(), {"norm_heads"}),
        (HalvesSwapped(), {"silu_mul"}),
        (ValueNotWritten(), {"rope_write"}),
        (LastTokenForgotten(), {"decode attention"}),
        (NotCausal(), {"decode attention", "ragged attention"}),
        (NotANumber(), {"silu_mul"}),
        (NeverDraws(), {"sample"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BufferedTorch) else "",
)
def test_a_planted_fault_is_found_in_its_kernel(ops, kernels):
    assert wrong(ops) == kernels
