"""Models of published shapes with random weights, made where they are needed: for checks and
timings on machines that have no weights."""

import zlib

import torch

from gpuworkers.models.config import Llama3Rope, LlamaConfig

WEIGHT_GAIN = 1.0  # over 1/sqrt(inputs): logits of deviation 1, where bf16 still tells 0.02 apart

LLAMA_8B = LlamaConfig(  # Llama-3.1-8B, arXiv:2407.21783
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope=Llama3Rope(8.0, 1.0, 4.0, 8192),
    max_model_len=131_072,
    tie_word_embeddings=False,
    has_head_norms=False,
    has_attention_bias=False,
    has_mlp_bias=False,
    eos_token_ids=frozenset(),
)
QWEN3_8B = LlamaConfig(  # Qwen3-8B, arXiv:2505.09388
    vocab_size=151_936,
    hidden_size=4096,
    num_layers=36,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12_288,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope=None,
    max_model_len=40_960,
    tie_word_embeddings=False,
    has_head_norms=True,
    has_attention_bias=False,
    has_mlp_bias=False,
    eos_token_ids=frozenset(),
)
SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=1408,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope=None,
    max_model_len=2048,
    tie_word_embeddings=False,
    has_head_norms=False,
    has_attention_bias=False,
    has_mlp_bias=False,
    eos_token_ids=frozenset(),
)
CONFIGS = {"llama-3.1-8b": LLAMA_8B, "qwen3-8b": QWEN3_8B, "small": SMALL}


class RandomWeights:
    """See models.llama.WeightSource. A tensor depends on its name and on `made_on`, so a model
    made on the CPU is the same on every device."""

    def __init__(self, made_on: str, device: str) -> None:
        self._made_on = made_on
        self._device = device

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator(self._made_on).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, device=self._made_on, dtype=dtype)
        if len(shape) == 1:
            values = 1.0 + 0.1 * values  # norms
        elif not name.startswith("model.embed_tokens"):
            values *= WEIGHT_GAIN / shape[-1] ** 0.5
        return values.to(self._device)
