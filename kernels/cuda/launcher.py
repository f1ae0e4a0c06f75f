"""What starts a compiled kernel; CupyLauncher in kernels/cuda/cupylauncher.py does it on a GPU.

The seam of the CUDA backend: kernels.cuda.backend knows shapes and launch geometry, a launcher
compiles and starts. The tests' launcher runs the same kernels on a CPU.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

Argument = torch.Tensor | np.generic  # a tensor goes as its address, a number by value
Constants = tuple[tuple[str, int], ...]  # macros of the compiler, in a fixed order


class Function(Protocol):
    """One kernel with its constants, ready to start."""

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        """Starts it on the current stream and returns at once.

        grid: blocks, block: threads, up to three dimensions; shared_bytes: dynamic, per block."""
        ...


class Launcher(Protocol):
    """Compiles kernels, each pair of file and constants once."""

    def function(self, file: str, name: str, constants: Constants = ()) -> Function:
        """The kernel `name` of kernels/cuda/{file}.cu. Raises what the compiler says."""
        ...
