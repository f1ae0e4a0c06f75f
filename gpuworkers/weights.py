"""Reads a model folder: config.json into a LlamaConfig, *.safetensors into checked tensors.

Only safetensors: a format that holds arrays and nothing that runs. Every tensor is looked up by
name, and a missing one, a wrong shape, a wrong dtype or a value that is not finite is an error that
names it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from controlplane.errors import SlackwaterError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HASH_CHUNK_BYTES = 1 << 22
CONFIG_BYTES_MAX = 1 << 20


class ModelError(SlackwaterError):
    """A model folder cannot be served; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape of a Llama-family model, in the words of its config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_model_len: int
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]


def read_config(folder: Path) -> LlamaConfig:
    """The model's shape. Raises ModelError for anything that the forward pass does not compute."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise ModelError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes")
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        raise ModelError(f"{path}: model_type must be 'llama'")
    for key, allowed in (
        ("hidden_act", ("silu", None)),
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("quantization_config", (None,)),
    ):
        if raw.get(key) not in allowed:
            raise ModelError(f"{path}: {key}={raw[key]!r} is not supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelError(f"{path}: rope scaling {rope!r} is not supported")
    return _checked(path, raw, rope)


def _checked(path: Path, raw: dict[str, Any], rope: dict[str, Any]) -> LlamaConfig:
    def number(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{path}: {key}={value!r}, expected a positive whole number")
        return value

    def positive(key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelError(f"{path}: {key}={value!r}, expected a positive number")
        return float(value)

    num_q_heads = number("num_attention_heads")
    hidden_size = number("hidden_size")
    eos = raw.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        num_layers=number("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=number("num_key_value_heads", num_q_heads),
        head_dim=number("head_dim", hidden_size // num_q_heads),
        intermediate_size=number("intermediate_size"),
        rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        rope_theta=positive("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 1e4))),
        max_model_len=number("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=frozenset(eos_ids),
    )
    if config.num_q_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelError(
            f"{path}: {config.num_q_heads} query heads, {config.num_kv_heads} KV heads,"
            f" head_dim {config.head_dim} do not fit together"
        )
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in config.eos_token_ids):
        raise ModelError(f"{path}: eos_token_id={eos!r} is outside the vocabulary")
    return config


class WeightFiles:
    """The tensors of a folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.safetensors"))
        if not self.paths:
            raise ModelError(f"{folder}: no *.safetensors file")
        self._files: dict[str, Any] = {}
        for path in self.paths:
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: {error}") from None
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in self._files:
                    raise ModelError(f"{path}: tensor {name} is also in another file")
                self._files[name] = opened

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as `dtype`. Raises ModelError."""
        if name not in self._files:
            raise ModelError(f"{self.paths[0].parent}: tensor {name} is missing")
        tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in DTYPES:
            raise ModelError(f"tensor {name} is {tensor.dtype}, expected one of {DTYPES}")
        tensor = tensor.to(dtype)
        if not torch.isfinite(tensor).all():
            raise ModelError(f"tensor {name} holds values that are not finite")
        return tensor

    def sha256(self) -> str:
        """Over all files, in the order of their names: equal for equal replicas."""
        digest = hashlib.sha256()
        for path in self.paths:
            for chunk in _chunks(path):
                digest.update(chunk)
        return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            yield chunk
