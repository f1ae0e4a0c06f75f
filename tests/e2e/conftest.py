"""Servers for tests that only send requests, and the converted demo model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with two modelled workers for all tests of a file."""
    served = Server(tmp_path_factory.mktemp("var"))
    yield served.start()
    served.stop()


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The demo model, converted once for this machine."""
    out = subprocess.run(
        [sys.executable, "-m", "gpuworkers.convert"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    ).stdout
    return Path(out.splitlines()[-1])
