"""Reads the *.safetensors of a model folder into checked tensors.

Only safetensors: a format that holds arrays and nothing that runs. Every tensor is looked up by
name, and a missing one, a wrong shape, a wrong dtype or a value that is not finite is an error that
names it.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpuworkers.models.config import ModelError, read_json

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HASH_CHUNK_BYTES = 1 << 22
INDEX = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightFiles:
    """The tensors of a folder, read one at a time: of the shards that the index names, where there
    is one, else of every *.safetensors file. They arrive on `device`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self._folder = folder
        index = _read_index(folder)
        names = set(index.values()) if index else {p.name for p in folder.glob("*.safetensors")}
        self.paths = sorted(folder / name for name in names)
        if not self.paths:
            raise ModelError(f"{folder}: no *.safetensors file{_pickle_hint(folder)}")
        self._files: dict[str, Any] = {}
        for path in self.paths:
            try:
                opened = safe_open(path, framework="pt", device=device)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: {error}") from None
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if name in self._files:
                    raise ModelError(f"{path}: tensor {name} is also in another file")
                if index and index.get(name) != path.name:
                    raise ModelError(f"{path}: tensor {name} is not where {INDEX} says")
                self._files[name] = opened
        if missing := index.keys() - self._files.keys():
            raise ModelError(f"{folder}: tensor {min(missing)} of {INDEX} is missing")

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as `dtype`. Raises ModelError."""
        if name not in self._files:
            raise ModelError(f"{self._folder}: tensor {name} is missing")
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


def _read_index(folder: Path) -> dict[str, str]:
    """File name of every tensor; empty without an index. Raises ModelError."""
    path = folder / INDEX
    if not path.exists():
        return {}
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ModelError(f"{path}: no weight_map")
    for name, file_name in entries.items():
        is_plain = isinstance(file_name, str) and Path(file_name).name == file_name
        if not is_plain or not file_name.endswith(".safetensors"):
            raise ModelError(f"{path}: {name} is said to be in {file_name!r}")
    return entries


def _pickle_hint(folder: Path) -> str:
    found = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if not found:
        return ""
    return f"; {found[0]} is a pickle, which can run code and is never loaded: convert it"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            yield chunk
