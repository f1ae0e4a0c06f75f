"""The console's end of a worker link: messages out, bounded, whatever the peer does.

`SocketLink` writes to a websocket through a task of its own, so that a decision never waits for a
socket. `MemoryLink` keeps what was sent, for tests that stand in for a worker.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from controlplane import protocol

OUTBOUND_BYTES_MAX = 4 << 20  # waiting for a worker that does not read; then the link is closed
CLOSE_POLICY = 1008  # the peer broke the protocol
CLOSE_TRY_LATER = 1013  # the peer does not read, or the console is not ready

Send = Callable[[dict[str, Any]], Awaitable[None]]


class WorkerLink(Protocol):
    """What the fleet needs of a connection to a worker. Both calls return at once."""

    def send(self, message: protocol.ToWorker) -> None: ...
    def close(self, code: int, reason: str) -> None: ...


class SocketLink:
    """A worker's websocket. Call from the event loop's thread only."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._frames: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closing: tuple[int, str] | None = None
        self.outbound_bytes = 0
        self.credit_frames = 0  # frames the worker may have unacknowledged; 0 until Welcome

    @property
    def is_closing(self) -> bool:
        return self._closing is not None

    def send(self, message: protocol.ToWorker) -> None:
        """Queues the message. A link over OUTBOUND_BYTES_MAX is closed with 1013 instead."""
        if self._closing is not None:
            return
        if isinstance(message, protocol.Welcome):
            self.credit_frames = message.credit_frames
        frame = protocol.encode(message)
        if self.outbound_bytes + len(frame) > OUTBOUND_BYTES_MAX:
            self._frames.clear()
            self.outbound_bytes = 0
            self.close(CLOSE_TRY_LATER, "the worker does not read")
            return
        self._frames.append(frame)
        self.outbound_bytes += len(frame)
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """Closes after the frames queued so far; the first code counts."""
        if self._closing is None:
            self._closing = (code, reason)
            self._wake.set()

    async def write(self) -> None:
        """Writes frames until the link closes; the consumer runs this as one task."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._frames:
                frame = self._frames[0]
                await self._send({"type": "websocket.send", "bytes": frame})
                if self._frames and self._frames[0] is frame:  # not dropped by an overflow
                    self._frames.popleft()
                    self.outbound_bytes -= len(frame)
            if self._closing is not None:
                code, reason = self._closing
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                return


class MemoryLink:
    """A link that keeps what was sent; encoding checks every message as a socket would."""

    def __init__(self) -> None:
        self.sent: list[protocol.ToWorker] = []
        self.closed: tuple[int, str] | None = None

    def send(self, message: protocol.ToWorker) -> None:
        assert self.closed is None, f"{message} after close {self.closed}"
        self.sent.append(protocol.decode_to_worker(protocol.encode(message)))

    def close(self, code: int, reason: str) -> None:
        if self.closed is None:
            self.closed = (code, reason)

    def take(self) -> list[protocol.ToWorker]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent
