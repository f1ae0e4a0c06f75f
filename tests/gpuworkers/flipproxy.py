"""A TCP proxy that damages, stalls or cuts what the server side sends, at a chosen byte."""

import asyncio
import contextlib


class FlipProxy:
    """Byte offsets count what comes from `target`, over the first connection."""

    def __init__(
        self,
        target: str,
        flip_at: int | None = None,
        stall_at: int | None = None,
        cut_at: int | None = None,
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._flip_at = flip_at
        self._stop_at = stall_at if cut_at is None else cut_at
        self._is_cutting = cut_at is not None
        self.stalled = asyncio.Event()
        self.go_on = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "FlipProxy":
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        upstream = asyncio.create_task(_copy(reader, far_writer))
        try:
            await self._damage(far_reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            upstream.cancel()
            await asyncio.wait([upstream])
            far_writer.close()
            writer.close()
            self._tasks.discard(task)

    async def _damage(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One byte at a time, so that offsets are exact."""
        offset = 0
        while byte := await reader.read(1):
            if offset == self._stop_at:
                self.stalled.set()
                if self._is_cutting:
                    return
                await self.go_on.wait()
            writer.write(bytes([byte[0] ^ 0x10]) if offset == self._flip_at else byte)
            offset += 1
            await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
