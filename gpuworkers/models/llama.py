"""Forward pass of a Llama-like model over the rows of one step.

Source: Touvron et al. 2023, arXiv:2302.13971, with grouped KV heads (Ainslie et al. 2023,
arXiv:2305.13245); norms of heads as in Qwen3 (arXiv:2505.09388); frequencies of Llama 3.1
(arXiv:2407.21783). Checked against transformers, token by token, in
tests/gpuworkers/test_transformers_equal.py and test_families.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gpuworkers.models.config import Llama3Rope, LlamaConfig
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
    q_norm: torch.Tensor | None  # (head_dim,)
    k_norm: torch.Tensor | None


class WeightSource(Protocol):
    """Where tensors come from: weights.WeightFiles, or made-up ones for checks."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


class Llama:
    """Weights of one model, and its forward pass."""

    def __init__(
        self,
        config: LlamaConfig,
        embedding: torch.Tensor,
        layers: list[LayerWeights],
        norm: torch.Tensor,
        head: Any,
        max_len: int,
    ) -> None:
        self.config = config
        self.heads = Heads(config.num_q_heads, config.num_kv_heads, config.head_dim)
        self.dtype = norm.dtype
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        cos, sin = rope_tables(config, max_len)
        self._cos, self._sin = cos.to(norm.device), sin.to(norm.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters; an embedding that is also the head counts once."""
        layers = [
            packed
            for layer in self._layers
            for packed in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        heads = [] if self.config.tie_word_embeddings else [self._head]
        numbers = sum(packed.num_out * packed.num_in for packed in (*layers, *heads))
        return (numbers + self._embedding.numel()) * self.dtype.itemsize

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
        layer_written: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Logits (len(sampling_rows), vocab) in the model's dtype; writes KV of every row.

        token_ids, positions (rows,) int64 or int32; `step` from the ops, over the same rows;
        layer_written hears the number of a layer when its KV is there."""
        eps = self.config.rms_norm_eps
        residual = self._embedding.index_select(0, token_ids).to(self.dtype)
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        x = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, (layer, kv_layer) in enumerate(zip(self._layers, kv_layers, strict=True)):
            if index:
                x = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            qkv = ops.linear(x, layer.qkv)
            if layer.q_norm is not None and layer.k_norm is not None:
                ops.norm_heads(qkv, layer.q_norm, layer.k_norm, self.heads, eps)
            q = ops.rope_write(qkv, cos, sin, kv_layer, step)
            if layer_written is not None:
                layer_written(index)
            x = ops.linear(ops.attention(q, kv_layer, step), layer.out)
            x = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
        if len(sampling_rows) == 0:
            return torch.empty(0, self.config.vocab_size, dtype=x.dtype, device=x.device)
        x, residual = x.index_select(0, sampling_rows), residual.index_select(0, sampling_rows)
        x = ops.add_rms_norm(x, residual, self._norm, eps)
        return ops.linear(x, self._head)


def rope_tables(config: LlamaConfig, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (max_len, head_dim) float32 in the form of Ops.rope_write."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope is not None:
        frequencies = _stretched(frequencies, config.rope)
    angles = torch.arange(max_len).float()[:, None] * frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def _stretched(frequencies: torch.Tensor, rope: Llama3Rope) -> torch.Tensor:
    """Long waves slowed down by `factor`, short ones kept, those between blended."""
    waves = 2 * math.pi / frequencies
    slowed = frequencies / rope.factor
    low, high = rope.low_freq_factor, rope.high_freq_factor
    share = (rope.original_max_len / waves - low) / (high - low)
    blended = (1 - share) * slowed + share * frequencies
    is_long = waves > rope.original_max_len / low
    is_short = waves < rope.original_max_len / high
    return torch.where(is_long, slowed, torch.where(is_short, frequencies, blended))


class _LayerFiles:
    """Tensors of one layer, fused where one linear computes several."""

    def __init__(self, files: WeightSource, index: int, dtype: torch.dtype, ops: Ops) -> None:
        self._files = files
        self._prefix = f"model.layers.{index}."
        self._dtype = dtype
        self._ops = ops

    def norm(self, name: str, size: int) -> torch.Tensor:
        return self._files.take(f"{self._prefix}{name}.weight", (size,), self._dtype)

    def linear(self, names: dict[str, int], num_in: int, has_bias: bool) -> Any:
        """names: of the projections, with the number of outputs of each."""
        take, prefix, dtype = self._files.take, self._prefix, self._dtype
        weights = [take(f"{prefix}{n}.weight", (out, num_in), dtype) for n, out in names.items()]
        bias = None
        if has_bias:
            bias = torch.cat([take(f"{prefix}{n}.bias", (out,), dtype) for n, out in names.items()])
        return self._ops.pack(torch.cat(weights), bias)


def load_llama(
    config: LlamaConfig,
    files: WeightSource,
    dtype: torch.dtype,
    ops: Ops,
    max_len: int | None = None,
) -> Llama:
    """Read, check and pack all weights; positions go to max_len. Raises ModelError."""
    layers = [
        _load_layer(config, _LayerFiles(files, i, dtype, ops)) for i in range(config.num_layers)
    ]
    hidden = config.hidden_size
    embedding = files.take("model.embed_tokens.weight", (config.vocab_size, hidden), dtype)
    norm = files.take("model.norm.weight", (hidden,), dtype)
    if config.tie_word_embeddings:
        head = ops.pack(embedding)
    else:
        head = ops.pack(files.take("lm_head.weight", (config.vocab_size, hidden), dtype))
    return Llama(config, embedding, layers, norm, head, max_len or config.max_model_len)


def _load_layer(config: LlamaConfig, files: _LayerFiles) -> LayerWeights:
    hidden, width, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_q_heads * dim, config.num_kv_heads * dim
    attention, mlp = config.has_attention_bias, config.has_mlp_bias
    qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
    return LayerWeights(
        input_norm=files.norm("input_layernorm", hidden),
        qkv=files.linear(qkv, hidden, attention),
        out=files.linear({"self_attn.o_proj": hidden}, q_size, attention),
        mlp_norm=files.norm("post_attention_layernorm", hidden),
        gate_up=files.linear({"mlp.gate_proj": width, "mlp.up_proj": width}, hidden, mlp),
        down=files.linear({"mlp.down_proj": hidden}, width, mlp),
        q_norm=files.norm("self_attn.q_norm", dim) if config.has_head_norms else None,
        k_norm=files.norm("self_attn.k_norm", dim) if config.has_head_norms else None,
    )
