"""The browser's websocket `/ws/console?topics=overview[,requests]`: one per page, operators only.

A frame is complete in itself, so a slow page loses old ones: at most UNACKED_MAX frames are on
their way to it, then it is skipped until it acknowledges, and what it gets next is the newest.
JSON frames begin with `{`; tables whose rows come and go are HTML that htmx swaps out of band.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async
from django.contrib.auth import SESSION_KEY, get_user_model
from django.contrib.sessions.backends.db import SessionStore
from django.template.loader import render_to_string

from console import livefeed, queueview, state, workerview

Part = Callable[[state.ServerState, Mapping[str, str]], tuple[str, dict[str, Any]]]
PARTS: dict[str, Part] = {  # topics with HTML of their own: template and context, without a query
    "requests": livefeed.requests_part,
    "queues": queueview.part,
    "worker": workerview.part,
}
TOPICS = ("overview", *PARTS)
UNACKED_MAX = 3  # frames
SOCKETS_MAX = 256  # open pages of one server process
MESSAGE_BYTES_MAX = 256  # an acknowledgement is far smaller
SESSION_CHECK_S = 30.0  # a page of someone who logged out goes quiet within this time
CLOSE_POLICY, CLOSE_INTERNAL, CLOSE_TRY_LATER = 1008, 1011, 1013
CLOSE_SIGNED_OUT = 4401  # the page does not try again

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
logger = logging.getLogger(__name__)


class LiveSocket:
    """ASGI application behind session authentication; the origin is checked in front of it."""

    num_open = 0

    @classmethod
    def as_asgi(cls) -> "LiveSocket":
        return cls()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        current = state.get()
        user = scope["user"]
        if not (user.is_authenticated and user.is_active and user.is_staff):
            await send({"type": "websocket.close", "code": CLOSE_SIGNED_OUT})
        elif current is None or current.draining or LiveSocket.num_open >= SOCKETS_MAX:
            await send({"type": "websocket.close", "code": CLOSE_TRY_LATER})
        else:
            LiveSocket.num_open += 1
            try:
                session_key = scope["session"].session_key
                await _serve(current, topics_of(scope), query_of(scope), session_key, receive, send)
            finally:
                LiveSocket.num_open -= 1


def topics_of(scope: dict[str, Any]) -> tuple[str, ...]:
    """Known topics of the query string; what is not known is left out."""
    query = parse_qs(scope.get("query_string", b"").decode("latin1"))
    asked = ",".join(query.get("topics", [])).split(",")
    return tuple(topic for topic in TOPICS if topic in asked)


def query_of(scope: dict[str, Any]) -> dict[str, str]:
    """What else the page's address says: filters that the rows keep to."""
    query = parse_qs(scope.get("query_string", b"").decode("latin1"))
    return {name: values[-1] for name, values in query.items()}


async def _serve(
    current: state.ServerState,
    topics: tuple[str, ...],
    query: Mapping[str, str],
    session_key: str,
    receive: Receive,
    send: Send,
) -> None:
    """Sends until the page is gone, breaks the protocol or is signed out."""
    window = _Window()
    tasks = [
        asyncio.ensure_future(work)
        for work in (
            _read(receive, window),
            _write(current, topics, query, window, send),
            _watch_session(session_key),
        )
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        code = min(task.result() for task in done)
        if code and not current.draining:  # a draining server has sent its own close
            await send({"type": "websocket.close", "code": code})
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


class _Window:
    """Which frames are on their way to the page."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.has_room = asyncio.Event()
        self.has_room.set()

    def send(self, seq: int) -> None:
        self.sent.append(seq)
        if len(self.sent) >= UNACKED_MAX:
            self.has_room.clear()

    def acknowledge(self, seq: int) -> None:
        self.sent = [waiting for waiting in self.sent if waiting > seq]
        if len(self.sent) < UNACKED_MAX:
            self.has_room.set()


async def _read(receive: Receive, window: _Window) -> int:
    """Takes acknowledgements; 0 when the page is gone, else the code to close with."""
    while True:
        event = await receive()
        if event["type"] == "websocket.disconnect":
            return 0
        text = event.get("text") or ""
        try:
            acknowledged = json.loads(text)["ack"] if len(text) <= MESSAGE_BYTES_MAX else None
        except (ValueError, KeyError, TypeError, RecursionError):
            acknowledged = None
        if not isinstance(acknowledged, int):
            return CLOSE_POLICY
        window.acknowledge(acknowledged)


async def _write(
    current: state.ServerState,
    topics: tuple[str, ...],
    query: Mapping[str, str],
    window: _Window,
    send: Send,
) -> int:
    feed = await livefeed.feed_of(current)
    seq = 0
    while not current.draining:
        await window.has_room.wait()
        newest = await feed.after(seq)
        if current.draining:
            break
        if newest is None:
            return CLOSE_INTERNAL
        seq, text = newest
        for topic in topics:
            if topic not in PARTS:
                continue
            template, context = PARTS[topic](current, query)
            html = await sync_to_async(render_to_string, thread_sensitive=False)(template, context)
            await send({"type": "websocket.send", "text": html.strip()})
        await send({"type": "websocket.send", "text": text})
        window.send(seq)
    return 0


async def _watch_session(session_key: str) -> int:
    while await database_sync_to_async(is_signed_in)(session_key):
        await asyncio.sleep(SESSION_CHECK_S)
    return CLOSE_SIGNED_OUT


def is_signed_in(session_key: str) -> bool:
    """The session still belongs to an active operator."""
    user_id = SessionStore(session_key).get(SESSION_KEY)
    return (
        user_id is not None
        and get_user_model().objects.filter(pk=user_id, is_active=True, is_staff=True).exists()
    )
