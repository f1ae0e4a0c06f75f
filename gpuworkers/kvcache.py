"""The KV arrays of one worker, allocated once, and their blocks as bytes for handoff.

Layout per layer: (num_blocks, 2, kv_heads, block_tokens, head_dim), contiguous, K before V.
"""

import contextlib
from collections.abc import Iterator

import torch

from gpuworkers.devicefailure import device_failures
from kernels.ops import Heads

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TorchKVCache:
    """See engine.KVStore. Starts as zeros; every value in it is finite at all times, because a
    masked position still takes part in products (0 · NaN is NaN)."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        heads: Heads,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.dtype_name = DTYPE_NAMES[dtype]
        self.device = torch.device(device)
        shape = (num_blocks, 2, heads.num_kv_heads, block_tokens, heads.head_dim)
        self.layers = [
            torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_layers)
        ]
        self.layer_block_bytes = self.layers[0][0].numel() * dtype.itemsize

    def read(self, layer: int, block_ids: list[int]) -> bytes:
        """Blocks of one layer, concatenated."""
        with self.work():
            ids = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            picked = self.layers[layer].index_select(0, ids).cpu()
        return picked.view(torch.uint8).numpy().tobytes()

    def write(self, layer: int, block_ids: list[int], data: bytes | memoryview) -> None:
        """Overwrite blocks of one layer. Raises ValueError on a wrong size or values that are not
        finite; then nothing was written."""
        expected = len(block_ids) * self.layer_block_bytes
        if len(data) != expected:
            raise ValueError(f"{len(data)} bytes for {len(block_ids)} blocks, expected {expected}")
        if not block_ids:
            return
        target = self.layers[layer]
        values = torch.frombuffer(bytearray(data), dtype=self.dtype)
        with self.work():
            fresh = values.view(len(block_ids), *target.shape[1:]).to(self.device)
            if not torch.isfinite(fresh).all():  # a CPU would take longer than the copy did
                raise ValueError(f"KV of layer {layer} holds values that are not finite")
            ids = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
            target.index_copy_(0, ids, fresh)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Work on the arrays: their device is the thread's current one, and what fails on it is
        DeviceFailed."""
        if self.device.type == "cpu":
            yield
            return
        with torch.cuda.device(self.device), device_failures(str(self.device)):
            yield

    def synchronize(self) -> None:
        """Wait for what the device has been told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
