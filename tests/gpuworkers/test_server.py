"""A worker's life with a console: work, commands, handoff between two workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from controlplane import protocol
from gpuworkers.engine import Engine
from tests.gpuworkers.stubconsole import StubConsole, assign, make_engine, make_worker

PROMPT = [(7 * i) % 250 for i in range(70)]


@contextlib.asynccontextmanager
async def running(url: str, *engines: Engine) -> AsyncIterator[None]:
    """Workers on these engines, stopped and checked at the end."""
    workers = [make_worker(url, engine) for engine in engines]
    tasks = []
    for number, worker in enumerate(workers):
        tasks.append(asyncio.create_task(worker.run()))
        del number
    try:
        yield
    finally:
        for worker in workers:
            await worker.stop("test over")
        await asyncio.gather(*tasks)
        for engine in engines:
            engine.check_integrity()


async def reference(prompt: list[int], output_tokens: int) -> list[int]:
    """Output of one worker without handoff."""
    async with StubConsole() as console, running(console.url, make_engine()):
        await console.joined(1)
        await console.send("w1", assign("r", prompt, output_tokens))
        return await console.finished("r")


async def test_assigned_request_is_accepted_before_its_tokens_and_reported_to_the_end() -> None:
    async with StubConsole() as console, running(console.url, make_engine()):
        await console.joined(1)
        await console.send("w1", assign("r1", PROMPT, output_tokens=12))
        assert len(await console.finished("r1")) == 12
        kinds = [m for _, m in console.heard if not isinstance(m, protocol.Heartbeat)]
        assert kinds[0] == protocol.Accepted("r1", 1)
        assert console.finish("r1") == "length"
