"""NVIDIA's run-time compiler from its wheel, which needs neither GPU nor driver."""

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from kernels.cuda import source
from kernels.cuda.launcher import Constants
from tests import skips

LIBRARIES = ("libnvrtc-builtins.so.13.?", "libnvrtc.so.13")  # the second asks for the first
FUNCTION = re.compile(
    r"Function properties for (?P<name>\w+)\n"
    r"[^\n]*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"(?:[^\n]*Used (?P<registers>\d+) registers(?P<rest>[^\n]*))?"
)


class CompileFailed(Exception):
    """The compiler's log."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes of a multiprocessor; a function that it calls has no registers of its
    own and only the spills are known."""

    name: str
    registers: int | None  # of one thread
    shared_bytes: int  # static, of one block
    spill_bytes: int


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        found = [sorted(Path(folder).glob(f"cu13/lib/{name}")) for name in LIBRARIES]
        if all(found):
            return [ctypes.CDLL(str(paths[-1])) for paths in found][-1]
    skips.missing("nvrtc")


def compile_kernels(name: str, constants: Constants, architecture: str) -> list[Usage]:
    """Compile one kernel file as CuPy's RawModule would. Raises CompileFailed."""
    return compile_text(source.read(name), constants, architecture)


def compile_text(text: str, constants: Constants, architecture: str) -> list[Usage]:
    """The same of a text."""
    library = _library()
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None
    )
    assert created == 0, f"nvrtcCreateProgram gave {created}"
    options = [
        f"--gpu-architecture={architecture}",
        "--ptxas-options=-v",
        *source.OPTIONS,
        *(f"-D{key}={value}" for key, value in constants),
    ]
    passed = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    result = library.nvrtcCompileProgram(program, len(options), passed)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if result:
        raise CompileFailed(log.value.decode())
    return [_usage(match) for match in FUNCTION.finditer(log.value.decode())]


def _usage(match: re.Match[str]) -> Usage:
    shared = re.search(r"(\d+) bytes smem", match["rest"] or "")
    return Usage(
        match["name"],
        int(match["registers"]) if match["registers"] else None,
        int(shared[1]) if shared else 0,
        int(match["stores"]) + int(match["loads"]),
    )
