"""However the server ends, nothing of it is left: process, listening socket or shared memory."""

import contextlib
import itertools
import os
import signal
import socket
import threading
from pathlib import Path

import httpx
import pytest

from console.demoload import SENTENCES
from gpuworkers.handoffcarrier import SEGMENT_NAME
from tests import skips
from tests.e2e.harness import Server, left_over, stream_lines, until

GONE_S = 5.0
SHARED_MEMORY = Path("/dev/shm")
STREAMS = 12
LONG_TEXT = " ".join(SENTENCES[:8])

pytestmark = pytest.mark.serial


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def mapping(pids: set[int]) -> list[int]:
    """Those of the processes that have memory of a handoff mapped."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            if SEGMENT_NAME in Path(f"/proc/{pid}/maps").read_text():
                found.append(pid)
    return found


def keep_asking(served: Server, stream: int, is_over: threading.Event) -> None:
    """One long prompt after the other. With enough streams that decode they are handed off."""
    for number in itertools.count():
        if is_over.is_set():
            return
        message = {"role": "user", "content": f"{stream} {number} {LONG_TEXT}"}
        body = {"model": served.model_id, "messages": [message], "max_tokens": 64}
        with contextlib.suppress(httpx.HTTPError):
            stream_lines(served, body)


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


def test_no_shared_memory_is_left_five_seconds_after_a_kill_during_handoffs(tmp_path):
    if not Path("/proc/self/maps").exists():
        skips.missing("/proc")
    memory_before = shared_memory()
    served = Server(tmp_path / "var", (*Server.options, "--profile", "cpu-fast"))
    is_over = threading.Event()
    streams = [
        threading.Thread(target=keep_asking, args=(served, stream, is_over), daemon=True)
        for stream in range(STREAMS)
    ]
    try:
        served.start()
        pids = {served.pid, *served.worker_pids().values()}
        for thread in streams:
            thread.start()
        until(lambda: mapping(pids), "a handoff through shared memory")
        is_over.set()
        served.kill()
        until(lambda: not left_over(pids), "processes to end", GONE_S)
        assert mapping(pids) == []
        assert shared_memory() <= memory_before
    finally:
        is_over.set()
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
