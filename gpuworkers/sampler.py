"""From sequences to a sampling table: parameters, forbidden ids, and one keyed draw per row.

The draw of output index i is Philox4x64 with key (seed, choice index) and counter i (Salmon et al.
2011, SC11), so whichever worker computes the token draws the same number.
"""

from collections.abc import Collection

import numpy as np
import torch

from gpuworkers.sequence import Sequence
from kernels.ops import SamplingTable

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
        uniform=np.array(draws, dtype=np.float64),
    )


def forbid_early_ends(
    logits: torch.Tensor, sequences: list[Sequence], eos_token_ids: Collection[int]
) -> None:
    """Rows below their output_tokens_min cannot draw an id that would end them; writes logits."""
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if sequence.output_tokens + 1 < sampling.output_tokens_min:
            ends = [] if sampling.ignore_eos else list(eos_token_ids)
            logits[row, ends + sampling.stop_token_ids] = -torch.inf
