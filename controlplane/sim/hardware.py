"""The devices of a simulated cluster: step times, KV room, links, and the noise of both.

Step times come from a file of estimates for real devices (the calibration), or from the packaged
table of the same source; the control plane has to learn them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from controlplane.latency import LatencyModel, StepFeatures, roofline
from controlplane.protocol import StepModel
from controlplane.sim import steptable
from controlplane.sim.steptable import StepTable, TableFile
from controlplane.sim.workload import Noise

MODEL = "llama-3.1-8b-bf16-tp1"
ROOFLINE_8B = roofline(3.9e-3, 1.2e-3, 27e-6, 32e-9)  # algorithms.md section 0, bf16 on H200
KV_TOKENS_8B = 820_000  # on one H200, bf16: README of the calibration
NUM_LAYERS_8B = 32
PROFILE_ROWS = (1, 8, 32, 64, 128, 192, 256)  # of a worker that measures itself when it starts
PROFILE_CONTEXTS = (256, 1024, 4096)
PROFILE_CHUNKS = (0, 64, 256, 512, 1024)
PROFILE_PASSES = 2


class TableFacts(Protocol):
    """What a table says of the device and model that it is of."""

    @property
    def source(self) -> str: ...

    @property
    def gpu(self) -> str: ...

    @property
    def kv_bytes_per_token(self) -> int: ...


class StepTimes(Protocol):
    """A device as a function: seconds of a step. Implemented by StepTable and PeerTiming."""

    @property
    def file(self) -> TableFacts: ...

    def step_s(
        self, chunks: Sequence[tuple[int, int]], decode_rows: int, decode_context_tokens: int
    ) -> float:
        """A step of chunks (start, count) and decode rows that read so many context tokens
        together. 0 for an empty step."""

    def steps_in_cell(self, rows: int, context_tokens: int) -> int:
        """For how many steps of these decode rows alone, each with one context token more a row,
        the times have equal second differences; at least 1."""


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a worker's network: KV leaves layer by layer while it is computed."""

    bytes_per_s: float = 50e9  # 400 Gb/s RDMA: 2.6 us for the KV of an 8B token
    setup_s: float = 0.001  # start value: connection and descriptors of one transfer


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of worker."""

    table: StepTimes
    kv_tokens: int = KV_TOKENS_8B
    num_layers: int = NUM_LAYERS_8B
    link: Link = Link()
    is_noisy: bool = True  # 2 % of a step, and stalls (workload.Noise)

    def noise(self, seed: int) -> Noise | None:
        return Noise(seed) if self.is_noisy else None

    def profile(self) -> StepModel:
        """What a worker measures of itself before it joins: its first step model."""
        model = LatencyModel(ROOFLINE_8B)
        for _ in range(PROFILE_PASSES):
            for rows in PROFILE_ROWS:
                for context in PROFILE_CONTEXTS:
                    for chunk in PROFILE_CHUNKS:
                        step = StepFeatures().with_decodes(rows, rows * context)
                        chunks = [(0, chunk)] if chunk else []
                        if chunk:
                            step = step.with_tokens(0, chunk)
                        model.observe(step, self.table.step_s(chunks, rows, rows * context))
        return model.coefficients()


def read(path: str) -> Hardware:
    """8B on an H200 by the calibration file at `path`; empty: by the packaged table. Raises
    ValueError, in one line, for a file that is not there or is something else."""
    if not path:
        return Hardware(steptable.load(MODEL))
    file = Path(path)
    if file.is_dir():
        file = file / "h200_steps.json"
    if not file.is_file():
        raise ValueError(f"no calibration {file}: give it with --calibration")
    try:
        models = msgspec.json.decode(file.read_bytes(), type=dict[str, msgspec.Raw])
        facts = msgspec.json.decode(models[MODEL], type=dict[str, object])
        facts |= {"name": MODEL, "source": str(facts.get("engine", "")) + f" by {file.name}"}
        return Hardware(StepTable(msgspec.convert(facts, TableFile)))
    except (msgspec.MsgspecError, KeyError) as error:
        raise ValueError(f"{file} has no step times of {MODEL}: {error}") from None
