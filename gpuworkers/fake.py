"""A modelled engine behind the seams of a real one: true scheduling, blocks and handoff; step
times from a model; ids that depend on every KV block, so that wrong KV gives wrong ids.

The KV of a position is a rolling hash over all ids up to it, kept once for each block and layer.
An id is drawn from that hash and the sampling key: the same on every worker, however the work was
split.
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from controlplane import protocol
from controlplane.errors import ConfigError
from controlplane.latency import LatencyModel, step_s
from gpuworkers.engine import RunResult
from gpuworkers.scheduler import Plan, PlanRow
from gpuworkers.sequence import Sequence

LETTERS = b"abcdefghijklmnopqrstuvwxyz      "  # ids of the console's byte-level vocabulary
VOCAB_SIZE = 1024
EOS_TOKEN_ID = 257  # end of a turn in that vocabulary; never drawn
MODULUS = (1 << 61) - 1  # Mersenne prime: rolling hash of Karp and Rabin 1987
BASE = 0x1B873593CC9E2D51 % MODULUS
START = 0x5171CC
LAYERS = 2
BLOCK = struct.Struct("<QQ")  # K: share of the hash, V: position; of one layer's block


@dataclass(frozen=True, slots=True)
class Profile:
    """A device and model to imitate."""

    device: protocol.DeviceFacts
    step: protocol.StepModel
    block_tokens: int
    num_blocks: int
    max_model_len: int
    kv_bytes_per_token: int
    load_s: float  # weights into memory and whatever is captured then; start values


PROFILES = {
    # Llama-3.1-8B bf16 on one H200: fitted to NVIDIA AIConfigurator 0.12.0's step times
    # (decode 1x4k 4.95, 64x4k 13.6, 256x4k 38.1 ms; prefill 2k 43.4 ms), within 20 % from one
    # row to 8k; KV room 0.82 M tokens.
    "h200-8b": Profile(
        protocol.DeviceFacts("modelled", "H200 (modelled)", 141 << 30, 132, "bf16"),
        protocol.StepModel(4.8e-3, 18e-6, 29e-9),
        block_tokens=64,
        num_blocks=12_800,
        max_model_len=131_072,
        kv_bytes_per_token=131_072,
        load_s=8.0,  # 16 GB at 2 GB/s
    ),
    "steady-20ms": Profile(  # for load tests: every step takes 20 ms, whatever is in it
        protocol.DeviceFacts("modelled", "20 ms a step (modelled)", 1 << 36, 0, "bf16"),
        protocol.StepModel(20e-3, 0.0, 0.0),
        block_tokens=64,
        num_blocks=12_800,
        max_model_len=131_072,
        kv_bytes_per_token=131_072,
        load_s=5.0,
    ),
    "cpu-fast": Profile(  # for tests: quick, and small enough to fill
        protocol.DeviceFacts("modelled", "CPU (modelled)", 1 << 30, 0, "fp32"),
        protocol.StepModel(2e-3, 5e-6, 1e-9),
        block_tokens=16,
        num_blocks=1024,
        max_model_len=8192,
        kv_bytes_per_token=1024,
        load_s=0.2,
    ),
}


class FakeKV:
    """KVStore of hashes."""

    num_layers = LAYERS
    layer_block_bytes = BLOCK.size
    dtype_name = "modelled"

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._layers = [bytearray(num_blocks * BLOCK.size) for _ in range(LAYERS)]

    def read(self, layer: int, block_ids: list[int]) -> bytes:
        stored = self._layers[layer]
        return b"".join(stored[i * BLOCK.size : (i + 1) * BLOCK.size] for i in block_ids)

    def write(self, layer: int, block_ids: list[int], data: bytes | memoryview) -> None:
        if len(data) != len(block_ids) * BLOCK.size:
            raise ValueError(f"{len(data)} bytes for {len(block_ids)} blocks of {BLOCK.size}")
        for index, block_id in enumerate(block_ids):
            piece = data[index * BLOCK.size : (index + 1) * BLOCK.size]
            self._layers[layer][block_id * BLOCK.size : (block_id + 1) * BLOCK.size] = piece

    def store(self, block_id: int, position: int, value: int) -> None:
        """The hash up to `position`, which lies in the block."""
        share = value * BASE % MODULUS
        BLOCK.pack_into(self._layers[0], block_id * BLOCK.size, value ^ share, position)
        BLOCK.pack_into(self._layers[1], block_id * BLOCK.size, share, position)

    def load(self, block_id: int, position: int) -> int:
        """The hash up to `position`; any other content gives another value."""
        value = 0
        for stored in self._layers:
            share, stored_position = BLOCK.unpack_from(stored, block_id * BLOCK.size)
            value ^= share ^ (stored_position ^ position) * BASE
        return value % MODULUS


class FakeRunner:
    """Runner in modelled time."""

    eos_token_ids = frozenset({EOS_TOKEN_ID})
    can_guide = False  # drawn ids have no text that a grammar could match

    def __init__(self, kv: FakeKV, step: protocol.StepModel) -> None:
        self.kv = kv
        self._step = step

    def prepare(self) -> None:
        """See engine.Runner; nothing to do."""

    def run(self, plan: Plan, layer_written: Callable[[int], None] | None = None) -> RunResult:
        token_ids: list[int | None] = []
        for row in plan.rows:
            value = self._compute(row)
            if row.samples:
                token_ids.append(_draw(row.sequence, value))
        for layer in range(self.kv.num_layers if layer_written is not None else 0):
            layer_written(layer)
        return RunResult(token_ids, modelled_s=step_s(self._step, plan.features))

    def _compute(self, row: PlanRow) -> int:
        """Writes the KV of the row's tokens; returns the hash at its end."""
        size = self.kv.block_tokens
        sequence, position, end = row.sequence, row.start, row.start + row.count
        value = START
        if position:
            value = self.kv.load(sequence.block_ids[(position - 1) // size], position - 1)
        while position < end:
            block = position // size
            block_end = min(end, (block + 1) * size)
            for token_id in sequence.token_ids[position:block_end]:
                value = (value * BASE + token_id + 1) % MODULUS
            position = block_end
            self.kv.store(sequence.block_ids[block], position - 1, value)
        return value


def _draw(sequence: Sequence, value: int) -> int:
    """The next id: greedy by the context alone, else by the sampling key too."""
    sampling = sequence.sampling
    key = (value, 0, 0, 0)
    if sampling.temperature > 0:
        seed = sampling.seed & (1 << 64) - 1
        key = (value, seed, sampling.choice_index, sequence.output_tokens)
    digest = hashlib.blake2b(struct.pack("<4Q", *key), digest_size=1).digest()
    return LETTERS[digest[0] % len(LETTERS)]


def load(
    profile_name: str, model_id: str, kv_tokens: int
) -> tuple[FakeRunner, protocol.ModelFacts, protocol.DeviceFacts, LatencyModel]:
    """A runner with a KV cache of its own. Raises ConfigError."""
    profile = PROFILES.get(profile_name)
    if profile is None:
        raise ConfigError(f"--profile={profile_name}: expected one of {', '.join(PROFILES)}")
    num_blocks = kv_tokens // profile.block_tokens if kv_tokens else profile.num_blocks
    if num_blocks < 1:
        raise ConfigError(f"--kv-tokens={kv_tokens}: a block has {profile.block_tokens} tokens")
    model = protocol.ModelFacts(
        model_id,
        hashlib.sha256(f"modelled {BASE} {LETTERS!r}".encode()).hexdigest(),
        profile.max_model_len,
        VOCAB_SIZE,
        profile.kv_bytes_per_token,
    )
    runner = FakeRunner(FakeKV(num_blocks, profile.block_tokens), profile.step)
    return runner, model, profile.device, LatencyModel(profile.step)
