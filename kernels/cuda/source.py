"""The text of a kernel file as a compiler gets it: common.cuh put in where it is included.

One text has no path in it, so a compiled kernel can be cached by its text and constants alone.
"""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SUFFIX = ".cu"
INCLUDE = '#include "common.cuh"\n'
OPTIONS = ("--std=c++20",)  # of NVRTC


def names() -> list[str]:
    """Kernel files, without their suffix."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


@cache
def read(name: str) -> str:
    """The text of one kernel file."""
    return expand((FOLDER / f"{name}{SUFFIX}").read_text(), name)


def expand(text: str, name: str) -> str:
    """The text with common.cuh in it; compilers still name the lines of the files."""
    before, found, after = text.partition(INCLUDE)
    assert found, f"{name}{SUFFIX} does not include common.cuh"
    common = (FOLDER / "common.cuh").read_text()
    next_line = before.count("\n") + 2
    return f'{before}#line 1 "common.cuh"\n{common}#line {next_line} "{name}{SUFFIX}"\n{after}'
