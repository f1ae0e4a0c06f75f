"""Every model family against transformers on small random weights: logits and greedy ids."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gpuworkers.runner import load
from gpuworkers.scheduler import PlanRow
from gpuworkers.sequence import from_assign
from tests.gpuworkers.enginekit import EngineBench, assign

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2_without_groups": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama31": (LlamaConfig, {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0}),
    "llama32_tied": (LlamaConfig, {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "llama_with_biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": (LlamaConfig, {"head_dim": 32}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "rope_theta": 1000000.0}),
    "qwen3_tied": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_with_bias": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}
MODELS = {LlamaConfig: LlamaForCausalLM, Qwen3Config: Qwen3ForCausalLM}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_random(folder, name: str, dtype: torch.dtype = torch.float32, **options: object):
    """A folder as transformers saves it, with weights spread wide enough to be told apart."""
    make_config, changes = FAMILIES[name]
    torch.manual_seed(5)
    model = MODELS[make_config](make_config(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.dim() == 1
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if is_norm else torch.randn_like(parameter) * 0.15
            )
    model.to(dtype).save_pretrained(folder, **options)
    return model


def reference(model, ids: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def logits_of(runner, ids: list[int]) -> torch.Tensor:
    sequence = from_assign(assign("r", ids), 0.0)
    sequence.block_ids = list(range(1 + len(ids) // 16))
    with torch.inference_mode():
        return runner.logits((PlanRow(sequence, 0, len(ids), True),))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_transformers_logits_and_ids(tmp_path, name):
    theirs = write_random(tmp_path, name)
    runner, facts, _, _ = load(tmp_path, "tiny", dtype="fp32", kv_tokens=4096)
    prompts = [[3 + (7 * i + j * j) % 300 for j in range(1 + 29 * i)] for i in range(8)]
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompts[-1]])).logits[0, -1]
    assert torch.allclose(logits_of(runner, prompts[-1]), expected, atol=2e-4, rtol=1e-4)
    bench = EngineBench(runner, model=facts)
    for index, ids in enumerate(prompts):
        bench.assign(f"r{index}", ids, 20)
    bench.run_dry()
    assert [bench.output(f"r{i}") for i in range(8)] == [reference(theirs, p, 20) for p in prompts]


@pytest.mark.parametrize("name", ["llama31", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_files_are_read_without_loss(tmp_path, name, dtype):
    """Weights of 16 bits, computed in float32 on both sides."""
    theirs = type(write_random(tmp_path, name, DTYPES[dtype])).from_pretrained(
        tmp_path, dtype=torch.float32
    )
    runner, *_ = load(tmp_path, "tiny", dtype="fp32", kv_tokens=1024)
    ids = list(range(10, 60))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(logits_of(runner, ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_computes_the_same_model_within_its_precision(tmp_path, dtype):
    write_random(tmp_path, "qwen3", DTYPES[dtype])
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    runner, *_ = load(tmp_path, "tiny", dtype=dtype, kv_tokens=1024)
    ids = list(range(10, 60))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    error = (logits_of(runner, ids) - expected).abs().max() / expected.abs().max()
    assert error < 0.05


def test_shards_as_transformers_saves_them_are_read(tmp_path):
    theirs = write_random(tmp_path, "qwen3", max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    runner, *_ = load(tmp_path, "tiny", dtype="fp32", kv_tokens=1024)
    with torch.inference_mode():
        expected = theirs(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert torch.allclose(logits_of(runner, [5, 6, 7]), expected, atol=2e-4, rtol=1e-4)


def test_a_sliding_window_is_refused(tmp_path):
    write_random(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_sliding_window": True}))
    with pytest.raises(Exception, match="use_sliding_window=True is not supported"):
        load(tmp_path, "tiny")
