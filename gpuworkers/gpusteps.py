"""Measures the step table of a GPU for the simulator: `python3 -m gpuworkers.gpusteps --out FILE`.

The file has the form of controlplane/sim/tables: decode steps as they follow one another, steps
with a prompt chunk from token ids to sampled ids, in milliseconds. Weights are random.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gpuworkers import gpumodel
from gpuworkers.enginebench import EngineBench, kv_tokens_for
from gpuworkers.gpucheck import DEVICE
from gpuworkers.memory import weight_bytes
from gpuworkers.randommodel import CONFIGS, RandomWeights

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192)
DECODE_CONTEXTS = (256, 1024, 4096)
CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
PREFIXES = (0, 1024, 4096, 16_384)
MIXED_ROWS = (0, 8, 32, 64, 128)
MIXED_CONTEXTS = (1024, 4096)


def measure(bench: EngineBench) -> dict[str, Any]:
    """The three tables."""

    def decode_ms(rows: int, context: int) -> float:
        return round(1e3 * bench.decode(rows, context).device_s, 3)

    def mixed_ms(chunk: int, start: int, rows: int, context: int) -> float:
        return round(1e3 * bench.mixed(chunk, start, rows, context), 3)

    decode = [[decode_ms(rows, c) for c in DECODE_CONTEXTS] for rows in DECODE_ROWS]
    say("decode steps")
    prefill = [[mixed_ms(chunk, start, 0, 0) for start in PREFIXES] for chunk in CHUNKS]
    say("prompts")
    mixed = [
        [[mixed_ms(chunk, 0, rows, c) for c in MIXED_CONTEXTS] for rows in MIXED_ROWS]
        for chunk in CHUNKS
    ]
    say("mixed steps")
    return {
        "decode_step_ms": {
            "batch": DECODE_ROWS, "context_tokens": DECODE_CONTEXTS, "ms": decode
        },
        "prefill_ms": {"new_tokens": CHUNKS, "prefix_tokens": PREFIXES, "ms": prefill},
        "mixed_step_ms": {
            "prefill_tokens": CHUNKS, "decode_rows": MIXED_ROWS,
            "decode_context_tokens": MIXED_CONTEXTS, "ms": mixed,
        },
    }  # fmt: skip


def say(what: str) -> None:
    print(f"measured {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gpuworkers.gpusteps", description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="llama-3.1-8b")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    config = CONFIGS[options.model]
    largest = [(rows, DECODE_CONTEXTS[-1]) for rows in DECODE_ROWS]
    chunk = (1, CHUNKS[-1] + PREFIXES[-1])
    mixed = (MIXED_ROWS[-1] + CHUNKS[-1] // MIXED_CONTEXTS[-1], MIXED_CONTEXTS[-1])
    tokens = kv_tokens_for([*largest, chunk, mixed], ())
    stepper, kv = gpumodel.place(
        config, RandomWeights(DEVICE, DEVICE), gpumodel.cuda_ops(DEVICE), DEVICE, tokens,
        gpumodel.capture_into_pool(),
    )  # fmt: skip
    stepper.ops.prepare_chunks(stepper.model.heads, CHUNKS[-1])
    gpu = torch.cuda.get_device_name(DEVICE)
    head = {
        "name": f"{options.model}-bf16-measured",
        "source": f"gpuworkers.gpusteps on one {gpu}, {datetime.now(UTC).date()}, random weights",
        "model": options.model,
        "gpu": gpu,
        "tp": 1,
        "kv_bytes_per_token": kv.layer_block_bytes * config.num_layers // gpumodel.BLOCK_TOKENS,
        "weight_gb": round(weight_bytes(config, gpumodel.DTYPE.itemsize) / 1e9, 1),
    }
    bench = EngineBench(stepper, kv, time.perf_counter, time.sleep)
    options.out.write_text(json.dumps(head | measure(bench)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
