"""The worker's websocket to the console: join, credits, reconnect with jitter, bounded outbox."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from controlplane import protocol
from controlplane.errors import ProtocolError, SlackwaterError

OPEN_S_MAX = 10.0  # TCP and websocket handshake
WELCOME_S_MAX = 10.0  # from Hello to its answer
PING_S, PONG_S_MAX = 1.5, 3.5  # a half-open connection is noticed within 5 s
RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0  # full jitter between attempts
FLUSH_S_MAX = 1.0  # for the last frames at a goodbye
MESSAGES_MAX = 8192  # answers and handoff messages that wait for credit
REPORTS_MAX = 8192  # merged sequence reports that wait
TOKENS_MAX = 262_144  # ids in them
FRAME_TOKENS_MAX = 65_536  # of one StepReport: at most 5 bytes each, so within FRAME_BYTES_MAX
FRAME_REPORTS_MAX = 1024

logger = logging.getLogger(__name__)


class JoinRefused(SlackwaterError):
    """The console does not take this worker; `reason` is for the person who started it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def merge_loads(older: protocol.WorkerLoad, newer: protocol.WorkerLoad) -> protocol.WorkerLoad:
    """The newer state with the seconds of both."""
    return msgspec.structs.replace(
        newer,
        online_s=older.online_s + newer.online_s,
        batch_s=older.batch_s + newer.batch_s,
        idle_s=older.idle_s + newer.idle_s,
    )


def without_seconds(load: protocol.WorkerLoad) -> protocol.WorkerLoad:
    """The same state, its seconds already reported."""
    return msgspec.structs.replace(load, online_s=0.0, batch_s=0.0, idle_s=0.0)


class Outbox:
    """What waits for credit or for the socket. Step reports merge, so a console that reads slowly
    costs bounded memory and still gets every id, in order.

    Order out: answers and handoff messages, then reports, then the last heartbeat, Drained and
    Goodbye."""

    def __init__(self) -> None:
        self._messages: deque[protocol.FromWorker] = deque()
        self._reports: deque[protocol.SequenceReport] = deque()
        self._newest: dict[tuple[str, int], int] = {}  # position of a sequence's newest report
        self._taken = 0  # reports taken so far: position of self._reports[0]
        self._tokens = 0
        self._load: protocol.WorkerLoad | None = None
        self._heartbeat: protocol.Heartbeat | None = None
        self._last: list[protocol.FromWorker] = []

    def __bool__(self) -> bool:
        return bool(self._messages or self._load or self._heartbeat or self._last)

    @property
    def num_tokens(self) -> int:
        return self._tokens

    def put(self, message: protocol.FromWorker) -> bool:
        """False when a maximum is reached: the caller reconnects, and the console asks again for
        what it misses."""
        match message:
            case protocol.StepReport(sequences=sequences, load=load):
                self._load = merge_loads(self._load, load) if self._load else load
                for report in sequences:
                    self._merge(report)
                return len(self._reports) <= REPORTS_MAX and self._tokens <= TOKENS_MAX
            case protocol.Heartbeat(load=load):
                if self._heartbeat is not None:
                    load = merge_loads(self._heartbeat.load, load)
                self._heartbeat = protocol.Heartbeat(load, message.busy_s)
            case protocol.Drained() | protocol.Goodbye():
                if message not in self._last:
                    self._last.append(message)
            case _:
                self._messages.append(message)
        return len(self._messages) <= MESSAGES_MAX

    def _merge(self, new: protocol.SequenceReport) -> None:
        """Appends to the sequence's newest report where the ids follow on, else stands alone."""
        key = (new.request_id, new.epoch)
        self._tokens += len(new.token_ids)
        position = self._newest.get(key, -1)
        if position >= self._taken:
            old = self._reports[position - self._taken]
            token_ids = old.token_ids + new.token_ids
            is_next = new.seq == old.seq + len(old.token_ids) and old.finish_reason is None
            if is_next and len(token_ids) <= protocol.RESEND_TOKENS_MAX:
                self._reports[position - self._taken] = protocol.SequenceReport(
                    new.request_id,
                    new.epoch,
                    old.seq,
                    token_ids,
                    new.finish_reason,
                    old.prefill_tokens + new.prefill_tokens,
                    new.cached_tokens,
                    new.context_tokens,
                )
                return
        self._newest[key] = self._taken + len(self._reports)
        self._reports.append(new)

    def take(self) -> protocol.FromWorker:
        """The next frame's message; the outbox is not empty."""
        if self._messages:
            return self._messages.popleft()
        if self._load is not None:
            return self._take_report(self._load)
        if self._heartbeat is not None:
            heartbeat, self._heartbeat = self._heartbeat, None
            return heartbeat
        return self._last.pop(0)

    def _take_report(self, load: protocol.WorkerLoad) -> protocol.StepReport:
        sequences: list[protocol.SequenceReport] = []
        tokens = 0
        while self._reports and len(sequences) < FRAME_REPORTS_MAX:
            if sequences and tokens + len(self._reports[0].token_ids) > FRAME_TOKENS_MAX:
                break
            report = self._reports.popleft()
            self._taken += 1
            tokens += len(report.token_ids)
            sequences.append(report)
        self._tokens -= tokens
        self._load = without_seconds(load) if self._reports else None
        if not self._reports:
            self._newest.clear()
        return protocol.StepReport(sequences, load)

    def sequences(self) -> list[protocol.LiveSequence]:
        """Sequences with ids that wait here, for the Hello of a reconnect."""
        ends = {(r.request_id, r.epoch): r.seq + len(r.token_ids) for r in self._reports}
        return [protocol.LiveSequence(*key, end) for key, end in ends.items()]

    def emptied(self) -> "Outbox":
        """An outbox that keeps nothing of this one but Drained and Goodbye."""
        fresh = Outbox()
        fresh._last = self._last
        return fresh


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

    @property
    def round_trip_s(self) -> float:
        """Of the last ping; 0 before the first."""
        return self._connection.latency if self._connection else 0.0

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
