"""Measures this machine at start: which dtype is faster, and the coefficients of the step model."""

import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from controlplane.latency import StepFeatures
from controlplane.protocol import StepModel
from kernels.torchops import linear

PROBE_ROWS = (4, 64)  # a decode step and a chunk
PROBE_REPEATS = 3
BASE_S_MIN = 1e-5


def faster_dtype(hidden_size: int, width: int) -> torch.dtype:
    """float32 or bfloat16, by one large linear of the model at decode and chunk sizes (~0.3 s)."""
    seconds = {
        dtype: _linear_s(hidden_size, width, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    return min(seconds, key=lambda dtype: seconds[dtype])


def _linear_s(hidden_size: int, width: int, dtype: torch.dtype) -> float:
    layout: linear.Layout = "packed" if linear.has_packing(dtype) else "plain"
    weight = linear.pack(torch.ones(2 * width, hidden_size, dtype=dtype), layout)
    total_s = 0.0
    for rows in PROBE_ROWS:
        x = torch.ones(rows, hidden_size, dtype=dtype)
        best_s = float("inf")
        for _ in range(PROBE_REPEATS):
            started_at_s = time.perf_counter()
            linear.multiply(x, weight)
            best_s = min(best_s, time.perf_counter() - started_at_s)
        total_s += best_s
    return total_s


def fit_step_model(observed: list[tuple[StepFeatures, float]]) -> StepModel:
    """Least squares on relative error with no negative coefficient.

    A coefficient that comes out negative is set to 0 and the others are fitted again."""
    assert observed, "nothing was measured"
    seconds = np.array([measured_s for _, measured_s in observed])
    columns = np.array([[1.0, f.rows, f.context_tokens] for f, _ in observed])
    scaled = columns / seconds[:, None]
    active = [0, 1, 2]
    while True:
        solution, *_ = np.linalg.lstsq(scaled[:, active], np.ones(len(seconds)), rcond=None)
        if solution.min() >= 0.0 or len(active) == 1:
            break
        del active[int(solution.argmin())]
    coefficients = np.zeros(3)
    coefficients[active] = np.maximum(solution, 0.0)
    base_s, per_token_s, per_context_token_s = (float(c) for c in coefficients)
    return StepModel(max(base_s, BASE_S_MIN), per_token_s, per_context_token_s)


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor_name() -> str:
    """The processor as Linux names it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
