"""Every operation in float64 with plain loops: what the fast implementations are checked against.

Slow on purpose: one token, one head, one position at a time, nothing shared with the code under
test but the argument types.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from kernels.ops import Heads, SamplingTable, SequenceTokens, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """A step as the reference walks it."""

    sequences: list[SequenceTokens]
    heads: Heads
    block_tokens: int

    def tokens(self) -> list[tuple[int, np.ndarray]]:
        """(position, block table) of every row."""
        return [
            (position, sequence.table)
            for sequence in self.sequences
            for position in range(sequence.start, sequence.start + sequence.count)
        ]


class ReferenceOps:
    """See kernels.ops.Ops; results keep the dtype of the input."""

    def pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight, bias

    def linear(
        self, x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor | None]
    ) -> torch.Tensor:
        weight, bias = packed
        product = x.double() @ weight.double().T
        return (product if bias is None else product + bias.double()).to(x.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = []
        for row in x.double():
            mean_square = sum(float(value) ** 2 for value in row) / len(row)
            rows.append(row / math.sqrt(mean_square + eps) * weight.double())
        return torch.stack(rows).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual.copy_(residual.double() + x.double())
        return self.rms_norm(residual, weight, eps)

    def norm_heads(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        heads: Heads,
        eps: float,
    ) -> None:
        for head in range(heads.num_q_heads + heads.num_kv_heads):
            weight = q_weight if head < heads.num_q_heads else k_weight
            columns = slice(head * heads.head_dim, (head + 1) * heads.head_dim)
            qkv[:, columns] = self.rms_norm(qkv[:, columns], weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.double().chunk(2, dim=1)
        return (gate / (1.0 + (-gate).exp()) * up).to(gate_up.dtype)

    def plan_step(
        self, sequences: list[SequenceTokens], heads: Heads, block_tokens: int
    ) -> ReferenceStep:
        return ReferenceStep(sequences, heads, block_tokens)

    def rope_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_layer: torch.Tensor,
        step: ReferenceStep,
    ) -> torch.Tensor:
        num_q, num_kv = step.heads.num_q_heads, step.heads.num_kv_heads
        heads = qkv.double().view(len(qkv), num_q + 2 * num_kv, step.heads.head_dim).clone()
        half = step.heads.head_dim // 2
        for row, (position, table) in enumerate(step.tokens()):
            for head in range(num_q + num_kv):
                low, high = heads[row, head, :half].clone(), heads[row, head, half:].clone()
                turn, swap = cos[row].double(), sin[row].double()
                heads[row, head, :half] = low * turn[:half] + high * swap[:half]
                heads[row, head, half:] = high * turn[half:] + low * swap[half:]
            block_id = int(table[position // step.block_tokens])
            offset = position % step.block_tokens
            for head in range(num_kv):
                kv_layer[block_id, 0, head, offset] = heads[row, num_q + head].to(kv_layer.dtype)
                value = heads[row, num_q + num_kv + head]
                kv_layer[block_id, 1, head, offset] = value.to(kv_layer.dtype)
        return heads[:, :num_q].to(qkv.dtype)

    def attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, step: ReferenceStep
    ) -> torch.Tensor:
        out = torch.zeros(q.shape, dtype=torch.float64)
        for row, (position, table) in enumerate(step.tokens()):
            for head in range(step.heads.num_q_heads):
                kv_head = head // step.heads.group
                keys, values = [], []
                for past in range(position + 1):
                    block_id = int(table[past // step.block_tokens])
                    offset = past % step.block_tokens
                    keys.append(kv_layer[block_id, 0, kv_head, offset].double())
                    values.append(kv_layer[block_id, 1, kv_head, offset].double())
                scores = torch.stack(keys) @ q[row, head].double() / math.sqrt(step.heads.head_dim)
                out[row, head] = torch.softmax(scores, dim=0) @ torch.stack(values)
        return out.view(len(q), -1).to(q.dtype)

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        ids: list[int | None] = []
        for index, row in enumerate(logits.double().tolist()):
            if any(math.isnan(v) or v == math.inf for v in row) or max(row) == -math.inf:
                ids.append(None)
                continue
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))
            if table.temperature[index] <= 0:
                ids.append(order[0])
                continue
            ids.append(_draw(row, order, table, index))
        return ids

    def logprobs(
        self, logits: torch.Tensor, token_ids: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        made = []
        for row, token_id, count in zip(logits.tolist(), token_ids, num_top, strict=True):
            rest = max(row) + math.log(math.fsum(math.exp(v - max(row)) for v in row))
            top = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:count]
            made.append(TokenLogprobs(row[token_id] - rest, top, [row[i] - rest for i in top]))
        return made


def _draw(row: list[float], order: list[int], table: SamplingTable, index: int) -> int:
    temperature, top_p = float(table.temperature[index]), float(table.top_p[index])
    top_k = int(table.top_k[index])
    weights = {i: math.exp((row[i] - row[order[0]]) / temperature) for i in order}
    kept = order[:top_k] if top_k else order
    if top_p < 1.0:
        total, mass, nucleus = math.fsum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i]
            if mass >= top_p * total:
                break
        kept = nucleus
    min_p = float(table.min_p[index])
    if min_p > 0.0:
        kept = [i for i in kept if weights[i] >= min_p] or kept[:1]
    walk = kept if top_k or top_p < 1.0 or min_p > 0.0 else sorted(kept)
    target = float(table.uniform[index]) * math.fsum(weights[i] for i in walk)
    mass = 0.0
    for i in walk:
        mass += weights[i]
        if mass > target:
            return i
    return [i for i in walk if weights[i] > 0][-1]
