"""Interactive and batch work on one worker: our planner, its bound, and the usual baselines.

All arms of a seed see the same arrivals and the same noise. Definitions of the figures: `compare`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from controlplane import protocol
from controlplane.latency import LatencyModel, StepFeatures, roofline
from controlplane.sim.station import Outcome, Planner, Station
from controlplane.sim.steptable import StepTable
from controlplane.sim.workload import Noise, arrivals
from gpuworkers import scheduler

KV_TOKENS = 820_000  # calibration README: 8B bf16 on one H200
KV_TOKENS_UNLIMITED = 8_000_000
TTFT_S = 0.5  # class I0 of algorithms.md section 3
WARM_S = 30.0
ROOFLINE_8B = roofline(3.9e-3, 1.2e-3, 27e-6, 32e-9)  # algorithms.md section 0, bf16 on H200
ONLINE_CHUNKS = (256, 512, 1024, 2048)
TUNED_CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
ITL_MISS_MAX = 0.001
TUNE_SEED = 9_001  # on which the fixed chunk is tuned; no seed of a measured run


class ExactModel(LatencyModel):
    """Knows the device's table: no learning, no noise, no margin."""

    def __init__(self, table: StepTable) -> None:
        super().__init__(ROOFLINE_8B)
        self._table = table

    def predict_s(self, features: StepFeatures) -> float:
        chunks = []
        if features.chunk_tokens:
            tiles = max(1, -(-features.chunk_tokens // 16))
            start = features.chunk_context_tokens // tiles - features.chunk_tokens // 2
            chunks.append((max(0, start), features.chunk_tokens))
        context = features.context_tokens - features.chunk_context_tokens
        return self._table.step_s(chunks, features.rows - features.chunk_tokens, context)

    @property
    def plan_margin(self) -> float:
        return 1.0

    def plan_s(self, features: StepFeatures) -> float:
        return self.predict_s(features)


@dataclass(frozen=True, slots=True)
class Scene:
    """What all arms share."""

    table: StepTable
    itl_s: float
    rate_per_s: float
    seconds: float
    ttft_s: float = TTFT_S

    @property
    def targets(self) -> protocol.ClassTargets:
        return protocol.ClassTargets("interactive", 0, self.ttft_s, self.itl_s)

    def policy(self, kappa: float) -> protocol.Policy:
        idle_s = max(0.05 * self.ttft_s, kappa * self.itl_s)  # design.md section 11
        return protocol.Policy(kappa, idle_s, 1024, 8192, 8192)

    def run(
        self,
        seed: int,
        planner: Planner,
        model: LatencyModel,
        has_batch: bool = True,
        observe: bool = False,
        is_exact: bool = False,
    ) -> Station:
        """One arm on one seed."""
        station = Station(
            self.table,
            planner,
            model,
            self.targets,
            KV_TOKENS_UNLIMITED if is_exact else KV_TOKENS,
            None if is_exact else Noise(seed),
            has_batch,
            observe,
        )
        station.run(arrivals(seed, self.rate_per_s, self.seconds), self.seconds, WARM_S)
        return station

    def ours(self, kappa: float, seed: int) -> Outcome:
        """The production planner with its learned model."""
        model = LatencyModel(ROOFLINE_8B)
        planner = partial(scheduler.plan, model=model, policy=self.policy(kappa))
        return self.run(seed, planner, model, observe=True).outcome

    def reference(self, seed: int) -> Outcome:
        """The bound: kappa 1, exact step times, no noise, no margin, KV unlimited."""
        model = ExactModel(self.table)
        planner = partial(scheduler.plan, model=model, policy=self.policy(1.0))
        return self.run(seed, planner, model, is_exact=True).outcome

    def fixed(self, tokens_max: int, has_batch: bool, seed: int) -> Outcome:
        """The baseline with a fixed number of tokens in a step."""
        model = LatencyModel(ROOFLINE_8B)
        policy = self.policy(1.0)

        def planner(now_s: float, state: scheduler.SchedulerState) -> scheduler.Plan:
            return scheduler.plan_fixed_chunk(state, model, policy, tokens_max)

        return self.run(seed, planner, model, has_batch).outcome


def pooled(outcomes: Iterable[Outcome]) -> Outcome:
    """Several runs as one."""
    total = Outcome()
    for outcome in outcomes:
        total.seconds += outcome.seconds
        total.ttft_s += outcome.ttft_s
        total.gaps += outcome.gaps
        total.gaps_missed += outcome.gaps_missed
        total.gap_s_max = max(total.gap_s_max, outcome.gap_s_max)
        total.batch_prompt_tokens += outcome.batch_prompt_tokens
        total.batch_output_tokens += outcome.batch_output_tokens
        total.steps += outcome.steps
        total.preempted += outcome.preempted
    return total


def quantile(values: list[float], level: float) -> float:
    """Of a sample, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]


def itl_miss(outcome: Outcome) -> float:
    return outcome.gaps_missed / max(1, outcome.gaps)


def row(outcome: Outcome) -> dict[str, float]:
    """An arm's figures as they are printed."""
    return {
        "ttft_p50_ms": round(1e3 * quantile(outcome.ttft_s, 0.5), 2),
        "ttft_p99_ms": round(1e3 * quantile(outcome.ttft_s, 0.99), 2),
        "itl_miss": round(itl_miss(outcome), 6),
        "itl_max_ms": round(1e3 * outcome.gap_s_max, 2),
        "batch_work_per_s": round(outcome.batch_work / outcome.seconds, 1),
        "batch_output_tokens_per_s": round(outcome.batch_output_tokens / outcome.seconds, 1),
        "requests": len(outcome.ttft_s),
        "steps": outcome.steps,
        "preempted": outcome.preempted,
    }


Say = Callable[[str], None]
