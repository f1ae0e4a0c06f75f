"""The torch backend with the extra operations of a device backend, for tests on a CPU."""

from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.ops import Heads, SamplingTable, SequenceTokens
from kernels.torchops.backend import TorchOps


@dataclass
class Bucket:
    """Decodes whose numbers are read when the step runs."""

    rows: int
    blocks_max: int
    heads: Heads
    block_tokens: int
    sequences: list[SequenceTokens] = field(default_factory=list)


class BufferedTorch(TorchOps):
    def decode_bucket(self, rows: int, blocks_max: int, heads: Heads, block_tokens: int) -> Bucket:
        return Bucket(rows, blocks_max, heads, block_tokens)

    def refill(self, step: Bucket, sequences: list[SequenceTokens]) -> None:
        blocks = max(-(-(s.start + s.count) // step.block_tokens) for s in sequences)
        assert len(sequences) <= step.rows and blocks <= step.blocks_max
        assert {s.count for s in sequences} == {1}
        step.sequences = sequences

    def rope_write(self, qkv, cos, sin, kv_layer, step):
        if not isinstance(step, Bucket):
            return TorchOps.rope_write(self, qkv, cos, sin, kv_layer, step)
        heads = step.heads
        if count := len(step.sequences):
            planned = self.plan_step(step.sequences, heads, step.block_tokens)
            TorchOps.rope_write(self, qkv[:count], cos[:count], sin[:count], kv_layer, planned)
        return qkv.view(len(qkv), -1, heads.head_dim)[:, : heads.num_q_heads]

    def attention(self, q, kv_layer, step):
        if not isinstance(step, Bucket):
            return TorchOps.attention(self, q, kv_layer, step)
        out = torch.full((len(q), step.heads.num_q_heads * step.heads.head_dim), np.nan)
        if count := len(step.sequences):
            planned = self.plan_step(step.sequences, step.heads, step.block_tokens)
            out[:count] = TorchOps.attention(self, q[:count], kv_layer, planned)
        return out.to(q.dtype)

    def prepare_chunks(self, heads: Heads, tokens_max: int) -> None:
        """Nothing waits here."""

    def sampling_params(self, table: SamplingTable) -> SamplingTable:
        return table

    def sample_ids(self, logits: torch.Tensor, params: SamplingTable) -> torch.Tensor:
        ids = TorchOps.sample(self, logits.float(), params)
        return torch.tensor([-1 if token_id is None else token_id for token_id in ids])
