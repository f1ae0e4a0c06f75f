"""However the server ends, nothing of it is left: process, listening socket or shared memory."""

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.e2e.harness import Server, left_over, until

GONE_S = 5.0
SHARED_MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.serial


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_five_seconds_after_the_end(tmp_path, number):
    memory_before = shared_memory()
    served = Server(tmp_path / "var")
    try:
        served.start()
        pids = {served.pid, *served.worker_pids().values()}
        assert len(pids) == 3
        status = served.kill(number)
        assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
        until(lambda: not left_over(pids), "processes to end", GONE_S)
        assert not is_listening(served.port)
        assert shared_memory() <= memory_before
    finally:
        served.stop()


def test_workers_end_with_a_parent_that_is_killed_while_they_start(tmp_path):
    served = Server(tmp_path / "var")
    try:
        served.start(num_workers=None)
        pids = set(until(served.worker_pids, "worker processes").values())
        os.kill(served.pid, signal.SIGKILL)
        served.process.wait()
        until(lambda: not left_over(pids), "workers to end", GONE_S)
    finally:
        served.stop()
