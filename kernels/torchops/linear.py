"""Linear layers whose rows have the same bits however many rows are computed together.

Three layouts of a weight. `packed`: by oneDNN, whose inner product walks the inputs of a row in one
order for any number of rows; what exact numerics use where torch has it. `transposed`: (in, out),
the fastest for one row and not exact. `plain`: (out, in), for machines without oneDNN.
Measured 2026-11 on an AVX2 EPYC, one thread, CPU milliseconds of all linears of the 135M model but
the vocabulary layer (that layer) at 1 / 2 / 4 / 16 rows: packed 40 / 47 / 53 / 87 (8 / 11 / 12 /
19), transposed 33 / 52 / 79 / 104 (6 / 12 / 32 / 42), plain 41 / 81 / 86 / 107 (10 / 24 / 26 / 34);
from 64 rows on all are equal. Reading the weights alone takes 33 (9): 13 GB/s.
Whether rows are equal on this machine is not assumed: `probe_tile` tries the model's own weights
and returns how many rows must be padded.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

PACK_ROWS = 16  # rows that oneDNN lays the weight out for; the fastest of 1, 4, 16, 64, 256
TILES = (1, 4, 8, 16)
FALLBACK_TILE = 16  # every call has exactly this many rows
PROBE_ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 64)
PROBE_ROWS_LONG = (128, 200, 256, 400, 512)
PROBED_ROWS_HALF = 256  # rows tried with each count in half precision
ROWS_MAX = PROBE_ROWS_LONG[-1]  # of one call: no more than was probed
WIDE_OUT = 16384  # vocabulary-sized layers get at most WIDE_ROWS rows a call
WIDE_ROWS = PROBE_ROWS[-1]

Layout = Literal["packed", "transposed", "plain"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight (out, in) ready for `multiply`."""

    data: torch.Tensor
    num_out: int
    num_in: int
    layout: Layout
    bias: torch.Tensor | None = None  # (out,)

    @property
    def rows_max(self) -> int:
        """Rows of one call."""
        return WIDE_ROWS if self.num_out >= WIDE_OUT else ROWS_MAX


def has_packing(dtype: torch.dtype) -> bool:
    """Can torch pack weights of this dtype for oneDNN on this machine?"""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        pack(torch.zeros(16, 16, dtype=dtype), "packed")
    except (RuntimeError, AttributeError):  # no such instruction set; no such operation
        return False
    return True


def pack(weight: torch.Tensor, layout: Layout, bias: torch.Tensor | None = None) -> PackedWeight:
    """Prepare a weight (out, in)."""
    num_out, num_in = weight.shape
    match layout:
        case "packed":
            data = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        case "transposed":
            data = weight.t().contiguous()
        case "plain":
            data = weight.contiguous()
    return PackedWeight(data, num_out, num_in, layout, bias)


def multiply(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x (rows, in) contiguous times the transposed weight, plus the bias."""
    match weight.layout:
        case "packed":
            product = torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")
        case "transposed":
            product = torch.mm(x, weight.data)
        case "plain":
            product = F.linear(x, weight.data)
    return product if weight.bias is None else product.add_(weight.bias)


def linear(x: torch.Tensor, weight: PackedWeight, tile: int | None) -> torch.Tensor:
    """x times the transposed weight in calls whose number of rows is a multiple of `tile`; with
    None every call has FALLBACK_TILE rows. Padding rows are zero and dropped."""
    rows = len(x)
    step = FALLBACK_TILE if tile is None else weight.rows_max
    if rows <= step:
        return _padded(x, weight, tile)
    parts = [_padded(x[start : start + step], weight, tile) for start in range(0, rows, step)]
    return torch.cat(parts)


def _padded(x: torch.Tensor, weight: PackedWeight, tile: int | None) -> torch.Tensor:
    rows = len(x)
    missing = -rows % (tile or FALLBACK_TILE)
    if missing == 0:
        return multiply(x, weight)
    return multiply(F.pad(x, (0, 0, 0, missing)), weight)[:rows]


def probe_tile(weights: list[PackedWeight], dtype: torch.dtype) -> int | None:
    """Smallest tile for which every weight gives bitwise equal rows; None when none does."""
    safe = set(TILES)
    for weight in weights:
        safe &= _safe_tiles(weight, dtype)
    return min(safe, default=None)


def _starts(count: int, num_rows: int, dtype: torch.dtype) -> list[int]:
    """Where the probe computes `count` of the rows: first and last; in half precision also between,
    since the rounded result shows another order of the sum once in some ten thousand values."""
    ends = [0, num_rows - count]
    if dtype == torch.float32:
        return ends
    return [*range(0, min(num_rows - count, PROBED_ROWS_HALF), count), *ends]


def _safe_tiles(weight: PackedWeight, dtype: torch.dtype) -> set[int]:
    counts = [count for count in PROBE_ROWS + PROBE_ROWS_LONG if count <= weight.rows_max]
    generator = torch.Generator().manual_seed(weight.num_out)
    x = torch.randn(max(counts), weight.num_in, generator=generator).to(dtype)
    expected = multiply(x, weight)
    differing = set()
    for count in counts[:-1]:
        for start in _starts(count, len(x), dtype):
            if not torch.equal(
                multiply(x[start : start + count].contiguous(), weight),
                expected[start : start + count],
            ):
                differing.add(count)
    return {tile for tile in TILES if not any(count % tile == 0 for count in differing)}
