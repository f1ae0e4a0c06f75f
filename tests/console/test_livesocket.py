"""The page's websocket: operators only, complete frames, never a queue behind a slow page."""

import asyncio
import json

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AnonymousUser
from django.test import Client

from console import livefeed, livesocket, state
from console.livesocket import LiveSocket
from tests.console.memoryserver import MemoryServer
from tests.console.pageserver import state_of

pytestmark = pytest.mark.django_db(transaction=True)


class Page:
    """The browser's end of the socket, in memory."""

    def __init__(self, user, session, topics="overview"):
        self.scope = {
            "type": "websocket",
            "user": user,
            "session": session,
            "query_string": f"topics={topics}".encode(),
        }
        self.inbox = asyncio.Queue()
        self.outbox = asyncio.Queue()
        self.inbox.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.ensure_future(
            LiveSocket.as_asgi()(self.scope, self.inbox.get, self.outbox.put)
        )

    async def take(self):
        return await asyncio.wait_for(self.outbox.get(), 20)

    async def frame(self):
        """The next JSON frame; HTML before it is skipped."""
        while True:
            event = await self.take()
            assert event["type"] == "websocket.send", event
            if event["text"].startswith("{"):
                return json.loads(event["text"])

    def say(self, **event):
        self.inbox.put_nowait({"type": "websocket.receive", **event})

    def acknowledge(self, seq):
        self.say(text=json.dumps({"ack": seq}))

    async def leave(self):
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await asyncio.wait_for(self.task, 20)


def signed_in(is_staff=True):
    """A user and a session as AuthMiddlewareStack would put them into the scope."""
    user = get_user_model().objects.create_user("ada")  # no password: hashing is slow
    get_user_model().objects.filter(pk=user.pk).update(is_staff=is_staff)
    user.refresh_from_db()
    client = Client()
    client.force_login(user)
    return user, client.session


@pytest.fixture
async def server(monkeypatch):
    made = state_of(MemoryServer(), asyncio.get_running_loop())
    monkeypatch.setattr(state, "current", made)
    yield made
    (await livefeed.feed_of(made)).stop()


@pytest.fixture
async def page(server):
    made = Page(*await sync_to_async(signed_in)())
    assert await made.take() == {"type": "websocket.accept"}
    yield made
    if not made.task.done():
        await made.leave()


async def test_an_operator_gets_complete_frames(page):
    frame = await page.frame()
    assert frame["topic"] == "overview" and len(frame["classes"]) == 4
    assert [worker["worker_id"] for worker in frame["workers"]] == ["w1"]


async def test_frames_go_on_as_they_are_acknowledged(page, server):
    seqs = []
    for _ in range(2 * livesocket.UNACKED_MAX):
        frame = await page.frame()
        seqs.append(frame["seq"])
        page.acknowledge(frame["seq"])
        (await livefeed.feed_of(server)).sample()
    assert seqs == sorted(set(seqs)) and len(seqs) == 6


async def test_a_page_that_does_not_acknowledge_is_skipped_and_then_gets_the_newest(page, server):
    feed = await livefeed.feed_of(server)
    for _ in range(livesocket.UNACKED_MAX):
        last = (await page.frame())["seq"]
        feed.sample()
    for _ in range(10):
        feed.sample()
        await asyncio.sleep(0)
    assert page.outbox.empty()
    page.acknowledge(last)
    assert (await page.frame())["seq"] == feed.newest["seq"]


async def test_live_requests_come_as_rows_to_be_swapped_in(server):
    page = Page(*await sync_to_async(signed_in)(), topics="overview,requests")
    await page.take()
    html = (await page.take())["text"]
    assert html.startswith('<tbody id="live-rows" hx-swap-oob="innerHTML">')
    assert "Nothing in flight" in html
    assert (await page.frame())["topic"] == "overview"
    await page.leave()


@pytest.mark.parametrize(
    "event",
    [
        {"text": "hello"},
        {"text": '{"ack": "1"}'},
        {"text": '{"ack": null}'},
        {"text": "[1]"},
        {"text": "{}"},
        {"text": '{"ack": ' + "1" * 300 + "}"},
        {"text": "[" * 200},
        {"bytes": b"\x00"},
    ],
)
async def test_anything_but_an_acknowledgement_closes_the_socket(page, event):
    page.say(**event)
    events = [await page.take()]
    while events[-1]["type"] != "websocket.close":
        events.append(await page.take())
    assert events[-1]["code"] == 1008
    await asyncio.wait_for(page.task, 20)


@pytest.mark.parametrize("who", ["anonymous", "not staff", "not active"])
async def test_nobody_but_an_active_operator_gets_a_frame(server, who):
    user, session = await sync_to_async(signed_in)(is_staff=who != "not staff")
    user.is_active = who != "not active"
    page = Page(AnonymousUser() if who == "anonymous" else user, session)
    await page.take()
    assert await page.take() == {"type": "websocket.close", "code": 4401}
    await page.task


async def test_without_a_server_the_page_is_told_to_try_later(monkeypatch):
    monkeypatch.setattr(state, "current", None)
    page = Page(*await sync_to_async(signed_in)())
    await page.take()
    assert await page.take() == {"type": "websocket.close", "code": 1013}
    await page.task


async def test_one_socket_above_the_maximum_is_told_to_try_later(server, monkeypatch):
    user, session = await sync_to_async(signed_in)()
    monkeypatch.setattr(LiveSocket, "num_open", livesocket.SOCKETS_MAX)
    page = Page(user, session)
    await page.take()
    assert await page.take() == {"type": "websocket.close", "code": 1013}
    monkeypatch.setattr(LiveSocket, "num_open", livesocket.SOCKETS_MAX - 1)
    last = Page(user, session)
    await last.take()
    assert (await last.frame())["seq"] >= 1
    await last.leave()


async def test_a_page_that_leaves_gives_its_place_back(page):
    await page.frame()
    assert LiveSocket.num_open == 1
    await page.leave()
    assert LiveSocket.num_open == 0


async def test_a_draining_server_sends_nothing_more(page, server):
    await page.frame()
    server.draining = True
    (await livefeed.feed_of(server)).sample()
    await asyncio.wait_for(page.task, 20)
    assert page.outbox.empty()


async def test_a_session_that_ended_closes_the_socket(server, monkeypatch):
    user, session = await sync_to_async(signed_in)()
    monkeypatch.setattr(livesocket, "SESSION_CHECK_S", 0.01)
    page = Page(user, session)
    await page.take()
    await page.frame()
    await sync_to_async(session.flush)()
    events = [await page.take()]
    while events[-1]["type"] != "websocket.close":
        events.append(await page.take())
    assert events[-1]["code"] == 4401
    await page.task


def test_a_session_counts_only_while_its_user_is_an_active_operator():
    user, session = signed_in()
    key = session.session_key
    assert livesocket.is_signed_in(key)
    get_user_model().objects.filter(pk=user.pk).update(is_staff=False)
    assert not livesocket.is_signed_in(key)
    assert not livesocket.is_signed_in("x" * 32)


@pytest.mark.parametrize(
    ("query", "topics"),
    [
        (b"topics=overview", ("overview",)),
        (b"topics=requests,overview", ("overview", "requests")),
        (b"topics=nonsense", ()),
        (b"", ()),
        (b"\xff=%zz", ()),
    ],
)
def test_topics_come_from_the_query_and_unknown_ones_are_left_out(query, topics):
    assert livesocket.topics_of({"query_string": query}) == topics


async def test_a_feed_that_ended_closes_its_sockets_so_that_pages_come_again(page, server):
    page.acknowledge((await page.frame())["seq"])
    (await livefeed.feed_of(server)).stop()
    assert await page.take() == {"type": "websocket.close", "code": 1011}
    await page.task
