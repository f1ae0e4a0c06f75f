"""One worker: an engine, its link to the console and its handoffs with peers.

Messages come in on the event loop, run as commands between two steps of the engine, and what steps
bring goes back over the link. KV in transfer is touched by the event loop only; the order of its
end is always: stop the transfer here, then free the blocks by a command to the engine.
"""

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Coroutine

from controlplane import protocol
from controlplane.errors import ProtocolError, SlackwaterError
from controlplane.latency import LatencyModel
from gpuworkers import handoff, handofffetch, handoffwire
from gpuworkers.driver import Driver, Turn, call
from gpuworkers.engine import Engine, Key, Runner
from gpuworkers.handoffcarrier import Segments
from gpuworkers.heartbeat import Heart
from gpuworkers.link import Link
from gpuworkers.modelswap import Models, NoRunner

ENGINE_VERSION = "0.1.0"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker says of itself in Hello, besides what its engine knows."""

    join_url: str
    token: str
    name: str
    engine: str
    device: protocol.DeviceFacts
    handoff_bind: str
    device_load: Callable[[], protocol.DeviceLoad | None] = lambda: None
    models: Models | None = None  # that it can load instead of the one it starts with


MakeDriver = Callable[[Engine, Callable[[Turn], None]], Driver]


class Worker:
    """See module. Create it inside the running event loop."""

    def __init__(
        self,
        facts: WorkerFacts,
        engine: Engine,
        make_driver: MakeDriver,
        uniform: Callable[[], float],
    ) -> None:
        self._facts = facts
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._driver = make_driver(engine, self._stepped)
        self._link = Link(facts.join_url, facts.token, self, uniform)
        self._heart = Heart(self._link, self._driver, facts.device_load)
        self._handoffs = handoff.HandoffServer(engine.runner.kv, self._sent, self._dropped)
        engine.layer_listener = self._layers_final
        self._segments = Segments()
        self._address = ""
        self._is_drained_told = False
        self._arriving: dict[str, int] = {}  # request id -> epoch of a `decode` assignment
        self._fetches: dict[str, asyncio.Task[None]] = {}  # of those, by request id
        self._change: asyncio.Task[None] | None = None  # of the model
        self._changing_to = ""

    @property
    def is_joined(self) -> bool:
        """Whether the console has this worker now."""
        return self._link.is_joined

    async def run(self) -> None:
        """Until `stop`. Raises JoinRefused, or what broke the engine."""
        self._address = await self._handoffs.start(self._facts.handoff_bind)
        self._driver.start()
        link = self._loop.create_task(self._link.run())
        heart = self._loop.create_task(self._heart.beat())
        try:
            await asyncio.wait(
                [link, heart, self._driver.failed], return_when=asyncio.FIRST_COMPLETED
            )
            if self._driver.failed.done():
                failure = self._driver.failed.exception()
                is_ours = isinstance(failure, SlackwaterError)  # else a defect, told in our log
                await self._link.close(str(failure) if is_ours else "engine failed")
                self._driver.failed.result()
            await link
        finally:
            tasks = [link, heart, *self._fetches.values()]
            tasks += [self._change] if self._change is not None else []
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._handoffs.close()
            await self._driver.stop()

    async def stop(self, reason: str) -> None:
        """Says Goodbye and ends `run`."""
        await self._link.close(reason)

    # --- from the link

    async def hello(self) -> protocol.Hello:
        return await call(self._driver, self._hello)

    def _hello(self) -> protocol.Hello:
        engine, facts = self._engine, self._facts
        return protocol.Hello(
            versions=[protocol.VERSION],
            name=facts.name,
            engine=facts.engine,
            engine_version=ENGINE_VERSION,
            role=engine.role,
            device=facts.device,
            models=[] if engine.model is None else [engine.model],
            block_tokens=engine.pool.block_tokens,
            num_blocks=engine.pool.num_blocks,
            step_model=engine.step_model.coefficients(),
            handoff_address=self._address,
            sequences=engine.live_sequences(),
            loadable=list(facts.models.model_ids) if facts.models else [],
        )

    def welcomed(self, welcome: protocol.Welcome, is_new: bool) -> None:
        """Takes the policy over. As a new worker it drops what it did under its old name."""
        logger.info("joined worker=%s epoch=%d", welcome.worker_id, welcome.epoch)
        engine = self._engine
        if is_new:
            for request_id in list(self._arriving):
                self._forget_arrival(request_id)
            self._handoffs.revoke_all()

        def take_over() -> None:
            self._take_policy(welcome.policy)
            for sequence in engine.live_sequences() if is_new else ():
                engine.abandon(sequence.request_id, sequence.epoch)

        self._driver.post(take_over)

    def received(self, message: protocol.ToWorker) -> None:
        engine = self._engine
        if isinstance(message, protocol.Assign):
            self._assign(message)
            return
        if not self._driver.has_room:
            raise ProtocolError("more commands than the engine can take between two steps")
        match message:
            case protocol.Cancel(request_id=request_id, epoch=epoch):
                self._handoffs.revoke((request_id, epoch))
                if self._arriving.get(request_id) == epoch:
                    self._forget_arrival(request_id)
                self._driver.post(functools.partial(engine.cancel, request_id, epoch))
            case protocol.Resend():
                self._driver.post(functools.partial(self._resend, message))
            case protocol.SetRole(role=role):
                self._driver.post(functools.partial(engine.set_role, role))
            case protocol.SetPolicy(policy=policy):
                self._driver.post(functools.partial(self._take_policy, policy))
            case protocol.UnloadModel(model_id=model_id):
                self._change_model(model_id, "", self._unload(model_id))
            case protocol.LoadModel(model_id=model_id):
                self._change_model(model_id, model_id, self._load(model_id))
            case protocol.Drain():
                self._driver.post(engine.drain)
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__}")

    def _take_policy(self, policy: protocol.Policy) -> None:
        self._engine.config = dataclasses.replace(self._engine.config, policy=policy)

    # --- models

    def _change_model(
        self, model_id: str, target: str, change: Coroutine[None, None, protocol.FromWorker]
    ) -> None:
        """One change at a time; the same order again, after a reconnect, is the one under way."""
        is_changing = self._change is not None and not self._change.done()
        if is_changing:
            change.close()
            if self._changing_to != target or not target:
                why = "another change of model is under way"
                self._link.post(protocol.ModelRefused(model_id, why))
            return
        self._changing_to = target
        self._change = self._loop.create_task(self._tell(change))

    async def _tell(self, change: Coroutine[None, None, protocol.FromWorker]) -> None:
        answer = await change
        if isinstance(answer, protocol.ModelRefused):
            logger.warning("model refused model=%s reason=%s", answer.model_id, answer.reason)
        self._link.post(answer)

    async def _unload(self, model_id: str) -> protocol.FromWorker:
        engine, begun_at_s = self._engine, self._loop.time()
        if engine.model is None or engine.model.model_id != model_id:
            return protocol.ModelRefused(model_id, "this worker does not serve it")
        if self._facts.models is None:
            return protocol.ModelRefused(model_id, "this worker can load no other model")
        runner = NoRunner(engine.pool.block_tokens)
        return await self._placed(model_id, runner, engine.step_model, None, begun_at_s)

    async def _load(self, model_id: str) -> protocol.FromWorker:
        engine, models, begun_at_s = self._engine, self._facts.models, self._loop.time()
        if models is None or model_id not in models.model_ids:
            return protocol.ModelRefused(model_id, "this worker cannot load it")
        if engine.model is not None and engine.model.model_id != model_id:
            return protocol.ModelRefused(model_id, f"{engine.model.model_id} is loaded")
        if engine.model is not None:
            return self._models_changed(0.0)
        try:
            loaded = await models.load(model_id)
        except SlackwaterError as error:
            return protocol.ModelRefused(model_id, str(error))
        return await self._placed(
            model_id, loaded.runner, loaded.step_model, loaded.model, begun_at_s
        )

    async def _placed(
        self,
        model_id: str,
        runner: Runner,
        step_model: LatencyModel,
        model: protocol.ModelFacts | None,
        begun_at_s: float,
    ) -> protocol.FromWorker:
        """Between two steps."""
        change = functools.partial(self._engine.change_model, runner, step_model, model)
        if why := await call(self._driver, change):
            return protocol.ModelRefused(model_id, why)
        self._handoffs.serve_from(runner.kv)
        return self._models_changed(self._loop.time() - begun_at_s)

    def _models_changed(self, seconds: float) -> protocol.ModelsChanged:
        engine = self._engine
        return protocol.ModelsChanged(
            models=[] if engine.model is None else [engine.model],
            block_tokens=engine.pool.block_tokens,
            num_blocks=engine.pool.num_blocks,
            step_model=engine.step_model.coefficients(),
            seconds=seconds,
        )

    # --- assignments and handoffs, event loop side

    def _assign(self, message: protocol.Assign) -> None:
        key = (message.request_id, message.epoch)
        if not self._driver.has_room:
            self._link.post(protocol.Rejected(*key, "queue_full", 0))
            return
        self._make_way(message)
        tokens = len(message.prompt_ids) + len(message.delivered)
        if message.handoff_out is not None:
            self._handoffs.offer(key, message.handoff_out, tokens)
        if message.handoff_in is not None:
            self._arriving.setdefault(message.request_id, message.epoch)

        def assign() -> None:
            answer = self._engine.assign(message, self._loop.time())
            is_installed = bool(self._engine.first_ids(*key))  # an Assign that came twice
            block_ids = [] if is_installed else self._engine.blocks_of(*key)
            self._to_loop(self._assigned, message, answer, block_ids)

        self._driver.post(assign)

    def _make_way(self, message: protocol.Assign) -> None:
        """The engine drops older epochs of the request: their transfers must end before."""
        self._handoffs.revoke_older(message.request_id, message.epoch)
        if self._arriving.get(message.request_id, message.epoch) < message.epoch:
            self._forget_arrival(message.request_id)

    def _assigned(
        self,
        message: protocol.Assign,
        answer: protocol.Accepted | protocol.Rejected,
        block_ids: list[int],
    ) -> None:
        self._link.post(answer)
        request_id = message.request_id
        is_expected = self._arriving.get(request_id) == message.epoch
        if isinstance(answer, protocol.Rejected):
            self._handoffs.revoke((request_id, message.epoch))
        if not is_expected or request_id in self._fetches:
            return
        if isinstance(answer, protocol.Rejected) or not block_ids:
            self._forget_arrival(request_id)
        else:
            self._fetches[request_id] = self._loop.create_task(self._fetch(message, block_ids))

    async def _fetch(self, message: protocol.Assign, block_ids: list[int]) -> None:
        """KV of a `decode` assignment, from the peer into our blocks."""
        key = (message.request_id, message.epoch)
        engine = self._engine
        tokens = len(message.prompt_ids) + len(message.delivered)
        assert message.handoff_in is not None
        try:
            fetched = await handofffetch.fetch(
                message.handoff_in, engine.runner.kv, block_ids, tokens, self._segments
            )
        except handoffwire.HandoffError as error:
            logger.warning("handoff failed request=%s epoch=%d %s", *key, error)
            self._driver.post(functools.partial(engine.abandon, *key))
            self._link.post(protocol.HandoffFailed(*key, error.reason))
        else:
            done = protocol.HandoffDone(*key, len(block_ids), fetched.bytes, fetched.seconds)
            self._driver.post(functools.partial(self._install, done, fetched.first_ids))
        # No await since the transfer ended: a cancellation has removed these already.
        del self._fetches[message.request_id], self._arriving[message.request_id]

    def _install(self, done: protocol.HandoffDone, first_ids: list[int]) -> None:
        """Runs between two steps, before the first one with the sequence. Only now the console
        hears of it and lets the first ids go: the next one follows them after one step."""
        key = (done.request_id, done.epoch)
        self._engine.installed(*key, first_ids, self._loop.time())
        self._to_loop(self._link.post, done)

    def _forget_arrival(self, request_id: str) -> None:
        """Stops the transfer before the engine may free its blocks."""
        del self._arriving[request_id]
        if (fetch := self._fetches.pop(request_id, None)) is not None:
            fetch.cancel()

    def _sent(self, key: Key) -> None:
        self._driver.post(functools.partial(self._engine.handed_off, *key))

    def _dropped(self, key: Key) -> None:
        logger.warning("handoff dropped request=%s epoch=%d", *key)
        self._driver.post(functools.partial(self._engine.abandon, *key))

    # --- from the engine

    def _layers_final(self, key: Key, block_ids: list[int], layers: range, end: int) -> None:
        """In the middle of a step, on the engine's thread."""
        at_s = self._loop.time()
        self._to_loop(self._handoffs.advance, key, block_ids, layers, end, at_s)

    def _resend(self, message: protocol.Resend) -> None:
        """Runs between two steps."""
        report = self._engine.resend(message.request_id, message.epoch, message.seq)
        self._to_loop(self._resent, report, self._engine.load(0.0))

    def _resent(self, report: protocol.SequenceReport | None, load: protocol.WorkerLoad) -> None:
        reports = [] if report is None else [report]
        self._link.post(protocol.StepReport(reports, self._heart.observe(load)))

    def _stepped(self, turn: Turn) -> None:
        load = self._heart.observe(turn.load)
        if turn.sequences is None:
            self._link.post(protocol.Heartbeat(load, 0.0))
        else:
            for report in turn.sequences:
                if report.finish_reason is not None:
                    self._handoffs.revoke((report.request_id, report.epoch))
            self._link.post(protocol.StepReport(turn.sequences, load))
        kv = self._engine.runner.kv
        for prompt in turn.ready:
            if self._handoffs.ready(prompt.key, prompt.block_ids, prompt.first_ids):
                num_blocks = len(prompt.block_ids)
                num_bytes = num_blocks * kv.num_layers * kv.layer_block_bytes
                self._link.post(protocol.HandoffReady(*prompt.key, num_blocks, num_bytes))
            else:  # no peer can come any more
                self._driver.post(functools.partial(self._engine.abandon, *prompt.key))
        if turn.is_drained and not self._is_drained_told:
            self._is_drained_told = True
            self._link.post(protocol.Drained())

    def _to_loop(self, function: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
