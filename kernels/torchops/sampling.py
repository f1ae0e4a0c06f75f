"""Draws one id per row of logits: greedy, or from the truncated distribution by a given uniform.

The uniform number is an argument, so the same logits and the same draw give the same id on every
worker. Rows are computed in float64 and one by one where an order over the vocabulary is needed.
"""

import numpy as np
import torch

from kernels import checks
from kernels.ops import SamplingTable


def sample(logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
    """See Ops.sample."""
    checks.shape("logits", logits, (len(table.uniform), None))
    checks.dtype("logits", logits, torch.float32)
    rows = logits.numpy()
    best = rows.argmax(axis=1)  # the first of equal ones; NaN counts as the largest
    peaks = rows[np.arange(len(rows)), best]
    ids: list[int | None] = []
    for index, peak in enumerate(peaks):
        if not np.isfinite(peak):
            ids.append(None)
        elif table.temperature[index] <= 0.0:
            ids.append(int(best[index]))
        else:
            ids.append(
                draw(
                    rows[index],
                    float(table.temperature[index]),
                    float(table.top_p[index]),
                    int(table.top_k[index]),
                    float(table.uniform[index]),
                )
            )
    return ids


def draw(logits: np.ndarray, temperature: float, top_p: float, top_k: int, uniform: float) -> int:
    """The id at `uniform` of the cumulative distribution, over ids in order when nothing is cut,
    else over ids from the most to the least likely (ties: lowest id first)."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    if top_p >= 1.0 and top_k == 0:
        return _invert(weights, uniform)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    ordered = weights[order]
    if top_p < 1.0:
        cumulative = np.cumsum(ordered)
        kept = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        ordered = ordered[:kept]
    return int(order[_invert(ordered, uniform)])


def _invert(weights: np.ndarray, uniform: float) -> int:
    """First index whose cumulative weight exceeds uniform · total."""
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    last = int(np.flatnonzero(weights)[-1])  # rounding must not reach an impossible id
    return min(index, last)
