"""A worker frees its model and loads another, only while nothing is in hand."""

import asyncio
from pathlib import Path

import pytest

from controlplane import protocol
from controlplane.errors import ConfigError
from gpuworkers import fake, runner
from gpuworkers.config import TOKEN_VARIABLE, parse
from gpuworkers.driver import Driver, TaskDriver, ThreadDriver
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.modelswap import Loaded, Models
from gpuworkers.server import Worker, WorkerFacts
from tests.gpuworkers.stubconsole import StubConsole, assign, make_engine
from tests.gpuworkers.tinyllama import write_tiny

PROMPT = [(7 * i) % 250 for i in range(40)]
FIRST, OTHER = "modelled-8b", "modelled-1b"


class Loads:
    """Loads modelled models when the test lets them; keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.fails = ""

    async def __call__(self, model_id: str) -> Loaded:
        self.asked.append(model_id)
        await self.may_end.wait()
        if self.fails:
            raise ConfigError(self.fails)
        parts, model, _, step_model = fake.load("cpu-fast", model_id, 4096)
        return Loaded(parts, model, step_model)

    def models(self) -> Models:
        return Models((FIRST, OTHER), self)


class Running:
    """One worker with a console of its own."""

    def __init__(
        self, models: Models | None, engine: Engine | None = None, driver: type[Driver] = TaskDriver
    ) -> None:
        self.console = StubConsole()
        self.engine = engine or make_engine()
        self._models = models
        self._driver = driver

    async def __aenter__(self) -> "Running":
        await self.console.__aenter__()
        facts = WorkerFacts(
            self.console.url, "token", "worker", "fake", fake.PROFILES["cpu-fast"].device,
            "127.0.0.1", models=self._models,
        )  # fmt: skip
        clock = asyncio.get_running_loop().time
        make = self._driver
        self.worker = Worker(facts, self.engine, lambda e, r: make(e, clock, r), lambda: 0.5)
        self.task = asyncio.create_task(self.worker.run())
        await self.console.joined(1)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.worker.stop("test over")
        await self.task
        await self.console.__aexit__()
        self.engine.check_integrity()

    def answers(self) -> list[protocol.ModelsChanged | protocol.ModelRefused]:
        kinds = protocol.ModelsChanged | protocol.ModelRefused
        return [message for _, message in self.console.heard if isinstance(message, kinds)]

    async def ask(self, *orders: protocol.ToWorker) -> list:
        """The answers so far, when there is one for each order ever sent."""
        count = len(self.answers()) + len(orders)
        for order in orders:
            await self.console.send("w1", order)
        await self.console.until(lambda: len(self.answers()) >= count)
        return self.answers()


async def test_swap_tells_the_new_facts_and_serves_the_other_model() -> None:
    loads = Loads()
    async with Running(loads.models()) as running:
        assert running.console.hellos[0].loadable == [FIRST, OTHER]
        (empty,) = await running.ask(protocol.UnloadModel(FIRST))
        assert (empty.models, empty.num_blocks) == ([], 1)
        await running.console.send("w1", assign("early", PROMPT, model_id=OTHER))
        await running.console.until(lambda: running.console.of(protocol.Rejected, "early"))
        (_, full) = await running.ask(protocol.LoadModel(OTHER))
        assert [model.model_id for model in full.models] == [OTHER]
        assert full.num_blocks == 256 and full.seconds >= 0.0
        await running.console.send("w1", assign("r", PROMPT, model_id=OTHER))
        assert len(await running.console.finished("r")) == 8
        await running.console.send("w1", assign("old", PROMPT, model_id=FIRST))
        await running.console.until(lambda: running.console.of(protocol.Rejected, "old"))
        assert running.console.of(protocol.Rejected, "old")[0].reason == "unknown_model"


async def test_unload_is_refused_while_a_sequence_is_in_hand() -> None:
    async with Running(Loads().models()) as running:
        await running.console.send("w1", assign("r", PROMPT, output_tokens=400))
        await running.console.until(lambda: running.console.of(protocol.Accepted, "r"))
        (refused,) = await running.ask(protocol.UnloadModel(FIRST))
        assert refused == protocol.ModelRefused(FIRST, "1 sequences are in hand")
        assert len(await running.console.finished("r")) == 400
        (_, empty) = await running.ask(protocol.UnloadModel(FIRST))
        assert empty.models == []


async def test_orders_that_make_no_sense_are_refused_with_a_reason() -> None:
    async with Running(Loads().models()) as running:
        answers = await running.ask(protocol.UnloadModel("unheard-of"))
        answers = await running.ask(protocol.LoadModel(OTHER))
        answers = await running.ask(protocol.LoadModel("unheard-of"))
        assert answers == [
            protocol.ModelRefused("unheard-of", "this worker does not serve it"),
            protocol.ModelRefused(OTHER, "modelled-8b is loaded"),
            protocol.ModelRefused("unheard-of", "this worker cannot load it"),
        ]
    async with Running(None) as running:
        (answer,) = await running.ask(protocol.UnloadModel(FIRST))
        assert answer.reason == "this worker can load no other model"


async def test_load_that_fails_leaves_the_worker_empty_and_able_to_load_again() -> None:
    loads = Loads()
    async with Running(loads.models()) as running:
        await running.ask(protocol.UnloadModel(FIRST))
        loads.fails = "model.safetensors is missing"
        (_, refused) = await running.ask(protocol.LoadModel(OTHER))
        assert refused == protocol.ModelRefused(OTHER, "model.safetensors is missing")
        loads.fails = ""
        (*_, back) = await running.ask(protocol.LoadModel(FIRST))
        assert [model.model_id for model in back.models] == [FIRST]


async def test_same_order_twice_is_carried_out_once_and_another_one_has_to_wait() -> None:
    loads = Loads()
    async with Running(loads.models()) as running:
        await running.ask(protocol.UnloadModel(FIRST))
        loads.may_end.clear()
        await running.console.send("w1", protocol.LoadModel(OTHER))
        await running.console.send("w1", protocol.LoadModel(OTHER))
        (_, refused) = await running.ask(protocol.LoadModel(FIRST))
        assert refused == protocol.ModelRefused(FIRST, "another change of model is under way")
        loads.may_end.set()
        await running.console.until(lambda: len(running.answers()) == 3)
        assert loads.asked == [OTHER]
        (*_, again) = await running.ask(protocol.LoadModel(OTHER))
        assert [model.model_id for model in again.models] == [OTHER] and loads.asked == [OTHER]


async def test_worker_without_a_model_joins_again_and_says_so() -> None:
    loads = Loads()
    async with Running(loads.models()) as running:
        await running.ask(protocol.UnloadModel(FIRST))
        await running.console.connections["w1"].close()
        await running.console.until(lambda: len(running.console.hellos) == 2)
        hello = running.console.hellos[1]
        assert hello.models == [] and hello.loadable == [FIRST, OTHER]


async def test_native_engine_swaps_weights_and_gives_the_other_models_output(
    tmp_path: Path,
) -> None:
    folders = {name: write_tiny(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}

    def load(model_id: str) -> Loaded:
        parts = runner.load(folders[model_id], model_id, "fp32", "exact", 2048, 1)
        return Loaded(parts[0], parts[1], parts[3])

    async def load_apart(model_id: str) -> Loaded:
        return await asyncio.to_thread(load, model_id)

    async def output(running: Running, name: str, model_id: str) -> list[int]:
        await running.console.send("w1", assign(name, PROMPT, 24, model_id=model_id))
        return await running.console.finished(name)

    def engine(model_id: str) -> Engine:
        loaded = load(model_id)
        return Engine(loaded.runner, EngineConfig(), loaded.step_model, loaded.model, "mixed")

    models = Models(("a", "b"), load_apart)
    async with Running(models, engine("b"), ThreadDriver) as running:
        expected = await output(running, "r", "b")
    async with Running(models, engine("a"), ThreadDriver) as running:
        first = await output(running, "r1", "a")
        await running.ask(protocol.UnloadModel("a"))
        await running.ask(protocol.LoadModel("b"))
        assert await output(running, "r2", "b") == expected != first
        await running.ask(protocol.UnloadModel("b"))
        await running.ask(protocol.LoadModel("a"))
        assert await output(running, "r3", "a") == first


@pytest.mark.parametrize("text", ["=x", "a=folder", ",".join(f"m{i}" for i in range(17))])
def test_loadable_models_that_cannot_be_stop_the_start(text: str) -> None:
    argv = ["--join", "ws://127.0.0.1:8000/ws/worker", "--engine", "fake", "--loadable", text]
    with pytest.raises(ConfigError, match="--loadable"):
        parse(argv, {TOKEN_VARIABLE: "secret"})
