"""Interactive and batch work on one real engine: `python -m gpuworkers.benchcoserve`.

No gateway: an engine is fed an arrival list and stepped in real time. Three arms take turns, slice
by slice of the same list: `online` (no batch), `kappa` (as served) and `full` (kappa 1). Times are
wall time, from a request's arrival to the end of the step that yielded a token. Prints one JSON
object.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from controlplane import kappas, protocol
from controlplane.errors import SlackwaterError
from controlplane.latency import LatencyModel, StepFeatures
from gpuworkers import runner
from gpuworkers.engine import HOST_BLOCKS_RATIO, Engine, EngineConfig

SEED = 20261125
BATCH_WAITING = 4  # sequences kept waiting, so that the backlog is never empty
SLICE_S = 60.0
LATE_S_MAX = 60.0  # after the end of a slice until its requests must have ended
TTFT_FACTOR, ITL_FACTOR = 4.0, 3.0  # targets of a measured class (design.md section 11)
TARGET_PREFILL_TOKENS, TARGET_ROWS, TARGET_CONTEXT_TOKENS = 256, 4, 64
MODEL_ID = "bench"
RESAMPLES = 1000
FIRST_TOKEN_SHARE = protocol.Policy().first_token_share


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Poisson arrivals of lognormal lengths, within both ends of a range, and batch beside them.
    warm_s: of each arm before its first slice, for its latency model to learn."""

    rate_per_s: float
    prompt_median: int
    output_median: int
    sigma: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    batch_prompt_tokens: int
    batch_output_tokens: int
    kv_tokens: int
    warm_s: float


SMALL = Workload(0.6, 64, 16, 0.6, (8, 256), (4, 64), 48, 48, 16_384, 45.0)  # 135M on a CPU


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_ids: list[int]
    output_tokens: int


@dataclasses.dataclass(slots=True)
class Figures:
    """What an arm did, over all its slices."""

    ttfts_s: list[float] = dataclasses.field(default_factory=list)
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    batch_tokens: int = 0  # computed, prompts included
    batch_output_tokens: int = 0
    seconds: float = 0.0


def make_arrivals(work: Workload, seconds: float, vocab_size: int, seed: int) -> list[Arrival]:
    """The same list for the same seed."""
    rng = np.random.default_rng(seed)

    def length(median: int, bounds: tuple[int, int]) -> int:
        return int(np.clip(round(median * np.exp(work.sigma * rng.standard_normal())), *bounds))

    arrivals, at_s = [], float(rng.exponential(1.0 / work.rate_per_s))
    while at_s < seconds:
        count = length(work.prompt_median, work.prompt_tokens)
        prompt_ids = rng.integers(100, vocab_size, count).tolist()
        output_tokens = length(work.output_median, work.output_tokens)
        arrivals.append(Arrival(at_s, prompt_ids, output_tokens))
        at_s += float(rng.exponential(1.0 / work.rate_per_s))
    return arrivals


class Arm:
    """One policy, with its own learned latency model."""

    def __init__(
        self,
        loaded: runner.TorchRunner,
        facts: protocol.ModelFacts,
        seed_model: protocol.StepModel,
        targets: protocol.ClassTargets,
        policy: protocol.Policy,
        work: Workload,
        has_batch: bool,
        host_blocks_ratio: float = HOST_BLOCKS_RATIO,
    ) -> None:
        self.figures = Figures()
        self.model = LatencyModel(seed_model)
        self._work = work
        self._config = EngineConfig(policy, host_blocks_ratio=host_blocks_ratio)
        self._runner, self._facts = loaded, facts
        self._targets, self._has_batch = targets, has_batch
        self._rng = np.random.default_rng(SEED)
        self._num_batch = 0

    def run(self, arrivals: list[Arrival], seconds: float) -> Figures:
        """A fresh engine serves the arrivals. Batch counts until `seconds`, then stops."""
        engine = Engine(self._runner, self._config, self.model, self._facts, "mixed")
        figures, due = Figures(seconds=seconds), list(reversed(arrivals))
        last_at_s: dict[str, float] = {}
        started_at_s = time.perf_counter()

        def clock() -> float:
            return time.perf_counter() - started_at_s

        while (now_s := clock()) < seconds or last_at_s or due:
            assert now_s < seconds + LATE_S_MAX, "requests do not end"
            while due and due[-1].at_s <= now_s:
                arrival = due.pop()
                name = f"online-{len(due)}"
                self._assign(engine, name, arrival, self._targets, arrival.at_s)
                last_at_s[name] = arrival.at_s
            if self._has_batch and now_s < seconds:
                self._top_up(engine, now_s)
            if not engine.has_work():
                until_s = due[-1].at_s if due else seconds
                time.sleep(max(0.0, min(until_s, now_s + 0.01) - now_s))
                continue
            result = engine.step(now_s, clock)
            self._count(result.sequences, clock(), seconds, last_at_s, figures)
        engine.check_integrity()
        return figures

    def _top_up(self, engine: Engine, now_s: float) -> None:
        while engine.load(0.0).waiting_batch < BATCH_WAITING:
            self._num_batch += 1
            count = self._work.batch_prompt_tokens
            ids = self._rng.integers(100, self._facts.vocab_size, count).tolist()
            arrival = Arrival(now_s, ids, self._work.batch_output_tokens)
            batch = protocol.ClassTargets("batch", 1, 3600.0, 3600.0, is_batch=True)
            self._assign(engine, f"batch-{self._num_batch}", arrival, batch, now_s)

    def _assign(
        self,
        engine: Engine,
        name: str,
        arrival: Arrival,
        targets: protocol.ClassTargets,
        now_s: float,
    ) -> None:
        sampling = protocol.Sampling(arrival.output_tokens, ignore_eos=True)
        message = protocol.Assign(
            name, 1, MODEL_ID, "full", arrival.prompt_ids, [], sampling, targets, b""
        )
        answer = engine.assign(message, now_s)
        assert isinstance(answer, protocol.Accepted), answer

    def _count(
        self,
        reports: list[protocol.SequenceReport],
        at_s: float,
        seconds: float,
        last_at_s: dict[str, float],
        figures: Figures,
    ) -> None:
        for report in reports:
            if report.request_id not in last_at_s:
                if at_s <= seconds:
                    figures.batch_output_tokens += len(report.token_ids)
                    figures.batch_tokens += len(report.token_ids) + report.prefill_tokens
                continue
            if report.token_ids:
                waited_s = at_s - last_at_s[report.request_id]
                (figures.gaps_s if report.seq else figures.ttfts_s).append(waited_s)
                last_at_s[report.request_id] = at_s
            if report.finish_reason is not None:
                del last_at_s[report.request_id]


def add(total: Figures, part: Figures) -> None:
    total.ttfts_s += part.ttfts_s
    total.gaps_s += part.gaps_s
    total.batch_tokens += part.batch_tokens
    total.batch_output_tokens += part.batch_output_tokens
    total.seconds += part.seconds


def quantile_with_interval(values: list[float], level: float) -> list[float]:
    """[estimate, low, high]: a bootstrap's 95 % interval (Efron 1979)."""
    rng, sample = np.random.default_rng(SEED), np.array(values)
    drawn = rng.choice(sample, (RESAMPLES, len(sample)))
    low, high = np.quantile(np.quantile(drawn, level, axis=1), (0.025, 0.975))
    return [float(np.quantile(sample, level)), float(low), float(high)]


def summary(figures: Figures, itl_s: float) -> dict[str, object]:
    ttfts_ms = [1000.0 * value for value in figures.ttfts_s]
    gaps_ms = [1000.0 * value for value in figures.gaps_s]
    return {
        "requests": len(ttfts_ms),
        "ttft_ms_p50": float(np.quantile(ttfts_ms, 0.5)),
        "ttft_ms_p90": quantile_with_interval(ttfts_ms, 0.9),
        "ttft_ms_p95": quantile_with_interval(ttfts_ms, 0.95),
        "ttft_ms_p99": quantile_with_interval(ttfts_ms, 0.99),
        "itl_ms_p50": float(np.quantile(gaps_ms, 0.5)),
        "itl_ms_p99": quantile_with_interval(gaps_ms, 0.99),
        "itl_miss": sum(gap > itl_s for gap in figures.gaps_s) / len(figures.gaps_s),
        "batch_tokens_per_s": figures.batch_tokens / figures.seconds,
        "batch_output_tokens_per_s": figures.batch_output_tokens / figures.seconds,
    }


def take_turns(arms: dict[str, Arm], work: Workload, vocab_size: int, num_slices: int) -> None:
    """Warms every arm, then runs the slices, each time with another arm first."""
    for name, arm in arms.items():
        arm.run(make_arrivals(work, work.warm_s, vocab_size, SEED), work.warm_s)
        print(f"{name} is warm", file=sys.stderr, flush=True)
    names = list(arms)
    for index in range(num_slices):
        arrivals = make_arrivals(work, SLICE_S, vocab_size, SEED + 1 + index)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            add(arms[name].figures, arms[name].run(arrivals, SLICE_S))
        print(f"slice {index + 1} of {num_slices}", file=sys.stderr, flush=True)


def measure(folder: Path, seconds: float, kappa: float) -> dict[str, object]:
    """All figures; kappa 0 is that of the shipped table. Raises SlackwaterError for a folder that
    cannot be served."""
    loaded, facts, device, model = runner.load(folder, MODEL_ID, "auto", "exact", SMALL.kv_tokens)
    prefill = StepFeatures().with_tokens(0, TARGET_PREFILL_TOKENS)
    decode = StepFeatures().with_decodes(TARGET_ROWS, TARGET_ROWS * TARGET_CONTEXT_TOKENS)
    ttft_s, itl_s = TTFT_FACTOR * model.predict_s(prefill), ITL_FACTOR * model.predict_s(decode)
    targets = protocol.ClassTargets("bench", 0, ttft_s, itl_s)
    kappa = kappa or kappas.kappa_for(kappas.load(), ttft_s, itl_s)

    def arm(kappa: float, has_batch: bool, share: float = FIRST_TOKEN_SHARE) -> Arm:
        policy = protocol.Policy.for_targets(ttft_s, itl_s, kappa, first_token_share=share)
        return Arm(loaded, facts, model.coefficients(), targets, policy, SMALL, has_batch)

    arms = {
        "online": arm(kappa, has_batch=False),
        "kappa": arm(kappa, has_batch=True),
        "full": arm(1.0, has_batch=True, share=1.0),
    }
    num_slices = max(1, round(seconds / SLICE_S))
    take_turns(arms, SMALL, facts.vocab_size, num_slices)
    rows = {name: summary(one.figures, itl_s) for name, one in arms.items()}

    def p90(name: str) -> float:
        return float(np.quantile(arms[name].figures.ttfts_s, 0.9))

    return {
        "ttft_p90_ratio": p90("kappa") / p90("online"),
        "itl_miss": rows["kappa"]["itl_miss"],
        "batch_share": arms["kappa"].figures.batch_tokens / arms["full"].figures.batch_tokens,
        "kappa": kappa,
        "ttft_target_ms": 1000.0 * ttft_s,
        "itl_target_ms": 1000.0 * itl_s,
        "arms": rows,
        "seconds": num_slices * SLICE_S,
        "device": device.name,
        "dtype": device.dtype,
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpuworkers.benchcoserve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each arm")
    parser.add_argument("--kappa", type=float, default=0.0, help="0: from the shipped table")
    options = parser.parse_args(argv)
    try:
        result = measure(options.model, options.seconds, options.kappa)
    except SlackwaterError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
