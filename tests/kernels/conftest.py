"""The CUDA backend as the tests meet it: on the CPU under the harness, or on a GPU."""

import importlib

import pytest
import torch

from tests import skips
from tests.cudasim import sim
from tests.kernels.cudakit import Kit


@pytest.fixture(params=["reverse", "shuffled", pytest.param("gpu", marks=pytest.mark.gpu)])
def kit(request) -> Kit:
    if request.param != "gpu":
        orders = {"reverse": sim.REVERSE, "shuffled": sim.SHUFFLED}
        return Kit(sim.SimLauncher(orders[request.param]), torch.device("cpu"))
    if not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        skips.missing("NVIDIA GPU")
    launcher = importlib.import_module("kernels.cuda.cupylauncher").CupyLauncher(0)
    return Kit(launcher, torch.device("cuda", 0))
