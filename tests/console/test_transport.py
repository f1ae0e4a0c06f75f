"""The console's end of a worker link: never blocks, never grows without bound."""

import asyncio
from typing import Any

import pytest

from console.transport import (
    CLOSE_POLICY,
    CLOSE_TRY_LATER,
    OUTBOUND_BYTES_MAX,
    MemoryLink,
    SocketLink,
)
from controlplane import protocol
from controlplane.errors import ProtocolError


class Wire:
    """Where a link writes; `gate` closed stands for a peer that does not read."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, event: dict[str, Any]) -> None:
        await self.gate.wait()
        self.events.append(event)

    @property
    def messages(self) -> list[protocol.ToWorker]:
        frames = [event["bytes"] for event in self.events if event["type"] == "websocket.send"]
        return [protocol.decode_to_worker(frame) for frame in frames]


def assign(prompt_tokens: int) -> protocol.Assign:
    return protocol.Assign(
        "r", 1, "m", "full", [2**31] * prompt_tokens, [], protocol.Sampling(1),
        protocol.ClassTargets("interactive", 0, 0.5, 0.03), b"",
    )  # fmt: skip


async def test_messages_leave_in_order_and_then_the_close() -> None:
    wire = Wire()
    link = SocketLink(wire.send)
    link.send(protocol.Cancel("r", 1))
    link.send(protocol.Drain())
    link.close(CLOSE_POLICY, "fenced")
    link.close(1000, "a later close counts for nothing")
    link.send(protocol.Drain())
    await asyncio.wait_for(link.write(), 20)
    assert wire.messages == [protocol.Cancel("r", 1), protocol.Drain()]
    assert wire.events[-1] == {"type": "websocket.close", "code": CLOSE_POLICY, "reason": "fenced"}
    assert link.outbound_bytes == 0


async def test_peer_that_does_not_read_costs_at_most_the_maximum_and_is_closed() -> None:
    wire = Wire()
    wire.gate.clear()
    link = SocketLink(wire.send)
    writer = asyncio.create_task(link.write())
    message = assign(100_000)
    size = len(protocol.encode(message))
    for _ in range(OUTBOUND_BYTES_MAX // size):
        link.send(message)
        await asyncio.sleep(0)
    assert not link.is_closing and link.outbound_bytes <= OUTBOUND_BYTES_MAX
    link.send(message)
    assert link.is_closing and link.outbound_bytes == 0
    wire.gate.set()
    await asyncio.wait_for(writer, 20)
    assert wire.events[-1]["code"] == CLOSE_TRY_LATER
    assert len(wire.messages) == 1  # the one that was on its way


async def test_credit_follows_the_welcome() -> None:
    link = SocketLink(Wire().send)
    assert link.credit_frames == 0
    link.send(protocol.Welcome("w1", 1, "s", 17, protocol.Policy()))
    assert link.credit_frames == 17


async def test_message_over_the_frame_maximum_is_an_error_of_the_sender() -> None:
    link = SocketLink(Wire().send)
    with pytest.raises(ProtocolError):
        link.send(assign(protocol.FRAME_BYTES_MAX))
    assert link.outbound_bytes == 0


def test_memory_link_gives_what_was_sent_since_the_last_look() -> None:
    link = MemoryLink()
    link.send(protocol.Drain())
    assert link.take() == [protocol.Drain()] and link.take() == []
    link.close(1000, "over")
    link.close(CLOSE_POLICY, "again")
    assert link.closed == (1000, "over")
    with pytest.raises(AssertionError):
        link.send(protocol.Drain())
