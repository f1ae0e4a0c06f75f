"""A control plane on a loop in its own thread: pages under Django's client find a server."""

import asyncio
import threading

from console import livefeed, state
from console.snapshot import SnapshotKeeper
from controlplane import protocol
from tests.console.memoryserver import MemoryServer, ScriptedWorker, say


class PageServer:
    """What `serve` would hold, without sockets; `do` runs a coroutine function on its loop."""

    def __init__(self, roles: tuple[protocol.Role, ...] = ("prefill", "decode")) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.memory: MemoryServer = self.do(self._build, roles)
        self.state = state_of(self.memory, self.loop)

    async def _build(self, roles) -> MemoryServer:
        memory = MemoryServer(num_workers=0)
        for index, role in enumerate(roles):
            worker = ScriptedWorker(memory.fleet, say("Hello"), f"c{index}")
            worker.join(role)
            memory.workers.append(worker)
        return memory

    def do(self, function, *args):
        async def run():
            return await function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def close(self) -> None:
        async def stop_feed() -> None:
            (await livefeed.feed_of(self.state)).stop()

        self.do(stop_feed)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


def state_of(memory: MemoryServer, loop: asyncio.AbstractEventLoop) -> state.ServerState:
    """The parts that pages look at; the others are absent."""
    return state.ServerState(
        loop=loop,
        fleet=memory.fleet,
        gateway=memory.gateway,
        live=memory.live,
        metrics=memory.metrics,
        snapshot=SnapshotKeeper(),
        writer=None,
        tokenizers=None,
        batches=None,
        workers=None,
        port=0,
        profile="local",
        started_at_s=0.0,
    )
