"""The workers' websocket: joins, credits, breaches; then with real workers over a real server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from console import workersocket
from console.transport import WorkerLink
from console.workersocket import WorkerSocket
from controlplane import protocol
from tests.gpuworkers.stubconsole import HANG_S, assign, make_engine, make_worker

LOAD = make_engine().load(0.0)
BEAT = protocol.Heartbeat(LOAD, 0.0)
HELLO = protocol.Hello(
    [protocol.VERSION], "w", "fake", "0", "mixed",
    protocol.DeviceFacts("modelled", "none", 0, 0, "fp32"), [], 16, 8, LOAD.step_model, token="t",
)  # fmt: skip


class StubFleet:
    """Welcomes everyone, keeps what it hears."""

    def __init__(self, credit_frames: int = 8) -> None:
        self.credit_frames = credit_frames
        self.links: dict[str, WorkerLink] = {}
        self.heard: list[tuple[str, protocol.FromWorker]] = []
        self.gone: list[str] = []
        self.answers_hello = True
        self.breaks = False
        self.changed = asyncio.Event()

    def connected(self, connection_id: str, link: WorkerLink) -> None:
        self.links[connection_id] = link

    def received(self, connection_id: str, message: protocol.FromWorker) -> None:
        assert not self.breaks, "a defect in the fleet"
        self.heard.append((connection_id, message))
        self.changed.set()
        if isinstance(message, protocol.Hello) and self.answers_hello:
            worker_id = f"w-{message.name}"
            welcome = protocol.Welcome(worker_id, 1, "s", self.credit_frames, protocol.Policy())
            self.links[connection_id].send(welcome)

    def disconnected(self, connection_id: str) -> None:
        self.gone.append(connection_id)
        self.changed.set()

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(HANG_S):
            while not holds():
                self.changed.clear()
                await self.changed.wait()


class Peer:
    """The server's side of one ASGI websocket connection, frame by frame."""

    def __init__(self, fleet: StubFleet | None, *headers: tuple[bytes, bytes]) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.events: list[dict[str, Any]] = []
        scope = {"type": "websocket", "path": "/ws/worker", "headers": list(headers)}
        self.inbox.put_nowait({"type": "websocket.connect"})
        application = WorkerSocket(lambda: fleet)
        self.task = asyncio.create_task(application(scope, self.inbox.get, self._send))

    async def _send(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def say(self, *messages: protocol.FromWorker) -> None:
        for message in messages:
            self.inbox.put_nowait(
                {"type": "websocket.receive", "bytes": protocol.encode(message), "text": None}
            )

    def leave(self) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def settle(self) -> None:
        """Lets everything run that can."""
        for _ in range(20):
            await asyncio.sleep(0)

    @property
    def heard(self) -> list[protocol.ToWorker]:
        frames = [event["bytes"] for event in self.events if event["type"] == "websocket.send"]
        return [protocol.decode_to_worker(frame) for frame in frames]

    async def closed(self) -> int:
        """The close code."""
        await asyncio.wait_for(self.task, HANG_S)
        (code,) = [e["code"] for e in self.events if e["type"] == "websocket.close"]
        return int(code)


async def test_hello_is_welcomed_and_messages_reach_the_fleet_in_order() -> None:
    fleet = StubFleet()
    peer = Peer(fleet)
    messages = [protocol.Accepted("r", 1), BEAT, protocol.Goodbye("over")]
    peer.say(HELLO, *messages)
    await peer.settle()
    assert [message for _, message in fleet.heard] == [HELLO, *messages]
    assert isinstance(peer.heard[0], protocol.Welcome)
    peer.leave()
    await asyncio.wait_for(peer.task, HANG_S)
    assert fleet.gone == list(fleet.links)


async def test_browsers_are_refused_before_the_handshake() -> None:
    fleet = StubFleet()
    peer = Peer(fleet, (b"origin", b"http://127.0.0.1:8000"))
    assert await peer.closed() == 1008
    assert peer.events == [{"type": "websocket.close", "code": 1008}] and not fleet.links


async def test_workers_come_later_while_the_console_is_not_ready() -> None:
    assert await Peer(None).closed() == 1013


@pytest.mark.parametrize(
    "event",
    [
        {"type": "websocket.receive", "bytes": None, "text": "hello"},
        {"type": "websocket.receive", "bytes": b"", "text": None},
        {"type": "websocket.receive", "bytes": b"\xc1\xff", "text": None},
        {"type": "websocket.receive", "bytes": b"\x81\xa4type\xa7unknown", "text": None},
        {"type": "websocket.receive", "bytes": protocol.encode(protocol.Drain()), "text": None},
        {"type": "websocket.receive", "bytes": protocol.encode(BEAT), "text": None},
        {"type": "websocket.receive", "bytes": bytes((1 << 20) + 1), "text": None},
    ],
    ids=["text", "empty", "noise", "unknown", "ours", "beat", "large"],
)
async def test_first_frame_that_is_no_hello_closes_the_connection(event: dict[str, Any]) -> None:
    fleet = StubFleet()
    peer = Peer(fleet)
    peer.inbox.put_nowait(event)
    assert await peer.closed() == 1008
    assert not fleet.heard and len(fleet.gone) == 1


@pytest.mark.parametrize("frame", [b"\xc1", protocol.encode(HELLO)], ids=["noise", "hello"])
async def test_later_frame_that_is_no_message_closes_the_connection(frame: bytes) -> None:
    fleet = StubFleet()
    peer = Peer(fleet)
    peer.say(HELLO)
    peer.inbox.put_nowait({"type": "websocket.receive", "bytes": frame, "text": None})
    assert await peer.closed() == 1008
    assert len(fleet.heard) == 1


async def test_silent_peer_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workersocket, "HELLO_S_MAX", 0.05)
    assert await Peer(StubFleet()).closed() == 1008


async def test_frames_are_acknowledged_as_they_are_consumed() -> None:
    peer = Peer(StubFleet(credit_frames=8))
    peer.say(HELLO)
    for _ in range(3):
        await peer.settle()
        peer.say(*[BEAT] * 8)
    await peer.settle()
    acks = [message.frames for message in peer.heard if isinstance(message, protocol.Ack)]
    assert sum(acks) == 24 and set(acks) == {2}
    peer.leave()
    await peer.task


async def test_exactly_the_credit_may_wait_and_one_frame_more_is_a_breach() -> None:
    fleet = StubFleet(credit_frames=8)
    honest, greedy = Peer(fleet), Peer(fleet)
    for peer, frames in ((honest, 8), (greedy, 9)):
        peer.say(HELLO)
        await peer.settle()
        peer.say(*[BEAT] * frames)
    assert await greedy.closed() == 1008
    assert not honest.task.done()
    honest.leave()
    await honest.task


async def test_ten_thousand_tiny_frames_close_the_connection_early() -> None:
    fleet = StubFleet(credit_frames=protocol.CREDIT_FRAMES)
    peer = Peer(fleet)
    peer.say(HELLO)
    await peer.settle()
    peer.say(*[protocol.Accepted("r", 1)] * 10_000)
    assert await peer.closed() == 1008
    assert len(fleet.heard) == 1 + protocol.CREDIT_FRAMES


async def test_frames_before_the_welcome_are_a_breach() -> None:
    fleet = StubFleet()
    fleet.answers_hello = False
    peer = Peer(fleet)
    peer.say(HELLO, BEAT)
    assert await peer.closed() == 1008
    assert len(fleet.heard) == 1


async def test_refusal_leaves_before_the_close() -> None:
    fleet = StubFleet()
    fleet.answers_hello = False
    peer = Peer(fleet)
    peer.say(HELLO)
    await peer.settle()
    (link,) = fleet.links.values()
    link.send(protocol.Refused("the join token is spent"))
    link.close(1008, "refused")
    peer.leave()
    assert await peer.closed() == 1008
    assert peer.heard == [protocol.Refused("the join token is spent")]


async def test_nothing_of_a_closing_link_reaches_the_fleet() -> None:
    fleet = StubFleet()
    peer = Peer(fleet)
    peer.say(HELLO)
    await peer.settle()
    next(iter(fleet.links.values())).close(1008, "fenced")
    peer.say(BEAT)
    await peer.settle()
    peer.leave()
    await peer.task
    assert len(fleet.heard) == 1


async def test_defect_in_the_fleet_closes_this_connection_only() -> None:
    fleet = StubFleet()
    healthy, broken = Peer(fleet), Peer(fleet)
    for peer in (healthy, broken):
        peer.say(HELLO)
        await peer.settle()
    fleet.breaks = True
    broken.say(BEAT)
    assert await broken.closed() == 1011
    fleet.breaks = False
    healthy.say(BEAT)
    await healthy.settle()
    assert fleet.heard[-1][1] == BEAT and not healthy.task.done()
    healthy.leave()
    await healthy.task


# --- real workers over a real socket


@contextlib.asynccontextmanager
async def server(fleet: StubFleet) -> AsyncIterator[str]:
    """The application behind a websocket server that is not Daphne."""
    application = WorkerSocket(lambda: fleet)

    async def connection(socket: ServerConnection) -> None:
        is_new = True

        async def receive() -> dict[str, Any]:
            nonlocal is_new
            if is_new:
                is_new = False
                return {"type": "websocket.connect"}
            try:
                return {"type": "websocket.receive", "bytes": await socket.recv()}
            except ConnectionClosed:
                return {"type": "websocket.disconnect", "code": 1006}

        async def send(event: dict[str, Any]) -> None:
            with contextlib.suppress(ConnectionClosed):
                if event["type"] == "websocket.send":
                    await socket.send(event["bytes"])
                elif event["type"] == "websocket.close":
                    await socket.close(event["code"], event["reason"])

        await application({"type": "websocket", "headers": []}, receive, send)

    listener = await serve(connection, "127.0.0.1", 0, compression=None)
    yield f"ws://127.0.0.1:{listener.sockets[0].getsockname()[1]}/ws/worker"
    listener.close()
    await listener.wait_closed()


def output(fleet: StubFleet, request_id: str) -> list[int]:
    steps = [message for _, message in fleet.heard if isinstance(message, protocol.StepReport)]
    reports = [r for step in steps for r in step.sequences if r.request_id == request_id]
    return [token_id for report in reports for token_id in report.token_ids]


async def test_two_workers_serve_a_request_with_handoff_through_the_consumer() -> None:
    prompt = list(range(50))
    fleet = StubFleet(credit_frames=4)
    async with server(fleet) as url:
        workers = [make_worker(url, make_engine(), name) for name in ("p", "d")]
        tasks = [asyncio.create_task(worker.run()) for worker in workers]
        await fleet.until(lambda: len(fleet.heard) >= 4)  # two Hellos, two first heartbeats
        by_name = {m.name: (c, m) for c, m in fleet.heard if isinstance(m, protocol.Hello)}
        to_prefill, to_decode = (fleet.links[by_name[name][0]] for name in ("p", "d"))
        to_decode.send(assign("alone", prompt, 30))
        into = protocol.HandoffIn(by_name["p"][1].handoff_address, "capability")
        out = protocol.HandoffOut("capability")
        to_prefill.send(assign("split", prompt, 30, stage="prefill", handoff_out=out))
        to_decode.send(assign("split", prompt, 30, stage="decode", handoff_in=into))
        await fleet.until(lambda: len(output(fleet, "alone")) == len(output(fleet, "split")) == 30)
        assert sorted(output(fleet, "alone")) == sorted(output(fleet, "split"))
        assert any(isinstance(message, protocol.HandoffDone) for _, message in fleet.heard)
        for worker in workers:
            await worker.stop("test over")
        await asyncio.gather(*tasks)
        await fleet.until(lambda: len(fleet.gone) == 2)
