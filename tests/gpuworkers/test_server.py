"""A worker's life with a console: work, commands, handoff between two workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import torch

from controlplane import protocol
from gpuworkers.devicefailure import DeviceFailed, device_failures
from gpuworkers.driver import COMMANDS_MAX, Driver, TaskDriver
from gpuworkers.engine import Engine, RunResult
from gpuworkers.scheduler import Plan
from gpuworkers.server import Worker
from tests.gpuworkers.flipproxy import FlipProxy
from tests.gpuworkers.stubconsole import StubConsole, assign, make_engine, make_worker

PROMPT = [(7 * i) % 250 for i in range(70)]
CAPABILITY = "capability-of-r"


@contextlib.asynccontextmanager
async def running(
    console: StubConsole, *engines: Engine, driver: type[Driver] = TaskDriver
) -> AsyncIterator[list[Worker]]:
    """Workers w1, w2, … on these engines; stopped, and their blocks checked, at the end."""
    workers = [make_worker(console.url, engine, driver=driver) for engine in engines]
    tasks = []
    for number, worker in enumerate(workers, 1):
        tasks.append(asyncio.create_task(worker.run()))
        await console.joined(number)
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.stop("test over")
        await asyncio.gather(*tasks)
        for engine in engines:
            engine.check_integrity()


async def undisturbed(prompt: list[int], output_tokens: int) -> list[int]:
    """Output of one worker without handoff."""
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", prompt, output_tokens))
        return await console.finished("r")


async def send_pair(
    console: StubConsole,
    prompt: list[int],
    output_tokens: int,
    address: str | None = None,
    epoch: int = 1,
    timeout_s: float = 20.0,
    **fields: object,
) -> None:
    """Prefill on w1, decode on w2."""
    out = protocol.HandoffOut(CAPABILITY)
    into = protocol.HandoffIn(address or console.hellos[0].handoff_address, CAPABILITY, timeout_s)
    decode = assign("r", prompt, output_tokens, epoch, "decode", handoff_in=into, **fields)
    await console.send("w2", decode)  # the peer may well ask before the prefill worker knows
    prefill = assign("r", prompt, output_tokens, epoch, "prefill", handoff_out=out, **fields)
    await console.send("w1", prefill)


# --- one worker


async def test_request_is_accepted_before_its_tokens_and_reported_to_the_end() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, output_tokens=12))
        assert len(await console.finished("r")) == 12
        work = [m for _, m in console.heard if not isinstance(m, protocol.Heartbeat)]
        assert work[0] == protocol.Accepted("r", 1)
        assert console.finish("r") == "length"
        assert sum(report.prefill_tokens for report in console.reports("r")) == len(PROMPT)


async def test_output_does_not_depend_on_the_worker_or_on_what_runs_beside() -> None:
    alone = await undisturbed(PROMPT, 20)
    async with StubConsole() as console, running(console, make_engine("decode")):
        for number in range(5):
            await console.send("w1", assign(f"other{number}", PROMPT[number:], 30))
        await console.send("w1", assign("r", PROMPT, 20))
        assert await console.finished("r") == alone


async def test_failover_goes_on_behind_the_delivered_ids() -> None:
    alone = await undisturbed(PROMPT, 20)
    async with StubConsole() as console, running(console, make_engine()):
        message = assign("r", PROMPT, 20, epoch=3, delivered=alone[:7])
        await console.send("w1", message)
        await console.until(lambda: console.finish("r") is not None)
        reports = [r for r in console.reports("r") if r.token_ids]
        assert reports[0].seq == 7 and {r.epoch for r in reports} == {3}
        assert [i for r in reports for i in r.token_ids] == alone[7:]


async def test_rejection_carries_reason_and_room() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, model_id="another-model"))
        await console.until(lambda: bool(console.of(protocol.Rejected, "r")))
        assert console.of(protocol.Rejected, "r") == [
            protocol.Rejected("r", 1, "unknown_model", free_blocks=1024)
        ]


async def test_cancelled_request_stops_and_frees_its_blocks() -> None:
    engine = make_engine()
    async with StubConsole() as console, running(console, engine):
        await console.send("w1", assign("r", PROMPT, output_tokens=5000))
        await console.until(lambda: len(console.output("r")) > 3)
        await console.send("w1", protocol.Cancel("r", 1))
        await console.until(lambda: last_load(console).kv_blocks_free > 1000)
        assert engine.is_idle() and console.finish("r") is None


async def test_assign_that_comes_twice_runs_once() -> None:
    alone = await undisturbed(PROMPT, 8)
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, 8))
        await console.send("w1", assign("r", PROMPT, 8))
        assert await console.finished("r") == alone
        await console.until(lambda: len(console.of(protocol.Accepted, "r")) == 2)
        assert sum(len(report.token_ids) for report in console.reports("r")) == 8


async def test_newer_epoch_replaces_the_older_and_a_stale_one_is_refused() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, 5000, epoch=1))
        await console.until(lambda: len(console.output("r")) > 2)
        await console.send("w1", assign("r", PROMPT, 6, epoch=2, delivered=[]))
        await console.until(lambda: console.finish("r") is not None)
        assert console.reports("r")[-1].epoch == 2
        await console.send("w1", assign("s", PROMPT, 5000, epoch=5))
        await console.send("w1", assign("s", PROMPT, 6, epoch=4))
        await console.until(lambda: bool(console.of(protocol.Rejected, "s")))
        assert console.of(protocol.Rejected, "s")[0].reason == "stale_epoch"
        await console.send("w1", protocol.Cancel("s", 5))


async def test_resend_repeats_ids_of_a_running_and_of_an_ended_request() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, 10))
        ids = await console.finished("r")
        before = len(console.reports("r"))
        await console.send("w1", protocol.Resend("r", 1, 4))
        await console.until(lambda: len(console.reports("r")) > before)
        again = console.reports("r")[-1]
        assert (again.seq, again.token_ids, again.finish_reason) == (4, ids[4:], "length")


async def test_role_flip_shows_in_the_next_report_of_an_idle_worker() -> None:
    async with StubConsole() as console, running(console, make_engine("decode")):
        await console.send("w1", protocol.SetRole("prefill"))
        await console.until(lambda: last_load(console).role == "prefill")


async def test_role_flip_under_work_loses_no_token() -> None:
    alone = await undisturbed(PROMPT, 40)
    async with StubConsole() as console, running(console, make_engine("decode")):
        await console.send("w1", assign("r", PROMPT, 40))
        await console.until(lambda: len(console.output("r")) > 3)
        await console.send("w1", protocol.SetRole("prefill"))
        assert await console.finished("r") == alone
        assert last_load(console).role == "prefill"


async def test_draining_worker_finishes_what_it_has_takes_nothing_new_and_says_so_once() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        await console.send("w1", assign("r", PROMPT, 30))
        await console.send("w1", protocol.Drain())
        await console.send("w1", assign("late", PROMPT, 30))
        assert len(await console.finished("r")) == 30
        await console.until(lambda: protocol.Drained() in kinds(console))
        assert console.of(protocol.Rejected, "late")[0].reason == "draining"
        await console.send("w1", protocol.SetRole("decode"))
        await console.until(lambda: last_load(console).role == "decode")
        assert kinds(console).count(protocol.Drained()) == 1


async def test_policy_of_the_welcome_and_each_later_one_reach_the_engine() -> None:
    engine = make_engine()
    async with StubConsole() as console:
        console.policy = protocol.Policy(kappa=0.25)
        async with running(console, engine):
            await console.until(lambda: engine.config.policy.kappa == 0.25)
            await console.send("w1", protocol.SetPolicy(protocol.Policy(kappa=0.75)))
            await console.until(lambda: engine.config.policy.kappa == 0.75)


async def test_idle_seconds_reach_the_console_once() -> None:
    async with StubConsole() as console, running(console, make_engine()):
        start_s = asyncio.get_running_loop().time()
        await console.until(lambda: sum(m.load.idle_s for m in beats(console)) > 0.2)
        assert sum(m.load.idle_s for m in beats(console)) <= (
            asyncio.get_running_loop().time() - start_s + 1.0
        )


async def test_heartbeats_go_on_while_a_long_step_runs_and_tell_its_age() -> None:
    engine = make_engine()
    engine.runner._step = protocol.StepModel(0.5, 0.0, 0.0)
    async with StubConsole() as console, running(console, engine):
        await console.send("w1", assign("r", PROMPT, 2))
        await console.until(lambda: any(m.busy_s > 0.1 for m in beats(console)))
        await console.finished("r")


async def test_engine_that_breaks_ends_the_worker_with_its_error() -> None:
    engine = make_engine()
    engine.runner.run = None  # a defect: `None` is not callable
    async with StubConsole() as console:
        worker = make_worker(console.url, engine)
        task = asyncio.create_task(worker.run())
        await console.joined(1)
        await console.send("w1", assign("r", PROMPT))
        with pytest.raises(TypeError):
            await task
        assert protocol.Goodbye("engine failed") in kinds(console)


class FailingRunner:
    """A runner whose device fails in the middle of a step."""

    def __init__(self, kv: object) -> None:
        self.kv = kv
        self.eos_token_ids: frozenset[int] = frozenset()

    def prepare(self) -> None:
        """The device is still well."""

    def run(self, plan: Plan, layer_written: object = None) -> RunResult:
        with device_failures("cuda:3"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access\nCompile with …")


async def test_device_that_fails_ends_the_worker_and_both_sides_hear_the_reason() -> None:
    engine = make_engine()
    engine.runner = FailingRunner(engine.runner.kv)
    async with StubConsole() as console:
        worker = make_worker(console.url, engine)
        task = asyncio.create_task(worker.run())
        await console.joined(1)
        await console.send("w1", assign("r", PROMPT))
        with pytest.raises(DeviceFailed) as failed:
            await task
    reason = "cuda:3 failed: AcceleratorError: CUDA error: an illegal memory access"
    assert str(failed.value) == reason and protocol.Goodbye(reason) in kinds(console)


async def test_reports_and_heartbeats_carry_the_load_of_the_device() -> None:
    loads = iter([None, protocol.DeviceLoad(0.5, 300.0)])
    newest = protocol.DeviceLoad(0.9, 600.0)
    engine = make_engine()
    async with StubConsole() as console:
        worker = make_worker(console.url, engine, device_load=lambda: next(loads, newest))
        task = asyncio.create_task(worker.run())
        await console.joined(1)
        await console.until(lambda: any(m.load.device == newest for m in beats(console)))
        await console.send("w1", assign("r", PROMPT))
        await console.finished("r")
        reports = [m for _, m in console.heard if isinstance(m, protocol.StepReport)]
        assert reports and all(report.load.device == newest for report in reports)
        await worker.stop("end of test")
        await task


async def test_commands_over_the_maximum_are_refused_not_kept() -> None:
    engine = make_engine()
    engine.runner._step = protocol.StepModel(3.0, 0.0, 0.0)
    async with StubConsole() as console, running(console, engine):
        await console.send("w1", assign("long", PROMPT, 2))
        await console.until(lambda: any(m.busy_s > 0 for m in beats(console)))
        for number in range(COMMANDS_MAX):
            await console.send("w1", protocol.Cancel(f"unknown{number}", 1))
        await console.send("w1", assign("r", PROMPT))
        await console.until(lambda: bool(console.of(protocol.Rejected, "r")))
        assert console.of(protocol.Rejected, "r")[0].reason == "queue_full"
        await console.send("w1", protocol.Cancel("r", 1))  # cannot be refused: the link starts anew
        await console.until(lambda: len(console.hellos) == 2)
        engine.runner._step = protocol.StepModel(0.001, 0.0, 0.0)
        await console.finished("long")


# --- two workers


async def test_output_with_handoff_equals_output_without() -> None:
    alone = await undisturbed(PROMPT, 24)
    engines = make_engine("prefill"), make_engine("decode")
    async with StubConsole() as console, running(console, *engines):
        await send_pair(console, PROMPT, 24)
        assert await console.finished("r") == alone
        await console.until(lambda: "handed_off" in [r.finish_reason for r in console.reports("r")])
        (ready,) = console.of(protocol.HandoffReady, "r")
        (done,) = console.of(protocol.HandoffDone, "r")
        assert (ready.blocks, ready.bytes) == (done.blocks, done.bytes) == (5, 5 * 2 * 16)
        first = [r for r in console.reports("r") if r.token_ids][0]
        assert (first.seq, first.token_ids) == (0, alone[:1])
        assert all(engine.is_idle() for engine in engines)


async def test_console_hears_of_moved_kv_between_the_step_in_hand_and_the_first_with_it() -> None:
    """It lets the first id go then, so that one step of ours lies between it and the next id."""
    engines = make_engine("prefill"), make_engine("decode")
    async with StubConsole() as console, running(console, *engines):
        await console.send("w2", assign("long", PROMPT, 5000))
        await console.until(lambda: len(console.output("long")) > 1)
        engines[1].runner._step = protocol.StepModel(0.3, 0.0, 0.0)
        await asyncio.sleep(0.02)  # from now on a step is in hand for most of the time
        await send_pair(console, PROMPT, 24)
        await console.until(lambda: bool(reported(console, "w2", "r")))
        engines[1].runner._step = protocol.StepModel(0.002, 0.0, 0.0)
        heard = [message for name, message in console.heard if name == "w2"]
        (at,) = [i for i, m in enumerate(heard) if isinstance(m, protocol.HandoffDone)]
        steps = [m for m in heard[at:] if isinstance(m, protocol.StepReport)]
        assert "r" in {report.request_id for report in steps[0].sequences}
        assert reported(console, "w2", "r")[0].seq == 1
        await console.finished("r")
        await console.send("w2", protocol.Cancel("long", 1))


async def test_handoff_after_failover_carries_the_delivered_ids() -> None:
    alone = await undisturbed(PROMPT, 24)
    async with StubConsole() as console, running(console, make_engine(), make_engine()):
        out = protocol.HandoffOut(CAPABILITY)
        into = protocol.HandoffIn(console.hellos[0].handoff_address, CAPABILITY)
        given = {"delivered": alone[:9]}
        prefill = assign("r", PROMPT, 24, 2, "prefill", handoff_out=out, **given)
        await console.send("w1", prefill)
        await console.send("w2", assign("r", PROMPT, 24, 2, "decode", handoff_in=into, **given))
        await console.until(lambda: console.finish("r") is not None)
        ids = {r.seq + i: t for r in console.reports("r") for i, t in enumerate(r.token_ids)}
        assert [ids[index] for index in sorted(ids)] == alone[9:]


async def test_request_that_ends_with_its_first_token_needs_no_handoff() -> None:
    async with StubConsole() as console, running(console, make_engine(), make_engine()):
        await send_pair(console, PROMPT, 1)
        assert len(await console.finished("r")) == 1
        await console.until(lambda: bool(console.of(protocol.HandoffFailed, "r")))
        assert console.of(protocol.HandoffFailed, "r")[0].reason == "refused"
        assert not console.of(protocol.HandoffReady, "r")


async def test_kv_of_another_prompt_in_the_sent_blocks_changes_the_output() -> None:
    """The receiver really continues from the KV that came, not from its own computation."""
    alone = await undisturbed(PROMPT, 24)
    other = [(11 * i) % 250 for i in range(len(PROMPT))]
    prefill = make_engine()
    read = prefill.runner.kv.read
    prefill.runner.kv.read = lambda layer, blocks: read(layer, sorted(foreign)[: len(blocks)])
    foreign: list[int] = []
    async with StubConsole() as console, running(console, prefill, make_engine()):
        await console.send("w1", assign("other", other, 200))
        await console.until(lambda: len(console.output("other")) > 1)
        foreign += prefill.blocks_of("other", 1)
        foreign.sort(key=prefill.blocks_of("other", 1).index)
        await send_pair(console, PROMPT, 24)
        swapped = await console.finished("r")
        assert swapped[:1] == alone[:1] and swapped != alone
        await console.send("w1", protocol.Cancel("other", 1))


async def test_flipped_bit_is_caught_and_the_request_computed_again() -> None:
    alone = await undisturbed(PROMPT, 24)
    engines = make_engine(), make_engine()
    async with StubConsole() as console, running(console, *engines):
        async with FlipProxy(console.hellos[0].handoff_address, flip_at=150) as proxy:
            await send_pair(console, PROMPT, 24, proxy.address)
            await console.until(lambda: bool(console.of(protocol.HandoffFailed, "r")))
        assert console.of(protocol.HandoffFailed, "r") == [
            protocol.HandoffFailed("r", 1, "checksum")
        ]
        await console.send("w2", assign("r", PROMPT, 24, epoch=2, delivered=alone[:1]))
        assert await console.finished("r") == alone
        await console.until(lambda: all(engine.is_idle() for engine in engines))


async def test_decode_worker_without_its_peer_reports_unreachable_and_frees() -> None:
    engine = make_engine()
    async with StubConsole() as console, running(console, make_engine(), engine):
        await send_pair(console, PROMPT, 24, address="127.0.0.1:1")
        await console.until(lambda: bool(console.of(protocol.HandoffFailed, "r")))
        assert console.of(protocol.HandoffFailed, "r")[0].reason == "unreachable"
        await console.until(lambda: engine.is_idle())


async def test_decode_worker_gives_up_a_peer_that_never_gets_ready() -> None:
    engine = make_engine()
    async with StubConsole() as console, running(console, make_engine(), engine):
        into = protocol.HandoffIn(console.hellos[0].handoff_address, CAPABILITY, timeout_s=0.2)
        await console.send("w2", assign("r", PROMPT, 24, 1, "decode", handoff_in=into))
        await console.until(lambda: bool(console.of(protocol.HandoffFailed, "r")))
        assert console.of(protocol.HandoffFailed, "r")[0].reason == "timeout"
        await console.until(lambda: engine.is_idle())


async def test_kv_that_nobody_fetches_is_freed_when_its_lease_is_over() -> None:
    engine = make_engine()
    async with StubConsole() as console, running(console, engine):
        out = protocol.HandoffOut(CAPABILITY, lease_s=0.1)
        await console.send("w1", assign("r", PROMPT, 24, 1, "prefill", handoff_out=out))
        await console.until(lambda: bool(console.of(protocol.HandoffReady, "r")))
        await console.until(lambda: engine.is_idle())
        assert engine.pool.num_available == engine.pool.num_blocks


@pytest.mark.parametrize("cancelled", ["w1", "w2"])
async def test_cancel_during_a_handoff_leaves_both_sides_empty(cancelled: str) -> None:
    engines = make_engine(), make_engine()
    async with (
        StubConsole() as console,
        running(console, *engines),
        FlipProxy(console.hellos[0].handoff_address, stall_at=150) as proxy,
    ):
        await send_pair(console, PROMPT, 24, proxy.address)
        await proxy.stalled.wait()
        await console.send(cancelled, protocol.Cancel("r", 1))
        await asyncio.sleep(0.05)
        proxy.go_on.set()
        other = "w2" if cancelled == "w1" else "w1"
        await console.send(other, protocol.Cancel("r", 1))
        await console.until(lambda: all(engine.is_idle() for engine in engines))


async def test_newer_epoch_during_a_handoff_ends_the_transfer_first() -> None:
    alone = await undisturbed(PROMPT, 24)
    engines = make_engine(), make_engine()
    async with StubConsole() as console, running(console, *engines):
        async with FlipProxy(console.hellos[0].handoff_address, stall_at=150) as proxy:
            await send_pair(console, PROMPT, 24, proxy.address)
            await proxy.stalled.wait()
            await console.send("w2", assign("r", PROMPT, 24, epoch=2, delivered=alone[:1]))
            proxy.go_on.set()
            assert await console.finished("r") == alone
        assert not console.of(protocol.HandoffDone, "r")
        await console.send("w1", protocol.Cancel("r", 1))
        await console.until(lambda: all(engine.is_idle() for engine in engines))


# --- what a console heard


def reported(
    console: StubConsole, worker_id: str, request_id: str
) -> list[protocol.SequenceReport]:
    """What one worker told of a request's ids."""
    steps = [m for w, m in console.heard if w == worker_id and isinstance(m, protocol.StepReport)]
    return [r for m in steps for r in m.sequences if r.request_id == request_id and r.token_ids]


def kinds(console: StubConsole) -> list[protocol.FromWorker]:
    return [message for _, message in console.heard]


def beats(console: StubConsole) -> list[protocol.Heartbeat]:
    return [m for m in kinds(console) if isinstance(m, protocol.Heartbeat)]


def last_load(console: StubConsole) -> protocol.WorkerLoad:
    loads = [
        m.load for m in kinds(console) if isinstance(m, protocol.Heartbeat | protocol.StepReport)
    ]
    return loads[-1] if loads else make_engine().load(0.0)
