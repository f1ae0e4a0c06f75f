"""Forward pass of a Llama-family model over the rows of one step.

Source: Touvron et al. 2023, arXiv:2302.13971, with grouped KV heads (Ainslie et al. 2023,
arXiv:2305.13245). Checked against transformers' LlamaForCausalLM, token by token, in
tests/gpuworkers/test_transformers_equal.py.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gpuworkers.weights import LlamaConfig, WeightFiles
from kernels.ops import Heads, Ops


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; packed for Ops.linear where not said otherwise."""

    input_norm: torch.Tensor  # (hidden,)
    qkv: Any  # (q + k + v, hidden)
    out: Any
    mlp_norm: torch.Tensor  # (hidden,)
    gate_up: Any  # (2·intermediate, hidden)
    down: Any


class Llama:
    """Weights of one model, and its forward pass."""

    def __init__(
        self,
        config: LlamaConfig,
        embedding: torch.Tensor,
        layers: list[LayerWeights],
        norm: torch.Tensor,
        head: Any,
    ) -> None:
        self.config = config
        self.heads = Heads(config.num_q_heads, config.num_kv_heads, config.head_dim)
        self.dtype = norm.dtype
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos, self._sin = rope_tables(config)

    def packed_shapes(self) -> list[Any]:
        """One packed weight of each shape, for probing."""
        first = self._layers[0]
        return [first.qkv, first.out, first.gate_up, first.down, self._head]

    def forward(
        self,
        ops: Ops,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_layers: list[torch.Tensor],
        step: Any,
        sampling_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (len(sampling_rows), vocab) float32; writes KV of every row.

        token_ids, positions (rows,) int64; `step` from ops.plan_step over the same rows."""
        eps = self.config.rms_norm_eps
        residual = self._embedding.index_select(0, token_ids).to(self.dtype)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, (layer, kv_layer) in enumerate(zip(self._layers, kv_layers, strict=True)):
            if index:
                x = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            q = ops.rope_write(ops.linear(x, layer.qkv), cos, sin, kv_layer, step)
            x = ops.linear(ops.attention(q, kv_layer, step), layer.out)
            x = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
        if len(sampling_rows) == 0:
            return torch.empty(0, self.config.vocab_size)
        x, residual = x.index_select(0, sampling_rows), residual.index_select(0, sampling_rows)
        x = ops.add_rms_norm(x, residual, self._norm, eps)
        return ops.linear(x, self._head).float()


def rope_tables(config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (max_model_len, head_dim) float32 in the form of Ops.rope_write."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = torch.arange(config.max_model_len).float()[:, None] * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def load_llama(config: LlamaConfig, files: WeightFiles, dtype: torch.dtype, ops: Ops) -> Llama:
    """Read, check and pack all weights. Raises ModelError."""
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
    layers = []
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."

        def take(name: str, *shape: int, prefix: str = prefix) -> torch.Tensor:
            return files.take(f"{prefix}{name}.weight", shape, dtype)

        qkv = torch.cat(
            (
                take("self_attn.q_proj", q_size, hidden),
                take("self_attn.k_proj", kv_size, hidden),
                take("self_attn.v_proj", kv_size, hidden),
            )
        )
        gate_up = torch.cat(
            (take("mlp.gate_proj", width, hidden), take("mlp.up_proj", width, hidden))
        )
        layers.append(
            LayerWeights(
                take("input_layernorm", hidden),
                ops.pack(qkv),
                ops.pack(take("self_attn.o_proj", hidden, q_size)),
                take("post_attention_layernorm", hidden),
                ops.pack(gate_up),
                ops.pack(take("mlp.down_proj", hidden, width)),
            )
        )
    embedding = files.take("model.embed_tokens.weight", (config.vocab_size, hidden), dtype)
    norm = files.take("model.norm.weight", (hidden,), dtype)
    if config.tie_word_embeddings:
        head = ops.pack(embedding)
    else:
        head = ops.pack(files.take("lm_head.weight", (config.vocab_size, hidden), dtype))
    return Llama(config, embedding, layers, norm, head)
