"""A handoff between two processes of which one is killed in the middle: the other notices, and
nothing of the shared memory is left."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gpuworkers.fake import FakeKV
from gpuworkers.handoffcarrier import SEGMENT_NAME, Segments
from tests import skips
from tests.gpuworkers.test_handoff import KEY, SOURCE_BLOCKS, Sender, fetching, reason_of, until

ROOT = Path(__file__).resolve().parents[2]
GONE_S = 5.0
# Prints its address; sends the first of two layers and goes on computing for ever.
SENDER = """
import asyncio
from tests.gpuworkers.test_handoff import KEY, SOURCE_BLOCKS, Sender
async def main():
    sender = Sender()
    print(await sender.server.start("127.0.0.1"), flush=True)
    sender.offer()
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    await asyncio.sleep(600)
asyncio.run(main())
"""
# Fetches from the address that it is told.
RECEIVER = """
import asyncio, sys
from gpuworkers.fake import FakeKV
from gpuworkers.handoffcarrier import Segments
from tests.gpuworkers.test_handoff import fetching
asyncio.run(fetching(sys.argv[1], FakeKV(8, 16), timeout_s=600, segments=Segments()))
"""

pytestmark = pytest.mark.serial


@pytest.fixture(autouse=True)
def process_tables() -> None:
    if not Path("/proc/self/maps").exists():
        skips.missing("/proc")


@contextlib.asynccontextmanager
async def process(code: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


def has_segment(pid: int | str) -> bool:
    try:
        return SEGMENT_NAME in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(holds: Callable[[], bool]) -> None:
    """Within GONE_S of a kill: a promise, and no claim about speed."""
    async with asyncio.timeout(GONE_S):
        while holds():
            await asyncio.sleep(0.02)


async def test_receiver_notices_a_killed_sender_and_keeps_no_shared_memory() -> None:
    kv = FakeKV(8, 16)
    async with process(SENDER) as sender:
        address = (await sender.stdout.readline()).decode().strip()
        transfer = asyncio.ensure_future(fetching(address, kv, segments=Segments()))
        await until(lambda: any(kv.read(0, list(range(8)))) and has_segment(sender.pid))
        assert has_segment("self") and not transfer.done()
        sender.kill()
        assert await reason_of(transfer) == "unreachable"
    assert not has_segment("self")


async def test_sender_notices_a_killed_receiver_and_keeps_no_shared_memory() -> None:
    sender = Sender()
    address = await sender.server.start("127.0.0.1")
    sender.offer()
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    async with process(RECEIVER, address) as receiver:
        await until(lambda: len(sender.server.departures) == 1)
        assert has_segment("self") and has_segment(receiver.pid)
        receiver.kill()
        await gone(lambda: has_segment("self"))
    await until(lambda: sender.dropped == [KEY])
    await sender.server.close()
