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

PIECE_STEP_TOKENS = 64  # pieces start at multiples: a tile for each of four warps
PIECE_TOKENS_MIN = 128
PIECE_COST_TOKENS = 96  # what starting and ending a piece costs, in tokens of streaming; a guess
WAVES_MAX = 4  # pieces of one step are at most this many per block of threads, besides one per row
PREFILL_ROWS = 64  # (token, head) rows of one tile, ROWS in chunked_prefill.cu
PIECE_FIELDS, PLACE_FIELDS, TILE_FIELDS = 5, 3, 4
# (new tokens at least, tokens before at most): where gathering KV and torch's attention win. From
# the rates in docs/kernels.md; to be measured anew for another GPU.
SDPA_SIZES = ((1024, 0), (2048, 1 << 30))


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step's arrays."""

    rows: int
    decode_rows: int
    tables: int
    blocks_max: int  # of one table
    pieces: int
    tiles: int

    @classmethod
    def of_bucket(cls, rows: int, blocks_max: int, pieces: int) -> "StepShape":
        """Up to `rows` decoding sequences of up to blocks_max blocks."""
        return cls(rows, rows, rows, blocks_max, pieces, 0)

    def sizes(self) -> tuple[int, ...]:
        """Numbers of each array: slots, tables, pieces, num_pieces, places, tiles."""
        return (
            self.rows,
            self.tables * self.blocks_max,
            self.pieces * PIECE_FIELDS,
            1,
            self.decode_rows * PLACE_FIELDS,
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
    num_pieces: torch.Tensor
    places: torch.Tensor  # see combine_pieces
    tiles: torch.Tensor  # see chunked_prefill.cu
    partial: torch.Tensor  # (pieces, q_heads, head_dim) float32
    softmax: torch.Tensor  # (pieces, q_heads, 2) float32
    long_chunks: tuple[LongChunk, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A step on the host."""

    shape: StepShape
    numbers: np.ndarray  # int32
    long_chunks: tuple[LongChunk, ...]


def pieces_max(rows: int, num_blocks: int, heads: Heads) -> int:
    """Most pieces that `cut` makes of so many rows."""
    return rows + WAVES_MAX * -(-num_blocks // heads.num_kv_heads)


def lay_out(
    sequences: list[SequenceTokens], heads: Heads, block_tokens: int, num_blocks: int
) -> Layout:
    """The step's numbers; num_blocks: blocks of threads that decode at the same time."""
    for sequence in sequences:
        checks.block_table("table", sequence.table, sequence.start + sequence.count, block_tokens)
    counts = np.array([sequence.count for sequence in sequences], dtype=np.int64)
    starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
    first_rows = np.cumsum(counts) - counts
    decoding = np.flatnonzero(counts == 1)
    pieces, places = cut(starts[decoding] + 1, num_blocks // heads.num_kv_heads)
    pieces[:, 0] = first_rows[decoding][pieces[:, 1]]
    pieces[:, 1] = decoding[pieces[:, 1]]
    places[:, 0] = first_rows[decoding]
    tiles, long_chunks = _chunks(sequences, first_rows, heads)
    used = -(-(starts + counts) // block_tokens)
    shape = StepShape(
        int(counts.sum()),
        len(decoding),
        len(sequences),
        int(used.max(initial=1)),
        len(pieces),
        len(tiles),
    )
    numbers = np.zeros(sum(shape.sizes()), dtype=np.int32)
    slots, tables, piece_numbers, num_pieces, place_numbers, tile_numbers = split(numbers, shape)
    for index, sequence in enumerate(sequences):
        tables[index, : used[index]] = sequence.table[: used[index]]
        positions = np.arange(sequence.start, sequence.start + sequence.count)
        rows = slice(first_rows[index], first_rows[index] + sequence.count)
        blocks = sequence.table[positions // block_tokens]
        slots[rows] = blocks * block_tokens + positions % block_tokens
    piece_numbers[:] = pieces.reshape(-1)
    num_pieces[0] = len(pieces)
    place_numbers[:] = places.reshape(-1)
    tile_numbers[:] = tiles.reshape(-1)
    return Layout(shape, numbers, long_chunks)


def split(numbers: np.ndarray, shape: StepShape) -> list[np.ndarray]:
    """Views of the arrays in the order of StepShape.sizes, the tables one row for each."""
    parts = np.split(numbers, np.cumsum(shape.sizes())[:-1])
    parts[1] = parts[1].reshape(shape.tables, shape.blocks_max)
    return parts


def piece_size(lengths: np.ndarray, lanes: int) -> int:
    """Tokens of a piece: of the sizes tried, the one whose longest lane is estimated shortest; see
    `cut`."""
    best: tuple[float, int] | None = None
    size, longest = PIECE_TOKENS_MIN, int(lengths.max(initial=1))
    while True:
        parts = -(-lengths // size)
        if parts.sum() <= len(lengths) + WAVES_MAX * lanes:
            each = np.sort(np.repeat(-(-lengths // parts), parts))[::-1]
            cost = float((each[::lanes] + PIECE_COST_TOKENS).sum())
            if best is None or cost < best[0]:
                best = (cost, size)
        if size >= longest:
            break
        size = min(longest, size + max(PIECE_STEP_TOKENS, size // 4))
    assert best is not None, f"{len(lengths)} rows in {lanes} lanes"
    return best[1]


def cut(lengths: np.ndarray, lanes: int, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Contexts of decoding rows as pieces, longest first, and where each row's pieces leave sums.

    lengths (n,) tokens; lanes: pieces of one KV head that are computed at the same time; size: of
    a piece, where known and not too small for the lanes.
    pieces (m, 5): 0, index of the row, first token, end, place or -1; places (n, 3): 0, first
    place, number of places (0 where the row is one piece)."""
    lanes = max(lanes, 1)
    if not size or (-(-lengths // size)).sum() > len(lengths) + WAVES_MAX * lanes:
        size = piece_size(lengths, lanes)
    parts = -(-lengths // size)
    sizes = -(-lengths // parts)
    sizes = -(-sizes // PIECE_STEP_TOKENS) * PIECE_STEP_TOKENS
    parts = -(-lengths // sizes)
    row = np.repeat(np.arange(len(lengths)), parts)
    ordinal = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = ordinal * sizes[row]
    is_split = parts > 1
    split_parts = np.where(is_split, parts, 0)
    first_place = np.cumsum(split_parts) - split_parts
    pieces = np.zeros((len(row), PIECE_FIELDS), dtype=np.int64)
    pieces[:, 1], pieces[:, 2] = row, first
    pieces[:, 3] = np.minimum(first + sizes[row], lengths[row])
    pieces[:, 4] = np.where(is_split[row], first_place[row] + ordinal, -1)
    order = np.argsort(pieces[:, 2] - pieces[:, 3], kind="stable")
    places = np.stack((np.zeros_like(parts), first_place, split_parts), axis=1)
    return pieces[order], places


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
        if any(count >= least and start <= most for least, most in SDPA_SIZES):
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
    slots, tables, pieces, num_pieces, places, tiles = numbers.split(shape.sizes())
    partial = (shape.pieces, heads.num_q_heads, heads.head_dim)
    return CudaStep(
        heads,
        block_tokens,
        shape,
        numbers,
        slots,
        tables.view(shape.tables, shape.blocks_max),
        pieces,
        num_pieces,
        places,
        tiles,
        torch.empty(partial, dtype=torch.float32, device=device),
        torch.empty((*partial[:2], 2), dtype=torch.float32, device=device),
        layout.long_chunks,
    )
