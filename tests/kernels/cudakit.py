"""Inputs for the tests of CUDA kernels, and how near their results must be to float64."""

from dataclasses import dataclass

import numpy as np
import torch

from kernels.cuda.backend import CudaOps
from kernels.cuda.launcher import Launcher
from kernels.ops import Heads, SequenceTokens
from kernels.reference import ReferenceOps

BLOCK = 16
NUM_SMS = 4  # few, so that a test's contexts are cut into pieces
SAMPLE_THREADS = 64
# A result is rounded to 8 bits of mantissa; the weights of attention too, before they meet values
# of size 1 to 3.
RELATIVE = 2.0**-7
ABSOLUTE = 8e-3


@dataclass(frozen=True, slots=True)
class Kit:
    """A launcher and the device that it launches on."""

    launcher: Launcher
    device: torch.device

    @property
    def ops(self) -> CudaOps:
        return CudaOps(self.launcher, self.device, NUM_SMS, SAMPLE_THREADS)

    def on(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor on the device."""
        return tensor.clone().to(self.device)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def cache(num_blocks: int, heads: Heads, seed: int = 0) -> torch.Tensor:
    return values(num_blocks, 2, heads.num_kv_heads, BLOCK, heads.head_dim, seed=seed)


def sequences(spans: list[tuple[int, int]]) -> tuple[list[SequenceTokens], int]:
    """(start, count) of each with a scattered block table, and the number of blocks in all."""
    counts = [-(-(start + count) // BLOCK) for start, count in spans]
    order = np.random.default_rng(sum(counts)).permutation(sum(counts))
    tables = np.split(order, np.cumsum(counts)[:-1])
    made = [SequenceTokens(*span, table) for span, table in zip(spans, tables, strict=True)]
    return made, sum(counts)


def assert_near(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """`exact` is float64; says where the largest difference is."""
    difference = (actual.cpu().double() - exact).abs()
    assert difference.isfinite().all(), "a result is not finite"
    excess = difference - (ABSOLUTE + RELATIVE * exact.abs())
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    assert excess.max() <= 0, f"{actual[worst]} at {worst}, expected {exact[worst]}"


def assert_attention(kit: Kit, spans: list[tuple[int, int]], heads: Heads) -> None:
    """The backend's attention of these spans against the reference."""
    steps, num_blocks = sequences(spans)
    rows = sum(count for _, count in spans)
    q, kv = values(rows, heads.num_q_heads, heads.head_dim, seed=1), cache(num_blocks, heads)
    reference = ReferenceOps()
    exact = reference.attention(q.double(), kv, reference.plan_step(steps, heads, BLOCK))
    ops = kit.ops
    step = ops.plan_step(steps, heads, BLOCK)
    assert_near(ops.attention(kit.on(q), kit.on(kv), step), exact)
