"""A worker without a model, and one that changes it: free the old weights and KV, load the others.

Both happen only while no sequence is in hand. Loading takes seconds, in which the link goes on; the
engine's thread runs nothing but what is loaded.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers.engine import Runner


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, with a KV cache of its own."""

    runner: Runner
    model: protocol.ModelFacts
    step_model: LatencyModel


@dataclass(frozen=True, slots=True)
class Models:
    """What a worker can load. `load` raises SlackwaterError."""

    model_ids: tuple[str, ...]
    load: Callable[[str], Awaitable[Loaded]]


class NoKV:
    """KVStore of a worker without a model: one block of nothing."""

    num_layers = 1
    num_blocks = 1
    layer_block_bytes = 0
    dtype_name = "none"

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens

    def read(self, layer: int, block_ids: list[int]) -> bytes:
        return b""

    def write(self, layer: int, block_ids: list[int], data: bytes | memoryview) -> None:
        if data:
            raise ValueError(f"{len(data)} bytes for a worker without a model")


class NoRunner:
    """Runner of a worker without a model; no sequence is accepted, so it runs nothing."""

    eos_token_ids: frozenset[int] = frozenset()
    can_guide = False

    def __init__(self, block_tokens: int) -> None:
        self.kv = NoKV(block_tokens)

    def prepare(self) -> None:
        """See engine.Runner; nothing to do."""

    def run(self, plan: object, layer_written: object = None) -> NoReturn:
        raise AssertionError("a step without a model")
