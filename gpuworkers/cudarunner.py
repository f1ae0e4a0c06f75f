"""Loads a model folder onto a GPU, for `python -m gpuworkers --device cuda:N`."""

from collections.abc import Callable
from pathlib import Path

import torch

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers import gpumodel
from gpuworkers.aheadrunner import AheadRunner
from gpuworkers.gpu import library, open_gpu
from gpuworkers.grammar import Grammars
from gpuworkers.models.config import read_config
from gpuworkers.runner import Shapes, TorchRunner, calibrate
from gpuworkers.weights import WeightFiles

CALIBRATION_STEPS: Shapes = (
    (1, 1024, 1), (8, 1024, 1), (32, 1024, 1), (64, 1024, 1), (64, 4096, 1), (128, 1024, 1),
    (1, 0, 256), (1, 0, 512), (1, 0, 1024), (1, 1024, 1024), (1, 0, 4096),
)  # fmt: skip
CALIBRATION_REPEATS = 3
# No host tier: the engine would wait for the copy of every full batch block, which cost five sixths
# of the batch tokens on an H200. A preempted batch row is computed again.
HOST_BLOCKS_RATIO = 0.0

Parts = tuple[TorchRunner, protocol.ModelFacts, protocol.DeviceFacts, LatencyModel]


def load(
    model_dir: str | Path, model_id: str, device: str, kv_tokens: int = 0
) -> tuple[Parts, Callable[[], protocol.DeviceLoad | None]]:
    """As runner.load, and the question for the device's load.

    kv_tokens 0 takes what the device has room for. Raises ConfigError where the device cannot be
    used or the model does not fit, ModelError for an unusable folder, DeviceFailed."""
    gpu = open_gpu(device, torch.cuda, library("pynvml"))
    torch.cuda.empty_cache()  # of a model that this process has unloaded; nothing at the start
    ops = gpumodel.cuda_ops(device)
    folder = Path(model_dir)
    config = read_config(folder)
    room = gpumodel.kv_room(config, device, kv_tokens)
    files = WeightFiles(folder, device)
    with torch.cuda.device(device):
        stepper, kv = gpumodel.place(config, files, ops, device, room, gpumodel.capture_into_pool())
    grammars = Grammars.of_folder(folder, config.vocab_size, config.eos_token_ids)
    runner = AheadRunner(stepper, kv, grammars)
    bytes_per_token = kv.layer_block_bytes * config.num_layers // gpumodel.BLOCK_TOKENS
    max_model_len = min(config.max_model_len, kv.num_blocks * gpumodel.BLOCK_TOKENS)
    facts = protocol.ModelFacts(
        model_id, files.sha256(), max_model_len, config.vocab_size, bytes_per_token
    )
    step_model = LatencyModel(calibrate(runner, CALIBRATION_STEPS, CALIBRATION_REPEATS))
    return (runner, facts, gpu.facts(kv.dtype_name), step_model), gpu.load
