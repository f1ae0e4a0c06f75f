"""One forward pass over the rows of a step: ragged and eager, or a replayed CUDA graph of decodes.

A decode step has one token of each sequence. Its kernels are the same at every step, so they are
captured once for each batch bucket and replayed with new numbers in the same buffers; rows up to
the bucket are padding, which reads and writes a block of its own. Any other step runs eagerly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from gpuworkers.models.llama import Llama
from kernels.ops import Heads, Ops, SequenceTokens

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)

Forward = Callable[[], torch.Tensor]
LayerWritten = Callable[[int], None]
Capture = Callable[[Forward], Forward]


@dataclass(frozen=True, slots=True)
class StepRow:
    """Tokens [start, start + count) of one sequence; the last one yields logits when `samples`."""

    token_ids: Sequence[int]  # the count of them
    start: int
    table: np.ndarray  # (blocks,) block ids in token order
    samples: bool


class Stepper:
    """Eager passes on the device of the KV layers."""

    def __init__(
        self, model: Llama, ops: Ops, layers: list[torch.Tensor], block_tokens: int
    ) -> None:
        self.model = model
        self.ops = ops
        self.layers = layers
        self.block_tokens = block_tokens

    def logits(
        self, rows: Sequence[StepRow], layer_written: LayerWritten | None = None
    ) -> torch.Tensor:
        """Logits of the rows that sample, in their order; writes KV of all rows. layer_written
        hears the number of a layer when its KV is there."""
        token_ids, positions, sequences, last_rows = [], [], [], []
        num_rows = 0
        for row in rows:
            count = len(row.token_ids)
            token_ids.append(np.array(row.token_ids, dtype=np.int64))
            positions.append(np.arange(row.start, row.start + count))
            sequences.append(SequenceTokens(row.start, count, row.table))
            num_rows += count
            if row.samples:
                last_rows.append(num_rows - 1)
        step = self.ops.plan_step(sequences, self.model.heads, self.block_tokens)
        indices = np.concatenate([*token_ids, *positions, np.array(last_rows, dtype=np.int64)])
        on_device = torch.from_numpy(indices).to(self.layers[0].device)
        ids, at, last = on_device.split([num_rows, num_rows, len(last_rows)])
        return self.model.forward(self.ops, ids, at, self.layers, step, last, layer_written)


class DecodeOps(Ops, Protocol):
    """What captured steps need beside the operations."""

    def plan_decodes(
        self, tables: torch.Tensor, lengths: torch.Tensor, heads: Heads, block_tokens: int
    ) -> Any:
        """A step of one token per row whose indices are read when its kernels run.

        tables (rows, blocks_max) int32, block ids, whatever stands beyond a row's blocks is not
        read; lengths (rows,) int32, tokens of the row with the new one, >= 1. Both are filled
        anew before each run and stay where they are."""
        ...


class DecodeBuffers:
    """Numbers of a decode step: written on the host, copied to the device in one piece.

    One int32 array serves all buckets: for a bucket of n rows it holds n token ids, n lengths and
    n rows of blocks_max block ids, one after the other."""

    def __init__(
        self, device: torch.device, blocks_max: int, scratch_block: int, bucket_max: int
    ) -> None:
        size = bucket_max * (2 + blocks_max)
        is_cuda = device.type == "cuda"
        # Ids of blocks that no row has are those of the scratch block, a valid address.
        self._staging = torch.full((size,), scratch_block, dtype=torch.int32, pin_memory=is_cuda)
        self._host = self._staging.numpy()
        self._device = torch.full_like(self._staging, scratch_block, device=device)
        self._blocks_max = blocks_max
        self._scratch_block = scratch_block
        self._bucket = 0
        self._tables: list[np.ndarray] = []  # what stands in the rows of the staging array

    def views(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (bucket,), lengths (bucket,), tables (bucket, blocks_max) on the device."""
        sizes = [bucket, bucket, bucket * self._blocks_max]
        ids, lengths, tables = self._device[: sum(sizes)].split(sizes)
        return ids, lengths, tables.view(bucket, self._blocks_max)

    def fill(self, rows: Sequence[StepRow], bucket: int) -> None:
        """The rows' numbers, padding up to the bucket, and the copy. No kernel of the step before
        may still read them."""
        count = len(rows)
        if bucket != self._bucket:
            self._bucket, self._tables = bucket, []
        ids, lengths = self._host[:bucket], self._host[bucket : 2 * bucket]
        tables = self._host[2 * bucket : bucket * (2 + self._blocks_max)].reshape(bucket, -1)
        ids[:count] = [row.token_ids[0] for row in rows]
        lengths[:count] = [row.start + 1 for row in rows]
        ids[count:], lengths[count:] = 0, 1
        tables[count:, 0] = self._scratch_block
        for index, row in enumerate(rows):
            if index >= len(self._tables) or self._tables[index] is not row.table:
                tables[index, : len(row.table)] = row.table
        self._tables = [row.table for row in rows]
        used = bucket * (2 + self._blocks_max)
        self._device[:used].copy_(self._staging[:used], non_blocking=True)


class DecodeGraphs:
    """A captured forward pass for each bucket, all made at the start: the largest first, so that
    the others fit into the memory it took."""

    def __init__(self, make: Callable[[int], Forward], buckets: Sequence[int]) -> None:
        """make(bucket) captures the pass of that many rows and returns its replay."""
        self.buckets = tuple(sorted(buckets))
        self._replays = {bucket: make(bucket) for bucket in reversed(self.buckets)}

    def bucket_for(self, num_rows: int) -> int | None:
        """The smallest bucket that holds the rows; None when none does."""
        return next((bucket for bucket in self.buckets if bucket >= num_rows), None)

    def replay(self, bucket: int) -> torch.Tensor:
        """The bucket's logits, in a buffer that the next replay overwrites."""
        return self._replays[bucket]()


class GraphStepper:
    """Decode steps from graphs, others as `Stepper` does them. `scratch_block` belongs to no
    sequence; `capture` turns a forward pass into its replay."""

    def __init__(
        self,
        eager: Stepper,
        ops: DecodeOps,
        scratch_block: int,
        capture: Capture,
        max_len: int,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        self.model = eager.model
        self.ops: Ops = ops
        self.num_replays = 0
        self._eager = eager
        heads, layers, block_tokens = eager.model.heads, eager.layers, eager.block_tokens
        blocks_max = -(-max_len // block_tokens)
        self._buffers = DecodeBuffers(layers[0].device, blocks_max, scratch_block, max(buckets))

        def make(bucket: int) -> Forward:
            ids, lengths, tables = self._buffers.views(bucket)
            every_row = torch.arange(bucket, device=ids.device)
            step = ops.plan_decodes(tables, lengths, heads, block_tokens)
            self._buffers.fill((), bucket)

            def forward() -> torch.Tensor:
                return self.model.forward(ops, ids, lengths - 1, layers, step, every_row)

            return capture(forward)

        self._graphs = DecodeGraphs(make, buckets)

    def logits(
        self, rows: Sequence[StepRow], layer_written: LayerWritten | None = None
    ) -> torch.Tensor:
        """See Stepper.logits. A replay has no layers to hear of."""
        is_decode = layer_written is None and all(
            row.samples and len(row.token_ids) == 1 for row in rows
        )
        bucket = self._graphs.bucket_for(len(rows)) if is_decode else None
        if bucket is None:
            return self._eager.logits(rows, layer_written)
        self._buffers.fill(rows, bucket)
        self.num_replays += 1
        return self._graphs.replay(bucket)[: len(rows)]


class BlockTables:
    """Block ids of sequences as arrays, kept from one step to the next.

    A sequence's list of block ids only grows while it holds them, and is another list after it lost
    them; so an array is right while the list is the same and as long. Holds the sequences of the
    last step."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[list[int], np.ndarray]] = {}

    def take(self, lists: Sequence[list[int]]) -> list[np.ndarray]:
        """One array for each list, int64; the same object as in the last step where nothing
        changed."""
        kept: dict[int, tuple[list[int], np.ndarray]] = {}
        for block_ids in lists:
            known = self._kept.get(id(block_ids))  # the list is kept alive: its id is its own
            if known is None or len(known[1]) != len(block_ids):
                known = (block_ids, np.array(block_ids, dtype=np.int64))
            kept[id(block_ids)] = known
        self._kept = kept
        return [kept[id(block_ids)][1] for block_ids in lists]
