"""Two workers on torch engines, each in its own thread: real KV over the wire, exact output."""

import math
import struct
from pathlib import Path

import pytest

from controlplane import protocol
from gpuworkers import runner
from gpuworkers.driver import ThreadDriver
from gpuworkers.engine import Engine, EngineConfig
from tests.gpuworkers.stubconsole import StubConsole, assign
from tests.gpuworkers.test_server import running, send_pair
from tests.gpuworkers.tinyllama import write_tiny

PROMPT = [(7 * i) % 500 + 3 for i in range(70)]
TINY = {"model_id": "tiny"}
SAMPLINGS = [
    protocol.Sampling(24, ignore_eos=True),
    protocol.Sampling(24, 8.0, top_p=0.95, seed=11, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny")


def torch_engine(folder: Path, role: protocol.Role = "mixed") -> Engine:
    loaded, facts, _, step_model = runner.load(folder, "tiny", dtype="fp32", kv_tokens=4096)
    return Engine(loaded, EngineConfig(), step_model, facts, role)


async def undisturbed(folder: Path, sampling: protocol.Sampling) -> list[int]:
    engine = torch_engine(folder)
    async with StubConsole() as console, running(console, engine, driver=ThreadDriver):
        await console.send("w1", assign("r", PROMPT, sampling=sampling, **TINY))
        return await console.finished("r")


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
async def test_handoff_between_two_threads_under_load_does_not_change_the_output(
    folder: Path, sampling: protocol.Sampling
) -> None:
    alone = await undisturbed(folder, sampling)
    assert len(alone) == 24 and len(set(alone)) > 2
    engines = torch_engine(folder, "prefill"), torch_engine(folder, "decode")
    async with StubConsole() as console, running(console, *engines, driver=ThreadDriver):
        for worker in ("w1", "w2"):
            for number in range(3):
                other = assign(f"{worker}-{number}", PROMPT[number:], 40, **TINY)
                await console.send(worker, other)
        await send_pair(console, PROMPT, 24, sampling=sampling, **TINY)
        assert await console.finished("r") == alone
        (done,) = console.of(protocol.HandoffDone, "r")
        kv = engines[0].runner.kv
        assert done.bytes == 5 * kv.num_layers * kv.layer_block_bytes
        for name in (f"{worker}-{number}" for worker in ("w1", "w2") for number in range(3)):
            await console.finished(name)


async def test_kv_that_is_not_finite_is_refused_and_the_request_computed_again(
    folder: Path,
) -> None:
    alone = await undisturbed(folder, SAMPLINGS[0])
    engines = torch_engine(folder), torch_engine(folder)
    kv = engines[0].runner.kv
    read = kv.read
    nan = struct.pack("<f", math.nan)
    kv.read = lambda layer, block_ids: nan + read(layer, block_ids)[4:]
    async with StubConsole() as console, running(console, *engines, driver=ThreadDriver):
        await send_pair(console, PROMPT, 24, sampling=SAMPLINGS[0], **TINY)
        await console.until(lambda: bool(console.of(protocol.HandoffFailed, "r")))
        assert console.of(protocol.HandoffFailed, "r")[0].reason == "malformed"
        again = assign("r", PROMPT, epoch=2, delivered=alone[:1], sampling=SAMPLINGS[0], **TINY)
        await console.send("w2", again)
        assert await console.finished("r") == alone
