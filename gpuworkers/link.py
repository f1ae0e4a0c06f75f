"""The worker's websocket to the console: join, credits, reconnect with jitter."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from controlplane import protocol
from controlplane.errors import ProtocolError, SlackwaterError
from gpuworkers.outbox import Outbox

OPEN_S_MAX = 10.0  # TCP and websocket handshake
WELCOME_S_MAX = 10.0  # from Hello to its answer
PING_S, PONG_S_MAX = 1.5, 3.5  # a half-open connection is noticed within 5 s
RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0  # full jitter between attempts
FLUSH_S_MAX = 1.0  # for the last frames at a goodbye

logger = logging.getLogger(__name__)


class JoinRefused(SlackwaterError):
    """The console does not take this worker; `reason` is for the person who started it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LinkOwner(Protocol):
    """The worker behind a link."""

    async def hello(self) -> protocol.Hello: ...  # without token and resume
    def welcomed(self, welcome: protocol.Welcome, is_new: bool) -> None: ...
    def received(self, message: protocol.ToWorker) -> None: ...


class Link:
    """Keeps one worker joined. Use from the event loop's thread only."""

    def __init__(
        self, url: str, token: str, owner: LinkOwner, uniform: Callable[[], float]
    ) -> None:
        self._url = url
        self._token = token
        self._owner = owner
        self._uniform = uniform
        self._resume: protocol.ResumeProof | None = None
        self._outbox = Outbox()
        self._wake = asyncio.Event()
        self._connection: ClientConnection | None = None
        self._credits = 0
        self._attempts = 0
        self._closing = asyncio.Event()
        self.sent_at_s = 0.0  # loop time of the last frame
        self.heartbeat_s = 1.0

    @property
    def is_joined(self) -> bool:
        return self._connection is not None

    def post(self, message: protocol.FromWorker) -> None:
        """Sends now or when credit and socket allow, over a reconnect if need be."""
        if not self._outbox.put(message):
            logger.warning("outbox full tokens=%d, reconnecting", self._outbox.num_tokens)
            self._outbox = self._outbox.emptied()
            if self._connection is not None:
                self._connection.transport.abort()
        self._wake.set()

    async def run(self) -> None:
        """Until `close`. Raises JoinRefused when the console says that trying again is useless."""
        sessions = asyncio.create_task(self._sessions())
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait([sessions, closing], return_when=asyncio.FIRST_COMPLETED)
            if sessions.done():
                sessions.result()
        finally:
            sessions.cancel()
            closing.cancel()
            await asyncio.wait([sessions, closing])

    async def _sessions(self) -> None:
        """One connection after the other."""
        while True:
            try:
                await self._session()
            except (OSError, TimeoutError, WebSocketException, ProtocolError) as error:
                logger.info("link lost url=%s reason=%r", self._url, error)
            self._attempts += 1  # since the last Welcome
            ceiling_s = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(self._attempts + 1, 10))
            delay_s = RETRY_S_MIN + self._uniform() * (ceiling_s - RETRY_S_MIN)
            await asyncio.sleep(delay_s)

    async def close(self, reason: str) -> None:
        """Says Goodbye, gives waiting frames FLUSH_S_MAX to leave, and ends `run`."""
        self.post(protocol.Goodbye(reason))
        deadline_s = asyncio.get_running_loop().time() + FLUSH_S_MAX
        while self._connection and self._outbox and _now_s() < deadline_s:
            await asyncio.sleep(0.01)
        self._closing.set()

    async def _session(self) -> None:
        """One connection, from Hello to its end."""
        async with connect(
            self._url,
            compression=None,
            max_size=protocol.FRAME_BYTES_MAX,
            open_timeout=OPEN_S_MAX,
            close_timeout=FLUSH_S_MAX,
            ping_interval=PING_S,
            ping_timeout=PONG_S_MAX,
            proxy=None,
            user_agent_header=None,
        ) as connection:
            if not await self._join(connection):
                return
            self._connection = connection
            sender = asyncio.create_task(self._send(connection))
            try:
                async for frame in connection:
                    self._received(_decode(frame))
            finally:
                self._connection = None
                sender.cancel()
                await asyncio.wait([sender])

    async def _join(self, connection: ClientConnection) -> bool:
        """Hello and its answer. A refused resume proof is dropped: the next attempt is a new
        worker. Raises JoinRefused."""
        hello = await self._owner.hello()
        known = {(s.request_id, s.epoch) for s in hello.sequences}
        waiting = [s for s in self._outbox.sequences() if (s.request_id, s.epoch) not in known]
        resume = self._resume
        hello = msgspec.structs.replace(
            hello,
            token=self._token if resume is None else None,
            resume=resume,
            sequences=hello.sequences + waiting,
        )
        await connection.send(protocol.encode(hello))
        async with asyncio.timeout(WELCOME_S_MAX):
            answer = _decode(await connection.recv())
        if isinstance(answer, protocol.Refused):
            if resume is None and answer.permanent:
                raise JoinRefused(answer.reason)
            if answer.permanent:
                self._resume = None
            logger.warning("join refused reason=%s", answer.reason)
            return False
        if not isinstance(answer, protocol.Welcome):
            raise ProtocolError(f"{type(answer).__name__} before Welcome")
        is_new = resume is None or answer.worker_id != resume.worker_id
        if is_new:
            self._outbox = self._outbox.emptied()
        self._resume = protocol.ResumeProof(answer.worker_id, answer.resume_secret)
        self._credits = answer.credit_frames
        self._attempts = 0
        self.heartbeat_s = answer.heartbeat_s
        self._owner.welcomed(answer, is_new)
        return True

    def _received(self, message: protocol.ToWorker) -> None:
        match message:
            case protocol.Ack(frames=frames):
                self._credits += frames
                self._wake.set()
            case protocol.Welcome() | protocol.Refused():
                raise ProtocolError(f"a second {type(message).__name__}")
            case _:
                self._owner.received(message)

    async def _send(self, connection: ClientConnection) -> None:
        """Frames while there is credit; waits where the socket's buffer is full."""
        self._wake.set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outbox and self._credits > 0:
                    self._credits -= 1
                    await connection.send(protocol.encode(self._outbox.take()))
                    self.sent_at_s = _now_s()
        except ConnectionClosed:
            return  # the reading side sees it too and reconnects


def _decode(frame: str | bytes) -> protocol.ToWorker:
    if isinstance(frame, str):
        raise ProtocolError("a text frame from the console")
    return protocol.decode_to_worker(frame)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
