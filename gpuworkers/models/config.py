"""What a model folder says about its shape: config.json of every family that `llama.py` computes.

A family is one row of FAMILIES; keys that change the forward pass and are not in it are refused by
name, so that a model is never served a little wrong.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane.errors import SlackwaterError

JSON_BYTES_MAX = 1 << 20


class ModelError(SlackwaterError):
    """A model folder cannot be served; the message names the file and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Family:
    """How a model_type differs from Llama 2. `plain` keys must be absent, null, or as given."""

    architecture: str
    has_head_norms: bool = False  # rms_norm of every query and key head before the rotation
    plain: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),  # Llama 2, 3.x, SmolLM2
    "qwen3": Family(
        "Qwen3ForCausalLM", has_head_norms=True, plain=(("use_sliding_window", False),)
    ),
}
PLAIN = (
    ("hidden_act", "silu"),
    ("quantization_config", None),
    ("partial_rotary_factor", 1.0),
    ("attention_multiplier", None),
)


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Stretched frequencies of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape of a Llama-like model, in the words of its config.json."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope: Llama3Rope | None
    max_model_len: int
    tie_word_embeddings: bool
    has_head_norms: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    eos_token_ids: frozenset[int]


class _Keys:
    """Values of one JSON object, each checked as it is read."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def refuse(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {key}={self.raw.get(key)!r}, expected {expected}")

    def number(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(key, "a positive whole number")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refuse(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value not in (True, False, None):
            raise self.refuse(key, "true or false")
        return bool(value)


def read_config(folder: Path) -> LlamaConfig:
    """The model's shape. Raises ModelError for anything that the forward pass does not compute."""
    path = folder / "config.json"
    raw = read_json(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        known = ", ".join(repr(name) for name in FAMILIES)
        raise ModelError(f"{path}: model_type must be one of {known}, is {raw.get('model_type')!r}")
    architectures = raw.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ModelError(f"{path}: architectures={architectures!r}, only {family.architecture}")
    for key, plain in (*PLAIN, *family.plain):
        if raw.get(key) not in (plain, None):
            raise ModelError(f"{path}: {key}={raw[key]!r} is not supported")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ModelError(f"{path}: layer_types other than full_attention are not supported")
    return _checked(folder, _Keys(path, raw), family)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises ModelError."""
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise ModelError(f"{path}: larger than {JSON_BYTES_MAX} bytes")
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object")
    return raw


def _checked(folder: Path, keys: _Keys, family: Family) -> LlamaConfig:
    num_q_heads = keys.number("num_attention_heads")
    hidden_size = keys.number("hidden_size")
    rope = keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise keys.refuse("rope_scaling", "an object")
    theta_keys = _Keys(keys.path, {"rope_theta": keys.raw.get("rope_theta")} | rope)
    vocab_size = keys.number("vocab_size")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=keys.number("num_hidden_layers"),
        num_q_heads=num_q_heads,
        num_kv_heads=keys.number("num_key_value_heads", num_q_heads),
        head_dim=keys.number("head_dim", hidden_size // num_q_heads),
        intermediate_size=keys.number("intermediate_size"),
        rms_norm_eps=keys.positive("rms_norm_eps", 1e-6),
        rope_theta=theta_keys.positive("rope_theta", 1e4),
        rope=_rope(keys.path, rope),
        max_model_len=keys.number("max_position_embeddings"),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        has_head_norms=family.has_head_norms,
        has_attention_bias=keys.flag("attention_bias"),
        has_mlp_bias=keys.flag("mlp_bias"),
        eos_token_ids=_eos_token_ids(folder, keys, vocab_size),
    )
    if config.num_q_heads % config.num_kv_heads or config.head_dim % 2:
        raise ModelError(
            f"{keys.path}: {config.num_q_heads} query heads, {config.num_kv_heads} KV heads,"
            f" head_dim {config.head_dim} do not fit together"
        )
    return config


def _rope(path: Path, rope: dict[str, Any]) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"{path}: rope scaling {rope!r} is not supported")
    keys = _Keys(path, rope)
    scaled = Llama3Rope(
        keys.positive("factor"),
        keys.positive("low_freq_factor"),
        keys.positive("high_freq_factor"),
        keys.number("original_max_position_embeddings"),
    )
    if scaled.low_freq_factor >= scaled.high_freq_factor:
        raise ModelError(f"{path}: rope scaling {rope!r}: low_freq_factor must be the lower one")
    return scaled


def _eos_token_ids(folder: Path, keys: _Keys, vocab_size: int) -> frozenset[int]:
    """Of config.json and, where chat models list the end of a turn, generation_config.json."""
    found: set[int] = set()
    sources = [keys]
    if (path := folder / "generation_config.json").exists():
        sources.append(_Keys(path, read_json(path)))
    for source in sources:
        eos = source.raw.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise ModelError(f"{source.path}: eos_token_id={eos!r} is outside the vocabulary")
        found.update(ids)
    return frozenset(found)
