"""Checks and times everything that needs a GPU, in one call: `python3 -m gpuworkers.gpucheck`.

Runs from the repository root on a machine with torch and CuPy; nothing else of ours need be
installed. Each phase is a process of its own with a time limit: a fault in one leaves the others.
Figures go to a JSON file, a short table comes last. Exit code 1 when a phase failed.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpuworkers import enginebench, gpumodel, greedycheck, peerbench
from gpuworkers.enginebench import EngineBench, StepTime
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.llama import load_llama
from gpuworkers.randommodel import CONFIGS, SMALL, RandomWeights
from gpuworkers.stepper import GraphStepper, Stepper
from kernels import bench, verify
from kernels.torchops.backend import TorchOps

DEVICE = "cuda:0"
TABLE_MARK = "--- "
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SIZES = verify.Sizes(  # instrumented kernels run tens of times slower
    context_max=600, rows=(1, 33), hidden=(576,), widths=(1536,), heads=verify.Sizes().heads[:2],
    vocabs=(1000,),
)  # fmt: skip
PHASES = {  # name: seconds allowed
    "kernels right": 150.0,
    "greedy": 120.0,
    "kernels fast": 180.0,
    "engine llama-3.1-8b": 180.0,
    "engine qwen3-8b": 180.0,
    "peer llama-3.1-8b": 240.0,
    "sanitizer memcheck": 300.0,
    "sanitizer racecheck": 300.0,
}
PHASES_DEFAULT = tuple(name for name in PHASES if not name.startswith(("sanitizer", "peer")))

Answer = dict[str, Any]


# --- phases, each in a process of its own --------------------------------------------------------


def check_kernels(sizes: verify.Sizes) -> Answer:
    """Every kernel against the float64 reference."""
    device = torch.device(DEVICE)
    ops = gpumodel.cuda_ops(DEVICE)
    with torch.inference_mode():
        made = list(verify.checks(ops, device, torch.bfloat16, sizes))
    worst: dict[str, verify.Check] = {}
    for check in made:
        known = worst.get(check.kernel)
        if known is None or not check.error <= known.error:
            worst[check.kernel] = check
    return {
        "checks": len(made),
        "wrong": [dataclasses.asdict(check) for check in made if not check.is_right],
        "worst": {name: dataclasses.asdict(check) for name, check in worst.items()},
        "is_right": all(check.is_right for check in made),
        "table": [
            f"{name:18} worst error {check.error:.1e} of {check.tolerance:.1e} at {check.case}"
            for name, check in worst.items()
        ],
    }


def check_greedy() -> Answer:
    """One small model on the CPU backend and on the GPU with captured decodes."""
    prompts = greedycheck.make_prompts(SMALL.vocab_size)
    size, output = gpumodel.BLOCK_TOKENS, greedycheck.OUTPUT_TOKENS
    tokens = greedycheck.kv_tokens_for(prompts, output, size)
    cpu_ops = TorchOps()
    with torch.no_grad():
        model = load_llama(SMALL, RandomWeights("cpu", "cpu"), gpumodel.DTYPE, cpu_ops)
    kv = TorchKVCache(SMALL.num_layers, tokens // size, size, model.heads, gpumodel.DTYPE)
    reference = greedycheck.generate(Stepper(model, cpu_ops, kv.layers, size), size, prompts)
    stepper, _ = gpumodel.place(
        SMALL, RandomWeights("cpu", DEVICE), gpumodel.cuda_ops(DEVICE), DEVICE, tokens,
        gpumodel.capture_into_pool(), (1, greedycheck.NUM_PROMPTS),
    )  # fmt: skip
    agreement = greedycheck.compare(reference, greedycheck.generate(stepper, size, prompts))
    text = f"{agreement.equal} of {agreement.prompts} outputs equal"
    if agreement.margins:
        text += f"; margins where they part: {', '.join(f'{m:.3f}' for m in agreement.margins)}"
    return dataclasses.asdict(agreement) | {
        "replays": stepper.num_replays,
        "is_right": agreement.is_right,
        "table": [text],
    }


def time_kernels() -> Answer:
    device = torch.device(DEVICE)
    ceiling, rows = bench.run_all(gpumodel.cuda_ops(DEVICE), device, bench.CudaTimer(device))
    return dataclasses.asdict(ceiling) | {
        "rows": [dataclasses.asdict(row) for row in rows],
        "is_right": True,
        "table": bench.table(ceiling, rows),
    }


def time_engine(model_name: str) -> Answer:
    """The shapes that the device has KV room for."""
    config = CONFIGS[model_name]
    room = gpumodel.kv_room(config, DEVICE)
    decodes = [d for d in enginebench.DECODES if enginebench.kv_tokens_for([d], ()) <= room]
    tokens = enginebench.kv_tokens_for(decodes, enginebench.PREFILLS)
    files = RandomWeights(DEVICE, DEVICE)
    ops, capture = gpumodel.cuda_ops(DEVICE), gpumodel.capture_into_pool()
    started_at_s = time.perf_counter()
    stepper, kv = gpumodel.place(config, files, ops, DEVICE, tokens, capture)
    placed_s = time.perf_counter() - started_at_s
    times = []
    engine = EngineBench(stepper, kv, time.perf_counter, time.sleep)
    for step in enginebench.run_all(engine, decodes, enginebench.PREFILLS):
        times.append(step)
        print(f"measured {step.kind} {step.batch} x {step.tokens}", file=sys.stderr, flush=True)
    times += engine_loops(stepper, kv, times)
    left_out = [f"{b} x {c}" for b, c in enginebench.DECODES if (b, c) not in decodes]
    table = step_table(times)
    return {
        "model": model_name,
        "kv_room_tokens": room,
        "placed_s": placed_s,  # weights made, KV allocated, graphs captured
        "peak_bytes": torch.cuda.max_memory_allocated(DEVICE),
        "steps": [dataclasses.asdict(t) | {"host_share": t.host_share} for t in times],
        "left_out": left_out,
        "is_right": True,
        "table": table + ([f"no KV room for {', '.join(left_out)}"] if left_out else []),
    }


def step_table(times: list[StepTime]) -> list[str]:
    head = f"{'step':14}{'batch':>6}{'tokens':>8}{'wall ms':>10}{'device ms':>11}{'host':>7}"
    return [head] + [
        f"{t.kind:14}{t.batch:6}{t.tokens:8}{t.wall_s * 1e3:10.2f}{t.device_s * 1e3:11.2f}"
        f"{t.host_share:7.1%}"
        for t in times
    ]


def time_peer(model_name: str) -> Answer:
    """transformers' continuous batching on the same shape."""
    model = peerbench.make_model(CONFIGS[model_name], DEVICE)
    times = [peerbench.time_decode(model, *shape, time.perf_counter) for shape in peerbench.SHAPES]
    return {
        "steps": [dataclasses.asdict(t) for t in times],
        "is_right": True,
        "table": step_table(times),
    }


def engine_loops(stepper: GraphStepper, kv: TorchKVCache, times: list[StepTime]) -> list[StepTime]:
    """Whole steps of an engine, where the wire format's library is there."""
    if importlib.util.find_spec("msgspec") is None:
        print("msgspec is not installed: no engine loop is timed", file=sys.stderr)
        return []
    loop = importlib.import_module("gpuworkers.engineloop")
    device_s = {(t.batch, t.tokens): t.device_s for t in times if t.kind == "decode"}
    return [
        loop.time_steps(stepper, kv, *shape, device_s[shape], time.perf_counter)
        for shape in loop.SHAPES
        if shape in device_s
    ]


def sanitize(tool: str) -> Answer:
    """The kernels' checks at small sizes under compute-sanitizer."""
    inner = [sys.executable, "-m", "gpuworkers.gpucheck", "--phase", "kernels right", "--small"]
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *inner]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("=====")]
    summary = [line for line in told if "SUMMARY" in line]
    is_clean = len(summary) == 1 and " 0 error" in summary[0].replace(": 0 hazard", ": 0 error")
    return {
        "is_right": is_clean and done.returncode == 0,
        "told": told[:100],
        "errors": done.stderr[-4000:],
        "table": summary or [f"{tool} gave no summary, exit code {done.returncode}"],
    }


def run_phase(name: str, is_small: bool) -> Answer:
    kind, _, rest = name.partition(" ")
    match kind:
        case "engine":
            return time_engine(rest)
        case "peer":
            return time_peer(rest)
        case "sanitizer":
            return sanitize(rest)
        case "greedy":
            return check_greedy()
    if name == "kernels fast":
        return time_kernels()
    return check_kernels(SANITIZER_SIZES if is_small else verify.Sizes())


# --- all phases ----------------------------------------------------------------------------------


def run_child(name: str, limit_s: float) -> Answer:
    """The phase's answer, or what it said before it ended without one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuworkers.gpucheck", "--phase", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # to end what it started too: a sanitizer's child holds the GPU
    )
    try:
        out, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        return failed(f"no answer within {limit_s:.0f} s", said)
    if process.returncode != 0:
        return failed(f"ended with {process.returncode}", said)
    answer: Answer = json.loads(out.splitlines()[-1])
    return answer


def failed(reason: str, said: str) -> Answer:
    """With the last line that names an error: a broken CUDA context says much after it."""
    lines = said.strip().splitlines() or ["and said nothing"]
    last = next((line for line in reversed(lines) if "Error: " in line), lines[-1])
    return {"is_right": False, "error": reason, "said": said[-6000:], "table": [reason, last]}


def run_phases(
    names: Sequence[str],
    run: Callable[[str, float], Answer],
    clock: Callable[[], float],
    budget_s: float,
    keep: Callable[[dict[str, Answer]], None],
) -> dict[str, Answer]:
    """One phase after the other; `keep` gets all answers so far after each. A phase gets what is
    left of the budget at most, and none is started without any left."""
    ends_at_s = clock() + budget_s
    answers: dict[str, Answer] = {}
    for name in names:
        left_s = ends_at_s - clock()
        if left_s > 0:
            started_at_s = clock()
            answer = run(name, min(PHASES[name], left_s))
            answers[name] = answer | {"seconds": clock() - started_at_s}
        else:
            answers[name] = failed("not started: the time budget is spent", "")
        keep(answers)
    return answers


def summary(answers: dict[str, Answer]) -> list[str]:
    """The short table: what is right first, then each phase's own lines."""
    lines = []
    for name, answer in answers.items():
        verdict = "ok" if answer["is_right"] else "FAILED"
        lines.append(f"{TABLE_MARK}{name}: {verdict}, {answer.get('seconds', 0.0):.0f} s")
        lines += answer["table"]
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m gpuworkers.gpucheck", description=__doc__)
    add = parser.add_argument
    add("--phases", default=",".join(PHASES_DEFAULT), help=f"of: {', '.join(PHASES)}")
    add("--out", type=Path, default=Path("gpucheck.json"), help="file for all figures")
    add("--budget-s", type=float, default=560.0, help="for all phases together")
    add("--phase", choices=PHASES, help="run this one here and print its answer as JSON")
    add("--small", action="store_true", help="with --phase: sizes for a sanitizer")
    options = parser.parse_args(argv)
    names = options.phases.split(",")
    if unknown := set(names) - PHASES.keys():
        parser.error(f"--phases: {', '.join(sorted(unknown))}: expected {', '.join(PHASES)}")
    reason = bench.refusal()
    if reason is not None:
        print(reason)
        return 1
    if options.phase:
        answer = run_phase(options.phase, options.small)
        print(json.dumps(answer))
        return 0
    where = bench.facts(torch.device(DEVICE))
    where["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    where["cupy"] = importlib.import_module("cupy").__version__

    def keep(answers: dict[str, Answer]) -> None:
        options.out.write_text(json.dumps(where | {"phases": answers}, indent=1))

    answers = run_phases(names, run_child, time.monotonic, options.budget_s, keep)
    print("\n".join([json.dumps(where), *summary(answers)]))
    return 0 if all(answer["is_right"] for answer in answers.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
