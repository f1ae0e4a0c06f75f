"""The torch backend with the extra operations of a device backend, for tests on a CPU."""

from dataclasses import dataclass

import torch

from kernels.ops import Heads, SamplingTable, SequenceTokens
from kernels.torchops.backend import TorchOps


@dataclass(frozen=True, slots=True)
class BufferedStep:
    """Decodes whose indices are read when the step runs."""

    tables: torch.Tensor
    lengths: torch.Tensor
    heads: Heads
    block_tokens: int

    def sequences(self) -> list[SequenceTokens]:
        return [
            SequenceTokens(length - 1, 1, table[: -(-length // self.block_tokens)].astype("int64"))
            for length, table in zip(self.lengths.tolist(), self.tables.numpy(), strict=True)
        ]


class BufferedTorch(TorchOps):
    def plan_decodes(
        self, tables: torch.Tensor, lengths: torch.Tensor, heads: Heads, block_tokens: int
    ) -> BufferedStep:
        return BufferedStep(tables, lengths, heads, block_tokens)

    def _planned(self, step):
        if not isinstance(step, BufferedStep):
            return step
        return self.plan_step(step.sequences(), step.heads, step.block_tokens)

    def rope_write(self, qkv, cos, sin, kv_layer, step):
        return TorchOps.rope_write(self, qkv, cos, sin, kv_layer, self._planned(step))

    def attention(self, q, kv_layer, step):
        return TorchOps.attention(self, q, kv_layer, self._planned(step))

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        return TorchOps.sample(self, logits.float(), table)

    def prepare_sampling(self, table: SamplingTable) -> SamplingTable:
        return table

    def sample_ids(self, logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
        return torch.tensor(self.sample(logits, table))
