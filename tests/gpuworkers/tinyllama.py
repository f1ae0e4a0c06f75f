"""A Llama of random weights, small enough for every test, and an engine bench over it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpuworkers import runner
from tests.gpuworkers.enginekit import EngineBench

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


def tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a size that makes logits spread, so that greedy output is not one id for ever."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden * config["num_key_value_heads"] // config["num_attention_heads"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (1.5 / shape[-1] ** 0.5)

    made = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator),
        "model.norm.weight": torch.rand(hidden, generator=generator) + 0.5,
    }
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = random(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        made |= {
            f"{prefix}self_attn.q_proj.weight": random(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": random(kv_size, hidden),
            f"{prefix}self_attn.v_proj.weight": random(kv_size, hidden),
            f"{prefix}self_attn.o_proj.weight": random(hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": random(width, hidden),
            f"{prefix}mlp.up_proj.weight": random(width, hidden),
            f"{prefix}mlp.down_proj.weight": random(hidden, width),
            f"{prefix}input_layernorm.weight": torch.rand(hidden, generator=generator) + 0.5,
            f"{prefix}post_attention_layernorm.weight": torch.rand(hidden, generator=generator)
            + 0.5,
        }
    return made


def write_tiny(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder; `changes` replace keys of config.json (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes
    save_file(tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def bench_of(folder: Path, kv_tokens: int = 4096, **options: object) -> EngineBench:
    """An engine on the model of the folder, float32 unless said otherwise."""
    options.setdefault("dtype", "fp32")
    loaded, facts, _, _ = runner.load(folder, "tiny", kv_tokens=kv_tokens, **options)
    return EngineBench(loaded, model=facts)
