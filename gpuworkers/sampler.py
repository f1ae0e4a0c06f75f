"""From sequences to a sampling table: parameters, edits of logits, and one keyed draw per row.

An edit follows from the sequence alone, its sampling parameters and its ids so far, so a resumed
sequence gets the same edits. In this order: the repetition penalty scales logits of ids seen
(Keskar et al. 2019, CTRL), penalties and biases are added as OpenAI's API describes them, a
grammar forbids what it cannot continue with.
The draw of output index i is Philox4x64 with key (seed, choice index) and counter i (Salmon et al.
2011, SC11), so whichever worker computes the token draws the same number.
"""

import math
from collections import Counter
from collections.abc import Collection

import numpy as np
import torch

from controlplane.protocol import TokenLogprobs
from gpuworkers.grammar import WORD_BITS, Grammars
from gpuworkers.sequence import Sequence
from kernels.ops import Ops, SamplingTable

MASK_64 = (1 << 64) - 1


def uniform(seed: int, choice_index: int, output_index: int) -> float:
    """The draw in [0, 1) for one output id, 53 bits."""
    key = choice_index << 64 | (seed & MASK_64)
    bits = np.random.Philox(key=key, counter=output_index)
    return (int(bits.random_raw()) >> 11) * 2.0**-53


def sampling_table(sequences: list[Sequence]) -> SamplingTable:
    """One row per sequence, for its next output id."""
    params = [sequence.sampling for sequence in sequences]
    draws = [
        uniform(p.seed, p.choice_index, s.output_tokens) if p.temperature > 0 else 0.0
        for p, s in zip(params, sequences, strict=True)
    ]
    return SamplingTable(
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        min_p=np.array([p.min_p for p in params], dtype=np.float64),
        uniform=np.array(draws, dtype=np.float64),
    )


def edits_of(sequence: Sequence, eos_token_ids: Collection[int]) -> dict[int, float]:
    """What to add to which logit for the next output id."""
    sampling = sequence.sampling
    edits = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token_id, count in Counter(sequence.output_ids).items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            edits[token_id] = edits.get(token_id, 0.0) - penalty
    if sequence.output_tokens + 1 < sampling.output_tokens_min:
        ends = [] if sampling.ignore_eos else list(eos_token_ids)
        edits |= dict.fromkeys([*ends, *sampling.stop_token_ids], -math.inf)
    return edits


def edit(
    logits: torch.Tensor,
    sequences: list[Sequence],
    eos_token_ids: Collection[int],
    grammars: Grammars | None = None,
) -> torch.Tensor:
    """The logits (rows, vocab) with all edits; the given ones are not changed. A row whose grammar
    allows nothing becomes minus infinity throughout, from which no id can be drawn."""
    logits = _scale_seen(logits, sequences)
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, sequence in enumerate(sequences):
        edits = edits_of(sequence, eos_token_ids)
        rows += [row] * len(edits)
        ids += edits.keys()
        values += edits.values()
    if rows:
        places = torch.tensor([rows, ids], device=logits.device)
        added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits = logits.index_put((places[0], places[1]), added, accumulate=True)
    return logits if grammars is None else _forbid(logits, sequences, grammars)


def _scale_seen(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, sequence in enumerate(sequences):
        penalty = sequence.sampling.repetition_penalty
        if penalty != 1.0:
            seen = sorted(set(sequence.token_ids))
            rows += [row] * len(seen)
            ids += seen
            values += [penalty] * len(seen)
    if not rows:
        return logits
    places = torch.tensor([rows, ids], device=logits.device)
    penalties = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    found = logits[places[0], places[1]]
    scaled = torch.where(found > 0, found / penalties, found * penalties)
    return logits.index_put((places[0], places[1]), scaled)


def _forbid(logits: torch.Tensor, sequences: list[Sequence], grammars: Grammars) -> torch.Tensor:
    """Minus infinity for ids that a row's grammar does not allow next."""
    guided = [row for row, sequence in enumerate(sequences) if sequence.sampling.grammar]
    if not guided:
        return logits
    words = grammars.masks([sequences[row] for row in guided])
    bits = torch.from_numpy(words).to(logits.device)[:, :, None] >> torch.arange(
        WORD_BITS, dtype=torch.int32, device=logits.device
    )
    allowed = (bits & 1).bool().flatten(1)[:, : logits.shape[1]]
    index = torch.tensor(guided, device=logits.device)
    kept = torch.where(allowed, logits[index], torch.full_like(logits[:1], -math.inf))
    return logits.index_copy(0, index, kept)


def logprobs_of(
    ops: Ops, logits: torch.Tensor, sequences: list[Sequence], token_ids: list[int | None]
) -> list[TokenLogprobs | None]:
    """For the sequences that ask for them and got an id; `logits` as the model gave them."""
    made: list[TokenLogprobs | None] = [None] * len(sequences)
    asked = [
        (row, token_id, sequence.sampling.logprobs)
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
        if sequence.sampling.logprobs is not None and token_id is not None
    ]
    if not asked:
        return made
    rows, ids, num_top = (list(column) for column in zip(*asked, strict=True))
    for row, found in zip(rows, ops.logprobs(logits[rows], ids, num_top), strict=True):
        made[row] = TokenLogprobs(found.logprob, found.top_ids, found.top_logprobs)
    return made
