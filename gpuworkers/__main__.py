"""`python -m gpuworkers`: joins a console and serves until told to stop.

Exit codes: 0 after SIGTERM or when the parent is gone, 2 for a wrong setting or model folder,
3 when the console refuses the worker, 1 for a defect or a device that failed.
"""

import asyncio
import ctypes
import importlib
import logging
import os
import random
import signal
import sys
import threading
import time
from typing import Any

from controlplane.errors import SlackwaterError
from controlplane.latency import LatencyModel
from gpuworkers import config, driver, modelfile
from gpuworkers.config import WorkerConfig
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.link import JoinRefused
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


def load_engines(worker: WorkerConfig) -> list[tuple[Engine, Any, Any]]:
    """Each worker's engine, device facts and question for the device's load. The module is chosen
    by name, so that a modelled worker does not load torch."""
    engines = []
    for _ in range(worker.count):
        settings = EngineConfig()
        if worker.engine == "fake":
            fake = importlib.import_module("gpuworkers.fake")
            parts = fake.load(worker.profile, worker.model_id, worker.kv_tokens)
            device_load = no_load
        elif worker.device == "cpu":
            runner = importlib.import_module("gpuworkers.runner")
            parts = runner.load(
                worker.model_dir,
                worker.model_id,
                worker.dtype,
                worker.numerics,
                worker.kv_tokens,
                worker.threads,
            )
            device_load = no_load
        else:
            cudarunner = importlib.import_module("gpuworkers.cudarunner")
            parts, device_load = cudarunner.load(
                worker.model_dir, worker.model_id, worker.device, worker.kv_tokens
            )
            settings = EngineConfig(host_blocks_ratio=cudarunner.HOST_BLOCKS_RATIO)
        model_runner, model, device, step_model = parts
        engine = Engine(model_runner, settings, step_model, model, worker.role)
        engines.append((engine, device, device_load))
    return engines


def no_load() -> None:
    """Of a device that does not tell its load."""


def learned_models(
    worker: WorkerConfig, engines: list[tuple[Engine, Any, Any]]
) -> list[tuple[LatencyModel, str, str]]:
    """Latency models worth keeping, each with its model id and device: not modelled ones."""
    if worker.engine == "fake":
        return []
    return [
        (
            engine.step_model,
            engine.model.model_id,
            f"{device.name} {device.dtype} {worker.numerics}",
        )
        for engine, device, _ in engines
    ]


async def serve(worker: WorkerConfig, engines: list[tuple[Engine, Any, Any]]) -> None:
    """Runs the workers until a signal. Raises JoinRefused, or what broke an engine."""
    loop = asyncio.get_running_loop()
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
        kept = learned_models(worker, engines)
        for step_model, model_id, device_name in kept:
            modelfile.restore(step_model, model_id, device_name)
        asyncio.run(serve(worker, engines))
        for step_model, model_id, device_name in kept:
            modelfile.save(step_model, model_id, device_name)
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
