"""Daphne with limits: slow readers slow their producer, bodies and headers are capped and timed.

Daphne 4.2.3 never waits for a socket, buffers any body and answers in HTML. Here and in
console/boundedhttp.py four things change: the request is a Twisted push producer whose state `send`
awaits, a body over its cap is refused before a byte of it is kept, headers and bodies have
deadlines, and every refusal carries OpenAI's error shape. Source: our measurements of Daphne 4.2.3
and Twisted 26.10 (memory with a reader that never reads; 11-13 us for a direct socket write against
36-41 us for `await send()`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import daphne.server
from daphne.http_protocol import HTTPFactory
from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol
from twisted.internet import defer, reactor
from twisted.internet.endpoints import quoteStringArgument

from console.boundedhttp import BoundedChannel, BoundedRequest, Limits

logger = logging.getLogger(__name__)

BACKLOG = 2048
WEBSOCKET_POLL_S = 0.02
WRITE_EXTENSION = "slackwater.write"  # scope["extensions"]: async (data: bytes) -> None

PUSH_EXTENSION = "slackwater.push"  # scope["extensions"]: (data: bytes) -> whether to go on
UPLOAD_EXTENSION = "slackwater.upload"  # scope["extensions"]: a binary file, the whole body


class BoundedFactory(HTTPFactory):
    """Builds bounded channels; without TLS and HTTP/2, which a proxy in front provides."""

    protocol = BoundedChannel

    def buildProtocol(self, addr: Any) -> Any:
        channel = super().buildProtocol(addr)
        channel.requestFactory = BoundedRequest
        return channel


class StandardWebSocket(WebSocketProtocol):
    """Closes with any code of RFC 6455, as ASGI allows; what Daphne calls for it knows 1000 and
    3000-4999 only and raises for others, so that the connection would stay open."""

    def serverClose(self, code: int | None = None) -> None:
        self.sendCloseFrame(code=1000 if code is None else code)


class StandardWebSocketFactory(WebSocketFactory):
    protocol = StandardWebSocket


daphne.server.HTTPFactory = BoundedFactory  # Server.run finds the factories by these names
daphne.server.WebSocketFactory = StandardWebSocketFactory


class BoundedServer(daphne.server.Server):
    """Daphne's server with back-pressure in `send` and a shutdown that idle connections survive."""

    listen_error_message: str | None = None

    def __init__(
        self,
        application: Any,
        host: str,
        port: int,
        ready: Callable[[], None],
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.num_uploads = 0
        interface = quoteStringArgument(host)
        super().__init__(
            application,
            endpoints=[f"tcp:port={port}:interface={interface}:backlog={BACKLOG}"],
            signal_handlers=False,  # serve drains first, then stops
            ready_callable=ready,
            websocket_timeout=-1,  # workers and pages stay connected; credentials decide
            request_buffer_size=64 << 10,
            verbosity=0,
            server_name="slackwater",
        )

    def create_application(self, protocol: Any, scope: dict[str, Any]) -> Any:
        if isinstance(protocol, BoundedRequest):
            scope["extensions"] = {
                WRITE_EXTENSION: protocol.write_now,
                PUSH_EXTENSION: protocol.push,
            }
            if protocol.upload is not None:
                scope["extensions"][UPLOAD_EXTENSION] = protocol.upload
        return super().create_application(protocol, scope)

    async def handle_reply(self, protocol: Any, message: dict[str, Any]) -> None:
        await super().handle_reply(protocol, message)
        if isinstance(protocol, BoundedRequest):
            if protocol.finished or protocol.channel is None:
                return
            if message["type"] == "http.response.start" and protocol.producer is None:
                protocol.registerProducer(protocol, True)
            await protocol.wait_writable()
        elif isinstance(protocol, WebSocketProtocol):
            await wait_websocket_writable(protocol, self.limits)

    def listen_error(self, failure: Any) -> None:
        self.listen_error_message = failure.getErrorMessage()
        self.stop()

    def kill_all_applications(self) -> Any:
        """Cancel what still runs and wait for it; idle connections have no application."""
        running = [
            details["application_instance"]
            for details in self.connections.values()
            if "application_instance" in details and not details["application_instance"].done()
        ]
        for task in running:
            task.cancel()
        return defer.Deferred.fromFuture(asyncio.ensure_future(_settled(running)))


async def wait_websocket_writable(protocol: Any, limits: Limits) -> None:
    """Return when a websocket's buffer has room; cut the reader off after `stall_s_max`.

    The channel of the upgrade stays the transport's producer, so this looks instead of listening,
    and only while the buffer is over its limit."""
    transport = protocol.transport
    for _ in range(int(limits.stall_s_max / WEBSOCKET_POLL_S)):
        if transport is None or not transport.connected:
            return
        if buffered_bytes(transport) <= limits.websocket_buffer_bytes_max:
            return
        await asyncio.sleep(WEBSOCKET_POLL_S)
    logger.info("reader_cut client=%s", protocol.client_addr)
    transport.abortConnection()


async def _settled(tasks: list[Awaitable[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop that the server, its applications and everything of `serve` run on."""
    loop: asyncio.AbstractEventLoop = reactor._asyncioEventloop
    return loop


def buffered_bytes(transport: Any) -> int:
    """Bytes that a Twisted transport holds and the kernel has not taken."""
    return len(transport.dataBuffer) + int(transport._tempDataLen)
