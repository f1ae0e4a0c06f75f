"""`manage.py serve --demo` as a user runs it: its errors, its counts, its end, its second start."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from console.demoseed import state_path
from tests.e2e.harness import ROOT, clean_environment, left_over, processes, until

# A database of the shell that must not be touched: nothing listens there.
FOREIGN = {
    "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
    "REDIS_URL": "redis://127.0.0.1:9",
}
START_S = 150.0

pytestmark = pytest.mark.serial


class DemoRun:
    """One demo and what it has printed."""

    def __init__(self, var: Path, *options: str, **environ: str) -> None:
        self.log = var / "demo.log"
        var.mkdir(exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "manage.py", "serve", "--demo", *options],
                cwd=ROOT,
                env={**clean_environment(var), **FOREIGN, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until_said(self, words: str) -> None:
        def said():
            assert words in self.text or self.process.poll() is None, self.text[-3000:]
            return words in self.text

        until(said, f"{words!r} of the demo", START_S)

    def family(self) -> set[int]:
        """Process ids of the demo and everything below it."""
        rows = processes()
        found = {self.process.pid}
        for _ in range(4):
            found |= {row.pid for row in rows if row.parent_pid in found}
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def info(var: Path) -> str:
    environ = {**clean_environment(var / "demo"), **FOREIGN}
    command = [sys.executable, "manage.py", "demo_info"]
    out = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    return out.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"DEMO_SECONDS": "soon"}, "DEMO_SECONDS=soon: expected a number above 0"),
        ({"DEMO_LOAD": "2"}, "DEMO_LOAD=2: expected 0 or 1"),
        ({"DEMO_JSON": "/nowhere/x.json"}, "DEMO_JSON=/nowhere/x.json: its folder does not exist"),
    ],
)
def test_a_wrong_variable_ends_with_one_line(tmp_path, environ, line):
    run = DemoRun(tmp_path, **environ)
    assert run.process.wait(60) == 1
    assert line in run.text.splitlines()[-1]
    assert "Traceback" not in run.text


def test_a_busy_port_that_was_asked_for_is_an_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = DemoRun(tmp_path, "--port", str(port))
        assert run.process.wait(60) == 1
        assert f"port {port} is taken: name a free one" in run.text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_counts_and_goes_on_where_it_ended(tmp_path, model_folder):
    out = tmp_path / "out.json"
    port = str(free_port())
    first = DemoRun(tmp_path, "--port", port, DEMO_SECONDS="25", DEMO_JSON=str(out))
    try:
        assert first.process.wait(400) == 0, first.text[-3000:]
    finally:
        first.end()
    report = json.loads(out.read_text())
    assert report["handoff"] >= 1
    assert report["local"] >= 1
    assert report["interactive"] >= 4
    assert report["handoff_bytes"] > 0
    assert report["failed"] == 0
    assert report["first_token_s"] > 0
    assert "request table and /metrics count the same" in first.text
    assert "first token after" in first.text
    key = re.search(r"key (sk-sw-\S+)", first.text)[1]
    assert key in info(tmp_path)
    assert state_path(tmp_path / "demo").stat().st_mode & 0o077 == 0

    second = DemoRun(tmp_path, "--port", port, DEMO_LOAD="0")
    try:
        second.until_said("Ctrl-C ends it")
        assert key in second.text
        family = second.family()
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(60) == 0
        until(lambda: not left_over(family), "processes to end", 5)
    finally:
        second.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_under_load_leaves_nothing_behind(tmp_path, model_folder, number):
    run = DemoRun(tmp_path, "--port", str(free_port()))
    try:
        run.until_said("tokens/s")  # its first status line: the load is under way
        family = run.family()
        assert len(family) >= 4  # server, two workers, load
        run.process.send_signal(number)
        status = run.process.wait(60)
        assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
        until(lambda: not left_over(family), f"{left_over(family)} to end", 5)
    finally:
        run.end()
