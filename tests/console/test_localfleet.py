"""The local backend: real worker processes on the fake engine, started, drained and stopped."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from console.fleet import Fleet
from console.generation import LiveRequest, Mailbox, Tokens
from console.localfleet import LocalFleet, read_limits
from console.metrics import Metrics
from console.workerprocs import WORKERS_MAX, WorkerProcs, WorkerSpec
from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.errors import ConfigError
from controlplane.journal import Journal
from controlplane.plane import ControlPlane
from tests.console.test_fleet import Facts, Rig, sent
from tests.console.test_workerprocs import is_alive, until
from tests.factories import make_request
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


# --- all together --------------------------------------------------------------------------------

STRICT = domain.SLOClass("strict", 0, ttft_s_p99=0.05, itl_s_p99=0.003, queue_s_max=60.0)
QUICK = {"plan_every_s": 0.3, "plan_window_s": 2.0, "plan_dwell_s": 1.0, "cold_start_s": 0.1}


class SocketLink:
    """WorkerLink over a websocket of the test's server."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, message: protocol.ToWorker) -> None:
        self._later(self._connection.send(protocol.encode(message)))

    def close(self, code: int, reason: str) -> None:
        self._later(self._connection.close(code, reason))

    def _later(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Console:
    """A real Fleet whose workers are real processes, on a quick plan."""

    def __init__(self, logs: Path) -> None:
        self.facts = Facts()
        plane = ControlPlane(ControlPlaneConfig.from_mapping(QUICK), b"s" * 32)
        self.fleet = Fleet(plane, Metrics(), self.facts)
        self.url = ""
        self.procs = WorkerProcs(
            [FAKE],
            lambda: self.url,
            self.fleet.mint_join_token,
            logs,
            os.environ,
            ended=self.fleet.start_failed,
        )
        self._num_connections = 0
        self.num_failed = self.num_done = 0
        self._clients: set[asyncio.Task[None]] = set()

    async def serve(self, connection: ServerConnection) -> None:
        self._num_connections += 1
        name = f"c{self._num_connections}"
        link = SocketLink(connection)
        self.fleet.connected(name, link)
        with contextlib.suppress(ConnectionClosed):
            async for frame in connection:
                self.fleet.received(name, protocol.decode_from_worker(frame))
                link.send(protocol.Ack(1))
        self.fleet.disconnected(name)

    async def run(self, until_s: float, per_s: float, holds) -> None:
        """Ticks, and so many requests per second, until the condition holds."""
        loop = asyncio.get_running_loop()
        ends_at_s, index = loop.time() + until_s, 0
        while not holds():
            assert loop.time() < ends_at_s, [plan.reason for plan in self.fleet.view().plans]
            for _ in range(int(per_s * 0.1)):
                index += 1
                self._send(f"r{loop.time():.3f}-{index}")
            self.fleet.tick()
            await asyncio.sleep(0.1)

    def _send(self, name: str) -> None:
        task = asyncio.get_running_loop().create_task(self._client(name))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _client(self, name: str) -> None:
        now_s = self.fleet.now_s()
        request = make_request(
            name, model_id="modelled-8b", slo=STRICT, output_tokens_max=24, arrived_at_s=now_s,
            tenant_concurrency_max=1_000,
        )  # fmt: skip
        live = LiveRequest(
            request=request,
            prompt_ids=list(range(32)),
            sampling=protocol.Sampling(24),
            targets=protocol.ClassTargets("strict", 0, 0.05, 0.003),
            salt=b"salt",
            journal=Journal(24),
            events=Mailbox(200),
        )
        self.fleet.submit(live)
        while True:
            event = await live.events.take()
            if isinstance(event, domain.Decided) and isinstance(event.outcome, domain.Rejected):
                self.num_failed += 1
                self.fleet.finished(live, "failed")
                return
            if isinstance(event, Tokens):
                live.delivered_tokens += len(event.token_ids)
            if isinstance(event, Tokens) and event.finish_reason is not None:
                self.num_done += 1
                self.fleet.finished(live, "completed")
                return

    def num_live(self) -> int:
        return sum(worker.status == "live" for worker in self.fleet.view().workers)

    async def clients_end(self) -> None:
        while self._clients:
            self.fleet.tick()
            await asyncio.sleep(0.05)


@pytest.mark.serial
async def test_real_processes_start_under_load_and_stop_after_it_and_no_request_fails(
    tmp_path: Path,
) -> None:
    console = Console(tmp_path)
    async with serve(console.serve, "127.0.0.1", 0, compression=None) as server:
        console.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws/worker"
        await console.procs.start()
        try:
            await follow_the_load(console)
        finally:
            await console.procs.stop(HANG_S)


async def follow_the_load(console: Console) -> None:
    backend = LocalFleet(console.procs, {FAKE.model_id: FAKE}, ["cpu"], (1, 3))
    console.fleet.offer(backend)
    await console.run(2 * HANG_S, 0.0, lambda: console.num_live() == 1)
    await console.run(2 * HANG_S, 20.0, lambda: console.num_live() == 3)
    names = sorted(view.name for view in console.procs.views())
    assert names == ["auto-1", "auto-2", "mixed-1"]
    await console.clients_end()
    await console.run(4 * HANG_S, 0.0, lambda: len(console.procs.views()) == 1)
    await console.clients_end()
    kinds = [plan.kind for plan in console.fleet.view().plans]
    assert kinds.count("start") == 2 and kinds.count("drain") == 2
    assert console.num_failed == 0 and console.num_done > 20
