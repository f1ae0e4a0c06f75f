"""One HTTP exchange of `/v1`: headers in, body in, answer or events out."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from console.apierrors import ApiError
from console.caps import BODY_BYTES_MAX
from console.daphneserver import PUSH_EXTENSION, WRITE_EXTENSION
from console.sse import PING

BODY_S_MAX = 120.0  # 4 MiB at the server's slowest allowed pace
OPENAI_VERSION = b"2020-10-01"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ClientGone(Exception):
    """The client closed the connection before it sent a whole request."""


@dataclass(slots=True)
class Exchange:
    """One HTTP request and what was answered so far."""

    scope: Scope
    receive: Receive
    send: Send
    request_id: str
    arrived_at_s: float  # time.perf_counter
    is_started: bool = False
    extra_headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def header(self, name: bytes) -> str | None:
        """The value of a header that may be sent once, None when it is absent or doubled."""
        values = [value for key, value in self.scope["headers"] if key == name]
        return values[0].decode("latin1") if len(values) == 1 else None

    def record(self, send: Send) -> None:
        """From now on everything goes through `send`, the direct write of streams too."""
        self.send = send
        self.scope = {**self.scope, "extensions": {}}

    def has_header(self, name: bytes) -> bool:
        return any(key == name for key, _ in self.scope["headers"])

    async def start(self, status: int, content_type: bytes) -> None:
        processing_ms = round((time.perf_counter() - self.arrived_at_s) * 1000)
        headers = [
            (b"content-type", content_type),
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", b"%d" % processing_ms),
            (b"openai-version", OPENAI_VERSION),
            (b"cache-control", b"no-store"),
            *self.extra_headers,
        ]
        self.is_started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def answer(self, status: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        self.extra_headers.append((b"content-length", b"%d" % len(payload)))
        await self.start(status, b"application/json")
        await self.send({"type": "http.response.body", "body": payload})

    async def refuse(self, error: ApiError) -> None:
        self.extra_headers += error.headers()
        await self.answer(error.status, error.body())


async def read_body(receive: Receive) -> bytes | ApiError:
    """The whole body, at most BODY_BYTES_MAX within BODY_S_MAX."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S_MAX):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > BODY_BYTES_MAX:
                    text = f"The body is larger than {BODY_BYTES_MAX} bytes."
                    return ApiError(413, "request_too_large", text)
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        return ApiError(408, "request_timeout", "The body did not arrive in time.")


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_tasks(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what still runs and wait until it has cleaned up; results stay with the caller."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventWriter:
    """The response of a stream: headers once, then events by the server's direct write."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        extensions = exchange.scope.get("extensions") or {}
        self._write_now = extensions.get(WRITE_EXTENSION)
        self._push = extensions.get(PUSH_EXTENSION)
        self._written_at_s = time.monotonic()

    @property
    def is_open(self) -> bool:
        return self._exchange.is_started

    @property
    def can_push(self) -> bool:
        """Whether `push` may be used: the server writes directly and the headers are out."""
        return self._push is not None and self.is_open

    def push(self, data: bytes) -> bool:
        """Write at once; False when the reader is behind: then `write` waits for it."""
        assert self._push is not None
        self._written_at_s = time.monotonic()
        return bool(self._push(data))

    def add_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """For an answer that the exchange gives instead of a stream."""
        self._exchange.extra_headers += headers

    async def open(self, headers: list[tuple[bytes, bytes]]) -> None:
        if not self.is_open:
            self._exchange.extra_headers += [*headers, (b"x-accel-buffering", b"no")]
            await self._exchange.start(200, b"text/event-stream; charset=utf-8")

    async def write(self, data: bytes) -> None:
        if not data:
            return
        self._written_at_s = time.monotonic()
        if self._write_now is not None:
            await self._write_now(data)
        else:
            message = {"type": "http.response.body", "body": data, "more_body": True}
            await self._exchange.send(message)

    async def finish(self, data: bytes) -> None:
        if self._write_now is not None:
            await self.write(data)
            data = b""
        await self._exchange.send({"type": "http.response.body", "body": data, "more_body": False})

    async def ping(self, silence_s: float) -> None:
        """A comment line after that much silence; it opens the stream of a request in a queue."""
        if time.monotonic() - self._written_at_s >= silence_s:
            await self.open([])
            await self.write(PING)
