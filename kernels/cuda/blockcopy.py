"""Blocks of all layers of a KV cache, gathered into one buffer and scattered from it."""

import numpy as np
import torch

from kernels import checks
from kernels.cuda.launcher import Constants, Launcher

THREADS = 256
VECTOR_BYTES = 16
GRID_Y_MAX = 65_535


def copy_constants(block_bytes: int) -> Constants:
    return (("BLOCK_VECTORS", block_bytes // VECTOR_BYTES),)


class BlockCopier:
    """Copies whole blocks; `layers`: contiguous arrays (num_blocks, …) of one shape and dtype,
    which stay where they are."""

    def __init__(self, launcher: Launcher, layers: list[torch.Tensor]) -> None:
        self._launcher = launcher
        self._layers = layers
        first = layers[0]
        self.block_bytes = first[0].numel() * first.dtype.itemsize
        for layer in layers:
            checks.shape("layer", layer, tuple(first.shape))
            checks.dtype("layer", layer, first.dtype)
            checks.contiguous("layer", layer)
        if self.block_bytes % VECTOR_BYTES or len(layers) > GRID_Y_MAX:
            raise ValueError(f"{len(layers)} layers, blocks of {self.block_bytes} bytes")
        addresses = np.array([layer.data_ptr() for layer in layers], dtype=np.int64)
        self._addresses = torch.from_numpy(addresses).to(first.device)

    def gather(self, block_ids: torch.Tensor, buffer: torch.Tensor) -> None:
        """Writes buffer (layers, len(block_ids), block_bytes) uint8 from the blocks.

        block_ids (n,) int32 on the layers' device, each in range."""
        self._copy("gather_blocks", block_ids, buffer)

    def scatter(self, block_ids: torch.Tensor, buffer: torch.Tensor) -> None:
        """Writes the blocks from a buffer of `gather`'s shape; each id stands once."""
        self._copy("scatter_blocks", block_ids, buffer)

    def _copy(self, kernel: str, block_ids: torch.Tensor, buffer: torch.Tensor) -> None:
        checks.dtype("block_ids", block_ids, torch.int32)
        checks.dtype("buffer", buffer, torch.uint8)
        checks.shape("buffer", buffer, (len(self._layers), len(block_ids), self.block_bytes))
        checks.contiguous("buffer", buffer)
        if len(block_ids) == 0:
            return
        function = self._launcher.function("block_copy", kernel, copy_constants(self.block_bytes))
        grid = (len(block_ids), len(self._layers))
        function(grid, (THREADS,), [self._addresses, block_ids, buffer])
