"""Interactive and batch work on one GPU, in real time: `python3 -m gpuworkers.gpucoserve`.

An engine with a Llama-3.1-8B-shaped model of random weights, fed directly; batch on and off in
turns of a minute over the same arrivals. Prints one JSON object.
"""

import argparse
import json
import sys

import msgspec
import torch

from controlplane import kappas, protocol
from controlplane.latency import audit_figures
from gpuworkers import benchcoserve, cudarunner, gpumodel
from gpuworkers.aheadrunner import AheadRunner
from gpuworkers.benchcoserve import Arm, Workload, summary, take_turns
from gpuworkers.randommodel import LLAMA_8B, RandomWeights
from gpuworkers.runner import calibrate

DEVICE = "cuda:0"
# As the simulated worker of `bench coserve`: Azure's conversations and 1,000/250 batch rows.
LARGE = Workload(3.0, 1020, 129, 0.8, (16, 16_384), (2, 2048), 1000, 250, 600_000, 20.0)
TTFT_S, ITL_S = 0.5, 0.05
ROWS_MAX, TOKENS_MAX = 256, 8192  # batch rows; tokens of a step and of a chunk
OUTPUT_WORK = 2.2  # an output token in prompt tokens, 8B at 1k context: algorithms.md 2g


def measure(num_slices: int) -> dict[str, object]:
    """All figures."""
    ops = gpumodel.cuda_ops(DEVICE)
    stepper, kv = gpumodel.place(
        LLAMA_8B,
        RandomWeights(DEVICE, DEVICE),
        ops,
        DEVICE,
        LARGE.kv_tokens,
        gpumodel.capture_into_pool(),
    )
    runner = AheadRunner(stepper, kv)
    runner.prepare()
    seed_model = calibrate(runner, cudarunner.CALIBRATION_STEPS, cudarunner.CALIBRATION_REPEATS)
    facts = protocol.ModelFacts(
        benchcoserve.MODEL_ID, "", LLAMA_8B.max_model_len, LLAMA_8B.vocab_size, 1
    )
    targets = protocol.ClassTargets("bench", 0, TTFT_S, ITL_S)
    kappa = kappas.kappa_for(kappas.load(), TTFT_S, ITL_S)
    policy = msgspec.structs.replace(
        protocol.Policy.for_targets(TTFT_S, ITL_S, kappa),
        batch_rows_max=ROWS_MAX,
        chunk_tokens_max=TOKENS_MAX,
        step_tokens_max=TOKENS_MAX,
    )
    ratio = cudarunner.HOST_BLOCKS_RATIO
    arms = {
        name: Arm(runner, facts, seed_model, targets, policy, LARGE, name == "batch", ratio)
        for name in ("online", "batch")
    }
    take_turns(arms, LARGE, LLAMA_8B.vocab_size, num_slices)
    batch = arms["batch"].figures
    prompt_tokens = batch.batch_tokens - batch.batch_output_tokens
    return {
        "kappa": kappa,
        "batch_work_per_s": (prompt_tokens + OUTPUT_WORK * batch.batch_output_tokens)
        / batch.seconds,
        "arms": {name: summary(arm.figures, ITL_S) for name, arm in arms.items()},
        "latency": {name: audit_figures(arm.model.audits) for name, arm in arms.items()},
        "device": torch.cuda.get_device_name(DEVICE),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gpuworkers.gpucoserve", description=__doc__)
    parser.add_argument("--slices", type=int, default=3, help="minutes of each arm")
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.slices)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
