"""Greedy output equals transformers' LlamaForCausalLM in float32, token by token."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, LlamaForCausalLM

from controlplane import protocol
from gpuworkers.runner import load
from gpuworkers.scheduler import PlanRow
from gpuworkers.sequence import from_assign
from tests.gpuworkers.enginekit import EngineBench, assign
from tests.gpuworkers.realmodel import real_model_folder
from tests.gpuworkers.tinyllama import write_tiny

CHAT = "<|im_start|>{}\n{}<|im_end|>\n"
TEXTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "1, 1, 2, 3, 5, 8,",
    "Übersetze: Guten Morgen, wie geht es Ihnen?",
    "日本の首都は",
    "List three colours.",
    "Why is the sky blue? Explain to a child.",
    "SELECT name FROM users WHERE",
    "Once upon a time",
    "🙂🙃",
    "x",
    "Summarise: " + "The tide rises and the tide falls. " * 12,
    "Count: " + " ".join(str(i) for i in range(60)),
    "The quick brown fox",
    "import numpy as np\n",
]
OUTPUT_TOKENS = 12


def reference_ids(model: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def reference_model(folder) -> LlamaForCausalLM:
    config = AutoConfig.from_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def outputs(bench: EngineBench, prompts: list[list[int]], count: int) -> list[list[int]]:
    for index, ids in enumerate(prompts):
        answer = bench.assign(f"r{index}", ids, count)
        assert isinstance(answer, protocol.Accepted), answer
    bench.run_dry()
    return [bench.output(f"r{index}") for index in range(len(prompts))]


def test_a_random_model_gives_transformers_ids_and_logits(tmp_path):
    folder = write_tiny(tmp_path)
    reference = reference_model(folder)
    loaded, facts, _, _ = load(folder, "tiny", dtype="fp32", kv_tokens=16384)
    prompts = [[3 + (7 * i + j * j) % 500 for j in range(1 + 11 * i)] for i in range(32)]
    expected = [reference_ids(reference, ids, 20) for ids in prompts]
    assert outputs(EngineBench(loaded, model=facts), prompts, 20) == expected
    sequence = from_assign(assign("r", prompts[20]), 0.0)
    sequence.block_ids = list(range(20))
    with torch.inference_mode():
        logits = loaded.logits((PlanRow(sequence, 0, len(prompts[20]), True),))
        theirs = reference(torch.tensor([prompts[20]])).logits[0, -1]
    assert torch.allclose(logits[0], theirs, atol=1e-4)


@pytest.mark.slow
def test_the_real_model_gives_transformers_ids_for_32_prompts():
    """Batched, chunked and with a prefix cache on our side; one by one on theirs."""
    folder = real_model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chats = [CHAT.format("user", text) + "<|im_start|>assistant\n" for text in TEXTS]
    prompts = [tokenizer.encode(text).ids for text in TEXTS + chats]
    assert len(prompts) == 32
    reference = reference_model(folder)
    expected = [reference_ids(reference, ids, OUTPUT_TOKENS) for ids in prompts]
    loaded, facts, _, _ = load(folder, "real", dtype="fp32", kv_tokens=16384)
    bench = EngineBench(loaded, model=facts)
    assert outputs(bench, prompts, OUTPUT_TOKENS) == expected


def test_the_real_model_is_exact_and_knows_the_capital_of_france():
    folder = real_model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded, facts, _, _ = load(folder, "real", dtype="fp32", kv_tokens=4096)
    bench = EngineBench(loaded, model=facts)
    ids = tokenizer.encode(CHAT.format("user", TEXTS[0]) + "<|im_start|>assistant\n").ids
    (whole,) = outputs(bench, [ids], 16)
    assert tokenizer.decode(whole) == "The capital of France is Paris."
    sequence = from_assign(assign("s", ids), 0.0)
    sequence.block_ids = list(range(3))
    with torch.inference_mode():
        alone = loaded.logits((PlanRow(sequence, 0, len(ids), True),))
        others = [from_assign(assign(f"o{i}", 20), 0.0) for i in range(8)]
        for index, other in enumerate(others):
            other.block_ids = [10 + 2 * index, 11 + 2 * index]
        rows = [
            PlanRow(other, 0, 20 if index % 2 else 1, True) for index, other in enumerate(others)
        ]
        mine = PlanRow(sequence, len(ids) - 1, 1, True)
        together = loaded.logits((*rows[:4], mine, *rows[4:]))
    assert torch.equal(together[4:5], alone)
