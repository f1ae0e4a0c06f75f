"""Compiles and starts kernels on one NVIDIA GPU: CuPy's RawModule on torch's tensors and stream.

Nothing is copied: a kernel gets the address of a torch tensor, and runs on the stream that torch
works on, also while torch captures that stream as a CUDA graph.
"""

from collections.abc import Sequence

import cupy
import numpy as np
import torch

from kernels.cuda import source
from kernels.cuda.launcher import Argument, Constants

SHARED_BYTES_UNASKED = 48 << 10  # of a block, static ones included; more needs an opt-in


class CupyFunction:
    """See launcher.Function."""

    def __init__(self, kernel: cupy.RawKernel, launcher: "CupyLauncher") -> None:
        self._kernel = kernel
        self._function = kernel.kernel  # starts on a stream that it is told: no context to enter
        self._launcher = launcher
        self._shared_bytes_max = SHARED_BYTES_UNASKED - kernel.shared_size_bytes

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        if shared_bytes > self._shared_bytes_max:
            self._kernel.max_dynamic_shared_size_bytes = shared_bytes
            self._shared_bytes_max = shared_bytes
        passed = [np.int64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        self._function(grid, block, passed, shared_bytes, self._launcher.stream())


class CupyLauncher:
    """See launcher.Launcher. Not thread safe: one engine thread."""

    def __init__(self, device_index: int) -> None:
        self._device_index = device_index
        cupy.cuda.Device(device_index).use()
        self._modules: dict[tuple[str, Constants], cupy.RawModule] = {}
        self._functions: dict[tuple[str, str, Constants], CupyFunction] = {}
        self._stream = cupy.cuda.Stream.null

    def function(self, file: str, name: str, constants: Constants = ()) -> CupyFunction:
        key = (file, name, constants)
        if key not in self._functions:
            module = self._module(file, constants)
            self._functions[key] = CupyFunction(module.get_function(name), self)
        return self._functions[key]

    def _module(self, file: str, constants: Constants) -> cupy.RawModule:
        key = (file, constants)
        if key not in self._modules:
            macros = [f"-D{name}={value}" for name, value in constants]
            options = (*source.OPTIONS, *macros)
            self._modules[key] = cupy.RawModule(code=source.read(file), options=options)
        return self._modules[key]

    def stream(self) -> cupy.cuda.Stream:
        """The stream that torch works on now."""
        current = torch.cuda.current_stream(self._device_index)
        if self._stream.ptr != current.cuda_stream:
            self._stream = cupy.cuda.Stream.from_external(current)
        return self._stream
