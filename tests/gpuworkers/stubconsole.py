"""A console for tests of workers: welcomes who dials in, keeps what it hears, sends on request."""

import asyncio
from collections.abc import Callable

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from controlplane import protocol
from gpuworkers import fake
from gpuworkers.driver import Driver, TaskDriver
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.server import Worker, WorkerFacts

HANG_S = 30.0  # a guard, not a claim about speed


class StubConsole:
    """Worker ids are w1, w2, … in order of joining; a resume proof keeps its id."""

    def __init__(
        self, refusal: protocol.Refused | None = None, credit_frames: int = protocol.CREDIT_FRAMES
    ) -> None:
        self.refusal = refusal
        self.credit_frames = credit_frames
        self.acks = True
        self.policy = protocol.Policy()
        self.hellos: list[protocol.Hello] = []
        self.heard: list[tuple[str, protocol.FromWorker]] = []
        self.connections: dict[str, ServerConnection] = {}
        self._changed = asyncio.Condition()
        self._server: Server | None = None
        self._num_workers = 0

    async def __aenter__(self) -> "StubConsole":
        self._server = await serve(self._serve, "127.0.0.1", 0, compression=None)
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/ws/worker"

    async def _serve(self, connection: ServerConnection) -> None:
        hello = protocol.decode_from_worker(await connection.recv())
        assert isinstance(hello, protocol.Hello)
        self.hellos.append(hello)
        await self._notify()
        if self.refusal is not None:
            await connection.send(protocol.encode(self.refusal))
            return
        worker_id = hello.resume.worker_id if hello.resume else ""
        if not worker_id:
            self._num_workers += 1
            worker_id = f"w{self._num_workers}"
        welcome = protocol.Welcome(
            worker_id, len(self.hellos), f"secret-{worker_id}", self.credit_frames,
            self.policy, heartbeat_s=0.05,
        )  # fmt: skip
        await connection.send(protocol.encode(welcome))
        self.connections[worker_id] = connection
        await self._notify()
        try:
            async for frame in connection:
                self.heard.append((worker_id, protocol.decode_from_worker(frame)))
                if self.acks:
                    await connection.send(protocol.encode(protocol.Ack(1)))
                await self._notify()
        except ConnectionClosed:
            return

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def send(self, worker_id: str, message: protocol.ToWorker) -> None:
        await self.connections[worker_id].send(protocol.encode(message))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S), self._changed:
            await self._changed.wait_for(holds)

    async def joined(self, count: int) -> None:
        await self.until(lambda: len(self.connections) >= count)

    def of(self, kind: type, request_id: str) -> list:
        """Messages of one kind about one request."""
        return [m for _, m in self.heard if isinstance(m, kind) and m.request_id == request_id]

    def reports(self, request_id: str) -> list[protocol.SequenceReport]:
        steps = [m for _, m in self.heard if isinstance(m, protocol.StepReport)]
        return [r for m in steps for r in m.sequences if r.request_id == request_id]

    def output(self, request_id: str) -> list[int]:
        """Output ids so far; indices must follow on, whoever sent them."""
        ids: dict[int, int] = {}
        for report in self.reports(request_id):
            for index, token_id in enumerate(report.token_ids, report.seq):
                assert ids.setdefault(index, token_id) == token_id, f"index {index} changed"
        assert sorted(ids) == list(range(len(ids))), f"gap in {sorted(ids)}"
        return [ids[index] for index in range(len(ids))]

    def finish(self, request_id: str) -> str | None:
        reasons = [r.finish_reason for r in self.reports(request_id)]
        return next((r for r in reasons if r not in (None, "handed_off")), None)

    async def finished(self, request_id: str) -> list[int]:
        await self.until(lambda: self.finish(request_id) is not None)
        return self.output(request_id)


def make_engine(role: protocol.Role = "mixed", kv_tokens: int = 0) -> Engine:
    runner, model, _, step_model = fake.load("cpu-fast", "modelled-8b", kv_tokens)
    return Engine(runner, EngineConfig(), step_model, model, role)


def make_worker(
    url: str,
    engine: Engine,
    name: str = "worker",
    driver: type[Driver] = TaskDriver,
    device_load: Callable[[], protocol.DeviceLoad | None] = lambda: None,
) -> Worker:
    """A worker on the running loop; start it with `asyncio.create_task(worker.run())`."""
    device = fake.PROFILES["cpu-fast"].device
    facts = WorkerFacts(url, "token", name, "fake", device, "127.0.0.1", device_load)
    clock = asyncio.get_running_loop().time
    return Worker(facts, engine, lambda e, report: driver(e, clock, report), lambda: 0.5)


def assign(
    request_id: str,
    prompt: list[int],
    output_tokens: int = 8,
    epoch: int = 1,
    stage: protocol.Stage = "full",
    **fields: object,
) -> protocol.Assign:
    sampling = protocol.Sampling(output_tokens_max=output_tokens)
    values = {
        "request_id": request_id,
        "epoch": epoch,
        "model_id": "modelled-8b",
        "stage": stage,
        "prompt_ids": prompt,
        "delivered": [],
        "sampling": sampling,
        "targets": protocol.ClassTargets("interactive", 0, 0.5, 0.03),
        "salt": b"salt",
    } | fields
    return protocol.Assign(**values)
