"""What the layers of one step share, as one array of int32 that goes to the device in one copy.

Decoding rows (one new token) are cut into pieces of context for paged_decode.cu; longer chunks into
tiles for chunked_prefill.cu, or they go whole to torch's attention where that is faster. A step
whose rows all decode can be laid into arrays of fixed size and address (`StepShape.of_bucket`), so
that a captured CUDA graph finds the next step's numbers there.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels import checks
from kernels.ops import Heads, SequenceTokens

UNIT_TOKENS = 64  # contexts are cut at multiples: a tile for each of four warps
ROW_COST_UNITS = 1  # what beginning and ending a row costs, in units of streaming
LANE_UNITS_MIN = 2  # a lane that has less to do is not worth its sums
PREFILL_ROWS = 64  # (token, head) rows of one tile, ROWS in chunked_prefill.cu
PIECE_FIELDS, TILE_FIELDS = 7, 4
# New tokens from which on gathering KV and torch's attention win, whatever stands before them.
# Measured on an H200 (docs/kernels.md); to be measured anew for another GPU.
SDPA_TOKENS_MIN = 512
PADS_PER_OCTAVE = 4


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays."""

    rows: int
    decode_rows: int
    tables: int
    blocks_max: int  # of one table
    lanes: int  # of a KV head: blocks of threads that decode at the same time
    pieces: int
    tiles: int

    @classmethod
    def of_bucket(cls, rows: int, blocks_max: int, lanes: int) -> "StepShape":
        """Up to `rows` decoding sequences of up to blocks_max blocks."""
        return cls(rows, rows, rows, blocks_max, lanes, rows + lanes, 0)

    def sizes(self) -> tuple[int, ...]:
        """Numbers of each array: slots, tables, pieces, lane_first, tiles."""
        return (
            self.rows,
            self.tables * self.blocks_max,
            self.pieces * PIECE_FIELDS,
            self.lanes + 1,
            self.tiles * TILE_FIELDS,
        )


@dataclass(frozen=True, slots=True)
class LongChunk:
    """Tokens [start, start + count) of the sequence with this table, from this row on."""

    row: int
    table: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class CudaStep:
    """Arrays of one step on the device; views of `numbers`."""

    heads: Heads
    block_tokens: int
    shape: StepShape
    numbers: torch.Tensor
    slots: torch.Tensor  # (rows,) see rope_kv_write.cu
    tables: torch.Tensor  # (tables, blocks_max)
    pieces: torch.Tensor  # see paged_decode.cu
    lane_first: torch.Tensor  # (lanes + 1,)
    tiles: torch.Tensor  # see chunked_prefill.cu
    partial: torch.Tensor  # (pieces, q_heads, head_dim) float32
    softmax: torch.Tensor  # (pieces, q_heads, 2) float32
    arrivals: torch.Tensor  # (pieces, kv_heads) int32, zeros between launches
    long_chunks: tuple[LongChunk, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A step on the host."""

    shape: StepShape
    numbers: np.ndarray  # int32
    long_chunks: tuple[LongChunk, ...]


def lay_out(sequences: list[SequenceTokens], heads: Heads, block_tokens: int, lanes: int) -> Layout:
    """The step's numbers; lanes: see `cut`."""
    for sequence in sequences:
        checks.block_table("table", sequence.table, sequence.start + sequence.count, block_tokens)
    counts = np.array([sequence.count for sequence in sequences], dtype=np.int64)
    starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
    first_rows = np.cumsum(counts) - counts
    decoding = np.flatnonzero(counts == 1)
    pieces, lane_first = cut(starts[decoding] + 1, lanes)
    pieces[:, 0] = first_rows[decoding][pieces[:, 1]]
    pieces[:, 1] = decoding[pieces[:, 1]]
    tiles, long_chunks = _chunks(sequences, first_rows, heads)
    used = -(-(starts + counts) // block_tokens)
    shape = StepShape(
        int(counts.sum()),
        len(decoding),
        len(sequences),
        int(used.max(initial=1)),
        lanes,
        len(pieces),
        len(tiles),
    )
    numbers = np.zeros(sum(shape.sizes()), dtype=np.int32)
    slots, tables, piece_numbers, lane_numbers, tile_numbers = split(numbers, shape)
    for index, sequence in enumerate(sequences):
        tables[index, : used[index]] = sequence.table[: used[index]]
        positions = np.arange(sequence.start, sequence.start + sequence.count)
        rows = slice(first_rows[index], first_rows[index] + sequence.count)
        blocks = sequence.table[positions // block_tokens]
        slots[rows] = blocks * block_tokens + positions % block_tokens
    piece_numbers[:] = pieces.reshape(-1)
    lane_numbers[:] = lane_first
    tile_numbers[:] = tiles.reshape(-1)
    return Layout(shape, numbers, long_chunks)


def split(numbers: np.ndarray, shape: StepShape) -> list[np.ndarray]:
    """Views of the arrays in the order of StepShape.sizes, the tables one row for each."""
    parts = np.split(numbers, np.cumsum(shape.sizes())[:-1])
    parts[1] = parts[1].reshape(shape.tables, shape.blocks_max)
    return parts


def cut(lengths: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of decoding rows as one stream, cut into a stretch of equal work for each lane.

    lengths (n,) tokens; lanes: blocks of threads of one KV head that decode at the same time.
    pieces (m, 7): 0, index of the row, first token, end, place of the piece's sums (-1 where it is
    all of its row), first place and number of places of the row; in the order of the rows.
    lane_first (lanes + 1,): pieces [lane_first[i], lane_first[i + 1]) are lane i's."""
    units = -(-lengths // UNIT_TOKENS)
    ends = np.cumsum(units + ROW_COST_UNITS)
    tokens_at = ends - units  # where the first token of each row lies in the stream
    total = int(ends[-1]) if len(ends) else 0
    busy = max(1, min(lanes, total // LANE_UNITS_MIN))
    bounds = np.arange(1, busy) * total // busy
    row = np.searchsorted(ends, bounds, side="right")
    unit = bounds - tokens_at[row]
    is_inside = unit > 0  # else the lane begins with the row
    row, unit = row[is_inside], unit[is_inside]
    rows = np.concatenate((np.arange(len(lengths)), row))
    first = np.concatenate((np.zeros_like(units), unit))
    order = np.lexsort((first, rows))
    rows, first = rows[order], first[order]
    parts = np.bincount(rows, minlength=len(lengths))
    ordinal = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
    split_parts = np.where(parts > 1, parts, 0)
    first_place = np.cumsum(split_parts) - split_parts
    pieces = np.zeros((len(rows), PIECE_FIELDS), dtype=np.int64)
    pieces[:, 1], pieces[:, 2] = rows, first * UNIT_TOKENS
    pieces[:-1, 3] = pieces[1:, 2]
    pieces[ordinal == parts[rows] - 1, 3] = lengths
    pieces[:, 4] = np.where(parts[rows] > 1, first_place[rows] + ordinal, -1)
    pieces[:, 5], pieces[:, 6] = first_place[rows], split_parts[rows]
    lane_of = np.searchsorted(bounds, tokens_at[rows] + first, side="right")
    lane_first = np.searchsorted(lane_of, np.arange(lanes + 1))
    return pieces, lane_first


def padded_tokens(count: int) -> int:
    """The next larger of few numbers of tokens, a quarter of a power of two apart. cuDNN takes
    50 ms to prepare for a number of tokens that it has not met (H200, cuDNN of torch 2.11)."""
    step = max(1, (1 << (count.bit_length() - 1)) // PADS_PER_OCTAVE)
    return -(-count // step) * step


def _chunks(
    sequences: list[SequenceTokens], first_rows: np.ndarray, heads: Heads
) -> tuple[np.ndarray, tuple[LongChunk, ...]]:
    """Tiles of the chunks, those with the longest context first, and the chunks left to torch."""
    tile_tokens = PREFILL_ROWS // heads.group
    tiles, long_chunks = [], []
    for index, sequence in enumerate(sequences):
        start, count, row = sequence.start, sequence.count, int(first_rows[index])
        if count == 1:
            continue
        if count >= SDPA_TOKENS_MIN:
            long_chunks.append(LongChunk(row, index, start, count))
            continue
        for offset in range(0, count, tile_tokens):
            tokens = min(tile_tokens, count - offset)
            tiles.append((row + offset, index, start + offset, tokens))
    tiles.sort(key=lambda tile: -(tile[2] + tile[3]))
    array = np.array(tiles, dtype=np.int64).reshape(len(tiles), TILE_FIELDS)
    return array, tuple(long_chunks)


def upload(layout: Layout, heads: Heads, block_tokens: int, device: torch.device) -> CudaStep:
    """The step on the device, in new arrays."""
    host = torch.from_numpy(layout.numbers)
    if device.type == "cuda":
        host = host.pin_memory()
    numbers = host.to(device, non_blocking=True, copy=True)
    shape = layout.shape
    slots, tables, pieces, lane_first, tiles = numbers.split(shape.sizes())
    partial = (shape.pieces, heads.num_q_heads, heads.head_dim)
    return CudaStep(
        heads,
        block_tokens,
        shape,
        numbers,
        slots,
        tables.view(shape.tables, shape.blocks_max),
        pieces,
        lane_first,
        tiles,
        torch.empty(partial, dtype=torch.float32, device=device),
        torch.empty((*partial[:2], 2), dtype=torch.float32, device=device),
        torch.zeros((shape.pieces, heads.num_kv_heads), dtype=torch.int32, device=device),
        layout.long_chunks,
    )
