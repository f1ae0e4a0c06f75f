"""Whose GPU seconds a step was: the marginal cost of each row, and the rest split over the rows.

Worker and simulator charge executed steps with it; fairness counts in the same unit. Marginal costs
are those of the step model: u·g + attention for a prompt, g + b·context for a decoded token
(algorithms.md 2g). What a step costs beyond its rows (t0) is split over the token rows that are
present, batch and interactive alike (2i, "attributed").
"""

from collections.abc import Sequence

from controlplane.latency import CONTEXT_TILE, prompt_context_token_s, prompt_token_s
from controlplane.protocol import GpuSeconds, StepModel

Row = tuple[int, int]  # tokens [start, start + count) of one sequence


def prompt_s(model: StepModel, start: int, tokens: int) -> float:
    """Marginal seconds of prompt tokens [start, start + tokens)."""
    passes = -(-tokens // CONTEXT_TILE)
    context_tokens = passes * (start + (tokens + 1) // 2)
    return prompt_token_s(model) * tokens + prompt_context_token_s(model) * context_tokens


def decode_s(model: StepModel, context_tokens: int, tokens: float = 1.0) -> float:
    """Marginal seconds of decoded tokens, the first of which reads so many context tokens."""
    row_s = prompt_token_s(model) + model.per_sequence_s
    context = tokens * (context_tokens + 0.5 * (tokens - 1.0))
    return row_s * tokens + model.per_context_token_s * context


def request_s(model: StepModel, uncached: int, prompt_tokens: int, output_tokens: float) -> float:
    """Marginal seconds of a whole request of which `uncached` prompt tokens must be computed. The
    prompt's last row gives the first output token."""
    decoded_s = decode_s(model, prompt_tokens + 1, max(0.0, output_tokens - 1.0))
    return prompt_s(model, prompt_tokens - uncached, uncached) + decoded_s


def split_step(
    model: StepModel, rows: Sequence[Row], measured_s: float
) -> tuple[list[float], float]:
    """Seconds of each row, which add up to measured_s, and how many of them each token row got
    of the step's fixed cost. Where marginal costs alone exceed the step, all shrink alike."""
    row_s = prompt_token_s(model) + model.per_sequence_s
    context_s = model.per_context_token_s
    marginal = [
        row_s + context_s * (start + 1) if count == 1 else prompt_s(model, start, count)
        for start, count in rows
    ]
    total_s = sum(marginal)
    if total_s >= measured_s:
        scale = measured_s / total_s if total_s > 0.0 else 0.0
        return [scale * seconds for seconds in marginal], 0.0
    fixed_s = (measured_s - total_s) / sum([count for _, count in rows])
    charged = zip(marginal, rows, strict=True)
    return [seconds + fixed_s * count for seconds, (_, count) in charged], fixed_s


class GpuMeter:
    """How a worker has spent its time, by lane and stage. Idle time is measured apart."""

    def __init__(self) -> None:
        self._lanes_s = [0.0, 0.0, 0.0, 0.0]  # online prefill and decode, batch prefill and decode
        self._batch_fixed_s = 0.0
        self._shares = [0.0, 0.0, 0.0, 0.0]  # of the last step
        self._batch_fixed_share = 0.0

    def add_step(
        self,
        model: StepModel,
        rows: Sequence[Row],
        num_online: int,
        is_decode: Sequence[bool],
        measured_s: float,
    ) -> list[float]:
        """Charge an executed step, whose first `num_online` rows are online; seconds of each row.

        `is_decode`: rows that decode, the others compute a prompt (or compute it again)."""
        assert rows and measured_s >= 0.0, (len(rows), measured_s)
        charged, fixed_s = split_step(model, rows, measured_s)
        lanes = [0.0, 0.0, 0.0, 0.0]
        for index, (seconds, decodes) in enumerate(zip(charged, is_decode, strict=True)):
            lanes[2 * (index >= num_online) + decodes] += seconds
        batch_fixed_s = fixed_s * sum([count for _, count in rows[num_online:]])
        if measured_s > 0.0:
            self._shares = [seconds / measured_s for seconds in lanes]
            self._batch_fixed_share = batch_fixed_s / measured_s
        self._add(lanes, batch_fixed_s)
        return charged

    def add_host(self, seconds: float) -> None:
        """Time around the last step in which the device waited for the host: it goes to the same
        lanes. Below 0 where a modelled step took less than its model says."""
        self._add([share * seconds for share in self._shares], self._batch_fixed_share * seconds)

    def _add(self, lanes_s: Sequence[float], batch_fixed_s: float) -> None:
        self._lanes_s = [sum_s + more for sum_s, more in zip(self._lanes_s, lanes_s, strict=True)]
        self._batch_fixed_s += batch_fixed_s

    def spent(self, idle_s: float) -> GpuSeconds:
        """All time so far; `idle_s` is what was measured while there was nothing to run."""
        online_prefill_s, online_decode_s, batch_prefill_s, batch_decode_s = self._lanes_s
        return GpuSeconds(
            online_prefill_s,
            online_decode_s,
            batch_prefill_s,
            batch_decode_s,
            self._batch_fixed_s,
            idle_s,
        )
