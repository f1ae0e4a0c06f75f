"""Turns of an engine, in a thread and in a task: the same order, the same reports."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from controlplane import protocol
from controlplane.protocol import GpuSeconds
from gpuworkers import driver
from gpuworkers.driver import IdleMeter, TaskDriver, ThreadDriver, Turn, call
from gpuworkers.engine import Engine
from tests.gpuworkers.stubconsole import assign, make_engine

DRIVERS = pytest.mark.parametrize("kind", [ThreadDriver, TaskDriver])


def make(kind: Any, engine: Engine, report: Callable[[Turn], None]) -> Any:
    return kind(engine, asyncio.get_running_loop().time, report)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


@DRIVERS
async def test_commands_run_between_steps_and_steps_are_reported_in_order(kind: Any) -> None:
    engine, turns = make_engine(), []
    runs = make(kind, engine, turns.append)
    runs.start()
    answer = await call(runs, lambda: engine.assign(assign("r", [1, 2, 3], 20), 0.0))
    assert answer == protocol.Accepted("r", 1)
    await until(
        lambda: bool(turns and turns[-1].sequences and turns[-1].sequences[0].finish_reason)
    )
    reports = [report for turn in turns for report in turn.sequences or []]
    assert [report.seq for report in reports] == list(range(20))
    assert turns[-1].load.step_index == 20
    await runs.stop()


@DRIVERS
async def test_command_without_work_reports_the_load_alone(kind: Any) -> None:
    engine, turns = make_engine(), []
    runs = make(kind, engine, turns.append)
    runs.start()
    runs.post(lambda: engine.set_role("prefill"))
    await until(lambda: bool(turns))
    assert turns[0].sequences is None and turns[0].load.role == "prefill"
    assert not turns[0].is_drained
    runs.post(engine.drain)
    await until(lambda: len(turns) == 2)
    assert turns[1].is_drained
    await runs.stop()


@DRIVERS
async def test_ready_prompt_comes_with_its_blocks_and_first_id(kind: Any) -> None:
    engine, turns = make_engine(), []
    runs = make(kind, engine, turns.append)
    runs.start()
    out = protocol.HandoffOut("capability")
    message = assign("r", list(range(40)), 20, stage="prefill", handoff_out=out)
    await call(runs, lambda: engine.assign(message, 0.0))
    await until(lambda: any(turn.ready for turn in turns))
    (prompt,) = [prompt for turn in turns for prompt in turn.ready]
    assert prompt.key == ("r", 1) and len(prompt.block_ids) == 3 and len(prompt.first_ids) == 1
    await runs.stop()


@DRIVERS
async def test_defect_in_a_turn_is_reported_once(kind: Any) -> None:
    runs = make(kind, make_engine(), lambda turn: None)
    runs.start()

    def defect() -> None:
        raise ZeroDivisionError

    runs.post(defect)
    async with asyncio.timeout(20):
        with pytest.raises(ZeroDivisionError):
            await runs.failed
    await runs.stop()


@DRIVERS
async def test_room_ends_at_the_maximum(kind: Any) -> None:
    runs = make(kind, make_engine(), lambda turn: None)
    for _ in range(driver.COMMANDS_MAX):
        assert runs.has_room
        runs.post(lambda: None)
    assert not runs.has_room
    runs.start()
    await until(lambda: runs.has_room)
    await runs.stop()


async def test_thread_waits_when_the_event_loop_is_behind() -> None:
    """The loop is held here: the engine may be TURNS_AHEAD_MAX turns ahead and no more."""
    engine = make_engine()
    steps = 0
    run = engine.runner.run

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return run(*arguments)

    engine.runner.run = counted
    engine.assign(assign("r", [1, 2, 3], 5000), 0.0)
    turns: list[Turn] = []
    runs = make(ThreadDriver, engine, turns.append)
    runs.start()
    wait = threading.Event()
    for _ in range(2000):
        if steps == driver.TURNS_AHEAD_MAX:
            break
        wait.wait(0.01)  # blocks the loop on purpose
    wait.wait(0.1)
    assert steps == driver.TURNS_AHEAD_MAX and not turns
    await until(lambda: len(turns) > driver.TURNS_AHEAD_MAX)
    await runs.stop()


async def test_engine_thread_is_the_only_one_that_steps() -> None:
    engine = make_engine()
    names: set[str] = set()
    run = engine.runner.run

    def noted(*arguments: Any) -> Any:
        names.add(threading.current_thread().name)
        return run(*arguments)

    engine.runner.run = noted
    turns: list[Turn] = []
    runs = make(ThreadDriver, engine, turns.append)
    runs.start()
    await call(runs, lambda: engine.assign(assign("r", [1, 2, 3], 5), 0.0))
    await until(lambda: len(turns) >= 5)
    await runs.stop()
    assert names == {"engine"}


def test_idle_seconds_are_taken_once() -> None:
    idle = IdleMeter()
    idle.start(10.0)
    assert idle.take(12.0) == 2.0
    assert idle.take(12.5) == 0.5
    idle.stop(13.0)
    assert idle.take(20.0) == 0.5
    assert idle.take(21.0) == 0.0


class CountingClock:
    """A millisecond passes with every look at it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            self.now_s += 0.001
            return self.now_s


async def test_every_second_of_the_engines_thread_is_work_or_idle() -> None:
    """Between the end of a turn and the next one's start the clock is looked at twice: that much
    is nobody's."""
    engine, turns, clock = make_engine(), [], CountingClock()
    runs = ThreadDriver(engine, clock, turns.append)
    runs.start()
    for index in range(5):
        request_id = f"r{index}"
        await call(runs, lambda: engine.assign(assign(request_id, [1, 2, 3], 20), 0.0))  # noqa: B023
        await until(lambda: engine.is_idle() and runs.idle._since_s is not None)
        clock.now_s += 0.5  # while the thread waits
    await runs.stop()
    spent = engine.load(runs.idle.take(clock.now_s)).spent
    assert spent.online_s > 0.0 and spent.idle_s > 2.0 and spent.batch_s == 0.0
    num_turns = len(turns)
    assert 0.0 <= clock.now_s - spent.total_s <= 0.002 * (num_turns + 10)


async def test_modelled_steps_count_for_as_long_as_they_really_took() -> None:
    """The loop was late; the modelled seconds are less than those that passed."""
    engine, turns = make_engine(), []
    clock = asyncio.get_running_loop().time
    began_s = clock()
    runs = TaskDriver(engine, clock, turns.append)
    runs.start()
    await call(runs, lambda: engine.assign(assign("r", [1, 2, 3], 20), 0.0))
    await until(lambda: bool(turns) and turns[-1].load.step_index == 20)
    spent: GpuSeconds = turns[-1].load.spent
    passed_s = clock() - began_s
    await runs.stop()
    modelled_s = sum(turn.load.measured_s for turn in turns if turn.sequences)
    assert modelled_s < spent.online_s <= passed_s
    assert spent.total_s <= passed_s
