"""One forward pass over the rows of a step: ragged and eager, or a replayed CUDA graph of decodes.

A decode step has one token of each sequence. Its kernels are the same at every step, so they are
captured once for each batch bucket and replayed with new numbers in the same arrays; rows up to the
bucket are padding, which writes no KV. Any other step runs eagerly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from gpuworkers.models.llama import Llama
from kernels.ops import Heads, Ops, SamplingTable, SequenceTokens

# The last: engine.SEQUENCES_MAX online and Policy.batch_rows_max batch sequences.
BUCKETS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 288, 320,
)  # fmt: skip

Forward = Callable[[], torch.Tensor]
LayerWritten = Callable[[int], None]
Capture = Callable[[Forward], Forward]


class StepRow(NamedTuple):
    """Tokens [start, start + count) of one sequence; the last one yields logits when `samples`.

    A tuple, because a step makes hundreds of them."""

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
    """What captured steps need beside the operations; kernels.cuda.backend.CudaOps has it."""

    def decode_bucket(self, rows: int, blocks_max: int, heads: Heads, block_tokens: int) -> Any:
        """A step for up to `rows` sequences of one new token each, over arrays that stay where
        they are; rows without a sequence write no KV."""
        ...

    def refill(self, step: Any, sequences: list[SequenceTokens]) -> None:
        """Put these sequences' numbers into the arrays of the bucket's step."""
        ...

    def prepare_chunks(self, heads: Heads, tokens_max: int) -> None:
        """What first chunks of up to tokens_max tokens would otherwise wait for, one by one."""
        ...

    def sampling_params(self, table: SamplingTable) -> Any:
        """The table on the device."""
        ...

    def sample_ids(self, logits: torch.Tensor, params: Any) -> torch.Tensor:
        """As Ops.sample, without waiting: ids (rows,) on the device."""
        ...


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
    """Decode steps from graphs, others as `Stepper` does them. `capture` turns a forward pass into
    its replay; sequences have at most max_len tokens."""

    def __init__(
        self,
        eager: Stepper,
        ops: DecodeOps,
        capture: Capture,
        max_len: int,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        self.model = eager.model
        self.ops = ops
        self.num_replays = 0
        self.eager = eager
        device = eager.layers[0].device
        blocks_max = -(-max_len // eager.block_tokens)
        # Token ids of a step, then its positions; one copy takes both to the device.
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(2, max(buckets), dtype=torch.int64, pin_memory=is_cuda)
        self._device = torch.zeros_like(self._host, device=device)
        # Kept, as all that replays read: a graph holds addresses, not tensors.
        self._rows = torch.arange(max(buckets), device=device)
        self._steps: dict[int, Any] = {}
        self._copied = torch.cuda.Event() if is_cuda else None

        def make(bucket: int) -> Forward:
            heads, block_tokens = self.model.heads, eager.block_tokens
            step = ops.decode_bucket(bucket, blocks_max, heads, block_tokens)
            self._steps[bucket] = step
            ids, positions = self._device[:, :bucket]

            def forward() -> torch.Tensor:
                rows = self._rows[:bucket]
                return self.model.forward(ops, ids, positions, eager.layers, step, rows)

            return capture(forward)

        self._graphs = DecodeGraphs(make, buckets)

    def logits(
        self, rows: Sequence[StepRow], layer_written: LayerWritten | None = None
    ) -> torch.Tensor:
        """See Stepper.logits; a replay has no layers to hear of."""
        is_decode = layer_written is None and all(
            row.samples and len(row.token_ids) == 1 for row in rows
        )
        bucket = self._graphs.bucket_for(len(rows)) if is_decode else None
        if bucket is None:
            return self.eager.logits(rows, layer_written)
        self._wait_for_copies()
        host = self._host.numpy()
        host[0, : len(rows)] = [row.token_ids[0] for row in rows]
        host[1, : len(rows)] = [row.start for row in rows]
        self._device.copy_(self._host, non_blocking=True)
        return self._replay(bucket, rows)

    def bucket_for(self, num_rows: int) -> int | None:
        """See DecodeGraphs.bucket_for."""
        return self._graphs.bucket_for(num_rows)

    def logits_behind(self, ids: torch.Tensor, rows: Sequence[StepRow]) -> torch.Tensor:
        """Logits of a decode step whose token ids (rows,) are on the device, or will be; those of
        `rows` are not looked at. Launched behind whatever is under way there."""
        bucket = self._graphs.bucket_for(len(rows))
        assert bucket is not None, len(rows)
        self._wait_for_copies()
        self._host.numpy()[1, : len(rows)] = [row.start for row in rows]
        self._device[0, : len(rows)] = ids.clamp(min=0)  # -1: no id, and no more of that sequence
        self._device[1].copy_(self._host[1], non_blocking=True)
        return self._replay(bucket, rows)

    def _replay(self, bucket: int, rows: Sequence[StepRow]) -> torch.Tensor:
        sequences = [SequenceTokens(row.start, 1, row.table) for row in rows]
        self.ops.refill(self._steps[bucket], sequences)
        if self._copied is not None:
            self._copied.record()
        self.num_replays += 1
        return self._graphs.replay(bucket)[: len(rows)]

    def _wait_for_copies(self) -> None:
        """The host's arrays may be written again: their copies, made before the replay that reads
        them began, are over. Hardly ever waits."""
        if self._copied is not None:
            self._copied.synchronize()


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
