"""How a device's memory is shared out: what is left for KV, and what is refused."""

from dataclasses import replace

import pytest

from controlplane.errors import ConfigError
from gpuworkers import memory
from gpuworkers.memory import KV_TOKENS_MIN, RESERVE_BYTES, RESERVE_SHARE, kv_tokens
from gpuworkers.models.config import LlamaConfig

LLAMA_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, num_layers=32, num_q_heads=32, num_kv_heads=8,
    head_dim=128, intermediate_size=14_336, rms_norm_eps=1e-5, rope_theta=5e5, rope=None,
    max_model_len=131_072, tie_word_embeddings=False, has_head_norms=False,
    has_attention_bias=False, has_mlp_bias=False, eos_token_ids=frozenset(),
)  # fmt: skip
TOKEN_BYTES = 131_072  # of KV: 2 · 32 layers · 8 heads · 128 · 2 bytes
GIB = 1 << 30


def free_bytes_for(tokens: int) -> int:
    """The least free memory that leaves room for so many tokens."""
    held = memory.weight_bytes(LLAMA_8B, 2) + memory.workspace_bytes(LLAMA_8B, 2) + RESERVE_BYTES
    free = int((held + tokens * TOKEN_BYTES) / (1 - RESERVE_SHARE))
    while kv_room(free) < tokens:
        free += 1
    return free


def kv_room(free: int) -> int:
    held = memory.weight_bytes(LLAMA_8B, 2) + memory.workspace_bytes(LLAMA_8B, 2) + RESERVE_BYTES
    return (free - held - int(free * RESERVE_SHARE)) // TOKEN_BYTES


def test_weights_are_those_of_the_published_model():
    # 8.03 billion parameters; the rest is the fused weight that exists twice while it loads
    numbers = memory.weight_bytes(LLAMA_8B, 1) - 2 * 4096 * 14_336
    assert numbers == pytest.approx(8.03e9, rel=1e-3)
    tied = memory.weight_bytes(replace(LLAMA_8B, tie_word_embeddings=True), 1)
    assert memory.weight_bytes(LLAMA_8B, 1) - tied == 128_256 * 4096


def test_an_h200_holds_the_tokens_that_others_report():
    # calibration: KV room of 8B bf16 on one H200 about 0.82 M tokens
    assert 0.82e6 < kv_tokens(LLAMA_8B, 2, 139 * GIB) < 1.0e6
    assert 0.35e6 < kv_tokens(LLAMA_8B, 2, 78 * GIB) < 0.5e6


def test_the_room_ends_exactly_where_a_token_more_does_not_fit():
    free = free_bytes_for(5000)
    assert kv_tokens(LLAMA_8B, 2, free) == 5000
    assert kv_tokens(LLAMA_8B, 2, free - 1) == 4999


def test_tokens_that_are_asked_for_are_given_when_they_fit():
    free = free_bytes_for(5000)
    assert kv_tokens(LLAMA_8B, 2, free, wanted_tokens=5000) == 5000
    assert kv_tokens(LLAMA_8B, 2, free, wanted_tokens=16) == 16
    with pytest.raises(ConfigError, match="KV room for 5000 tokens, wanted 5001"):
        kv_tokens(LLAMA_8B, 2, free, wanted_tokens=5001)


def test_a_device_too_small_for_the_model_is_refused_with_the_sizes():
    with pytest.raises(ConfigError, match=r"16\.0 GiB free .* weights 15\.2 GiB, .* for 0 tokens"):
        kv_tokens(LLAMA_8B, 2, 16 * GIB)
    with pytest.raises(ConfigError, match=f"wanted {KV_TOKENS_MIN}"):
        kv_tokens(LLAMA_8B, 2, free_bytes_for(KV_TOKENS_MIN) - 1)
    assert kv_tokens(LLAMA_8B, 2, free_bytes_for(KV_TOKENS_MIN)) == KV_TOKENS_MIN
