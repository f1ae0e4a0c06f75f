"""KV from one GPU's worker to another's: `python3 -m tests.gpu.handoffload --model DIR`.

Starts two worker processes, gives the first prompts to compute and the second to go on with, one at
a time, and prints for each length how long the prompt took, how much of the transfer was left when
it was computed, and that the output is what the second worker makes of the prompt alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from controlplane import protocol
from tests.gpuworkers import stubconsole
from tests.gpuworkers.stubconsole import StubConsole

ROOT = Path(__file__).resolve().parents[2]
JOIN_S_MAX = 150.0
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
REPEATS = 3
OUTPUT_TOKENS = 16
COPY_BYTES, COPY_REPEATS = 1 << 30, 10
TARGETS = protocol.ClassTargets("bench", 0, 60.0, 60.0)


def copy_gb_per_s(source: str, target: str) -> float:
    """One way, between two devices or a device and itself: what the link gives."""
    data = torch.ones(COPY_BYTES, dtype=torch.uint8, device=source)
    into = torch.empty_like(data, device=target)
    into.copy_(data)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(COPY_REPEATS):
        into.copy_(data, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    return COPY_REPEATS * COPY_BYTES / start.elapsed_time(end) / 1e6


async def started(console: StubConsole, model: Path, role: str, device: str) -> Any:
    options = ["--join", console.url, "--token", "t", "--role", role, "--device", device]
    options += ["--model", str(model), "--exit-with-parent", str(os.getpid())]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpuworkers", *options, cwd=ROOT
    )


async def transfer(console: StubConsole, model_id: str, tokens: int, number: int) -> Any:
    """One prompt through both workers, then through the second alone."""
    loop, name = asyncio.get_running_loop(), f"{tokens}-{number}"
    prompt = [(number * 7919 + 31 * i) % 40_000 + 100 for i in range(tokens)]
    common: dict[str, Any] = {
        "model_id": model_id,
        "sampling": protocol.Sampling(OUTPUT_TOKENS, ignore_eos=True),
        "targets": TARGETS,
    }
    assign = stubconsole.assign
    source = protocol.HandoffIn(console.hellos[0].handoff_address, name, 60.0)
    out = protocol.HandoffOut(name, 60.0)
    started_at_s = loop.time()
    await console.send("w2", assign(name, prompt, stage="decode", handoff_in=source, **common))
    await console.send("w1", assign(name, prompt, stage="prefill", handoff_out=out, **common))
    await console.until(lambda: bool(console.of(protocol.HandoffReady, name)))
    computed_s = loop.time() - started_at_s
    output = await console.finished(name)
    (done,) = console.of(protocol.HandoffDone, name)
    alone = f"{name}-alone"
    await console.send("w2", assign(alone, prompt, **{**common, "salt": name.encode()}))
    return {
        "tokens": tokens,
        "bytes": done.bytes,
        "computed_ms": round(1e3 * computed_s, 1),
        "left_ms": round(1e3 * done.seconds, 1),
        "gb_per_s": round(done.bytes / (computed_s + done.seconds) / 1e9, 2),
        "is_equal": output == await console.finished(alone),
    }


async def measure(model: Path, devices: Sequence[str], lengths: Sequence[int]) -> dict[str, Any]:
    stubconsole.HANG_S = JOIN_S_MAX
    async with StubConsole() as console:
        console.policy = protocol.Policy.for_targets(60.0, 60.0, 0.8)
        workers = [await started(console, model, "prefill", devices[0])]
        await console.joined(1)
        workers.append(await started(console, model, "decode", devices[1]))
        await console.joined(2)
        try:
            rows = [
                await transfer(console, model.name, tokens, number)
                for tokens in lengths
                for number in range(REPEATS)
            ]
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.send_signal(signal.SIGTERM)
                await worker.wait()
    return {"transfers": rows}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.handoffload", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--devices", nargs=2, default=("cuda:0", "cuda:1"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    is_cuda = options.devices[0] != "cpu"
    answer = {"link_gb_per_s": copy_gb_per_s(*options.devices) if is_cuda else None}
    torch.cuda.empty_cache()
    answer |= asyncio.run(measure(options.model, options.devices, options.lengths))
    options.out.write_text(json.dumps(answer, indent=1))
    print("link", answer["link_gb_per_s"])
    for row in answer["transfers"]:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
