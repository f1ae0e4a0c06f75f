"""The simulated worker on a measured step table: `python3 -m tests.gpu.simerror --table FILE`.

Arrivals, policy and KV room are those of gpuworkers.gpucoserve; with its answer beside, the error
of each figure is printed too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from controlplane import kappas, protocol
from controlplane.latency import LatencyModel
from controlplane.sim import coserve
from controlplane.sim.station import Outcome, Station
from controlplane.sim.steptable import StepTable, TableFile
from controlplane.sim.workload import Arrival, Noise
from gpuworkers import benchcoserve, gpucoserve, scheduler
from gpuworkers.randommodel import LLAMA_8B

LEVELS = {"ttft_ms_p50": 0.5, "ttft_ms_p95": 0.95, "ttft_ms_p99": 0.99}
FINISH_S = 10.0  # for requests that are running at the end of a slice
REFERENCE_ROWS = 1024  # algorithms.md: the bound has no limit that matters


def arrivals(index: int, seconds: float) -> list[Arrival]:
    """Of a slice; index -1 is the warm-up."""
    work, seed = gpucoserve.LARGE, benchcoserve.SEED + 1 + index
    made = benchcoserve.make_arrivals(work, seconds, LLAMA_8B.vocab_size, seed)
    return [Arrival(a.at_s, len(a.prompt_ids), a.output_tokens) for a in made]


def policy(kappa: float, rows_max: int, **fields: float) -> protocol.Policy:
    made = protocol.Policy.for_targets(gpucoserve.TTFT_S, gpucoserve.ITL_S, kappa, **fields)
    tokens = gpucoserve.TOKENS_MAX
    return msgspec.structs.replace(
        made, batch_rows_max=rows_max, chunk_tokens_max=tokens, step_tokens_max=tokens
    )


def serve(
    table: StepTable, has_batch: bool, is_reference: bool = False, num_slices: int = 3
) -> Outcome:
    """All slices; the reference knows every step's time and has KV without end."""
    work = gpucoserve.LARGE
    targets = protocol.ClassTargets("bench", 0, gpucoserve.TTFT_S, gpucoserve.ITL_S)
    if is_reference:
        model: LatencyModel = coserve.ExactModel(table)
        rules = policy(1.0, REFERENCE_ROWS, first_token_share=1.0)
        kv_tokens = coserve.KV_TOKENS_UNLIMITED
    else:
        model = LatencyModel(coserve.ROOFLINE_8B)
        kappa = kappas.kappa_for(kappas.load(), gpucoserve.TTFT_S, gpucoserve.ITL_S)
        rules, kv_tokens = policy(kappa, gpucoserve.ROWS_MAX), work.kv_tokens
    planner = partial(scheduler.plan, model=model, policy=rules)

    def run(index: int, seconds: float) -> Outcome:
        noise = None if is_reference else Noise(index + 1)
        station = Station(
            table, planner, model, targets, kv_tokens, noise, has_batch, observe=not is_reference
        )
        spare_s = 0.0 if has_batch else FINISH_S
        outcome = station.run(arrivals(index, seconds), seconds + spare_s, 0.0)
        outcome.seconds = seconds
        return outcome

    run(-1, work.warm_s)
    return coserve.pooled(run(index, benchcoserve.SLICE_S) for index in range(num_slices))


def figures(outcome: Outcome) -> dict[str, float]:
    ttfts_ms = 1e3 * np.array(outcome.ttft_s)
    made = {name: float(np.quantile(ttfts_ms, level)) for name, level in LEVELS.items()}
    return made | {
        "itl_miss": coserve.itl_miss(outcome),
        "batch_work_per_s": outcome.batch_work / outcome.seconds,
        "batch_output_tokens_per_s": outcome.batch_output_tokens / outcome.seconds,
    }


def errors(simulated: dict[str, float], measured: dict[str, Any]) -> dict[str, float]:
    """Simulated over measured less 1; a figure with its interval counts by the estimate."""
    found = {}
    for name in (*LEVELS, "batch_output_tokens_per_s"):
        value = measured[name]
        value = value[0] if isinstance(value, list) else value
        if value:
            found[name] = round(simulated[name] / value - 1.0, 3)
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.simerror", description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="of gpuworkers.gpusteps")
    parser.add_argument("--measured", type=Path, help="answer of gpuworkers.gpucoserve")
    options = parser.parse_args(argv)
    table = StepTable(msgspec.json.decode(options.table.read_bytes(), type=TableFile))
    answer: dict[str, Any] = {
        "online": figures(serve(table, has_batch=False)),
        "batch": figures(serve(table, has_batch=True)),
        "reference": figures(serve(table, has_batch=True, is_reference=True)),
    }
    if options.measured:
        measured = json.loads(options.measured.read_text())
        answer["errors"] = {
            name: errors(answer[name], arm) for name, arm in measured["arms"].items()
        }
        reference = answer["reference"]["batch_work_per_s"]
        answer["harvest"] = measured["batch_work_per_s"] / reference
    print(json.dumps(answer, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
