"""Interactive and batch work on one worker: our planner, its bound, and the usual baselines.

All arms of a seed see the same arrivals and the same noise. Definitions of the figures: `compare`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from controlplane import protocol
from controlplane.latency import LatencyModel, StepFeatures, roofline
from controlplane.sim.station import Outcome, Planner, Station
from controlplane.sim.steptable import StepTable
from controlplane.sim.workload import Noise, arrivals
from gpuworkers import scheduler

DEVICE_BYTES = 141e9  # H200
KV_SHARE = 0.88  # of the memory, with the weights: gives the 0.82 M tokens of 8B bf16 on one H200
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

    @property
    def kv_tokens(self) -> int:
        file = self.table.file
        room = KV_SHARE * DEVICE_BYTES * file.tp - 1e9 * file.weight_gb
        return int(room / file.kv_bytes_per_token)

    def policy(self, kappa: float, first_token_share: float = 0.25) -> protocol.Policy:
        idle_s = max(0.05 * self.ttft_s, kappa * self.itl_s)  # design.md section 11
        return protocol.Policy(kappa, idle_s, 1024, 8192, 8192, first_token_share)

    def run(
        self,
        seed: int,
        planner: Planner,
        model: LatencyModel,
        has_batch: bool = True,
        observe: bool = False,
        noise: Noise | None = None,
        kv_tokens: int = 0,
    ) -> Station:
        """One arm on one seed; kv_tokens 0 takes the device's room."""
        station = Station(
            self.table,
            planner,
            model,
            self.targets,
            kv_tokens or self.kv_tokens,
            noise,
            has_batch,
            observe,
        )
        station.run(arrivals(seed, self.rate_per_s, self.seconds), self.seconds, WARM_S)
        return station

    def ours(self, kappa: float, seed: int) -> Outcome:
        """The production planner with its learned model."""
        model = LatencyModel(ROOFLINE_8B)
        planner = partial(scheduler.plan, model=model, policy=self.policy(kappa))
        return self.run(seed, planner, model, observe=True, noise=Noise(seed)).outcome

    def reference(self, seed: int) -> Outcome:
        """The bound: kappa 1, exact step times, no noise, no margin, KV unlimited."""
        model = ExactModel(self.table)
        planner = partial(scheduler.plan, model=model, policy=self.policy(1.0, 1.0))
        return self.run(seed, planner, model, kv_tokens=KV_TOKENS_UNLIMITED).outcome

    def fixed(self, tokens_max: int, has_batch: bool, seed: int) -> Outcome:
        """The baseline with a fixed number of tokens in a step."""
        model = LatencyModel(ROOFLINE_8B)
        policy = self.policy(1.0)

        def planner(now_s: float, state: scheduler.SchedulerState) -> scheduler.Plan:
            return scheduler.plan_fixed_chunk(state, model, policy, tokens_max)

        return self.run(seed, planner, model, has_batch, noise=Noise(seed)).outcome


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


def row(outcome: Outcome) -> dict[str, float | None]:
    """An arm's figures as they are printed; no TTFT where the arm starves every request."""

    def ttft_ms(level: float) -> float | None:
        return round(1e3 * quantile(outcome.ttft_s, level), 2) if outcome.ttft_s else None

    return {
        "ttft_p50_ms": ttft_ms(0.5),
        "ttft_p99_ms": ttft_ms(0.99),
        "itl_miss": round(itl_miss(outcome), 6),
        "itl_max_ms": round(1e3 * outcome.gap_s_max, 2),
        "batch_work_per_s": round(outcome.batch_work / outcome.seconds, 1),
        "batch_output_tokens_per_s": round(outcome.batch_output_tokens / outcome.seconds, 1),
        "requests": len(outcome.ttft_s),
        "steps": outcome.steps,
        "preempted": outcome.preempted,
    }


def compare(
    scene: Scene, kappa: float, seeds: Sequence[int], say: Callable[[str], None]
) -> dict[str, object]:
    """Every arm at one ITL target.

    harvest: batch work per second over that of the reference run. ttft_p99_inflation: TTFT p99
    with batch less that of the best fixed online-only chunk without ITL misses, over the class's
    TTFT target. batch_vs_tuned_chunk: batch output tokens over those of the fixed chunk with most
    of them at no more than ITL_MISS_MAX, tuned on another seed. miss_ratio_at_equal_batch: gaps
    missed at kappa 1 over those of the fixed chunk that does as much batch."""

    def pool(name: str, arm: Callable[[int], Outcome]) -> Outcome:
        outcome = pooled(arm(seed) for seed in seeds)
        say(f"itl {1e3 * scene.itl_s:.0f} ms {name}: {row(outcome)}")
        return outcome

    static = {c: pool(f"online {c}", partial(scene.fixed, c, False)) for c in ONLINE_CHUNKS}
    kept = [c for c, outcome in static.items() if itl_miss(outcome) <= ITL_MISS_MAX]
    best = min(kept or static, key=lambda c: quantile(static[c].ttft_s, 0.99))
    alone_s = quantile(static[best].ttft_s, 0.99)
    reference = pool("reference", scene.reference)
    ours = pool(f"kappa {kappa}", partial(scene.ours, kappa))
    full = pool("kappa 1", partial(scene.ours, 1.0))
    grid = {c: scene.fixed(c, True, TUNE_SEED) for c in TUNED_CHUNKS}
    tuned = _tuned(grid)
    fixed = pool(f"fixed {tuned}", partial(scene.fixed, tuned, True))
    equal = _equal(grid, scene.ours(1.0, TUNE_SEED))
    equal_fixed = (
        fixed if equal == tuned else pool(f"fixed {equal}", partial(scene.fixed, equal, True))
    )
    ttft_s = quantile(ours.ttft_s, 0.99)
    return {
        "itl_target_ms": 1e3 * scene.itl_s,
        "kappa": kappa,
        "harvest": ours.batch_work / reference.batch_work,
        "harvest_kappa_1": full.batch_work / reference.batch_work,
        "ttft_p99_inflation": (ttft_s - alone_s) / scene.ttft_s,
        "ttft_p99_ratio": ttft_s / alone_s,
        "itl_miss": itl_miss(ours),
        "batch_vs_tuned_chunk": ours.batch_output_tokens / fixed.batch_output_tokens,
        "batch_vs_tuned_chunk_kappa_1": full.batch_output_tokens / fixed.batch_output_tokens,
        "tuned_chunk_ttft_p99_inflation": (quantile(fixed.ttft_s, 0.99) - alone_s) / scene.ttft_s,
        "tuned_chunk_itl_miss": itl_miss(fixed),
        "miss_ratio_at_equal_batch": itl_miss(full) / max(itl_miss(equal_fixed), 1e-9),
        "tuned_chunk": tuned,
        "equal_batch_chunk": equal,
        "best_online_chunk": best,
        "arms": {
            **{f"online_{c}": row(outcome) for c, outcome in static.items()},
            "reference": row(reference),
            "ours": row(ours),
            "ours_kappa_1": row(full),
            "fixed_tuned": row(fixed),
            "fixed_equal_batch": row(equal_fixed),
        },
        "fixed_grid_on_tuning_seed": {str(c): row(outcome) for c, outcome in grid.items()},
    }


def _tuned(grid: dict[int, Outcome]) -> int:
    """Most batch without ITL misses; where none is without, the fewest misses."""
    kept = [c for c, outcome in grid.items() if itl_miss(outcome) <= ITL_MISS_MAX]
    if kept:
        return max(kept, key=lambda c: grid[c].batch_work)
    return min(grid, key=lambda c: itl_miss(grid[c]))


def _equal(grid: dict[int, Outcome], ours: Outcome) -> int:
    """The smallest chunk that does as much batch (less 1 %), or the one that does most."""
    as_much = [c for c, outcome in grid.items() if outcome.batch_work >= 0.99 * ours.batch_work]
    return min(as_much) if as_much else max(grid, key=lambda c: grid[c].batch_work)


def sweep(
    scene: Scene, kappas: Sequence[float], seeds: Sequence[int], say: Callable[[str], None]
) -> list[dict[str, float]]:
    """Harvest, inflation and misses for each kappa; the largest harvest that keeps both limits
    with a quarter to spare is what a table of kappas ships."""
    chunks = [pooled(scene.fixed(c, False, seed) for seed in seeds) for c in ONLINE_CHUNKS]
    kept = [outcome for outcome in chunks if itl_miss(outcome) <= ITL_MISS_MAX]
    alone_s = min(quantile(outcome.ttft_s, 0.99) for outcome in kept or chunks)
    reference = pooled(scene.reference(seed) for seed in seeds)
    rows = []
    for kappa in kappas:
        ours = pooled(scene.ours(kappa, seed) for seed in seeds)
        rows.append(
            {
                "kappa": kappa,
                "harvest": ours.batch_work / reference.batch_work,
                "ttft_p99_inflation": (quantile(ours.ttft_s, 0.99) - alone_s) / scene.ttft_s,
                "itl_miss": itl_miss(ours),
            }
        )
        say(f"itl {1e3 * scene.itl_s:.0f} ms sweep {rows[-1]}")
    return rows
