"""A whole forward pass on the CUDA kernels: as near to float64 as the torch backend's in bf16."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.weights import WeightFiles
from kernels.ops import Ops, SequenceTokens
from kernels.reference import ReferenceOps
from kernels.torchops.backend import TorchOps
from tests.cudasim.sim import SHUFFLED, SimLauncher
from tests.gpuworkers.test_families import SHAPE, write_random
from tests.kernels.cudakit import BLOCK, Kit

NUM_BLOCKS = 24
# Chunks of prompts beside decoding rows: every step is (sequence, start, count) of some sequences.
STEPS = [
    [(0, 0, 20), (1, 0, 1)],
    [(0, 20, 23), (1, 1, 1), (2, 0, 17)],
    [(0, 43, 1), (1, 2, 40), (2, 17, 1)],
    [(0, 44, 1), (1, 42, 1), (2, 18, 1)],
]


@dataclass(slots=True)
class Pass:
    """A model on one backend, with its KV."""

    model: Any
    ops: Ops
    layers: list[torch.Tensor]

    def logits(self, spans: list[tuple[int, int, int]]) -> torch.Tensor:
        """Of the last token of each sequence, float64."""
        tables = np.arange(NUM_BLOCKS).reshape(-1, 3).T  # scattered: 0, 3, 6 … for the first
        step = self.ops.plan_step(
            [SequenceTokens(start, count, tables[index]) for index, start, count in spans],
            self.model.heads,
            BLOCK,
        )
        ids = [(31 * i + 17 * p + p * p) % 300 for i, s, n in spans for p in range(s, s + n)]
        positions = [p for _, start, count in spans for p in range(start, start + count)]
        last = torch.tensor(np.cumsum([count for *_, count in spans]) - 1)
        made = self.model.forward(
            self.ops, torch.tensor(ids), torch.tensor(positions), self.layers, step, last
        )
        return made.double()


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


class AlignedFiles(WeightFiles):
    """Tensors in memory of their own, as on a device; those of a mapped file start anywhere."""

    def take(self, *arguments: Any) -> torch.Tensor:
        return super().take(*arguments).clone()


def make(folder, ops: Ops, dtype: torch.dtype) -> Pass:
    config = read_config(folder)
    model = load_llama(config, AlignedFiles(folder), dtype, ops, 128)
    shape = (NUM_BLOCKS, 2, config.num_kv_heads, BLOCK, config.head_dim)
    return Pass(model, ops, [torch.zeros(shape, dtype=dtype) for _ in range(config.num_layers)])


@pytest.mark.parametrize("family", ["llama31", "qwen3_with_bias"])
def test_chunks_and_decoding_give_the_torch_backends_logits(family, tmp_path):
    folder = tmp_path / family
    write_random(folder, family, torch.bfloat16)
    launcher = SimLauncher(SHUFFLED)
    cuda = make(folder, Kit(launcher, torch.device("cpu")).ops, torch.bfloat16)
    theirs = make(folder, TorchOps(), torch.bfloat16)
    exact = make(folder, ReferenceOps(), torch.float64)
    with torch.inference_mode():
        logits = [torch.cat([p.logits(spans) for spans in STEPS]) for p in (cuda, theirs, exact)]
    mine, torch_logits, true = logits
    kernels = 5 + family.startswith("qwen3")  # of a layer, at least
    assert launcher.num_launches >= kernels * SHAPE["num_hidden_layers"] * len(STEPS)
    error = rms(torch_logits - true)
    assert error <= 0.02 * rms(true)
    assert rms(mine - true) <= 1.25 * error
    assert rms(mine - torch_logits) <= 1.75 * error
    for layer, exact_layer in zip(cuda.layers, exact.layers, strict=True):
        assert rms(layer - exact_layer) <= 0.02 * rms(exact_layer)
