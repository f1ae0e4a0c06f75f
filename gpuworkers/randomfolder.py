"""Writes a model folder of a published shape, weights random: `python3 -m gpuworkers.randomfolder`.

For serving, end to end, a model whose weights are not at hand. The tokenizer is another model's:
ids beyond its vocabulary become words of their own, which encoding never yields.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpuworkers.models.config import LlamaConfig
from gpuworkers.randommodel import CONFIGS, RandomWeights
from gpuworkers.weights import INDEX

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

Shapes = dict[str, tuple[int, ...]]


def shards(config: LlamaConfig) -> Iterator[Shapes]:
    """Names and shapes of all tensors, a file's worth at a time: the tables, then each layer."""
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
    tables: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        tables["lm_head.weight"] = (config.vocab_size, hidden)
    yield tables
    layer: Shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    if config.has_head_norms:
        layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
    for index in range(config.num_layers):
        yield {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}


def config_json(config: LlamaConfig) -> dict[str, Any]:
    """The words that models.config.read_config reads."""
    family = ("qwen3", "Qwen3ForCausalLM") if config.has_head_norms else ("llama", None)
    rope = config.rope
    return {
        "model_type": family[0],
        "architectures": [family[1] or "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope
        and {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_len,
        },
        "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": sorted(config.eos_token_ids),
        "hidden_act": "silu",
        "dtype": "bfloat16",
    }


def widen(definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The tokenizer with a word for every id up to vocab_size. Raises ValueError for a larger one.

    The new ones have no merge, so that no text is encoded to them; as byte-level pieces they are
    a space (U+0120) and their number."""
    vocab = definition["model"]["vocab"]
    used = set(vocab.values()) | {token["id"] for token in definition["added_tokens"]}
    if max(used) >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {max(used)}, the model {vocab_size}")
    for token_id in range(vocab_size):
        if token_id not in used:
            vocab[f"\u0120~{token_id}"] = token_id
    return definition


def write(config: LlamaConfig, tokenizer: Path, out: Path, device: str) -> None:
    """All files of the folder; `device` draws the numbers."""
    out.mkdir(parents=True)
    weights, weight_map = RandomWeights(device, "cpu"), {}
    for index, shapes in enumerate(shards(config)):
        name = f"model-{index:05d}.safetensors"
        tensors = {key: weights.take(key, shape, torch.bfloat16) for key, shape in shapes.items()}
        save_file(tensors, out / name)
        weight_map |= dict.fromkeys(shapes, name)
    (out / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config_json(config)))
    definition = json.loads((tokenizer / TOKENIZER).read_text())
    (out / TOKENIZER).write_text(json.dumps(widen(definition, config.vocab_size)))
    shutil.copy(tokenizer / TOKENIZER_CONFIG, out)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gpuworkers.randomfolder", description=__doc__)
    add = parser.add_argument
    add("--shape", choices=CONFIGS, required=True)
    add("--tokenizer", type=Path, required=True, help="folder with a byte-level tokenizer.json")
    add("--out", type=Path, required=True, help="folder to make")
    add("--device", default="cpu", help="draws the numbers: cpu or cuda:0")
    options = parser.parse_args(argv)
    try:
        write(CONFIGS[options.shape], options.tokenizer, options.out, options.device)
    except (OSError, ValueError) as error:
        print(f"randomfolder: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
