"""Checks a backend on its device against the float64 reference at the sizes where kernels break.

The reference computes on float64 copies of the same inputs, so an error is the backend's alone. It
is the largest difference over the largest value, of each result tensor and of the KV layer written.
Sizes: one, a block's or tile's tokens and one less and more, odd ones, contexts of many splits,
rows of prefill and decode in one step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.ops import Heads, SamplingTable, SequenceTokens
from kernels.reference import ReferenceOps

# bf16 keeps 8 bits: a result is rounded once, attention weights and the KV once before that.
TOLERANCES = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
DRAW_SLACK = 1e-4  # a draw this close to an id's edge may fall to its neighbour
SEED = 20261124
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is tried; the defaults are for a GPU."""

    block_tokens: int = 64
    context_max: int = 4097
    rows: tuple[int, ...] = (1, 2, 7, 33, 64, 65)
    hidden: tuple[int, ...] = (576, 4096)
    widths: tuple[int, ...] = (1536, 14_336)
    heads: tuple[Heads, ...] = (Heads(8, 2, 128), Heads(9, 3, 64), Heads(32, 8, 128))
    vocabs: tuple[int, ...] = (512, 1000, 49_152, 128_256)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `error` of ids is the share of rows that differ."""

    kernel: str
    case: str
    error: float
    tolerance: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def checks(ops: Any, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Check]:
    """All comparisons. `ops` are a backend's with decode buckets."""
    torch.manual_seed(SEED)
    yield from _row_wise(ops, device, dtype, sizes)
    for heads in sizes.heads:
        yield from _rope_write(ops, device, dtype, heads, sizes.block_tokens)
        is_first = heads == sizes.heads[0]  # the plain loops take long for long contexts
        longest = sizes.context_max if is_first else 4 * sizes.block_tokens + 1
        yield from _decodes(ops, device, dtype, heads, sizes.block_tokens, longest)
        yield from _ragged(ops, device, dtype, heads, sizes.block_tokens)
    for vocab in sizes.vocabs:
        yield from _sampling(ops, device, dtype, vocab)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where the actual values are not finite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.cpu().double() - expected).abs().max()
    return float(difference / expected.abs().max())


def _row_wise(ops: Any, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Check]:
    reference, tolerance = ReferenceOps(), TOLERANCES[dtype]
    for rows in sizes.rows:
        for hidden in sizes.hidden:
            case = f"{rows} x {hidden}"
            x, weight = _random((rows, hidden), dtype), _random((hidden,), dtype)
            expected = reference.rms_norm(x.double(), weight.double(), EPS)
            actual = ops.rms_norm(x.to(device), weight.to(device), EPS)
            yield Check("rms_norm", case, _error(actual, expected), tolerance)
            residual = _random((rows, hidden), dtype)
            wide, mine = residual.double(), residual.to(device)
            expected = reference.add_rms_norm(x.double(), wide, weight.double(), EPS)
            actual = ops.add_rms_norm(x.to(device), mine, weight.to(device), EPS)
            error = max(_error(actual, expected), _error(mine, wide))
            yield Check("add_rms_norm", case, error, tolerance)
        for width in sizes.widths:
            gate_up = _random((rows, 2 * width), dtype)
            expected = reference.silu_mul(gate_up.double())
            actual = ops.silu_mul(gate_up.to(device))
            yield Check("silu_mul", f"{rows} x {width}", _error(actual, expected), tolerance)
        for heads in sizes.heads:
            width = (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim
            qkv, q, k = (_random(s, dtype) for s in ((rows, width), *[(heads.head_dim,)] * 2))
            wide, mine = qkv.double(), qkv.to(device)
            reference.norm_heads(wide, q.double(), k.double(), heads, EPS)
            ops.norm_heads(mine, q.to(device), k.to(device), heads, EPS)
            yield Check("norm_heads", f"{rows} x {heads}", _error(mine, wide), tolerance)


@dataclass(frozen=True, slots=True)
class _Cast:
    """Sequences over shuffled blocks of one layer, each with its table."""

    layer: torch.Tensor
    sequences: list[SequenceTokens]

    @property
    def rows(self) -> int:
        return sum(sequence.count for sequence in self.sequences)


def _cast(
    spans: list[tuple[int, int]], heads: Heads, block_tokens: int, dtype: torch.dtype
) -> _Cast:
    """spans: (tokens before, tokens to compute) of each sequence."""
    counts = [-(-(start + count) // block_tokens) for start, count in spans]
    order = np.random.default_rng(SEED).permutation(sum(counts) + 1)
    tables = np.split(order, np.cumsum(counts))
    size = (len(order), 2, heads.num_kv_heads, block_tokens, heads.head_dim)
    sequences = [
        SequenceTokens(start, count, table)
        for (start, count), table in zip(spans, tables, strict=False)
    ]
    return _Cast(_random(size, dtype), sequences)


def _rope_write(
    ops: Any, device: torch.device, dtype: torch.dtype, heads: Heads, block_tokens: int
) -> Iterator[Check]:
    size, dim = block_tokens, heads.head_dim
    for name, spans in {
        "prefill": [(0, size + 1)],
        "decodes": [(0, 1), (size - 1, 1), (size, 1), (3 * size + 1, 1)],
        "ragged": [(5, 2 * size), (size - 1, 1), (size, 3)],
    }.items():
        cast = _cast(spans, heads, size, dtype)
        qkv = _random((cast.rows, (heads.num_q_heads + 2 * heads.num_kv_heads) * dim), dtype)
        angles = torch.randn(cast.rows, dim // 2)
        cos = torch.cat([angles.cos()] * 2, 1)
        sin = torch.cat([-angles.sin(), angles.sin()], 1)
        reference, wide = ReferenceOps(), cast.layer.double()
        step = reference.plan_step(cast.sequences, heads, size)
        expected = reference.rope_write(qkv.double(), cos, sin, wide, step)
        mine = cast.layer.to(device)
        step = ops.plan_step(cast.sequences, heads, size)
        q = ops.rope_write(qkv.to(device), cos.to(device), sin.to(device), mine, step)
        error = max(_error(q.reshape(expected.shape), expected), _error(mine, wide))
        yield Check("rope_write", f"{name} {heads}", error, TOLERANCES[dtype])


def _decodes(
    ops: Any,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    block_tokens: int,
    context_max: int,
) -> Iterator[Check]:
    size = block_tokens
    lengths = [1, 2, size - 1, size, size + 1, 2 * size, 4 * size - 1, 4 * size + 1, context_max]
    cast = _cast([(length - 1, 1) for length in lengths], heads, size, dtype)
    q = _random((len(lengths), heads.num_q_heads, heads.head_dim), dtype)
    reference = ReferenceOps()
    step = reference.plan_step(cast.sequences, heads, size)
    expected = reference.attention(q.double(), cast.layer.double(), step)
    layer = cast.layer.to(device)
    for batch in (len(lengths), 1):  # a step of one row may split its context otherwise
        part, rows = cast.sequences[-batch:], q[-batch:]
        bucket = ops.decode_bucket(batch + 3, len(part[-1].table) + 3, heads, size)
        ops.refill(bucket, part)
        padded = torch.cat([rows, rows.new_zeros(3, *rows.shape[1:])])
        for name, planned, queries in (
            ("planned", ops.plan_step(part, heads, size), rows),
            ("bucket", bucket, padded),
        ):
            actual = ops.attention(queries.to(device), layer, planned)
            pairs = zip(actual[:batch], expected[-batch:], strict=True)
            error = max(_error(row, wide) for row, wide in pairs)
            case = f"{name} {batch} rows to {context_max} {heads}"
            yield Check("decode attention", case, error, TOLERANCES[dtype])


def _ragged(
    ops: Any, device: torch.device, dtype: torch.dtype, heads: Heads, block_tokens: int
) -> Iterator[Check]:
    size = block_tokens
    for name, spans in {
        "one token": [(0, 1)],
        "below a block": [(0, size - 1)],
        "a block": [(0, size)],
        "above a block": [(0, size + 1)],
        "odd": [(0, 2 * size + 7)],
        "chunk": [(2 * size + 5, size + 1)],
        "chunk of one": [(3 * size, 1)],
        "mixed": [(size, 1), (0, size + 3), (5 * size - 1, 1), (17, 16), (size - 1, 2)],
    }.items():
        cast = _cast(spans, heads, size, dtype)
        q = _random((cast.rows, heads.num_q_heads, heads.head_dim), dtype)
        reference = ReferenceOps()
        step = reference.plan_step(cast.sequences, heads, size)
        expected = reference.attention(q.double(), cast.layer.double(), step)
        step = ops.plan_step(cast.sequences, heads, size)
        actual = ops.attention(q.to(device), cast.layer.to(device), step)
        error = _error(actual, expected)
        yield Check("ragged attention", f"{name} {heads}", error, TOLERANCES[dtype])


def _sampling(ops: Any, device: torch.device, dtype: torch.dtype, vocab: int) -> Iterator[Check]:
    settings = [  # temperature, top_k, top_p, min_p
        (0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 50, 1.0, 0.0), (1.3, 0, 0.9, 0.0),
        (0.8, 40, 0.95, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 0, 1.0, 0.05), (2.0, 0, 0.999, 0.0),
    ]  # fmt: skip
    rows = len(settings)
    temperature, top_k, top_p, min_p = (np.array(column) for column in zip(*settings, strict=True))
    logits = (2 * torch.randn(rows, vocab)).to(dtype)
    logits[0, vocab // 2 :: 7] = logits[0].max()  # ties: the lowest id
    draws = np.random.default_rng(SEED).random(rows)
    accepted = []
    for moved in (0.0, -DRAW_SLACK, DRAW_SLACK):
        uniform = np.clip(draws + moved, 0.0, np.nextafter(1.0, 0.0))
        table = SamplingTable(temperature, top_p, top_k, min_p, uniform)
        accepted.append(ReferenceOps().sample(logits.double(), table))
    ids = ops.sample(logits.to(device), SamplingTable(temperature, top_p, top_k, min_p, draws))
    wrong = [found not in allowed for found, *allowed in zip(ids, *accepted, strict=True)]
    yield Check("sample", f"{rows} x {vocab}", sum(wrong) / rows, 0.0)
    broken = logits.clone()
    broken[1, 3], broken[2, 5] = torch.nan, torch.inf
    table = SamplingTable(temperature, top_p, top_k, min_p, draws)
    found = [token_id is None for token_id in ops.sample(broken.to(device), table)]
    wrong = [was_none != (row in (1, 2)) for row, was_none in enumerate(found)]
    yield Check("sample", f"not finite, {rows} x {vocab}", sum(wrong) / rows, 0.0)
