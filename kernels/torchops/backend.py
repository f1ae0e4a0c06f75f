"""The operations on torch for CPUs, with the numerics chosen once at start."""

from dataclasses import dataclass, replace

import torch

from kernels.ops import Heads, SamplingTable, SequenceTokens, TokenLogprobs
from kernels.torchops import attention, linear, pointwise, sampling
from kernels.torchops.attention import StepIndices
from kernels.torchops.linear import Layout, PackedWeight


@dataclass(frozen=True, slots=True)
class TorchOps:
    """See kernels.ops.Ops. `tile`: rows of a linear are padded to a multiple of it (None: calls of
    a fixed size); `rows_min`: see attention.probe_rows_min."""

    layout: Layout = "plain"
    tile: int | None = 1
    rows_min: int | None = 1

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedWeight:
        return linear.pack(weight, self.layout, bias)

    def linear(self, x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        return linear.linear(x, packed, self.tile)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return pointwise.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return pointwise.add_rms_norm(x, residual, weight, eps)

    def norm_heads(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        heads: Heads,
        eps: float,
    ) -> None:
        pointwise.norm_heads(qkv, q_weight, k_weight, heads.num_q_heads, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return pointwise.silu_mul(gate_up)

    def plan_step(
        self, sequences: list[SequenceTokens], heads: Heads, block_tokens: int
    ) -> StepIndices:
        return attention.plan_step(sequences, heads, block_tokens, self.rows_min)

    def rope_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_layer: torch.Tensor,
        step: StepIndices,
    ) -> torch.Tensor:
        return pointwise.rope_write(qkv, cos, sin, kv_layer, step.slots, step.heads.num_q_heads)

    def attention(self, q: torch.Tensor, kv_layer: torch.Tensor, step: StepIndices) -> torch.Tensor:
        return attention.attention(q, kv_layer, step)

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        return sampling.sample(logits.float(), table)

    def logprobs(
        self, logits: torch.Tensor, token_ids: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        return sampling.logprobs(logits, token_ids, num_top)


def exact(ops: TorchOps, weights: list[PackedWeight], dtype: torch.dtype, heads: Heads) -> TorchOps:
    """The same operations with the smallest paddings that make a row's bits its own here.

    `weights`: one of each shape that the model uses."""
    return replace(
        ops,
        tile=linear.probe_tile(weights, dtype),
        rows_min=attention.probe_rows_min(heads),
    )
