"""One HTTP connection with limits: its channel, its requests, and refusals in OpenAI's shape.

The subclasses lean on names that Daphne and Twisted call private; both are pinned and
tests/console/test_daphneserver.py asserts each name.
"""

import asyncio
import json
import logging
from dataclasses import dataclass
from http import HTTPStatus
from io import BytesIO
from typing import Any

from daphne.http_protocol import WebRequest
from twisted.internet.interfaces import IPushProducer
from twisted.web.http import HTTPChannel
from zope.interface import implementer

logger = logging.getLogger(__name__)

BODY_CHECKS_PER_GRACE = 2
UPLOAD_PATH = b"/v1/files"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may cost."""

    v1_body_bytes_max: int = 4 << 20
    upload_body_bytes_max: int = (200 * 1000 * 1000) + (64 << 10)  # a batch file and its form
    uploads_max: int = 4  # at a time; each may fill the spool with as much
    body_bytes_max: int = 1 << 20  # forms and the JSON of pages, admin and /api
    header_s_max: float = 10.0
    body_grace_s: float = 10.0
    body_bytes_per_s_min: int = 64 << 10  # after the grace
    stall_s_max: float = 20.0  # a reader that takes nothing for so long is cut off
    linger_s: float = 2.0  # the rest of a refused body is read and dropped for so long, so that
    # the refusal is not lost to a TCP reset
    websocket_buffer_bytes_max: int = 64 << 10  # unsent bytes of one websocket; above, `send` waits


_CODES = {
    HTTPStatus.BAD_REQUEST: "malformed_request",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "headers_too_large",
}


def error_body(status: HTTPStatus, message: str) -> bytes:
    """OpenAI's error shape, for answers that no application gives."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = _CODES.get(status, "server_error" if status >= 500 else "invalid_request")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error}).encode()


def raw_refusal(status: HTTPStatus, message: str) -> bytes:
    """A whole HTTP/1.1 response that ends its connection."""
    body = error_body(status, message)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@implementer(IPushProducer)
class BoundedRequest(WebRequest):
    """One HTTP request; the transport pauses it when its write buffer is over 64 KiB."""

    is_refused = False
    is_upload = False
    upload: Any = None  # the spooled body of an upload: a file that the application reads itself
    body_bytes = 0
    body_bytes_max = 0

    def __init__(self, channel: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(channel, *args, **kwargs)
        self._parsePOSTFormSubmission = False  # Django parses forms itself, with its own limits
        self.limits: Limits = self.server.limits
        self.writable = asyncio.Event()
        self.writable.set()

    # --- body -------------------------------------------------------------------------------

    def gotLength(self, length: int | None) -> None:
        """Headers are in, no body byte yet."""
        path = self.channel._path.partition(b"?")[0]
        is_upload = path == UPLOAD_PATH and self.channel._command == b"POST"
        self.body_bytes_max = self.limits.body_bytes_max
        if is_upload:
            self.body_bytes_max = self.limits.upload_body_bytes_max
        elif path.startswith(b"/v1/"):
            self.body_bytes_max = self.limits.v1_body_bytes_max
        super().gotLength(length)
        if (length or 0) > self.body_bytes_max:
            self.refuse_body()
        elif is_upload and self.server.num_uploads >= self.limits.uploads_max:
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many files are being uploaded.")
        elif is_upload:
            self.is_upload = True
            self.server.num_uploads += 1

    def handleContentChunk(self, data: bytes) -> None:
        self.body_bytes += len(data)
        if self.is_refused:
            return
        if self.body_bytes > self.body_bytes_max:
            self.refuse_body()
        else:
            super().handleContentChunk(data)

    def refuse_body(self) -> None:
        self.refuse(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The request body is larger than the {self.body_bytes_max} bytes this path accepts.",
        )

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer at once, drop what still comes, close within `linger_s`. Does nothing twice."""
        if self.is_refused:
            return
        self.is_refused = True
        self.requestHeaders.removeHeader(b"Expect")  # no `100 Continue` after the refusal
        self.content.close()
        self.channel.refuse(status, message)

    def process(self) -> Any:
        """An upload's body stays in its file: Daphne would queue it in memory, piece by piece."""
        if self.is_upload:
            self.upload, self.content = self.content, BytesIO()
        return super().process()

    def end_upload(self) -> None:
        """Room for the next one; does nothing twice."""
        if self.is_upload:
            self.is_upload = False
            self.server.num_uploads -= 1
        if self.upload is not None:
            self.upload.close()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """A refused request has its answer already; anything else goes to the application."""
        if self.is_refused:
            self.channel.loseConnection()
        else:
            super().requestReceived(command, path, version)

    # --- back-pressure ----------------------------------------------------------------------

    def pauseProducing(self) -> None:
        self.writable.clear()

    def resumeProducing(self) -> None:
        self.writable.set()

    def stopProducing(self) -> None:
        self.writable.set()

    def connectionLost(self, reason: Any) -> None:
        self.writable.set()  # nobody waits for a dead peer
        self.end_upload()
        super().connectionLost(reason)

    def finish(self) -> None:
        if self.producer is not None:
            self.unregisterProducer()
        self.end_upload()
        super().finish()

    async def wait_writable(self) -> None:
        """Return when the write buffer has room; cut the reader off after `stall_s_max`.

        Raises CancelledError then, which ends the application's task and so the generation."""
        if self.writable.is_set():
            return
        try:  # not wait_for, which on Python 3.11 may swallow a cancellation
            async with asyncio.timeout(self.limits.stall_s_max):
                await self.writable.wait()
        except TimeoutError:
            if self.channel is not None:
                logger.info("reader_cut client=%s", self.client_addr)
                self.channel.transport.abortConnection()
            raise asyncio.CancelledError from None

    async def write_now(self, data: bytes) -> None:
        """Write a piece of the response body; the extension WRITE_EXTENSION of the scope.

        For the time between http.response.start and the last http.response.body. The bytes go
        straight to the socket when nothing waits before them. Returns in silence when the client
        has gone, as `send` does."""
        if not self.push(data):
            await self.wait_writable()

    def push(self, data: bytes) -> bool:
        """Write without waiting; False when the reader is behind, and `wait_writable` is due.

        The extension PUSH_EXTENSION of the scope."""
        if self.finished or self._disconnected or self.channel is None:
            return True
        if not self.startedWriting:
            self.write(data)  # headers first
        elif data:
            frame = b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data
            self.sentLength += len(data)
            write_to_transport(self.channel.transport, frame)
        return self.writable.is_set()

    # --- answers that no application gave ---------------------------------------------------

    def basic_error(self, status: int, status_text: bytes, body: str) -> None:
        """Daphne's own refusals, in JSON instead of its HTML page."""
        del status_text
        headers = [(b"content-type", b"application/json")]
        if not self._response_started:
            self.handle_reply({"type": "http.response.start", "status": status, "headers": headers})
            payload = error_body(HTTPStatus(status), body)
            self.handle_reply({"type": "http.response.body", "body": payload})
        elif self.channel is not None:
            self.channel.transport.abortConnection()  # a cut answer must not look complete


def write_to_transport(transport: Any, frame: bytes) -> None:
    """`socket.send` when the transport's buffer is empty, the buffer for whatever is left."""
    sent = 0
    is_idle = not transport.dataBuffer and not transport._tempDataBuffer
    if is_idle and transport.connected and not transport.disconnecting:
        try:
            sent = transport.socket.send(frame)
        except OSError:
            sent = 0  # full, or broken: the reactor finds out which when it writes the rest
    if sent < len(frame):
        transport.write(frame[sent:])


class BoundedChannel(HTTPChannel):
    """One connection: deadlines for headers and body, and Twisted's own refusals in JSON."""

    deadline: Any = None  # the pending DelayedCall, or None

    @property
    def limits(self) -> Limits:
        return self.factory.server.limits

    def dataReceived(self, data: bytes) -> None:
        # Twisted's idle timer starts anew with each byte; this one does not.
        if self.deadline is None and not self._handlingRequest:
            self.deadline = self.callLater(self.limits.header_s_max, self.headers_late)
        super().dataReceived(data)

    def allHeadersReceived(self) -> None:
        self.stop_deadline()
        super().allHeadersReceived()
        if self.length != 0 and not self.requests[-1].is_refused:
            self.deadline = self.callLater(
                self.limits.body_grace_s, self.check_body, self.requests[-1], 0.0
            )

    def allContentReceived(self) -> None:
        self.stop_deadline()
        super().allContentReceived()

    def headers_late(self) -> None:
        self.deadline = None
        self.refuse(HTTPStatus.REQUEST_TIMEOUT, "The headers took too long.")

    def check_body(self, request: BoundedRequest, after_grace_s: float) -> None:
        """Cut a body that comes slower than `body_bytes_per_s_min` after its grace."""
        self.deadline = None
        if request.body_bytes < after_grace_s * self.limits.body_bytes_per_s_min:
            request.refuse(HTTPStatus.REQUEST_TIMEOUT, "The body came too slowly.")
        else:
            wait_s = self.limits.body_grace_s / BODY_CHECKS_PER_GRACE
            self.deadline = self.callLater(wait_s, self.check_body, request, after_grace_s + wait_s)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer outside any application; what the client still sends is dropped for `linger_s`."""
        self.stop_deadline()
        self.persistent = 0
        self.transport.write(raw_refusal(status, message))
        self.deadline = self.callLater(self.limits.linger_s, self.end_linger)

    def end_linger(self) -> None:
        self.deadline = None
        self.transport.abortConnection()

    def _respondToBadRequestAndDisconnect(self) -> None:
        if (
            self._receivedHeaderSize > self.totalHeadersSize
            or self._receivedHeaderCount > self.maxHeaders
        ):
            status, message = (
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                "The headers are too large.",
            )
        else:
            status, message = HTTPStatus.BAD_REQUEST, "The request is not valid HTTP/1.1."
        self.transport.write(raw_refusal(status, message))
        self.loseConnection()

    def lineLengthExceeded(self, line: bytes) -> None:
        """A header line longer than LineReceiver keeps."""
        del line
        self.transport.write(
            raw_refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "A header line is too long.")
        )
        self.transport.loseConnection()

    def connectionLost(self, reason: Any) -> None:
        self.stop_deadline()
        super().connectionLost(reason)

    def stop_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
