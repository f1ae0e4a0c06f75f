"""A model on a GPU, ready to step: weights and KV allocated once, decode steps captured.

Knows nothing of the wire, so that the checks on a bare GPU machine (gpucheck.py) run the same code
as a worker.
"""

import importlib
from typing import Any

import torch

from controlplane.errors import ConfigError
from gpuworkers import memory
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import LlamaConfig
from gpuworkers.models.llama import WeightSource, load_llama
from gpuworkers.stepper import BUCKETS, Capture, DecodeOps, GraphStepper, Stepper

BLOCK_TOKENS = 64  # the largest block of the layout: the fewest table entries a step has to read
DTYPE = torch.bfloat16  # what the kernels are written for


def cuda_ops(device: str) -> Any:
    """The CUDA backend on one device. Raises ConfigError where CuPy is missing."""
    try:
        backend = importlib.import_module("kernels.cuda.device")
    except ImportError as error:
        raise ConfigError(f"the CUDA kernels need CuPy: {error}") from None
    return backend.cuda_ops(torch.device(device))


def capture_into_pool() -> Capture:
    """A capture as CUDA graphs that share one memory pool: no two of them run at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(forward: Any) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()  # compiles kernels and makes cuBLAS' workspaces outside of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            logits = forward()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay

    return capture


def place(
    config: LlamaConfig,
    files: WeightSource,
    ops: DecodeOps,
    device: str,
    kv_tokens: int,
    capture: Capture,
    buckets: tuple[int, ...] = BUCKETS,
    dtype: torch.dtype = DTYPE,
) -> tuple[GraphStepper, TorchKVCache]:
    """The model's stepper and its KV of `kv_tokens` tokens; positions go no further than both
    allow. `files` gives tensors that lie on the device."""
    num_blocks = kv_tokens // BLOCK_TOKENS
    max_len = min(config.max_model_len, num_blocks * BLOCK_TOKENS)
    with torch.no_grad():  # not inference mode: handoff writes into the KV arrays later
        model = load_llama(config, files, dtype, ops, max_len)
        kv = TorchKVCache(config.num_layers, num_blocks, BLOCK_TOKENS, model.heads, dtype, device)
        eager = Stepper(model, ops, kv.layers, BLOCK_TOKENS)
        with kv.work():
            stepper = GraphStepper(eager, ops, capture, max_len, buckets)
            kv.synchronize()
    return stepper, kv


def kv_room(config: LlamaConfig, device: str, wanted_tokens: int = 0) -> int:
    """Tokens of KV to allocate on the device, before the weights are there. Raises ConfigError."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return memory.kv_tokens(config, DTYPE.itemsize, free_bytes, wanted_tokens)
