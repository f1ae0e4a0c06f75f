"""`python -m gpuworkers` as a process: its exit codes and what it prints."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from controlplane import protocol
from tests.gpuworkers.stubconsole import HANG_S, StubConsole

ROOT = Path(__file__).parent.parent.parent
FAKE = ["--engine", "fake", "--profile", "cpu-fast"]
pytestmark = pytest.mark.serial


async def start(url: str, *options: str) -> asyncio.subprocess.Process:
    environ = {"PATH": os.environ["PATH"], "SLACKWATER_JOIN_TOKEN": "a-join-token"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpuworkers", "--join", url, *options,
        cwd=ROOT, env=environ, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def end_of(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(HANG_S):
        _, errors = await process.communicate()
    return process.returncode, errors.decode()


async def test_refused_worker_prints_the_reason_and_exits_3() -> None:
    async with StubConsole(protocol.Refused("the join token is spent")) as console:
        code, errors = await end_of(await start(console.url, *FAKE))
    assert code == 3
    assert errors.splitlines()[-1] == "refused: the join token is spent"
    assert "a-join-token" not in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engine", "fake", "--profile", "tpu"], "--profile=tpu"),
        (["--engine", "fake", "--count", "0"], "--count=0"),
        (["--engine", "native", "--model", str(ROOT / "docs")], "docs"),
        (
            ["--engine", "native", "--model", str(ROOT / "docs"), "--device", "cuda:63"],
            "--device=cuda:63: ",
        ),
    ],
)
async def test_wrong_setting_is_one_line_and_exit_2(options: list[str], named: str) -> None:
    code, errors = await end_of(await start("ws://127.0.0.1:1/ws/worker", *options))
    assert code == 2
    assert errors.startswith("error: ") and named in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_worker_started_by_hand_ends_with_a_goodbye(number: signal.Signals) -> None:
    async with StubConsole() as console:
        process = await start(console.url, *FAKE)
        await console.joined(1)
        process.send_signal(number)
        code, errors = await end_of(process)
        assert code == 0 and "Traceback" not in errors
        assert console.heard[-1][1] == protocol.Goodbye(f"stopped by {number.name}")


async def test_worker_waits_for_a_console_that_is_not_there_yet() -> None:
    process = await start("ws://127.0.0.1:1/ws/worker", *FAKE)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 1.0)
    process.terminate()
    code, errors = await end_of(process)
    assert code == 0 and "link lost" in errors


async def test_modelled_worker_does_not_load_torch() -> None:
    async with StubConsole() as console:
        process = await start(console.url, *FAKE)
        await console.joined(1)
        maps = Path(f"/proc/{process.pid}/maps")
        if maps.exists():
            assert "libtorch" not in maps.read_text()
        process.terminate()
        assert (await end_of(process))[0] == 0
