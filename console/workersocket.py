"""The websocket that workers dial: one loop on `receive()`, nothing between a frame and the fleet.

Credits: a worker may have `Welcome.credit_frames` frames that no Ack has answered. Frames that sit
in the server's queue when a turn of the event loop begins were all sent before the worker could see
an Ack of that turn; more of them than the credit is a breach, and the connection closes with 1008.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from console.transport import CLOSE_POLICY, CLOSE_TRY_LATER, Send, SocketLink, WorkerLink
from controlplane import protocol
from controlplane.errors import ProtocolError

HELLO_S_MAX = 10.0  # from the open socket to the first frame
LAST_WORDS_S_MAX = 2.0  # for the frames still queued when the loop ends
CLOSE_INTERNAL = 1011

Receive = Callable[[], Awaitable[dict[str, Any]]]
logger = logging.getLogger(__name__)
_connection_numbers = itertools.count(1)


class WorkerFleet(Protocol):
    """The part of the fleet that a worker's socket talks to; every call returns at once."""

    def connected(self, connection_id: str, link: WorkerLink) -> None: ...
    def received(self, connection_id: str, message: protocol.FromWorker) -> None: ...
    def disconnected(self, connection_id: str) -> None: ...


class WorkerSocket:
    """ASGI application for `/ws/worker`. `fleet` gives None while the console is not ready."""

    def __init__(self, fleet: Callable[[], WorkerFleet | None]) -> None:
        self._fleet = fleet

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        opened = await receive()
        assert opened["type"] == "websocket.connect", opened
        if any(name == b"origin" for name, _ in scope["headers"]):
            await send({"type": "websocket.close", "code": CLOSE_POLICY})  # a browser: 403
            return
        await send({"type": "websocket.accept"})
        fleet = self._fleet()
        if fleet is None:
            await send({"type": "websocket.close", "code": CLOSE_TRY_LATER})
            return
        link = SocketLink(send)
        writer = asyncio.get_running_loop().create_task(link.write())
        connection_id = f"c{next(_connection_numbers)}"
        try:
            fleet.connected(connection_id, link)
            await _read(fleet, connection_id, link, receive)
        except ProtocolError as error:
            logger.warning("worker closed connection=%s reason=%s", connection_id, error)
            link.close(CLOSE_POLICY, str(error)[:120])
        except Exception:
            logger.exception("worker failed connection=%s", connection_id)
            link.close(CLOSE_INTERNAL, "internal error")
        finally:
            fleet.disconnected(connection_id)
            await _finish(link, writer)


async def _read(fleet: WorkerFleet, connection_id: str, link: SocketLink, receive: Receive) -> None:
    """Decodes frames and hands them on until the peer is gone. Raises ProtocolError."""
    try:
        hello = _decode(await asyncio.wait_for(receive(), HELLO_S_MAX))
    except TimeoutError:
        raise ProtocolError(f"no hello within {HELLO_S_MAX:.0f} s") from None
    if hello is None:
        return
    if not isinstance(hello, protocol.Hello):
        raise ProtocolError(f"{type(hello).__name__} before Hello")
    fleet.received(connection_id, hello)
    credit = _Credit(link)
    while (message := _decode(await receive())) is not None:
        if isinstance(message, protocol.Hello):
            raise ProtocolError("a second Hello")
        credit.count()
        if not link.is_closing:
            fleet.received(connection_id, message)


def _decode(event: dict[str, Any]) -> protocol.FromWorker | None:
    """The frame's message; None when the peer is gone."""
    if event["type"] == "websocket.disconnect":
        return None
    frame = event.get("bytes")
    if frame is None:
        raise ProtocolError("a text frame")
    if len(frame) > protocol.FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {len(frame)} bytes")
    return protocol.decode_from_worker(frame)


class _Credit:
    """Counts frames, acknowledges them by the quarter credit, and sees a breach."""

    def __init__(self, link: SocketLink) -> None:
        self._link = link
        self._received = 0
        self._acked = 0
        self._acked_before_turn = 0
        self._is_turn_open = False

    def count(self) -> None:
        if not self._is_turn_open:
            self._is_turn_open = True
            self._acked_before_turn = self._acked
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._received += 1
        if self._received - self._acked_before_turn > self._link.credit_frames:
            raise ProtocolError(f"more than {self._link.credit_frames} frames without credit")
        consumed = self._received - self._acked
        if consumed >= max(1, self._link.credit_frames // 4):
            self._link.send(protocol.Ack(consumed))
            self._acked = self._received

    def _end_turn(self) -> None:
        self._is_turn_open = False


async def _finish(link: SocketLink, writer: asyncio.Task[None]) -> None:
    """Lets queued frames leave (a Refused, say), then ends the writer."""
    link.close(1000, "")
    try:
        await asyncio.wait_for(writer, LAST_WORDS_S_MAX)
    except TimeoutError:
        logger.info("worker did not read its last frames")
    finally:
        writer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writer
