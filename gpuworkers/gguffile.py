"""Reads a Llama model from a GGUF file and writes it in the files that the engine reads.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised tensors are expanded.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKEN = 3  # GGUF's token type "control"
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


Say = Callable[[str], None]


def write_model(source: Path, folder: Path, say: Say) -> None:
    """Write model.safetensors (bf16), config.json, tokenizer.json and tokenizer_config.json."""
    reader = GGUFReader(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    say(f"2/4 reading {len(reader.tensors)} tensors")
    tensors = _tensors(reader, field("llama.attention.head_count"),
                       field("llama.attention.head_count_kv"), say)  # fmt: skip
    say("3/4 writing model.safetensors")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    say("4/4 writing config.json and tokenizer.json")
    config = _config(field, is_tied="lm_head.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(field, folder)


def _tensors(
    reader: GGUFReader, num_q_heads: int, num_kv_heads: int, say: Say
) -> dict[str, torch.Tensor]:
    tensors = {}
    for index, tensor in enumerate(reader.tensors):
        if index and index % 100 == 0:
            say(f"    {index} of {len(reader.tensors)}")
        values = np.array(dequantize(tensor.data, tensor.tensor_type))
        weight = torch.from_numpy(values).reshape([int(n) for n in tensor.shape[::-1]])
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                heads = num_q_heads if parts[2] == "attn_q" else num_kv_heads
                weight = _unpermuted(weight, heads)
            name = f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}"
        else:
            name = MODEL_NAMES[parts[0]]
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _unpermuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of a head for its rotary embedding; undo it."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(field: Callable[[str], Any], is_tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "intermediate_size": field("llama.feed_forward_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "max_position_embeddings": field("llama.context_length"),
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": is_tied,
        "hidden_act": "silu",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "dtype": "bfloat16",
    }


def _write_tokenizer(field: Callable[[str], Any], folder: Path) -> None:
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[index] for index, kind in enumerate(types) if kind == SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "chat_template": field("tokenizer.chat_template"),
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
