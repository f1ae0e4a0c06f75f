"""The worker's websocket: joining, being refused, reconnecting, and a bounded outbox."""

import asyncio

import pytest

from controlplane import protocol
from gpuworkers import link as links
from gpuworkers.link import JoinRefused, Link
from gpuworkers.outbox import MESSAGES_MAX
from tests.gpuworkers.stubconsole import StubConsole, assign, make_engine, make_worker
from tests.gpuworkers.test_server import PROMPT, kinds, running, undisturbed


async def test_worker_joins_with_its_token_and_tells_what_it_is() -> None:
    async with StubConsole() as console, running(console, make_engine("prefill")):
        (hello,) = console.hellos
        assert (hello.token, hello.resume, hello.role) == ("token", None, "prefill")
        assert hello.versions == [protocol.VERSION] and hello.num_blocks == 1024
        assert hello.handoff_address.startswith("127.0.0.1:")


async def test_refused_worker_ends_with_the_reason() -> None:
    async with StubConsole(protocol.Refused("the join token is spent")) as console:
        with pytest.raises(JoinRefused, match="the join token is spent"):
            await make_worker(console.url, make_engine()).run()
    assert len(console.hellos) == 1


async def test_worker_refused_for_now_tries_again() -> None:
    async with StubConsole(protocol.Refused("full", permanent=False)) as console:
        worker = make_worker(console.url, make_engine())
        task = asyncio.create_task(worker.run())
        await console.until(lambda: len(console.hellos) >= 2)
        console.refusal = None
        await console.joined(1)
        await worker.stop("test over")
        await task


async def test_work_goes_on_over_a_lost_connection() -> None:
    alone = await undisturbed(PROMPT, 60)
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, 60))
        await console.until(lambda: len(console.output("r")) > 5)
        console.connections["w1"].transport.abort()
        await console.until(lambda: len(console.hellos) == 2)
        again = console.hellos[1]
        assert again.token is None
        assert again.resume == protocol.ResumeProof("w1", "secret-w1")
        assert [(s.request_id, s.epoch) for s in again.sequences] == [("r", 1)]
        await console.until(lambda: console.hellos[-1] is again and "w1" in console.connections)
        await console.send("w1", protocol.Resend("r", 1, 0))  # what a console asks on Reattach
        await console.until(lambda: console.finish("r") is not None)
        await console.until(lambda: console.output("r") == alone)


async def test_end_that_fell_into_a_gap_is_named_in_hello_and_sent_again() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        console.acks = False
        await console.send("w1", assign("r", PROMPT, 6))
        await console.finished("r")
        console.connections["w1"].transport.abort()
        await console.until(lambda: len(console.hellos) == 2)
        assert protocol.LiveSequence("r", 1, 6) in console.hellos[1].sequences


async def test_worker_whose_resume_proof_is_refused_joins_as_a_new_one_without_its_work() -> None:
    engine = make_engine()
    async with StubConsole() as console, running(console, engine):
        await console.send("w1", assign("r", PROMPT, 5000))
        await console.until(lambda: len(console.output("r")) > 3)
        console.refusal = protocol.Refused("unknown worker")
        console.connections.pop("w1").transport.abort()
        await console.until(lambda: len(console.hellos) >= 2)
        console.refusal = None
        await console.joined(1)
        assert "w2" in console.connections and console.hellos[-1].token == "token"
        await console.until(lambda: engine.is_idle())


async def test_worker_without_credit_merges_and_loses_nothing() -> None:
    alone = await undisturbed(PROMPT, 100)
    async with StubConsole(credit_frames=3) as console, running(console, make_engine()):
        console.acks = False
        await console.send("w1", assign("r", PROMPT, 100))
        await console.until(lambda: len(console.heard) == 3)
        await asyncio.sleep(0.5)  # it works on, with no credit to tell
        assert len(console.heard) == 3
        console.acks = True
        await console.send("w1", protocol.Ack(1))
        assert await console.finished("r") == alone
        assert len(console.reports("r")) < 60


async def test_worker_whose_outbox_is_full_reconnects() -> None:
    async with StubConsole(credit_frames=1) as console:
        console.acks = False
        worker = make_worker(console.url, make_engine())
        task = asyncio.create_task(worker.run())
        async with asyncio.timeout(20):
            while not worker._link.is_joined:
                await asyncio.sleep(0.01)
        for number in range(MESSAGES_MAX + 2):
            worker._link.post(protocol.Accepted(f"r{number}", 1))
        await console.until(lambda: len(console.hellos) == 2)
        await worker.stop("test over")
        await task


async def test_console_that_breaks_the_protocol_is_left_and_dialled_again() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.connections["w1"].send("text")
        await console.until(lambda: len(console.hellos) == 2)
        await console.connections["w1"].send(b"\xc1")
        await console.until(lambda: len(console.hellos) == 3)
        again = protocol.Welcome("w9", 1, "s", 1, protocol.Policy())
        await console.send("w1", again)
        await console.until(lambda: len(console.hellos) == 4)


async def test_goodbye_is_the_last_word_and_ends_the_run() -> None:
    async with StubConsole() as console:
        async with running(console, make_engine()):
            pass
        await console.until(lambda: bool(kinds(console)))
        assert kinds(console)[-1] == protocol.Goodbye("test over")


async def test_worker_that_never_reached_a_console_can_be_stopped() -> None:
    worker = make_worker("ws://127.0.0.1:1/ws/worker", make_engine())
    task = asyncio.create_task(worker.run())
    await asyncio.sleep(0.2)
    assert not task.done()
    await worker.stop("test over")
    async with asyncio.timeout(20):
        await task


async def test_waits_between_attempts_grow_to_the_ceiling_with_full_jitter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def note(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 12:
            raise asyncio.CancelledError

    monkeypatch.setattr(links.asyncio, "sleep", note)
    draws = iter([1.0, 0.0] * 6)
    owner = make_worker("ws://127.0.0.1:1/ws/worker", make_engine())
    link = Link("ws://127.0.0.1:1/ws/worker", "token", owner, lambda: next(draws))
    with pytest.raises(asyncio.CancelledError):
        await link._sessions()
    assert waits[1::2] == [links.RETRY_S_MIN] * 6
    longest = waits[::2]
    assert longest == sorted(longest) and longest[-1] == pytest.approx(links.RETRY_S_MAX)
