"""`bench gateway`: what the gateway costs for each token and request, and what it adds to TTFT.

A `serve` of its own without workers, in a folder of its own, on one core; the load and the modelled
workers run on the other (`gpuworkers.gatewayload`). CPU is user and system time of every gateway
process, read from /proc.
"""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.conf import settings

from console.baresend import EVENTS

START_S_MAX = 60.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IDLE_WORKERS = 200
JOIN_TOKENS_MAX = 256
SEED = """
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from console import auth, jointokens
from console.models import ApiKey, Model, Quota, SLOClassRow, Tenant, ensure_default_classes
ensure_default_classes()
tenant = Tenant.objects.create(
    slug="bench", name="Bench", default_class=SLOClassRow.objects.get(name="flex"))
Quota.objects.create(tenant=tenant, concurrency_max=4096)
Model.objects.get_or_create(model_id="modelled-8b", defaults={"max_model_len": 131072})
key = auth.mint_key()
ApiKey.objects.create(tenant=tenant, public_id=key.public_id, secret_hmac=key.secret_hmac,
                      last4=key.last4)
print(key.text)
"""
TOKENS = """
import django
django.setup()
from console import jointokens
print(",".join(jointokens.mint(f"load-{i}", 3600) for i in range(%d)))
"""


class BenchFailed(Exception):
    """The benchmark has no answer; the message says why in one line."""


class GatewayUnderLoad:
    """The `serve` process that is measured."""

    def __init__(self, folder: Path, core: int | None) -> None:
        self.folder = folder
        self._environ = {
            key: value
            for key, value in os.environ.items()
            if key not in ("DATABASE_URL", "REDIS_URL")
        } | {"SLACKWATER_VAR": str(folder), "DJANGO_SETTINGS_MODULE": "console.settings"}
        self.key = self._python(SEED)
        log = (folder / "serve.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "manage.py", "serve", "--port", "0"],
            cwd=settings.BASE_DIR,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        self.port = self._wait_port()

    def _python(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=settings.BASE_DIR,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise BenchFailed("the bench's database could not be prepared")
        return done.stdout.split()[-1]

    def _wait_port(self) -> int:
        ends_at_s = time.monotonic() + START_S_MAX
        while time.monotonic() < ends_at_s and self.process.poll() is None:
            said = (self.folder / "serve.log").read_text()
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/readyz", said):
                return int(found[1])
            time.sleep(0.1)
        raise BenchFailed(f"serve did not start, see {self.folder / 'serve.log'}")

    def join_tokens(self, count: int) -> str:
        assert count <= JOIN_TOKENS_MAX, count
        return self._python(TOKENS % count)

    def load(
        self, phase: str, core: int | None, say: Callable[[str], None], **options: float
    ) -> dict[str, Any]:
        """Run one phase; its answer, with the gateway's CPU between its marks."""
        workers = int(options.get("workers", 4))
        arguments = [f"--{name}={value:g}" for name, value in options.items()]
        say(f"{phase}: {options.get('seconds', 0):g} s")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gpuworkers.gatewayload", phase),
                *("--join", f"ws://127.0.0.1:{self.port}/ws/worker"),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *arguments,
            ],
            cwd=settings.BASE_DIR,
            env=self._environ
            | {"SLACKWATER_API_KEY": self.key, "SLACKWATER_JOIN_TOKEN": self.join_tokens(workers)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        assert process.stderr is not None and process.stdout is not None
        marks: dict[str, float] = {}
        last = ""
        for line in process.stderr:
            last = line.strip()
            if last in ("measure", "done"):
                marks[last] = cpu_s(self.process.pid)
                marks[f"{last}_at"] = time.monotonic()
        answer = process.stdout.read()
        if process.wait() != 0 or len(marks) != 4:
            raise BenchFailed(f"the load {phase} failed: {last}")
        found: dict[str, Any] = json.loads(answer)
        found["cpu_s"] = marks["done"] - marks["measure"]
        found["wall_s"] = marks["done_at"] - marks["measure_at"]
        found["rss_mb"] = rss_bytes(self.process.pid) / 1e6
        return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def gateway(core: int | None) -> Iterator[GatewayUnderLoad]:
    with tempfile.TemporaryDirectory(prefix="slackwater-bench-") as folder:
        running = GatewayUnderLoad(Path(folder), core)
        try:
            yield running
        finally:
            running.stop()


def run(seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All phases; raises BenchFailed."""
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    bare_us = bare_send_us(ours, theirs)
    with gateway(ours) as running:
        streams = running.load("streams", theirs, say, seconds=seconds)
        requests = running.load("requests", theirs, say, seconds=min(seconds, 20.0))
        ttft = running.load("ttft", theirs, say, seconds=min(seconds, 30.0))
        idle = running.load("idle", theirs, say, seconds=min(seconds, 20.0), workers=IDLE_WORKERS)
    return {
        "cpu_us_per_token": 1e6 * streams["cpu_s"] / max(1, streams["tokens"]),
        "events_per_token": streams["events_per_token"],
        "bare_send_us": bare_us,
        "tokens_per_s": streams["tokens_per_s"],
        "itl_ms_p50": streams["itl_ms_p50"],
        "itl_ms_p99": streams["itl_ms_p99"],
        "rss_mb": streams["rss_mb"],
        "wrong": streams["wrong"] + ttft["wrong"],
        "failed": streams["failed"] + requests["failed"] + ttft["failed"],
        "cpu_us_per_request": 1e6 * requests["cpu_s"] / max(1, requests["requests"]),
        "requests_per_s": requests["requests_per_s"],
        "steps_of_40_ms": requests["steps_of_40_ms"],
        "added_ttft_ms_p50": ttft["added_ttft_ms_p50"],
        "added_ttft_ms_p99": ttft["added_ttft_ms_p99"],
        "idle_workers_core_share": idle["cpu_s"] / idle["wall_s"],
        "machine": f"{platform.processor() or platform.machine()}, {len(cores)} cores",
        "load_average": os.getloadavg()[0],
    }


def bare_send_us(ours: int | None, theirs: int | None) -> float:
    """CPU of Daphne's own `send` for one event, with a reader on the other core."""
    process = subprocess.Popen(
        [sys.executable, "-m", "console.baresend"],
        cwd=settings.BASE_DIR,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        if ours is not None:
            os.sched_setaffinity(process.pid, {ours})
        before_s = cpu_s(process.pid)
        reader = threading.Thread(target=_read_all, args=(port, theirs))
        reader.start()
        reader.join()
        return 1e6 * (cpu_s(process.pid) - before_s) / EVENTS
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _read_all(port: int, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(threading.get_native_id(), {core})
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while sock.recv(1 << 18):
            pass


def cpu_s(pid: int) -> float:
    """User and system seconds of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
