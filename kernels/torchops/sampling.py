"""Draws one id per row of logits: greedy, or from the truncated distribution by a given uniform.

The uniform number is an argument, so the same logits and the same draw give the same id on every
worker. Drawn rows are computed together in float64. Every filter keeps a head of the ids in order
of likeliness (ties: lowest id first); that head is looked for among the CANDIDATES likeliest, and
in the whole row only where it does not end within them.
"""

import numpy as np
import torch

from kernels import checks
from kernels.ops import SamplingTable, TokenLogprobs

CANDIDATES = 256


def sample(logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
    """See Ops.sample."""
    checks.shape("logits", logits, (len(table.uniform), None))
    checks.dtype("logits", logits, torch.float32)
    rows = logits.numpy()
    best = rows.argmax(axis=1)  # the first of equal ones; NaN counts as the largest
    is_number = np.isfinite(rows[np.arange(len(rows)), best])
    ids = best.copy()
    is_drawn = is_number & (table.temperature > 0.0)
    is_cut = (table.top_p < 1.0) | (table.top_k > 0) | (table.min_p > 0.0)
    for picked, draw in ((is_drawn & ~is_cut, _draw_plain), (is_drawn & is_cut, _draw_cut)):
        index = np.flatnonzero(picked)
        if len(index):
            ids[index] = draw(logits[torch.from_numpy(index)], table.rows(index)).numpy()
    return [int(i) if ok else None for i, ok in zip(ids, is_number, strict=True)]


def _weights(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """exp((logit - largest) / temperature) per row, float64."""
    wide = logits.double()
    wide -= wide.amax(1, keepdim=True)
    return wide.div_(torch.from_numpy(table.temperature)[:, None]).exp_()


def _draw_plain(logits: torch.Tensor, table: SamplingTable) -> torch.Tensor:
    """Nothing is cut: the ids in their own order."""
    weights = _weights(logits, table)
    cumulative = weights.cumsum(1)
    target = torch.from_numpy(table.uniform)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    for row in torch.nonzero(found == logits.shape[1]).flatten().tolist():
        found[row] = weights[row].nonzero()[-1, 0]  # rounding must not pass the last possible id
    return found


def _draw_cut(
    logits: torch.Tensor, table: SamplingTable, candidates: int = CANDIDATES
) -> torch.Tensor:
    """The ids from the likeliest on, as far as top_k, top_p and min_p all keep them."""
    vocab = logits.shape[1]
    width = min(vocab, candidates)
    weights = _weights(logits, table)
    values, ids = _likeliest(logits, width)
    ordered = weights.gather(1, ids)
    cumulative = ordered.cumsum(1)
    kept = _kept(ordered, cumulative, weights.sum(1), table)
    last = kept[:, None] - 1
    mass = cumulative.gather(1, last.clamp(max=width - 1))
    target = torch.from_numpy(table.uniform)[:, None] * mass
    found = (cumulative <= target).sum(1, keepdim=True).minimum(last).clamp_(max=width - 1)
    possible = (ordered > 0).sum(1, keepdim=True) - 1
    drawn = ids.gather(1, found.minimum(possible))[:, 0]
    if width == vocab:
        return drawn
    # The head must end before the last candidate's value: beyond it equal logits may follow. And
    # top_p is a share of the top_k likeliest ids' mass, which must all be candidates.
    edge = values.gather(1, last.clamp(max=width - 1))[:, 0]
    is_share_unknown = torch.from_numpy((table.top_k > width) & (table.top_p < 1.0))
    is_open = (kept >= width) | (edge <= values[:, -1]) | is_share_unknown
    again = torch.nonzero(is_open).flatten()
    if len(again):
        drawn[again] = _draw_cut(logits[again], table.rows(again.numpy()), vocab)
    return drawn


def _likeliest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids of the `width` largest, largest first, of equal ones the lowest id first."""
    if width == logits.shape[1]:
        return logits.sort(dim=1, descending=True, stable=True)
    values, ids = logits.topk(width, dim=1)
    ids, order = ids.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _kept(
    ordered: torch.Tensor, cumulative: torch.Tensor, total: torch.Tensor, table: SamplingTable
) -> torch.Tensor:
    """How many of the ordered ids stay; more than there are columns where the end is not in
    sight. At least 1."""
    width = ordered.shape[1]
    beyond = width + 1
    top_k, top_p = torch.from_numpy(table.top_k), torch.from_numpy(table.top_p)
    min_p = torch.from_numpy(table.min_p)
    by_k = torch.where(top_k > 0, top_k, beyond)
    within = (by_k - 1).clamp(max=width - 1)[:, None]
    mass = torch.where(by_k <= width, cumulative.gather(1, within)[:, 0], total)
    reached = (cumulative < (top_p * mass)[:, None]).sum(1) + 1
    by_p = torch.where(top_p < 1.0, reached, beyond)
    likely = (ordered >= min_p[:, None]).sum(1)
    by_min = torch.where((min_p > 0.0) & (likely < width), likely, beyond)
    return torch.minimum(torch.minimum(by_k, by_p), by_min).clamp_(min=1)


def logprobs(logits: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """See Ops.logprobs."""
    wide = logits.double()
    rest = wide.logsumexp(1)
    chosen = wide.gather(1, torch.tensor(token_ids)[:, None])[:, 0] - rest
    width = min(max(num_top), logits.shape[1])
    values, ids = _likeliest(logits, width) if width else (wide[:, :0], wide[:, :0].long())
    tops = values.double() - rest[:, None]
    return [
        TokenLogprobs(own, top_ids[:count], top[:count])
        for own, top_ids, top, count in zip(
            chosen.tolist(), ids.tolist(), tops.tolist(), num_top, strict=True
        )
    ]
