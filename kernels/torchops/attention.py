"""Causal attention over paged KV, the same bits for a token in prefill, decode and any company.

KV is read in tiles of TILE_TOKENS tokens that start at absolute multiples of it. For one query
token and one tile: scores, their maximum, weights exp(score - maximum over all tiles), their sum
and the weighted values come from one small matrix product each, of a shape that does not depend on
the step. Tiles are added up by a sum over an outer dimension, which torch does in one fixed order;
a tile beyond the token adds exact zeros at the end of it.
Matrix rows: the query heads of one KV head, for a chunk those of up to CHUNK_QUERIES tokens. A
batched product gives equal rows for any row count >= `rows_min`, which `probe_rows_min` finds
(4 on an AVX2 EPYC, torch 2.13); where it finds none, chunks are computed token by token.
Source: split-KV softmax as in Dao et al. 2023, Flash-Decoding.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kernels import checks
from kernels.ops import Heads, SequenceTokens

TILE_TOKENS = 64
CHUNK_QUERIES = 64
PAIRS_MAX = 256  # (token, tile) pairs of one call; bounds the gathered KV
HEAD_ROWS_MIN = 2  # a single row would make the sum over tiles an inner one, of another order
ROWS_MIN_TRIED = (1, 4, 8, 16)
PROBE_ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 15, 16, 24, 33, 48, 96, 192)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single query tokens of similar context, padded to the longest: `tiles` of each token.

    A pair is one token and one tile, in the order (token, tile)."""

    tiles: int
    token_rows: torch.Tensor  # (n,) rows of the step
    q_rows: torch.Tensor  # (pairs·kv_heads·head rows,) rows of q seen as (rows·q_heads, head_dim)
    gather: torch.Tensor  # (2·pairs·kv_heads·blocks per tile,) block rows of the KV layer
    mask: torch.Tensor  # (n, tiles, 1, 1, TILE_TOKENS) 0 or minus infinity


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Consecutive query tokens of one sequence: rows [start_row, start_row + count)."""

    start_row: int
    count: int
    gather: torch.Tensor  # (2·tiles·kv_heads·blocks per tile,)
    first_masked_tile: int
    mask: torch.Tensor  # (tiles - first_masked_tile, 1, count, 1, TILE_TOKENS)


@dataclass(frozen=True, slots=True)
class StepIndices:
    """What all layers of a step share."""

    heads: Heads
    num_rows: int
    slots: torch.Tensor  # see pointwise.rope_write
    decodes: list[DecodeGroup]
    chunks: list[ChunkGroup]


def plan_step(
    sequences: list[SequenceTokens], heads: Heads, block_tokens: int, rows_min: int | None
) -> StepIndices:
    """Indices of a step whose rows stand in the order of `sequences`."""
    if TILE_TOKENS % block_tokens:
        raise ValueError(f"blocks of {block_tokens} tokens do not divide {TILE_TOKENS}")
    singles: list[tuple[int, int, np.ndarray]] = []  # row, tokens it sees, table
    chunks: list[ChunkGroup] = []
    slots = []
    row = 0
    for sequence in sequences:
        start, count, table = sequence.start, sequence.count, sequence.table
        checks.block_table("table", table, start + count, block_tokens)
        positions = np.arange(start, start + count)
        slots.append((table[positions // block_tokens], positions % block_tokens))
        for offset in range(0, count, CHUNK_QUERIES):
            size = min(CHUNK_QUERIES, count - offset)
            first_row, first = row + offset, start + offset
            if rows_min is None or size == 1 or size * heads.group < rows_min:
                singles += [(first_row + i, first + i + 1, table) for i in range(size)]
            else:
                chunks.append(_chunk_group(first_row, first, size, table, heads, block_tokens))
        row += count
    head_rows = max(rows_min or 1, heads.group, HEAD_ROWS_MIN)
    groups = [_decode_group(part, heads, head_rows, block_tokens) for part in _split(singles)]
    return StepIndices(heads, row, _slots(slots, heads, block_tokens), groups, chunks)


def _slots(
    places: list[tuple[np.ndarray, np.ndarray]], heads: Heads, block_tokens: int
) -> torch.Tensor:
    block_ids = np.concatenate([block_id for block_id, _ in places])[:, None]
    offsets = np.concatenate([offset for _, offset in places])[:, None]
    planes = np.arange(2 * heads.num_kv_heads)[None, :]  # (K|V, kv head)
    rows = (block_ids * 2 * heads.num_kv_heads + planes) * block_tokens + offsets
    return torch.from_numpy(rows.reshape(-1))


def _split(
    singles: list[tuple[int, int, np.ndarray]],
) -> list[list[tuple[int, int, np.ndarray]]]:
    """Longest first, in groups that hold at most PAIRS_MAX padded pairs (a longer context stands
    alone) and no context of half the longest one's tiles or less."""
    parts: list[list[tuple[int, int, np.ndarray]]] = []
    tiles_first = 0
    for single in sorted(singles, key=lambda s: -s[1]):
        tiles = -(-single[1] // TILE_TOKENS)
        is_full = parts and (len(parts[-1]) + 1) * tiles_first > PAIRS_MAX
        if not parts or is_full or 2 * tiles <= tiles_first:
            parts.append([])
            tiles_first = tiles
        parts[-1].append(single)
    return parts


def _block_rows(block_ids: np.ndarray, heads: Heads) -> torch.Tensor:
    """Rows of the KV layer seen as (num_blocks·2·kv_heads, block_tokens·head_dim) that lay out
    block_ids (pairs, blocks per tile) as (K|V, pairs, kv head, tokens of the tile, head_dim)."""
    kv_heads = heads.num_kv_heads
    planes = np.arange(2 * kv_heads).reshape(2, 1, kv_heads, 1)
    rows = block_ids[None, :, None, :] * 2 * kv_heads + planes
    return torch.from_numpy(rows.reshape(-1))


def _decode_group(
    singles: list[tuple[int, int, np.ndarray]], heads: Heads, head_rows: int, block_tokens: int
) -> DecodeGroup:
    lengths = np.array([length for _, length, _ in singles])
    tiles = -(-int(lengths[0]) // TILE_TOKENS)
    per_tile = TILE_TOKENS // block_tokens
    tables = np.empty((len(singles), tiles * per_tile), dtype=np.int64)
    for index, (_, length, table) in enumerate(singles):
        used = -(-length // block_tokens)
        tables[index, :used] = table[:used]
        tables[index, used:] = table[0]  # masked, any block of its own will do
    is_seen = np.arange(tiles * TILE_TOKENS)[None, :] < lengths[:, None]
    mask = np.where(is_seen, 0.0, -np.inf).astype(np.float32)
    token_rows = np.array([row for row, _, _ in singles])
    in_group = np.minimum(np.arange(head_rows), heads.group - 1)  # padding repeats the last head
    q_heads = np.arange(heads.num_kv_heads)[:, None] * heads.group + in_group[None, :]
    q_rows = token_rows[:, None] * heads.num_q_heads + q_heads.reshape(1, -1)
    return DecodeGroup(
        tiles,
        torch.from_numpy(token_rows),
        torch.from_numpy(np.repeat(q_rows, tiles, axis=0).reshape(-1)),
        _block_rows(tables.reshape(-1, per_tile), heads),
        torch.from_numpy(mask.reshape(len(singles), tiles, 1, 1, TILE_TOKENS)),
    )


def _chunk_group(
    row: int, start: int, count: int, table: np.ndarray, heads: Heads, block_tokens: int
) -> ChunkGroup:
    per_tile = TILE_TOKENS // block_tokens
    num_tiles = -(-(start + count) // TILE_TOKENS)
    used = -(-(start + count) // block_tokens)
    padded = np.full(num_tiles * per_tile, table[0], dtype=np.int64)
    padded[:used] = table[:used]
    first_masked = start // TILE_TOKENS
    keys = np.arange(first_masked * TILE_TOKENS, num_tiles * TILE_TOKENS)
    queries = np.arange(start, start + count)
    mask = np.where(keys.reshape(-1, 1, TILE_TOKENS) <= queries[None, :, None], 0.0, -np.inf)
    return ChunkGroup(
        row,
        count,
        _block_rows(padded.reshape(num_tiles, per_tile), heads),
        first_masked,
        torch.from_numpy(mask.astype(np.float32)[:, None, :, None, :]),
    )


def attention(q: torch.Tensor, kv_layer: torch.Tensor, step: StepIndices) -> torch.Tensor:
    """See Ops.attention. q (rows, q_heads, head_dim); computed in float32."""
    heads = step.heads
    checks.shape("q", q, (step.num_rows, heads.num_q_heads, heads.head_dim))
    checks.contiguous("kv_layer", kv_layer)
    kv_rows = kv_layer.view(kv_layer.shape[0] * 2 * heads.num_kv_heads, -1)
    scaled = q.float() * heads.head_dim**-0.5
    width = heads.num_q_heads * heads.head_dim
    if step.num_rows == 1 and step.decodes:
        return _decode(scaled, kv_rows, step.decodes[0], heads).view(1, width).to(q.dtype)
    out = torch.empty(step.num_rows, width)
    for decodes in step.decodes:
        part = _decode(scaled, kv_rows, decodes, heads)
        out.index_copy_(0, decodes.token_rows, part.view(-1, width))
    for chunk in step.chunks:
        rows = slice(chunk.start_row, chunk.start_row + chunk.count)
        out[rows] = _chunk(scaled[rows], kv_rows, chunk, heads)
    return out.to(q.dtype)


def _tiles(kv_rows: torch.Tensor, gather: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """Keys and values, each (tiles·kv_heads, TILE_TOKENS, head_dim) float32."""
    return kv_rows.index_select(0, gather).float().view(2, -1, TILE_TOKENS, dim).unbind()


def _decode(
    q: torch.Tensor, kv_rows: torch.Tensor, group: DecodeGroup, heads: Heads
) -> torch.Tensor:
    """(n, kv_heads, group, head_dim) contiguous for the n tokens of the group."""
    num, kv_heads, dim = len(group.token_rows), heads.num_kv_heads, heads.head_dim
    keys, values = _tiles(kv_rows, group.gather, dim)
    picked = q.view(-1, dim).index_select(0, group.q_rows).view(len(keys), -1, dim)
    scores = torch.bmm(picked, keys.transpose(1, 2))
    by_tile = scores.view(num, group.tiles, kv_heads, -1, TILE_TOKENS)
    by_tile += group.mask
    by_tile -= by_tile.amax((1, 4), keepdim=True)
    weights = scores.exp_()
    sums = by_tile.sum(-1).sum(1)
    parts = torch.bmm(weights, values)
    total = parts.view(num, group.tiles, kv_heads, -1, dim).sum(1)
    return (total / sums[..., None])[:, :, : heads.group].contiguous()


def _chunk(q: torch.Tensor, kv_rows: torch.Tensor, chunk: ChunkGroup, heads: Heads) -> torch.Tensor:
    """(count, q_heads·head_dim) for consecutive tokens of one sequence."""
    kv_heads, group, dim = heads.num_kv_heads, heads.group, heads.head_dim
    keys, values = _tiles(kv_rows, chunk.gather, dim)
    tiles = len(keys) // kv_heads
    q = q.view(chunk.count, kv_heads, group, dim)
    q = q.transpose(0, 1).reshape(1, kv_heads, chunk.count * group, dim)
    q = q.expand(tiles, -1, -1, -1).reshape(tiles * kv_heads, -1, dim)
    scores = torch.bmm(q, keys.transpose(1, 2))
    by_query = scores.view(tiles, kv_heads, chunk.count, group, TILE_TOKENS)
    by_query[chunk.first_masked_tile :] += chunk.mask
    by_tile = scores.view(tiles, kv_heads, -1, TILE_TOKENS)
    by_tile -= by_tile.amax((0, 3), keepdim=True)
    weights = scores.exp_()
    sums = by_tile.sum(-1).sum(0)
    parts = torch.bmm(weights, values)
    total = parts.view(tiles, kv_heads, -1, dim).sum(0)
    out = (total / sums[..., None]).view(kv_heads, chunk.count, group, dim)
    return out.transpose(0, 1).reshape(chunk.count, -1)


def probe_rows_min(heads: Heads) -> int | None:
    """Smallest row count from which on a batched product of tile shape gives equal rows."""
    generator = torch.Generator().manual_seed(heads.head_dim)
    rows, kv_heads, dim = PROBE_ROWS[-1], heads.num_kv_heads, heads.head_dim
    q = torch.randn(1, rows, dim, generator=generator)
    weights = torch.rand(1, rows, TILE_TOKENS, generator=generator)
    kv = torch.randn(kv_heads, TILE_TOKENS, dim, generator=generator)
    differing = 0
    for left, right in ((q, kv.transpose(1, 2)), (weights, kv)):
        expected = torch.bmm(left.expand(kv_heads, -1, -1).contiguous(), right)
        for count in PROBE_ROWS[:-1]:
            for start in (0, rows - count):
                part = left[:, start : start + count].expand(kv_heads, -1, -1).contiguous()
                if not torch.equal(torch.bmm(part, right), expected[:, start : start + count]):
                    differing = max(differing, count)
    return next((tried for tried in ROWS_MIN_TRIED if tried > differing), None)
