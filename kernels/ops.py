"""The operations of a forward pass behind one interface, and what they are told about a step.

Two implementations: `kernels.torchops.backend.TorchOps` (CPU) and `kernels.reference.ReferenceOps`
(float64, plain loops, for tests). Tensors are torch tensors in both.
KV layout per layer: (num_blocks, 2, kv_heads, block_tokens, head_dim), index 1 is K then V, so one
block of one layer is one contiguous piece; `.transpose(0, 1)` is the (2, blocks, …) view.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of one attention layer."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class SequenceTokens:
    """Tokens [start, start + count) of one sequence, whose KV lies in the blocks of `table`.

    `table` (num_blocks,) int64, token order, covers at least start + count tokens."""

    start: int
    count: int
    table: np.ndarray


@dataclass(frozen=True, slots=True)
class SamplingTable:
    """How to draw one id for each row of logits; arrays of one entry per row.

    temperature 0 is greedy; `uniform` in [0, 1) is the draw; top_k 0, top_p 1 and min_p 0 are off.
    An id stays when it is among the top_k likeliest, in the smallest head of these that holds top_p
    of their mass, and at least min_p times as likely as the likeliest."""

    temperature: np.ndarray  # float64
    top_p: np.ndarray  # float64
    top_k: np.ndarray  # int64
    min_p: np.ndarray  # float64
    uniform: np.ndarray  # float64

    def rows(self, index: np.ndarray) -> "SamplingTable":
        """The table of some of the rows."""
        return SamplingTable(
            self.temperature[index],
            self.top_p[index],
            self.top_k[index],
            self.min_p[index],
            self.uniform[index],
        )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities by the model, before any sampling parameter."""

    logprob: float  # of the id drawn
    top_ids: list[int]  # the likeliest, likeliest first
    top_logprobs: list[float]


class Ops(Protocol):
    """Operations over token rows; `rows` is the number of tokens in the step."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """Prepare weight (out, in) and bias (out,) for `linear`; the originals may be dropped."""
        ...

    def linear(self, x: torch.Tensor, packed: Any) -> torch.Tensor:
        """x (rows, in) times the weight's transpose, plus the bias: (rows, out)."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (rows, hidden) divided by its root mean square per row, times weight (hidden,)."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x in place, then rms_norm of residual."""
        ...

    def norm_heads(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        heads: Heads,
        eps: float,
    ) -> None:
        """rms_norm of every Q and K head of qkv (see rope_write) in place; weights (head_dim,)."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up (rows, 2·width), gate first: silu(gate) · up, (rows, width)."""
        ...

    def plan_step(self, sequences: list[SequenceTokens], heads: Heads, block_tokens: int) -> Any:
        """Indices that all layers of one step share; rows stand in the order of `sequences`."""
        ...

    def rope_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_layer: torch.Tensor,
        step: Any,
    ) -> torch.Tensor:
        """Rotate Q and K in place, write K and V into kv_layer, return Q (rows, q_heads, head_dim).

        qkv (rows, (q_heads + 2·kv_heads)·head_dim); cos, sin (rows, head_dim) float32: the cosines
        twice, the negated sines and then the sines, so that a head turns by
        x · cos + (halves of x swapped) · sin."""
        ...

    def attention(self, q: torch.Tensor, kv_layer: torch.Tensor, step: Any) -> torch.Tensor:
        """Causal attention of every row over its own sequence: (rows, q_heads·head_dim).

        The KV of the rows themselves is already in kv_layer."""
        ...

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        """One id per row of logits (rows, vocab), in the model's dtype or float32; None where a
        logit is not finite.

        A logit of minus infinity is a forbidden id. Ties go to the lowest id."""
        ...

    def logprobs(
        self, logits: torch.Tensor, token_ids: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        """Of one id for each row of finite logits, with the num_top likeliest ids beside it."""
        ...
