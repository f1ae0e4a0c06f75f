"""Runs the CUDA kernels on a CPU: compiles them with g++ against cudasim.h and launches them."""

import ctypes
import getpass
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.cuda import source
from kernels.cuda.launcher import Argument, Constants
from tests import skips

HEADER = Path(__file__).with_name("cudasim.h")
FLAGS = ("-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
FORWARD, REVERSE, SHUFFLED = ORDERS = 0, 1, 20261124  # orders of threads, see cudasim.h


class LaunchFailed(Exception):
    """A kernel did what a GPU forbids; the message has the reason, block and thread."""


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_size_t),
        ("seed", ctypes.c_uint),
        ("num_arguments", ctypes.c_uint),
        ("num_tensors", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("argument_bytes", ctypes.POINTER(ctypes.c_uint)),
        ("tensors", ctypes.POINTER(_Range)),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_size_t),
    ]


class SimFunction:
    """See kernels.cuda.launcher.Function."""

    def __init__(self, entry: ctypes._CFuncPtr, launcher: "SimLauncher") -> None:
        self._entry = entry
        self._launcher = launcher

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        ranges = (_Range * max(1, len(tensors)))(*[_storage(tensor) for tensor in tensors])
        kept = [_by_value(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(kept))(*[ctypes.addressof(value) for value in kept])
        sizes = (ctypes.c_uint * len(kept))(*[ctypes.sizeof(value) for value in kept])
        error = ctypes.create_string_buffer(512)
        launch = _Launch(
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
            shared_bytes,
            self._launcher.order,
            len(kept),
            len(tensors),
            ctypes.cast(addresses, ctypes.POINTER(ctypes.c_void_p)),
            ctypes.cast(sizes, ctypes.POINTER(ctypes.c_uint)),
            ctypes.cast(ranges, ctypes.POINTER(_Range)),
            ctypes.cast(error, ctypes.c_char_p),
            len(error),
        )
        self._launcher.num_launches += 1
        if self._entry(ctypes.byref(launch)):
            raise LaunchFailed(error.value.decode())


class SimLauncher:
    """See kernels.cuda.launcher.Launcher.

    `order` of the threads of a block; `faults` are (file, text, other text) put into the source."""

    def __init__(self, order: int = FORWARD, faults: Sequence[tuple[str, str, str]] = ()) -> None:
        self.order = order
        self.faults = faults
        self.num_launches = 0
        self._functions: dict[tuple[str, str, Constants], SimFunction] = {}

    def function(self, file: str, name: str, constants: Constants = ()) -> SimFunction:
        key = (file, name, constants)
        if key not in self._functions:
            self._functions[key] = self.compile(self._source(file), name, constants)
        return self._functions[key]

    def compile(self, text: str, name: str, constants: Constants = ()) -> SimFunction:
        """The kernel `name` of this text."""
        library = ctypes.CDLL(str(build(text, constants)))
        return SimFunction(getattr(library, f"cudasim_launch_{name}"), self)

    def _source(self, file: str) -> str:
        text = source.read(file)
        for where, right, wrong in self.faults:
            if where == file:
                assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times"
                text = text.replace(right, wrong)
        return text


def build(text: str, constants: Constants) -> Path:
    """The shared library of one kernel text, from the cache or compiled now."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        skips.missing("g++")
    whole = "\n".join(
        [
            *(f"#define {name} {value}" for name, value in constants),
            f'#include "{HEADER}"',
            '#line 1 "kernel.cu"',
            text,
            *(f"CUDASIM_EXPORT({name})" for name in KERNEL.findall(text)),
        ]
    )
    key = hashlib.sha256((whole + HEADER.read_text() + repr(FLAGS)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"slackwater-cudasim-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        unfinished = folder / f"{key}.{os.getpid()}"
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(unfinished)]
        result = subprocess.run(command, input=whole, text=True, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr[:4000]
        unfinished.replace(library)
    return library


def _storage(tensor: torch.Tensor) -> _Range:
    storage = tensor.untyped_storage()
    return _Range(storage.data_ptr(), storage.nbytes())


def _by_value(argument: Argument) -> ctypes._SimpleCData | ctypes.Array:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return (ctypes.c_char * argument.nbytes).from_buffer_copy(argument.tobytes())
