"""`python -m gpuworkers`: joins a console and serves until told to stop.

Exit codes: 0 after SIGTERM or when the parent is gone, 2 for a wrong setting or model folder,
3 when the console refuses the worker, 1 for a defect or a device that failed.
"""

import asyncio
import ctypes
import gc
import importlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlplane import protocol
from controlplane.errors import SlackwaterError
from controlplane.latency import LatencyModel
from gpuworkers import config, driver, modelfile
from gpuworkers.config import WorkerConfig
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.link import JoinRefused
from gpuworkers.modelswap import Loaded, Models
from gpuworkers.server import Worker, WorkerFacts

EXIT_FAILED, EXIT_PERMANENT, EXIT_REFUSED = 1, 2, 3
PARENT_POLL_S = 0.5
PARENT_GONE_S_MAX = 3.0  # for a goodbye; then the process ends whatever it does
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger("gpuworkers")


def follow_parent(parent_pid: int) -> None:
    """Ends this process when the parent is gone, however the parent ended and whatever we do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PARENT_GONE_S_MAX)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@dataclass(frozen=True, slots=True)
class Parts:
    """A loaded model, what it runs on, and the question for the device's load."""

    loaded: Loaded
    device: protocol.DeviceFacts
    device_load: Callable[[], protocol.DeviceLoad | None]
    settings: EngineConfig


def load_parts(worker: WorkerConfig, model_id: str, folder: Path | None) -> Parts:
    """One model on the worker's device. The module is chosen by name, so that a modelled worker
    does not load torch. Raises SlackwaterError."""
    settings, device_load = EngineConfig(), no_load
    if worker.engine == "fake":
        fake = importlib.import_module("gpuworkers.fake")
        parts = fake.load(worker.profile, model_id, worker.kv_tokens)
    elif worker.device == "cpu":
        runner = importlib.import_module("gpuworkers.runner")
        parts = runner.load(
            folder, model_id, worker.dtype, worker.numerics, worker.kv_tokens, worker.threads
        )
    else:
        cudarunner = importlib.import_module("gpuworkers.cudarunner")
        parts, device_load = cudarunner.load(folder, model_id, worker.device, worker.kv_tokens)
        settings = EngineConfig(host_blocks_ratio=cudarunner.HOST_BLOCKS_RATIO)
    model_runner, model, device, step_model = parts
    return Parts(Loaded(model_runner, model, step_model), device, device_load, settings)


def load_engines(worker: WorkerConfig) -> list[tuple[Engine, Any, Any]]:
    """Each worker's engine, device facts and question for the device's load."""
    engines = []
    for _ in range(worker.count):
        parts = load_parts(worker, worker.model_id, worker.model_dir)
        loaded = parts.loaded
        engine = Engine(loaded.runner, parts.settings, loaded.step_model, loaded.model, worker.role)
        engines.append((engine, parts.device, parts.device_load))
    return engines


def loadable_models(worker: WorkerConfig) -> Models | None:
    """What the worker can load, its first model among them; None: nothing else."""
    if not worker.loadable:
        return None
    folders = {worker.model_id: worker.model_dir, **dict(worker.loadable)}

    async def load(model_id: str) -> Loaded:
        if worker.engine == "fake":
            fake = importlib.import_module("gpuworkers.fake")
            await asyncio.sleep(fake.PROFILES[worker.profile].load_s)
            return load_parts(worker, model_id, None).loaded
        gc.collect()  # the former model's arrays
        parts = await asyncio.to_thread(load_parts, worker, model_id, folders[model_id])
        loaded = parts.loaded
        modelfile.restore(loaded.step_model, model_id, device_name(worker, parts.device))
        return loaded

    return Models(tuple(folders), load)


def no_load() -> None:
    """Of a device that does not tell its load."""


def learned_models(
    worker: WorkerConfig, engines: list[tuple[Engine, Any, Any]]
) -> list[tuple[LatencyModel, str, str]]:
    """Latency models worth keeping, each with its model id and device: not modelled ones."""
    if worker.engine == "fake":
        return []
    return [
        (engine.step_model, engine.model.model_id, device_name(worker, device))
        for engine, device, _ in engines
        if engine.model is not None
    ]


def device_name(worker: WorkerConfig, device: protocol.DeviceFacts) -> str:
    """What step times depend on beside the model."""
    return f"{device.name} {device.dtype} {worker.numerics}"


async def serve(worker: WorkerConfig, engines: list[tuple[Engine, Any, Any]]) -> None:
    """Runs the workers until a signal. Raises JoinRefused, or what broke an engine."""
    loop = asyncio.get_running_loop()
    models = loadable_models(worker)
    make = driver.TaskDriver if worker.engine == "fake" else driver.ThreadDriver
    workers = [
        Worker(
            WorkerFacts(
                worker.join_url,
                worker.token(index),
                worker.worker_name(index),
                worker.engine,
                device,
                worker.handoff_bind,
                device_load,
                models,
            ),
            engine,
            lambda engine, report: make(engine, loop.time, report),
            random.random,
        )
        for index, (engine, device, device_load) in enumerate(engines)
    ]
    stopping: list[asyncio.Task[None]] = []

    def stop(name: str) -> None:
        if not stopping:
            stopping.extend(loop.create_task(w.stop(f"stopped by {name}")) for w in workers)

    loop.add_signal_handler(signal.SIGTERM, stop, "SIGTERM")
    if worker.parent_pid is None:  # started by hand; else Ctrl-C is the parent's business
        loop.add_signal_handler(signal.SIGINT, stop, "SIGINT")
    running = [loop.create_task(w.run()) for w in workers]
    try:
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, *stopping, return_exceptions=True)


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        worker = config.parse(argv, os.environ)
        if worker.parent_pid is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            follow_parent(worker.parent_pid)
        os.nice(worker.nice)
        engines = load_engines(worker)
        for step_model, model_id, device in learned_models(worker, engines):
            modelfile.restore(step_model, model_id, device)
        asyncio.run(serve(worker, engines))
        for step_model, model_id, device in learned_models(worker, engines):
            modelfile.save(step_model, model_id, device)
    except JoinRefused as refused:
        print(f"refused: {refused.reason}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except SlackwaterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_PERMANENT if error.permanent else EXIT_FAILED
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == EXIT_FAILED:
        os._exit(code)  # the destructors of a broken CUDA context abort, in many lines of their own
    sys.exit(code)
