"""The comparison of greedy outputs: equal backends agree, a fault is not excused."""

from dataclasses import replace

import pytest
import torch

from gpuworkers import greedycheck
from gpuworkers.gpumodel import BLOCK_TOKENS, place
from gpuworkers.greedycheck import MARGIN, STEP_TOKENS, Generated, compare, generate, make_prompts
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.llama import load_llama
from gpuworkers.randommodel import SMALL, RandomWeights
from gpuworkers.stepper import Forward, Stepper
from kernels.torchops.backend import TorchOps
from tests.kernels.bufferedtorch import BufferedTorch

CONFIG = replace(SMALL, num_layers=2, hidden_size=128, intermediate_size=64, vocab_size=512)
PROMPTS = make_prompts(CONFIG.vocab_size, count=7)
OUTPUT = 6


def rerun(forward: Forward) -> Forward:
    """A capture for a machine without CUDA."""
    logits = forward()
    return lambda: logits.copy_(forward())


def eager(ops: TorchOps, dtype: torch.dtype) -> list[Generated]:
    model = load_llama(CONFIG, RandomWeights("cpu", "cpu"), dtype, ops)
    tokens = greedycheck.kv_tokens_for(PROMPTS, OUTPUT, BLOCK_TOKENS)
    kv = TorchKVCache(2, tokens // BLOCK_TOKENS, BLOCK_TOKENS, model.heads, dtype)
    return generate(Stepper(model, ops, kv.layers, BLOCK_TOKENS), BLOCK_TOKENS, PROMPTS, OUTPUT)


def placed(ops: BufferedTorch, dtype: torch.dtype) -> list[Generated]:
    tokens = greedycheck.kv_tokens_for(PROMPTS, OUTPUT, BLOCK_TOKENS)
    files = RandomWeights("cpu", "cpu")
    with torch.inference_mode():
        stepper, _ = place(CONFIG, files, ops, "cpu", tokens, rerun, (1, 8), dtype)
    made = generate(stepper, BLOCK_TOKENS, PROMPTS, OUTPUT)
    assert stepper.num_replays == OUTPUT - 1
    return made


def test_captured_decodes_give_the_output_of_the_eager_backend():
    expected = eager(TorchOps(), torch.float32)
    agreement = compare(expected, placed(BufferedTorch(), torch.float32))
    assert (agreement.prompts, agreement.equal, agreement.margins) == (7, 7, [])
    assert agreement.is_right
    assert all(len(each.token_ids) == len(each.margins) == OUTPUT for each in expected)
    assert len({tuple(each.token_ids) for each in expected}) == 7


def test_bfloat16_agrees_or_parts_where_two_ids_are_nearly_as_likely():
    assert compare(
        eager(TorchOps(), torch.bfloat16), placed(BufferedTorch(), torch.bfloat16)
    ).is_right


class Skewed(BufferedTorch):
    """Captured steps whose rows attend to one token each, with the KV written at its place."""

    def refill(self, step, sequences):
        super().refill(step, [replace(s, start=0) for s in sequences])


def test_a_backend_with_a_fault_does_not_agree():
    agreement = compare(eager(TorchOps(), torch.float32), placed(Skewed(), torch.float32))
    assert not agreement.is_right and agreement.equal < 7


@pytest.mark.parametrize(
    ("other", "margins", "is_right"),
    [
        ([1, 2, 3], [], True),
        ([1, 9, 3], [0.01], True),
        ([1, 9, 9], [0.01], True),  # only the first difference counts
        ([1, 2, 9], [MARGIN], False),
    ],
)
def test_the_first_difference_is_excused_by_its_margin_alone(other, margins, is_right):
    reference = Generated([1, 2, 3], [2.0, 0.01, MARGIN])
    agreement = compare([reference], [Generated(other, [1.0, 1.0, 1.0])])
    assert (agreement.margins, agreement.is_right) == (margins, is_right)
    assert agreement.equal == 1 - len(margins)


def test_prompts_are_computed_in_full_steps_and_each_ends_once():
    tables = [None] * len(PROMPTS)
    steps = greedycheck._prompt_steps(PROMPTS, tables)
    sizes = [sum(len(row.token_ids) for row in rows) for rows, _ in steps]
    assert sizes[:-1] == [STEP_TOKENS] * (len(steps) - 1) and sum(sizes) == sum(map(len, PROMPTS))
    assert [index for _, ended in steps for index in ended] == list(range(len(PROMPTS)))
    for rows, ended in steps:
        assert sum(row.samples for row in rows) == len(ended)
