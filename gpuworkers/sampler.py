"""From sequences to a sampling table: parameters, edits of logits, and one keyed draw per row.

An edit is a number added to one logit of one row. It follows from the sequence alone, its sampling
parameters and its ids so far, so a resumed sequence gets the same edits; masks add minus infinity.
The draw of output index i is Philox4x64 with key (seed, choice index) and counter i (Salmon et al.
2011, SC11), so whichever worker computes the token draws the same number.
"""

import math
from collections.abc import Collection

import numpy as np
import torch

from controlplane.protocol import TokenLogprobs
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
    """What to add to which logit for the next output id; new kinds of edits are added here."""
    sampling = sequence.sampling
    if sequence.output_tokens + 1 >= sampling.output_tokens_min:
        return {}
    ends = [] if sampling.ignore_eos else list(eos_token_ids)
    return dict.fromkeys([*ends, *sampling.stop_token_ids], -math.inf)


def edit(
    logits: torch.Tensor, sequences: list[Sequence], eos_token_ids: Collection[int]
) -> torch.Tensor:
    """The logits (rows, vocab) with all edits; the given ones are not changed."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, sequence in enumerate(sequences):
        edits = edits_of(sequence, eos_token_ids)
        rows += [row] * len(edits)
        ids += edits.keys()
        values += edits.values()
    if not rows:
        return logits
    places = torch.tensor([rows, ids], device=logits.device)
    added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
    return logits.index_put((places[0], places[1]), added, accumulate=True)


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
