"""The local backend: real worker processes on the fake engine, started, drained and stopped."""

import os
from pathlib import Path

import pytest

from console.localfleet import LocalFleet, read_limits
from console.workerprocs import WORKERS_MAX, WorkerProcs, WorkerSpec
from controlplane import domain, protocol
from controlplane.errors import ConfigError
from tests.console.test_fleet import Rig, sent
from tests.console.test_workerprocs import is_alive, until
from tests.gpuworkers.stubconsole import HANG_S, StubConsole

FAKE = WorkerSpec("mixed", "fake", model_id="modelled-8b", profile="cpu-fast")
OTHER = WorkerSpec("mixed", "fake", model_id="modelled-1b", profile="cpu-fast")


# --- limits --------------------------------------------------------------------------------------


def test_limits_are_read_or_absent():
    assert read_limits(0, 0, 2) is None
    assert read_limits(0, 4, 2) == (1, 4)
    assert read_limits(2, WORKERS_MAX, 2) == (2, WORKERS_MAX)


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ((1, 0, 1), "--workers-min=1: needs --workers-max"),
        ((0, WORKERS_MAX + 1, 1), f"--workers-max={WORKERS_MAX + 1}"),
        ((0, -1, 1), "--workers-max=-1"),
        ((5, 4, 1), "--workers-min=5"),
        ((0, 2, 3), "3 workers are to be started"),
        ((0, 2, 0), "0 workers are to be started"),
    ],
)
def test_impossible_limits_are_named(numbers, named):
    with pytest.raises(ConfigError) as refused:
        read_limits(*numbers)
    assert named in str(refused.value)


# --- processes -----------------------------------------------------------------------------------


class Machine:
    """A LocalFleet over real processes that dial a stub console."""

    def __init__(self, console: StubConsole, logs: Path, *specs: WorkerSpec, devices=("cpu",)):
        self.ended: list[tuple[str, str]] = []
        tokens = iter(f"token-{number}" for number in range(1_000))
        self.procs = WorkerProcs(
            specs,
            lambda: console.url,
            lambda name: next(tokens),
            logs,
            os.environ,
            ended=lambda name, reason: self.ended.append((name, reason)),
        )
        templates = {spec.model_id: spec for spec in (FAKE, OTHER)}
        self.fleet = LocalFleet(self.procs, templates, list(devices), (1, 4))

    def names(self) -> list[str]:
        return [view.name for view in self.procs.views()]


@pytest.mark.serial
async def test_started_worker_joins_under_its_name_with_role_and_model(tmp_path: Path) -> None:
    async with StubConsole() as console:
        machine = Machine(console, tmp_path, FAKE)
        await machine.procs.start()
        assert machine.fleet.offer() == domain.FleetOffered(1, 4, ("mixed-1",))
        await console.joined(1)
        machine.fleet.start("auto-1", "decode", "modelled-1b")
        await console.joined(2)
        hello = console.hellos[1]
        assert (hello.name, hello.role) == ("auto-1", "decode")
        assert [model.model_id for model in hello.models] == ["modelled-1b"]
        assert machine.names() == ["mixed-1", "auto-1"]
        await machine.procs.stop(HANG_S)


@pytest.mark.serial
async def test_stopped_worker_says_goodbye_and_does_not_come_back(tmp_path: Path) -> None:
    async with StubConsole() as console:
        machine = Machine(console, tmp_path, FAKE, FAKE)
        await machine.procs.start()
        await console.joined(2)
        view = machine.procs.views()[1]
        machine.fleet.drain(view.name)
        assert is_alive(view.pid), "a drain only lets it end"
        machine.fleet.stop(view.name)
        await until(lambda: machine.names() == ["mixed-1"])
        assert not is_alive(view.pid)
        await console.until(
            lambda: any(isinstance(message, protocol.Goodbye) for _, message in console.heard)
        )
        assert len(console.hellos) == 2
        machine.fleet.stop(view.name)  # gone already
        await machine.procs.stop(HANG_S)


@pytest.mark.serial
async def test_start_that_cannot_be_is_told_and_not_repeated(tmp_path: Path) -> None:
    async with StubConsole(protocol.Refused("the join token is spent")) as console:
        machine = Machine(console, tmp_path)
        machine.fleet.start("auto-1", "mixed", "modelled-8b")
        await until(lambda: bool(machine.ended))
        ((name, reason),) = machine.ended
        assert name == "auto-1" and "exit code 3: refused: the join token is spent" in reason
        with pytest.raises(ConfigError, match="can serve unheard-of"):
            machine.fleet.start("auto-2", "mixed", "unheard-of")
        await machine.procs.stop(1.0)


# --- the console's side --------------------------------------------------------------------------


class Backend:
    """Keeps the calls."""

    def __init__(self, refusal: str = "") -> None:
        self.calls: list[tuple[str, ...]] = []
        self._refusal = refusal

    def offer(self) -> domain.FleetOffered:
        return domain.FleetOffered(2, 3, ("c1",))

    def start(self, *what: str) -> None:
        self.calls.append(("start", *what))
        if self._refusal:
            raise ConfigError(self._refusal)

    def drain(self, name: str) -> None:
        self.calls.append(("drain", name))

    def stop(self, name: str) -> None:
        self.calls.append(("stop", name))


def test_plan_s_starts_drains_and_stops_reach_the_backend():
    rig, backend = Rig(), Backend()
    link = rig.join("c1")
    rig.fleet.offer(backend)
    for command in (
        domain.StartWorker("auto-1", "decode", "m"),
        domain.DrainWorker("c1"),
        domain.StopWorker("c1"),
        domain.SendUnload("w1", "m"),
        domain.SendLoad("w1", "n"),
    ):
        rig.fleet.execute(command)
    assert backend.calls == [("start", "auto-1", "decode", "m"), ("drain", "c1"), ("stop", "c1")]
    assert sent(link, protocol.UnloadModel) == [protocol.UnloadModel("m")]
    assert sent(link, protocol.LoadModel) == [protocol.LoadModel("n")]


def test_minimum_is_filled_up_and_a_refused_start_waits_for_its_turn():
    rig, backend = Rig(), Backend("no room")
    rig.join("c1")
    rig.fleet.offer(backend)

    def live(seconds: int) -> None:
        for _ in range(seconds):
            rig.heartbeat("c1")
            rig.ticks(1.0)

    live(40)
    assert backend.calls == [("start", "auto-1", "mixed", "smollm2-135m")]
    live(40)
    assert [call[1] for call in backend.calls] == ["auto-1", "auto-2"]
