"""Step times by which a peer's replay (NVIDIA Dynamo 1.6.1, offline) timed Llama-3.1-8B on an H200.

A step costs its prompt chunks plus its decode rows, added; noise there is none. Prompt chunks have
two rules. `position`, for comparisons: token j of a prompt costs P(j) - P(j - 1), j counted anew
every REPEAT_TOKENS, so that no way to split a prompt is cheaper than another. `tokens`, the peer's
own: one P of all new tokens of the step, wherever they stand in their prompts.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal, get_args

import msgspec

from controlplane.sim.steptable import STEPS_MAX

PATH = Path(__file__).parent / "tables" / "peer-llama-3.1-8b.json"
REPEAT_TOKENS = 8_192  # the peer's largest step
DECODE_MS_MIN = 1.0  # of a step that gives tokens, whatever the table says

PromptRule = Literal["position", "tokens"]
PROMPT_RULES: tuple[PromptRule, ...] = get_args(PromptRule)


class PeerTable(msgspec.Struct, frozen=True):
    """The file: prefill by new tokens; decode by [KV tokens read][mean context of a row]."""

    name: str
    source: str
    gpu: str
    kv_bytes_per_token: int
    prefill_isl: list[float]
    prefill_ttft_ms: list[float]
    decode_active_kv_tokens: list[float]
    decode_context_length: list[float]
    decode_itl: list[list[float]]


@dataclass(frozen=True, slots=True)
class PeerTiming:
    """Seconds of a step. Both tables are linear between their points and go on beyond them."""

    file: PeerTable
    prompt_rule: PromptRule = "position"
    _ms_to: list[float] = field(init=False, repr=False)  # P(n) for n up to REPEAT_TOKENS; P(0) = 0

    def __post_init__(self) -> None:
        ms_to = [0.0, *(self._prefill_ms(n) for n in range(1, REPEAT_TOKENS + 1))]
        object.__setattr__(self, "_ms_to", ms_to)

    def step_s(
        self, chunks: Sequence[tuple[int, int]], decode_rows: int, decode_context_tokens: int
    ) -> float:
        """Chunks (start, count), and decode rows that read so many tokens together, the newest
        ones included. 0 for an empty step."""
        seconds = self._prompts_s(chunks) if chunks else 0.0
        return seconds + self._decode_s(decode_rows, decode_context_tokens)

    def _prompts_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        if self.prompt_rule == "position":
            return 1e-3 * sum([self._until_ms(s + n) - self._until_ms(s) for s, n in chunks])
        return 1e-3 * self._prefill_ms(sum([count for _, count in chunks]))

    def _decode_s(self, rows: int, kv_tokens: int) -> float:
        if not rows:
            return 0.0
        table = self.file
        row, down = _cell(table.decode_active_kv_tokens, kv_tokens)
        column, across = _cell(table.decode_context_length, kv_tokens // rows)
        low, high = table.decode_itl[row], table.decode_itl[row + 1]
        at_low = low[column] + across * (low[column + 1] - low[column])
        at_high = high[column] + across * (high[column + 1] - high[column])
        return 1e-3 * max(DECODE_MS_MIN, at_low + down * (at_high - at_low))

    def steps_in_cell(self, rows: int, kv_tokens: int) -> int:
        """Steps of `rows` decodes, from one with kv_tokens on, that lie between the same points of
        the table: there their times have equal second differences."""
        table = self.file
        to_kv = _left(table.decode_active_kv_tokens, kv_tokens) / rows
        to_context = _left(table.decode_context_length, kv_tokens // rows)
        return 1 + int(min(to_kv, to_context, STEPS_MAX))

    def _until_ms(self, tokens: int) -> float:
        """A prompt's first tokens, computed in any chunks."""
        whole, rest = divmod(tokens, REPEAT_TOKENS)
        return whole * self._ms_to[REPEAT_TOKENS] + self._ms_to[rest]

    def _prefill_ms(self, tokens: int) -> float:
        xs, ys = self.file.prefill_isl, self.file.prefill_ttft_ms
        index, share = _cell(xs, float(tokens))
        return ys[index] + share * (ys[index + 1] - ys[index])


def load(prompt_rule: PromptRule = "position") -> PeerTiming:
    """The packaged table."""
    return PeerTiming(msgspec.json.decode(PATH.read_bytes(), type=PeerTable), prompt_rule)


def _cell(grid: Sequence[float], value: float) -> tuple[int, float]:
    index = min(max(bisect_right(grid, value) - 1, 0), len(grid) - 2)
    return index, (value - grid[index]) / (grid[index + 1] - grid[index])


def _left(grid: Sequence[float], value: float) -> float:
    """Up to the next inner point; the outer cells go on for ever."""
    index = max(1, bisect_right(grid, value))
    return grid[index] - value if index < len(grid) - 1 else inf
