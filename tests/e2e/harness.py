"""`manage.py serve` as a real process with a var folder of its own, and what tests need of it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 90.0  # a guard against hanging, not a claim
MODELLED = "modelled-8b"
# Run inside the server's var folder before it starts: rows, and a key for the tests.
SEED = """
import django
django.setup()
from pathlib import Path
from django.conf import settings
from django.core.management import call_command
from console import demoseed
call_command("migrate", verbosity=0)
login = demoseed.seed(settings.SLACKWATER_VAR, "", Path("."))
print(login.api_key)
"""


def until(condition, what, limit_s=HANG_S):
    """Polls until `condition()` gives something true, and returns it."""
    ends_at_s = time.monotonic() + limit_s
    while time.monotonic() < ends_at_s:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {limit_s:.0f} s for {what}")


def demo_model_folder(limit_s: float = 280.0) -> Path:
    """The demo model, converted once for this machine."""
    out = subprocess.run(
        [sys.executable, "-m", "gpuworkers.convert"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=True,
    ).stdout
    return Path(out.splitlines()[-1])


def clean_environment(var: Path) -> dict[str, str]:
    """The shell's, less what would point to another database, broker or settings module."""
    dropped = ("DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE", "MAKELEVEL", "MAKEFLAGS")
    environ = {key: value for key, value in os.environ.items() if key not in dropped}
    environ = {k: v for k, v in environ.items() if not k.startswith(("PYTEST", "DEMO_", "PORT"))}
    return {**environ, "SLACKWATER_VAR": str(var), "PYTHONUNBUFFERED": "1"}


@dataclass
class Process:
    """One line of the process table."""

    pid: int
    parent_pid: int
    command: str


def processes() -> list[Process]:
    out = subprocess.run(
        ["ps", "-axwwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(None, 2) for line in out.splitlines())
    return [Process(int(row[0]), int(row[1]), row[2]) for row in rows if len(row) == 3]


def left_over(pids: set[int]) -> list[str]:
    """Command lines of those processes that still run; a zombie has none of ours."""
    return [
        row.command for row in processes() if row.pid in pids and "<defunct>" not in row.command
    ]


def rss_bytes(pid: int) -> int:
    out = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    ).stdout
    return int(out) * 1024


@dataclass
class Server:
    """Starts with `start`, ends with `stop` or `kill`, as often as wanted on one var folder."""

    var: Path
    options: tuple[str, ...] = ("--workers", "prefill=1,decode=1", "--engine", "fake")
    model_id: str = MODELLED
    api_key: str = ""
    port: int = 0
    process: subprocess.Popen | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.var / "serve.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def seed(self) -> None:
        self.var.mkdir(parents=True, exist_ok=True)
        environ = clean_environment(self.var) | {"DJANGO_SETTINGS_MODULE": "console.settings"}
        out = subprocess.run(
            [sys.executable, "-c", SEED],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=True,
        ).stdout
        self.api_key = out.split()[-1]

    def start(self, num_workers: int | None = 2, port: int = 0) -> "Server":
        """Serves when this returns; `num_workers` live workers too, unless it is None."""
        if not self.api_key:
            self.seed()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "manage.py", "serve", "--port", str(port), *self.options],
                cwd=ROOT,
                env=clean_environment(self.var),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        found = until(self._said_port, f"the port in {self.log}")
        self.port = int(found)
        until(lambda: self.status("/livez") == 200, "livez")
        if num_workers is not None:
            until(lambda: self.num_live() >= num_workers, f"{num_workers} workers: {self.tail()}")
        return self

    def _said_port(self) -> str | None:
        assert self.process.poll() is None, f"serve ended: {self.tail()}"
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", self.log.read_text())
        return match[1] if match else None

    def status(self, path: str) -> int:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}{path}", timeout=5, trust_env=False).status_code
        return 0

    def tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of /metrics with this name that carry these labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
                total += float(value)
        return total

    def num_live(self) -> int:
        return int(self.metric("slackwater_workers", status="live"))

    def worker_pids(self) -> dict[str, int]:
        """Name -> process id of the workers that this server started."""
        mine = [
            row
            for row in processes()
            if "-m gpuworkers" in row.command and row.parent_pid == self.pid
        ]
        return {re.search(r"--name (\S+)", row.command)[1]: row.pid for row in mine}

    def num_starts(self) -> int:
        """How often this server has started a worker process, by its log."""
        return self.log.read_text().count("worker started name=")

    def client(self, **options) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.api_key,
            max_retries=0,
            timeout=HANG_S,
            **options,
        )

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=clean_environment(self.var),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Ends the server this way; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG_S)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@dataclass
class Streamed:
    """One stream as a client saw it, with the debug ids of every chunk."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)  # index of first id, how many
    arrived_at_s: list[float] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    num_done: int = 0
    usage: dict | None = None
    error: str = ""
    logprobs: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        pairs = zip(self.arrived_at_s, self.arrived_at_s[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)

    def is_contiguous(self) -> bool:
        """Every chunk begins at the output index where the one before ended."""
        expected = 0
        for seq, count in self.chunks:
            if seq != expected:
                return False
            expected += count
        return True

    def feed(self, event: dict) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        self.usage = event.get("usage") or self.usage
        debug = event.get("slackwater")
        if debug is not None:
            self.chunks.append((debug["seq"], len(debug["token_ids"])))
            self.token_ids += debug["token_ids"]
            self.arrived_at_s.append(time.monotonic())
        for choice in event.get("choices", []):
            self.text += (choice.get("delta") or {}).get("content") or ""
            entries = (choice.get("logprobs") or {}).get("content") or ()
            self.logprobs += [entry["logprob"] for entry in entries]
            if choice.get("finish_reason"):
                self.finish_reasons.append(choice["finish_reason"])


STREAMING = {"stream": True, "stream_options": {"include_usage": True}}
DEBUG_IDS = {"x-slackwater-debug": "ids"}


def stream_lines(server: Server, body: dict, on_ids=None) -> Streamed:
    """One chat read line by line, so that [DONE] is seen; `on_ids(n)` hears each growth."""
    streamed = Streamed()
    headers = {"authorization": f"Bearer {server.api_key}", **DEBUG_IDS}
    url = f"{server.url}/v1/chat/completions"
    with (
        httpx.Client(timeout=HANG_S, trust_env=False) as client,
        client.stream("POST", url, json={**body, **STREAMING}, headers=headers) as response,
    ):
        if response.status_code != 200:
            streamed.error = response.read().decode()
            return streamed
        for line in response.iter_lines():
            if line == "data: [DONE]":
                streamed.num_done += 1
            elif line.startswith("data: "):
                streamed.feed(json.loads(line[6:]))
                if on_ids is not None:
                    on_ids(len(streamed.token_ids))
    return streamed


def stream_openai(server: Server, body: dict, on_ids=None) -> Streamed:
    """The same through OpenAI's client, which does not retry; it ends at [DONE] only."""
    streamed = Streamed()
    extra = {key: body[key] for key in ("ignore_eos",) if key in body}
    known = {key: value for key, value in body.items() if key not in extra}
    with (
        server.client() as client,
        client.chat.completions.create(
            **known, **STREAMING, extra_headers=DEBUG_IDS, extra_body=extra
        ) as chunks,
    ):
        for chunk in chunks:
            streamed.feed(chunk.model_dump())
            if on_ids is not None:
                on_ids(len(streamed.token_ids))
    streamed.num_done = 1
    return streamed
