"""Servers for tests that only send requests, and the converted demo model."""

from pathlib import Path

import pytest

from tests.e2e.harness import Server, demo_model_folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server with two modelled workers for all tests of a file."""
    served = Server(tmp_path_factory.mktemp("var"))
    yield served.start()
    served.stop()


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """The demo model, converted once for this machine."""
    return demo_model_folder()
