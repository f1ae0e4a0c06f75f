"""Turns of an engine: commands between steps, a step while there is work, else waiting.

Two drivers: `ThreadDriver` runs a native engine in a thread of its own; `TaskDriver` runs a
modelled one as a task of the event loop and sleeps the modelled seconds. Both report to the loop.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from controlplane import protocol
from gpuworkers.engine import Engine, Key, StepResult

COMMANDS_MAX = 4096  # waiting between two steps; `has_room` says no above it
TURNS_AHEAD_MAX = 64  # steps that the event loop has not taken in yet

Command = Callable[[], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReadyPrompt:
    """A computed prompt whose KV waits for its peer."""

    key: Key
    block_ids: list[int]
    first_ids: list[int]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the event loop hears of a turn. `sequences` is None when no step ran."""

    sequences: list[protocol.SequenceReport] | None
    ready: list[ReadyPrompt]
    load: protocol.WorkerLoad
    is_drained: bool


class IdleMeter:
    """Seconds with nothing to run: waiting for work, and turns whose plan was empty. The engine's
    thread starts and stops it, both threads take."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since_s: float | None = None
        self._sum_s = 0.0

    def start(self, now_s: float) -> None:
        with self._lock:
            self._since_s = now_s

    def stop(self, now_s: float) -> None:
        with self._lock:
            assert self._since_s is not None
            self._sum_s += now_s - self._since_s
            self._since_s = None

    def add(self, seconds: float) -> None:
        """A turn in which nothing was computed."""
        with self._lock:
            self._sum_s += seconds

    def take(self, now_s: float) -> float:
        """Idle seconds since the last call."""
        with self._lock:
            sum_s, self._sum_s = self._sum_s, 0.0
            if self._since_s is not None:
                sum_s += now_s - self._since_s
                self._since_s = now_s
            return sum_s


class Driver(Protocol):
    """Runs one engine. `post` and `call` may be used from the event loop's thread."""

    idle: IdleMeter
    failed: asyncio.Future[None]  # gets the exception of a turn that broke

    @property
    def has_room(self) -> bool: ...
    @property
    def busy_since_s(self) -> float | None: ...
    def post(self, command: Command) -> None: ...
    def start(self) -> None: ...
    async def stop(self) -> None: ...


async def call(driver: Driver, question: Callable[[], T]) -> T:
    """The answer of a question asked between two steps."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def take(value: T) -> None:
        if not answer.cancelled():
            answer.set_result(value)

    def ask() -> None:
        loop.call_soon_threadsafe(take, question())

    driver.post(ask)
    return await answer


class _Turns:
    """What both drivers do with an engine, in whichever thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float], idle: IdleMeter) -> None:
        self.engine = engine
        self.clock = clock
        self.idle = idle

    def step(self) -> tuple[StepResult, list[ReadyPrompt]]:
        result = self.engine.step(self.clock(), self.clock)
        ready = [
            ReadyPrompt(key, self.engine.blocks_of(*key), self.engine.first_ids(*key))
            for key in result.ready
        ]
        return result, ready

    def charge(self, since_s: float, has_stepped: bool, charged_s: float = 0.0) -> float:
        """The time since then, but for the `charged_s` of the step itself, goes to who ran in the
        step; in a turn without one all of it was idle. Gives the time until which that holds."""
        now_s = self.clock()
        if has_stepped:
            self.engine.charge_host(now_s - since_s - charged_s)
        else:
            self.idle.add(now_s - since_s)
        return now_s

    def turn(
        self, sequences: list[protocol.SequenceReport] | None, ready: list[ReadyPrompt]
    ) -> Turn:
        load = self.engine.load(self.idle.take(self.clock()))
        is_drained = self.engine.is_draining and self.engine.is_idle()
        return Turn(sequences, ready, load, is_drained)


class ThreadDriver:
    """A thread for the engine. It waits where the event loop is TURNS_AHEAD_MAX turns behind."""

    def __init__(
        self, engine: Engine, clock: Callable[[], float], report: Callable[[Turn], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._report = report
        self._commands: deque[Command] = deque()
        self._changed = threading.Condition()
        self._ahead = threading.Semaphore(TURNS_AHEAD_MAX)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.busy_since_s: float | None = None
        self.idle = IdleMeter()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self._turns = _Turns(engine, clock, self.idle)

    @property
    def has_room(self) -> bool:
        return len(self._commands) < COMMANDS_MAX

    def post(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """After the step in hand."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._ahead.release()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._turns.engine.runner.prepare()
            while self._turn():
                pass
        except Exception as error:  # a bug: the worker ends and says so
            self._loop.call_soon_threadsafe(self.failed.set_exception, error)

    def _turn(self) -> bool:
        """False when stopping."""
        turns, engine, clock = self._turns, self._turns.engine, self._turns.clock
        began_s = clock()
        with self._changed:
            if not self._commands and not self._is_stopping and not engine.has_work():
                self.idle.start(began_s)
                while not self._commands and not self._is_stopping:
                    self._changed.wait()
                began_s = clock()
                self.idle.stop(began_s)
            commands = list(self._commands)
            self._commands.clear()
        if self._is_stopping:
            return False
        for command in commands:
            command()
        if engine.has_work():
            self._ahead.acquire()
            self.busy_since_s = clock()
            result, ready = turns.step()
            self.busy_since_s = None
            has_stepped = result.measured_s > 0.0
            until_s = turns.charge(began_s, has_stepped, result.measured_s)
            turn = turns.turn(result.sequences, ready)
            self._loop.call_soon_threadsafe(self._deliver, turn)
            turns.charge(until_s, has_stepped)  # telling takes time too: in the next report
        elif commands:
            self._ahead.acquire()
            until_s = turns.charge(began_s, False)
            self._loop.call_soon_threadsafe(self._deliver, turns.turn(None, []))
            turns.charge(until_s, False)
        return True

    def _deliver(self, turn: Turn) -> None:
        self._ahead.release()
        self._report(turn)


class TaskDriver:
    """A task for a modelled engine: results appear when the modelled seconds are over."""

    def __init__(
        self, engine: Engine, clock: Callable[[], float], report: Callable[[Turn], None]
    ) -> None:
        self._report = report
        self._commands: deque[Command] = deque()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.busy_since_s: float | None = None
        self.idle = IdleMeter()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns = _Turns(engine, clock, self.idle)

    @property
    def has_room(self) -> bool:
        return len(self._commands) < COMMANDS_MAX

    def post(self, command: Command) -> None:
        self._commands.append(command)
        self._changed.set()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            while True:
                await self._turn()
        except Exception as error:  # a bug: the worker ends and says so
            self.failed.set_exception(error)

    async def _turn(self) -> None:
        turns, engine, clock = self._turns, self._turns.engine, self._turns.clock
        began_s = clock()
        if not self._commands and not engine.has_work():
            self.idle.start(began_s)
            self._changed.clear()
            await self._changed.wait()
            began_s = clock()
            self.idle.stop(began_s)
        commands = list(self._commands)
        self._commands.clear()
        for command in commands:
            command()
        if engine.has_work():
            self.busy_since_s = clock()
            result, ready = turns.step()
            await asyncio.sleep(max(0.0, self.busy_since_s + result.measured_s - clock()))
            self.busy_since_s = None
            turns.charge(began_s, result.measured_s > 0.0, result.measured_s)
            self._report(turns.turn(result.sequences, ready))
        elif commands:
            turns.charge(began_s, False)
            self._report(turns.turn(None, []))
