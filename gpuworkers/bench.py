"""Measures the engine on a real model against transformers: `python -m gpuworkers.bench`.

One process, one thread, no gateway. Both sides get the same ids, dtype and greedy decoding, and are
measured by the processor time of this process, turn by turn, so that other load on the machine
disturbs both alike. Ratios are theirs over ours: above 1 we are faster. Prints one JSON object.
"""

import argparse
import dataclasses
import functools
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from controlplane import protocol
from controlplane.errors import ConfigError, SlackwaterError
from controlplane.latency import LatencyModel
from gpuworkers import runner
from gpuworkers.engine import Engine, EngineConfig

SEED = 20261124
NUM_REQUESTS = 16
PROMPT_TOKENS = (32, 512)  # uniform, both ends included
OUTPUT_TOKENS = (16, 128)
PREFILL_TOKENS = 1024
PREFILL_REPEATS = 3
KV_TOKENS = 16_384
MODEL_ID = "bench"
TARGETS = protocol.ClassTargets("bench", 0, ttft_s_left=3600.0, itl_s=3600.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    prompt_ids: list[int]
    output_tokens: int


Arms = dict[str, Callable[[list[Request]], list[list[int]]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What a run made and took."""

    outputs: list[list[int]]
    cpu_s: float
    wall_s: float


def make_requests(vocab_size: int, count: int) -> list[Request]:
    """The workload, the same for every arm."""
    rng = np.random.default_rng(SEED)
    return [
        Request(
            rng.integers(
                100, vocab_size, int(rng.integers(*PROMPT_TOKENS, endpoint=True))
            ).tolist(),
            int(rng.integers(*OUTPUT_TOKENS, endpoint=True)),
        )
        for _ in range(count)
    ]


def timed(work: Callable[[], list[list[int]]]) -> Run:
    gc.collect()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    outputs = work()
    return Run(outputs, time.process_time() - cpu_s, time.perf_counter() - wall_s)


class Ours:
    """An engine that is fed and stepped directly."""

    def __init__(self, folder: Path, dtype: str, numerics: str) -> None:
        loaded, self.facts, _, self._model = runner.load(
            folder, MODEL_ID, dtype, numerics, kv_tokens=KV_TOKENS
        )
        self.runner = loaded

    def generate(self, requests: list[Request]) -> list[list[int]]:
        """All at once, in a fresh engine: no prefix is found in a cache."""
        engine = Engine(
            self.runner,
            EngineConfig(),
            LatencyModel(self._model.coefficients()),
            self.facts,
            "mixed",
        )
        outputs: list[list[int]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            sampling = protocol.Sampling(request.output_tokens, ignore_eos=True)
            answer = engine.assign(
                protocol.Assign(
                    str(index), 1, MODEL_ID, "full", request.prompt_ids, [], sampling, TARGETS, b""
                ),
                time.perf_counter(),
            )
            assert isinstance(answer, protocol.Accepted), answer
        while engine.has_work():
            result = engine.step(time.perf_counter(), time.perf_counter)
            for report in result.sequences:
                outputs[int(report.request_id)] += report.token_ids
        engine.check_integrity()
        return outputs


class Theirs:
    """transformers with a KV cache, greedy, in inference mode."""

    def __init__(self, folder: Path, dtype: torch.dtype, attention: str) -> None:
        self.attention = attention
        try:  # only here: a worker is installed without it
            transformers = importlib.import_module("transformers")
        except ImportError:
            raise ConfigError("the comparison needs transformers: install the dev extra") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        ).eval()

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[list[int]]:
        """Several are one left-padded batch that runs until its longest output is there."""
        # A bare loop, faster than transformers' own generate; one request needs no mask.
        width = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        steps = max(request.output_tokens for request in requests)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, made = None, []
        for _ in range(steps):
            batch = {} if len(requests) == 1 else {"attention_mask": mask}
            out = self._model(
                ids,
                past_key_values=cache,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **batch,
            )
            cache = out.past_key_values
            ids = out.logits[:, -1:].argmax(-1)
            made.append(ids[:, 0].tolist())
            positions = positions[:, -1:] + 1
            mask = torch.cat((mask, mask.new_ones(len(requests), 1)), dim=1)
        columns = [list(column) for column in zip(*made, strict=True)]
        return [column[: r.output_tokens] for column, r in zip(columns, requests, strict=True)]


def resident_mb() -> float:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def extra_rss_mb(ours: Ours, before_mb: float) -> float:
    """What a worker holds beyond its weights and its KV pool, after a full run."""
    model, kv = ours.runner.model, ours.runner.kv
    held = model.weight_bytes + kv.num_layers * kv.num_blocks * kv.layer_block_bytes
    return resident_mb() - before_mb - held / 1024**2


def best_attention(folder: Path, dtype: torch.dtype, probe: list[Request]) -> Theirs:
    """The faster of sdpa and eager on one short request."""
    candidates = [Theirs(folder, dtype, attention) for attention in ("sdpa", "eager")]
    for candidate in candidates:
        candidate.generate(probe)
    return min(candidates, key=lambda c: timed(lambda: c.generate(probe)).cpu_s)


def alternate(arms: Arms, pieces: list[list[Request]]) -> dict[str, Run]:
    """Every arm on a piece before the next piece, so that a slow minute is everybody's."""
    runs = {name: Run([], 0.0, 0.0) for name in arms}
    for piece in pieces:
        for name, arm in arms.items():
            run, sum_ = timed(functools.partial(arm, piece)), runs[name]
            runs[name] = Run(
                sum_.outputs + run.outputs, sum_.cpu_s + run.cpu_s, sum_.wall_s + run.wall_s
            )
    for name, run in runs.items():
        print(f"{name} cpu_s={run.cpu_s:.2f} wall_s={run.wall_s:.2f}", file=sys.stderr)
    return runs


def measure(folder: Path, dtype_name: str, num_requests: int) -> dict[str, object]:
    """All figures. Raises SlackwaterError for a folder that cannot be served."""
    torch.set_num_threads(1)
    before_mb = resident_mb()
    exact = Ours(folder, dtype_name, "exact")
    requests = make_requests(exact.facts.vocab_size, num_requests)
    exact.generate(requests)
    rss_mb = extra_rss_mb(exact, before_mb)
    fast = Ours(folder, dtype_name, "fast")
    warm = [Request(list(range(200, 232)), 8)]
    fast.generate(warm)
    theirs = best_attention(folder, exact.runner.model.dtype, warm)
    singles = {"theirs": theirs.generate, "exact": exact.generate, "fast": fast.generate}
    runs = alternate(singles, [[request] for request in requests])
    runs |= alternate({"static": theirs.generate, "batch16": exact.generate}, [requests])
    long = [make_long(exact.facts.vocab_size, index) for index in range(PREFILL_REPEATS)]
    prefills = {"prefill_theirs": theirs.generate, "prefill_exact": exact.generate}
    runs |= alternate(prefills, [[request] for request in long])
    expected = runs["theirs"].outputs
    output_tokens = sum(request.output_tokens for request in requests)

    def ratio(other: str, mine: str) -> float:
        return runs[other].cpu_s / runs[mine].cpu_s

    return {
        "single_ratio": ratio("theirs", "exact"),
        "single_ratio_fast": ratio("theirs", "fast"),
        "batch16_vs_sequential": ratio("theirs", "batch16"),
        "batch16_vs_static": ratio("static", "batch16"),
        "prefill_ratio": ratio("prefill_theirs", "prefill_exact"),
        "outputs_equal": int(runs["exact"].outputs == runs["batch16"].outputs == expected),
        "outputs_equal_share": agreement(runs["batch16"].outputs, expected),
        "fast_outputs_equal_share": agreement(runs["fast"].outputs, expected),
        "worker_extra_rss_mb": rss_mb,
        "cpu_s": {name: run.cpu_s for name, run in runs.items()},
        "wall_s": {name: run.wall_s for name, run in runs.items()},
        "tokens_per_cpu_s": {
            name: output_tokens / runs[name].cpu_s
            for name in ("theirs", "exact", "fast", "static", "batch16")
        },
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "output_tokens": output_tokens,
        "dtype": exact.runner.kv.dtype_name,
        "attention": theirs.attention,
        "device": runner.device_facts(exact.runner.kv.dtype_name).name,
        "threads": torch.get_num_threads(),
    }


def make_long(vocab_size: int, index: int) -> Request:
    rng = np.random.default_rng(SEED + 1 + index)
    return Request(rng.integers(100, vocab_size, PREFILL_TOKENS).tolist(), 1)


def agreement(outputs: list[list[int]], expected: list[list[int]]) -> float:
    """Share of requests with exactly the expected ids."""
    equal = sum(mine == other for mine, other in zip(outputs, expected, strict=True))
    return equal / len(expected)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpuworkers.bench", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "auto"), default="fp32")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(argv)
    try:
        result = measure(options.model, options.dtype, options.requests)
    except SlackwaterError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps(result, indent=None if options.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
