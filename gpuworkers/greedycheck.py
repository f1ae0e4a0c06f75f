"""Compares the greedy output of one model on two backends, token by token.

Rounding differs between backends, so two ids whose logits are nearly equal may change places; after
such a place the texts are different ones. A prompt agrees when all ids are equal, or when the first
difference stands where the reference's two likeliest logits are closer than MARGIN.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpuworkers.stepper import GraphStepper, Stepper, StepRow

NUM_PROMPTS = 32
OUTPUT_TOKENS = 48
PROMPT_TOKENS = (3, 300)  # uniform, both ends included
STEP_TOKENS = 512  # prompts computed together: chunks of several in one step
MARGIN = 0.05
SEED = 20261124


@dataclass(frozen=True, slots=True)
class Generated:
    """Output ids of one prompt, and before each the margin of the likeliest logit."""

    token_ids: list[int]
    margins: list[float]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of all prompts. `margins`: the reference's at each first difference."""

    prompts: int
    equal: int
    margins: list[float]

    @property
    def is_right(self) -> bool:
        return all(margin < MARGIN for margin in self.margins)


def make_prompts(vocab_size: int, count: int = NUM_PROMPTS) -> list[list[int]]:
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(*PROMPT_TOKENS, size=count, endpoint=True)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def kv_tokens_for(prompts: Sequence[list[int]], output_tokens: int, block_tokens: int) -> int:
    """KV that all of them need at once."""
    return sum(
        -(-(len(prompt) + output_tokens) // block_tokens) * block_tokens for prompt in prompts
    )


@torch.inference_mode()
def generate(
    stepper: Stepper | GraphStepper,
    block_tokens: int,
    prompts: Sequence[list[int]],
    output_tokens: int = OUTPUT_TOKENS,
) -> list[Generated]:
    """All prompts in chunks of mixed sequences, then decodes of all together."""
    made = [Generated([], []) for _ in prompts]
    tables, first = [], 0
    for prompt in prompts:
        count = -(-(len(prompt) + output_tokens) // block_tokens)
        tables.append(np.arange(first, first + count)[::-1].copy())
        first += count

    def take(logits: torch.Tensor, indices: Sequence[int]) -> None:
        values, ids = logits.float().topk(2, dim=1)
        margins = (values[:, 0] - values[:, 1]).tolist()
        for index, token_id, margin in zip(indices, ids[:, 0].tolist(), margins, strict=True):
            made[index].token_ids.append(token_id)
            made[index].margins.append(margin)

    for rows, indices in _prompt_steps(prompts, tables):
        logits = stepper.logits(rows)
        if indices:
            take(logits, indices)
    for step in range(output_tokens - 1):
        rows = [
            StepRow(made[index].token_ids[-1:], len(prompt) + step, tables[index], True)
            for index, prompt in enumerate(prompts)
        ]
        take(stepper.logits(rows), range(len(prompts)))
    return made


def _prompt_steps(
    prompts: Sequence[list[int]], tables: list[np.ndarray]
) -> list[tuple[list[StepRow], list[int]]]:
    """Steps of at most STEP_TOKENS tokens, each with the prompts that it finishes."""
    steps: list[tuple[list[StepRow], list[int]]] = [([], [])]
    room = STEP_TOKENS
    for index, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            if room == 0:
                steps.append(([], []))
                room = STEP_TOKENS
            count = min(room, len(prompt) - start)
            is_last = start + count == len(prompt)
            row = StepRow(prompt[start : start + count], start, tables[index], is_last)
            steps[-1][0].append(row)
            if is_last:
                steps[-1][1].append(index)
            start += count
            room -= count
    return steps


def compare(reference: Sequence[Generated], other: Sequence[Generated]) -> Agreement:
    """Where the outputs part, and by how little."""
    margins = []
    for mine, theirs in zip(reference, other, strict=True):
        pairs = zip(mine.token_ids, theirs.token_ids, mine.margins, strict=True)
        differing = next((margin for a, b, margin in pairs if a != b), None)
        if differing is not None:
            margins.append(differing)
    return Agreement(len(reference), len(reference) - len(margins), margins)
