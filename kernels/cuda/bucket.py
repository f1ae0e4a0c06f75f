"""The numbers of a decode bucket on the host: what one step changes is written, nothing else.

A step of a hundred sequences is laid out in a fraction of a millisecond this way, and the device
waits for it.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from kernels import checks
from kernels.cuda import plan
from kernels.cuda.plan import PIECE_FIELDS, CudaStep, StepShape
from kernels.ops import SequenceTokens


class DecodeBucket:
    """A step over arrays that stay where they are, and the host's copy of them."""

    def __init__(self, shape: StepShape, is_pinned: bool) -> None:
        self._shape = shape
        size = sum(shape.sizes())
        self._staging = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        self.numbers = self._staging.numpy()
        slots, tables, pieces, lane_first, _ = plan.split(self.numbers, shape)
        self._slots, self._tables, self._lane_first = slots, tables, lane_first
        self._pieces = pieces.reshape(shape.pieces, PIECE_FIELDS)
        self._slots[:] = -1
        self._held: list[np.ndarray] = []  # tables that stand in the rows

    def fill(self, sequences: list[SequenceTokens], block_tokens: int) -> None:
        """The numbers of decoding sequences.

        A table that is the same array as in the fill before has not changed. Raises ValueError
        where the bucket is too small or a sequence has more than one token."""
        starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
        used = starts // block_tokens + 1
        self._check(sequences, used, block_tokens)
        count = len(sequences)
        for row, sequence in enumerate(sequences):
            if row >= len(self._held) or self._held[row] is not sequence.table:
                blocks = sequence.table[: self._shape.blocks_max]
                self._tables[row, : len(blocks)] = blocks
        self._held = [sequence.table for sequence in sequences]
        blocks = self._tables[np.arange(count), used - 1]
        self._slots[:count] = blocks * block_tokens + starts % block_tokens
        self._slots[count:] = -1
        pieces, lane_first = plan.cut(starts + 1, self._shape.lanes)
        pieces[:, 0] = pieces[:, 1]
        self._pieces[: len(pieces)] = pieces
        self._lane_first[:] = lane_first

    def _check(self, sequences: list[SequenceTokens], used: np.ndarray, block_tokens: int) -> None:
        shape = self._shape
        if len(sequences) > shape.rows or any(sequence.count != 1 for sequence in sequences):
            counts = [sequence.count for sequence in sequences]
            raise ValueError(f"{counts} tokens per sequence, bucket of {shape.rows} rows")
        if used.max(initial=0) > shape.blocks_max:
            raise ValueError(f"{used.max()} blocks: {shape} is too small")
        for sequence, blocks in zip(sequences, used.tolist(), strict=True):
            if len(sequence.table) < blocks:
                checks.block_table("table", sequence.table, sequence.start + 1, block_tokens)

    def copy_to(self, numbers: torch.Tensor) -> None:
        """To the device, without waiting; the next fill must come after the copy is over."""
        numbers.copy_(self._staging, non_blocking=True)


@dataclass(frozen=True, slots=True)
class BucketStep(CudaStep):
    """A step whose arrays are filled from its bucket."""

    bucket: DecodeBucket

    @classmethod
    def of(cls, step: CudaStep, bucket: DecodeBucket) -> "BucketStep":
        return cls(*(getattr(step, field.name) for field in fields(CudaStep)), bucket)
