"""Seconds of a step by a table of estimates for a real device, read from `tables/`.

This is the device that the simulated worker runs on. Its form (multilinear interpolation on three
tables) is deliberately not that of controlplane/latency.py, which has to learn it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

TABLES = Path(__file__).parent / "tables"
NAMES = ("llama-3.1-8b-bf16-tp1", "llama-3.1-8b-fp8-tp1", "llama-3.1-70b-fp8-tp4")
STEPS_MAX = 1_000_000  # of one run: more than any output has tokens
CONTEXT_TOKENS_MIN = 256.0  # shortest context of the decode table


class PrefillTable(msgspec.Struct, frozen=True):
    """One prompt alone: [new tokens][prefix tokens]."""

    new_tokens: list[float]
    prefix_tokens: list[float]
    ms: list[list[float]]


class DecodeTable(msgspec.Struct, frozen=True):
    """Decodes alone: [rows][context tokens of a row]."""

    batch: list[float]
    context_tokens: list[float]
    ms: list[list[float]]


class MixedTable(msgspec.Struct, frozen=True):
    """Both: [prompt tokens][decode rows][context tokens of a row]."""

    prefill_tokens: list[float]
    decode_rows: list[float]
    decode_context_tokens: list[float]
    ms: list[list[list[float]]]


class TableFile(msgspec.Struct, frozen=True):
    """A file of `tables/`. Weights are in 1e9 bytes."""

    name: str
    source: str
    model: str
    gpu: str
    tp: int
    kv_bytes_per_token: int
    weight_gb: float
    prefill_ms: PrefillTable
    decode_step_ms: DecodeTable
    mixed_step_ms: MixedTable


@dataclass(frozen=True, slots=True)
class StepTable:
    """Step times of one model on one device."""

    file: TableFile

    def step_s(
        self, chunks: Sequence[tuple[int, int]], decode_rows: int, decode_context_tokens: int
    ) -> float:
        """Seconds of a step of chunks (start, count) and decode rows that read so many context
        tokens together. 0 for an empty step."""
        chunk_tokens, prefix_ms = 0, 0.0
        for start, count in chunks:
            chunk_tokens += count
            prefix_ms += self._prefix_ms(start, count)
        if not chunk_tokens and not decode_rows:
            return 0.0
        mixed = self.file.mixed_step_ms
        context = mixed.decode_context_tokens[0]  # without decode rows the context is nobody's
        if decode_rows:
            context = max(decode_context_tokens / decode_rows, CONTEXT_TOKENS_MIN)
        if chunk_tokens >= mixed.prefill_tokens[0]:
            return 1e-3 * (self._mixed_ms(chunk_tokens, decode_rows, context) + prefix_ms)
        smallest = mixed.prefill_tokens[0]
        share = chunk_tokens / smallest
        without_ms = self._decode_ms(max(1, decode_rows), context)
        with_ms = self._mixed_ms(smallest, decode_rows, context)
        return 1e-3 * (without_ms + share * max(0.0, with_ms - without_ms) + prefix_ms)

    def steps_in_cell(self, rows: int, context_tokens: int) -> int:
        """Steps of these decode rows alone, each with one more token a row, between the same points
        of the table: there their times grow linearly."""
        grid, context = self.file.decode_step_ms.context_tokens, context_tokens / rows
        bends = (CONTEXT_TOKENS_MIN, *grid[1:-1])  # it goes on as in its last interval
        return 1 + int(min((bend - context for bend in bends if bend > context), default=STEPS_MAX))

    def _decode_ms(self, rows: float, context: float) -> float:
        table = self.file.decode_step_ms
        row, row_share = _cell(table.batch, rows)
        column, column_share = _cell(table.context_tokens, context)
        return _between(
            _along(table.ms[row], column, column_share),
            _along(table.ms[row + 1], column, column_share),
            row_share,
        )

    def _mixed_ms(self, chunk_tokens: float, rows: float, context: float) -> float:
        table = self.file.mixed_step_ms
        chunk, chunk_share = _cell(table.prefill_tokens, chunk_tokens)
        row, row_share = _cell(table.decode_rows, rows)
        column, column_share = _cell(table.decode_context_tokens, context)
        ms = [
            _between(
                _along(plane[row], column, column_share),
                _along(plane[row + 1], column, column_share),
                row_share,
            )
            for plane in (table.ms[chunk], table.ms[chunk + 1])
        ]
        return _between(ms[0], ms[1], chunk_share)

    def _prefix_ms(self, start: int, count: int) -> float:
        """What reading the context before a chunk adds; in proportion below the table."""
        if start == 0:
            return 0.0
        table = self.file.prefill_ms
        smallest = table.new_tokens[0]
        row, row_share = _cell(table.new_tokens, max(float(count), smallest))
        column, column_share = _cell(table.prefix_tokens, start)
        low, high = table.ms[row], table.ms[row + 1]
        at_start = _between(
            _along(low, column, column_share), _along(high, column, column_share), row_share
        )
        added = max(0.0, at_start - _between(low[0], high[0], row_share))
        return added * min(1.0, count / smallest)


def load(name: str) -> StepTable:
    """The table of that name. Raises ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"table {name!r}: expected one of {', '.join(NAMES)}")
    data = (TABLES / f"{name}.json").read_bytes()
    return StepTable(msgspec.json.decode(data, type=TableFile))


def _cell(grid: Sequence[float], value: float) -> tuple[int, float]:
    """The grid interval to interpolate in and the position there; the outer ones go on beyond."""
    index = min(max(bisect_right(grid, value) - 1, 0), len(grid) - 2)
    return index, (value - grid[index]) / (grid[index + 1] - grid[index])


def _along(values: Sequence[float], index: int, share: float) -> float:
    return values[index] + share * (values[index + 1] - values[index])


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)
