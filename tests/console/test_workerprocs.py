"""Worker subprocesses: start, restart, stop, nobody left behind. Real processes, fake engine."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from console.workerprocs import (
    ENVIRONMENT,
    RESTART_S_MAX,
    ROOT,
    WORKERS_MAX,
    ProcView,
    WorkerProcs,
    WorkerSpec,
    parse_workers,
    pause_s,
)
from controlplane import protocol
from controlplane.errors import ConfigError
from tests.gpuworkers.stubconsole import HANG_S, StubConsole

FAKE = WorkerSpec("decode", engine="fake", profile="cpu-fast")
pytestmark = pytest.mark.serial


def start_procs(
    console: StubConsole, logs: Path, *specs: WorkerSpec, **options: bool
) -> WorkerProcs:
    tokens = iter(f"token-{number}" for number in range(10_000))
    return WorkerProcs(
        specs, lambda: console.url, lambda name: next(tokens), logs, os.environ, **options
    )


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_S):
        while not holds():
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    """A zombie counts as gone: it holds nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def one(procs: WorkerProcs) -> ProcView:
    (view,) = procs.views()
    return view


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("prefill=1,decode=1", ["prefill", "decode"]),
        ("mixed=2", ["mixed", "mixed"]),
        ("decode=0", []),
        ("", []),
    ],
)
def test_worker_counts_are_read_as_one_role_each(text: str, roles: list[str]) -> None:
    assert parse_workers(text) == roles


@pytest.mark.parametrize("text", ["prefill", "encode=1", "decode=x", "decode=-1", "decode=65"])
def test_unreadable_worker_counts_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        parse_workers(text)


def test_worker_counts_over_the_maximum_are_refused() -> None:
    assert len(parse_workers(f"decode={WORKERS_MAX}")) == WORKERS_MAX
    with pytest.raises(ConfigError, match=f"at most {WORKERS_MAX}"):
        parse_workers(f"prefill=1,decode={WORKERS_MAX}")


def test_a_worker_sees_no_secret_of_the_server() -> None:
    assert not {"SECRET_KEY", "SLACKWATER_PEPPER", "DATABASE_URL", "REDIS_URL"} & set(ENVIRONMENT)


async def test_worker_joins_in_its_own_session_and_stops_with_a_goodbye(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        await console.joined(1)
        view = one(procs)
        assert view.state == "running" and view.name == "decode-1" and view.pid is not None
        assert os.getsid(view.pid) == view.pid != os.getsid(0)
        assert console.hellos[0].name == "decode-1" and console.hellos[0].role == "decode"
        os.kill(view.pid, signal.SIGINT)  # Ctrl-C is the server's business
        await console.until(lambda: len(console.heard) > 2)
        await procs.stop(grace_s=HANG_S)
        assert not is_alive(view.pid)
        assert console.heard[-1][1] == protocol.Goodbye("stopped by SIGTERM")
        assert one(procs).state == "stopped"


async def test_killed_worker_is_started_again_with_a_fresh_token(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        await console.joined(1)
        first_pid = one(procs).pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        await console.joined(2)
        view = one(procs)
        assert view.restarts == 1 and view.pid not in (None, first_pid)
        assert [hello.token for hello in console.hellos] == ["token-0", "token-1"]
        await procs.stop(grace_s=HANG_S)


def test_pause_doubles_with_each_quick_end_up_to_its_maximum() -> None:
    assert [pause_s(failures) for failures in (0, 1, 2, 6)] == [0.5, 1.0, 2.0, 30.0]
    assert pause_s(1_000_000) == RESTART_S_MAX


async def test_worker_killed_again_and_again_comes_back_each_time(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        pids = set()
        for kills in range(3):
            await console.joined(kills + 1)
            pid = one(procs).pid
            assert pid is not None and pid not in pids
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
        await console.joined(4)
        assert one(procs).restarts == 3
        assert not any(is_alive(pid) for pid in pids)
        await procs.stop(grace_s=HANG_S)


async def test_killed_worker_stays_down_when_restart_is_off(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE, restart=False)
        await procs.start()
        await console.joined(1)
        os.kill(one(procs).pid or 0, signal.SIGKILL)
        await until(lambda: one(procs).state == "ended")
        assert one(procs).pid is None and one(procs).restarts == 0
        await procs.stop(grace_s=1.0)


async def test_refused_worker_is_not_started_again_and_shows_the_reason(tmp_path: Path) -> None:
    async with StubConsole(protocol.Refused("the join token is spent")) as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        await until(lambda: one(procs).state == "ended")
        assert "refused: the join token is spent" in one(procs).last_lines
        assert len(console.hellos) == 1
        await procs.stop(grace_s=1.0)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (WorkerSpec("mixed", "fake", profile="unheard-of"), "--profile=unheard-of"),
        (WorkerSpec("mixed", model_dir=str(ROOT / "docs"), device="cuda:63"), "--device=cuda:63"),
    ],
    ids=["profile", "device"],
)
async def test_worker_with_a_wrong_setting_is_not_started_again(
    tmp_path: Path, spec: WorkerSpec, named: str
) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, spec)
        await procs.start()
        await until(lambda: one(procs).state == "ended")
        assert named in one(procs).last_lines[-1]
        await procs.stop(grace_s=1.0)


async def test_worker_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        await console.joined(1)
        pid = one(procs).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await procs.stop(grace_s=0.2)
        assert not is_alive(pid)


async def test_one_process_runs_many_modelled_workers_each_with_its_own_token(
    tmp_path: Path,
) -> None:
    async with StubConsole() as console:
        spec = WorkerSpec("mixed", "fake", count=8, profile="h200-8b", name="fleet")
        procs = start_procs(console, tmp_path, spec)
        await procs.start()
        await console.joined(8)
        assert {hello.name for hello in console.hellos} == {f"fleet-1-{n}" for n in range(1, 9)}
        assert len({hello.token for hello in console.hellos}) == 8
        assert len({hello.handoff_address for hello in console.hellos}) == 8
        await procs.stop(grace_s=HANG_S)
        goodbyes = [m for _, m in console.heard if isinstance(m, protocol.Goodbye)]
        assert len(goodbyes) == 8


async def test_processes_over_the_maximum_are_refused(tmp_path: Path) -> None:
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path)
        for _ in range(WORKERS_MAX):
            procs.add(FAKE)  # their tasks do not get a turn before `stop`
        with pytest.raises(ConfigError, match=str(WORKERS_MAX)):
            procs.add(FAKE)
        await procs.stop(grace_s=0.0)


async def test_long_log_is_put_aside_before_a_start(tmp_path: Path) -> None:
    log = tmp_path / "worker-decode-1.log"
    with log.open("wb") as file:
        file.truncate((4 << 20) + 1)
    async with StubConsole() as console:
        procs = start_procs(console, tmp_path, FAKE)
        await procs.start()
        await console.joined(1)
        assert log.with_suffix(".old").stat().st_size == (4 << 20) + 1
        assert log.stat().st_size < 65_536
        await procs.stop(grace_s=HANG_S)


SERVER = """
    import asyncio, os, sys
    from pathlib import Path
    from console.workerprocs import WorkerProcs, WorkerSpec

    async def main():
        spec = WorkerSpec("decode", engine="fake", profile="cpu-fast")
        procs = WorkerProcs(
            [spec], lambda: sys.argv[1], lambda name: "t", Path(sys.argv[2]), os.environ
        )
        await procs.start()
        await asyncio.sleep(0.3)
        print(procs.views()[0].pid, flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


async def test_no_worker_outlives_a_server_that_was_killed(tmp_path: Path) -> None:
    async with StubConsole() as console:
        command = [sys.executable, "-c", textwrap.dedent(SERVER), console.url, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            pid = int(await asyncio.to_thread(server.stdout.readline))
            await console.joined(1)
            assert is_alive(pid)
            server.kill()
        deadline_s = time.monotonic() + HANG_S
        while is_alive(pid):
            assert time.monotonic() < deadline_s, f"worker {pid} is still there"
            await asyncio.sleep(0.05)
        assert console.heard[-1][1] == protocol.Goodbye("stopped by SIGTERM")
