"""Workers per role when the work changes: the planner against every fixed split.

Three phases of equal length replay parts of three traces on one model on eight H200: long prompts
with short answers, short prompts with long answers, very long prompts with shared beginnings. A
fixed split is the same plane with its planner in shadow mode. Each phase is scaled so that its best
fixed split keeps the promise to 95 % of its requests; `search` finds these factors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from multiprocessing import Pool

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.kappas import kappa_for
from controlplane.kappas import load as load_kappas
from controlplane.sim import hardware, traces
from controlplane.sim.hardware import Hardware
from controlplane.sim.replay import MAX_MODEL_LEN, Client, Record, Replay
from controlplane.sim.replayworker import GAP_MS_MAX
from controlplane.sim.traces import TraceRequest

WORKERS = 8
BLOCK_TOKENS = 64
TTFT_S, ITL_S = 0.5, 0.03  # class I0 for 8B of algorithms.md section 3
TTFT_UNLOADED = 2.5  # long prompts: so many times their own prefill on an idle worker (ibid.)
SLO_STEP_TOKENS = 256  # prompts of one step have the same target
CHUNK_TOKENS = 8192
QUEUE_S_MAX = 30.0
ATTAINED = 0.95  # of the best fixed split in each phase
SEARCH_STEPS = 5  # halvings of a factor of SEARCH_SPAN
SEARCH_SPAN = 2.0
OUTPUT_ROOM = 8_192  # tokens that no prompt leaves unused
OURS, MIXED = "planner", "mixed"
PREFILL: protocol.Role = "prefill"
DECODE: protocol.Role = "decode"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a trace at a multiple of its rate. The factors are start values: in phases of 60 s
    the best fixed split attains 99 to 100 % at them; `search` finds those of ATTAINED."""

    trace: str
    start_s: float
    factor: float
    output_tokens_max: int  # that its clients allow


PHASES = (
    Phase("azure2023_code", 300.0, 60.0, 1_024),
    Phase("servegen_deepseek_r1", 20_000.0, 2.0, 8_192),
    Phase("mooncake_conversation", 300.0, 2.5, 2_048),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What all policies of one comparison share; it travels to other processes."""

    folder: str  # of the traces
    calibration: str
    phases: tuple[Phase, ...]
    seconds: float  # of each phase
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What the clients of one policy saw, phase by phase."""

    name: str
    requests: tuple[int, ...]
    good: tuple[int, ...]
    ttft_met: tuple[int, ...]
    gaps_met: tuple[int, ...]
    itl_ms_p99: float  # of all gaps between ids
    flips: int
    handed_off: int

    @property
    def goodput(self) -> int:
        return sum(self.good)


def roles_of(name: str) -> list[protocol.Role]:
    """Of the eight workers at the start: `3P5D`, or all mixed."""
    if "P" not in name:
        return ["mixed"] * WORKERS
    num_prefill = int(name[0])
    return [*repeat(PREFILL, num_prefill), *repeat(DECODE, WORKERS - num_prefill)]


SPLITS = tuple(f"{count}P{WORKERS - count}D" for count in range(1, WORKERS))
STATICS = (*SPLITS, MIXED)


def slo_of(device: Hardware) -> Callable[[TraceRequest], domain.SLOClass]:
    """One class whose TTFT target follows the prompt's length."""
    known: dict[int, domain.SLOClass] = {}

    def of(row: TraceRequest) -> domain.SLOClass:
        step = -(-row.prompt_tokens // SLO_STEP_TOKENS)
        if step not in known:
            alone_s = prefill_s(device, step * SLO_STEP_TOKENS)
            ttft_s = max(TTFT_S, TTFT_UNLOADED * alone_s)
            known[step] = domain.SLOClass("interactive", 0, ttft_s, ITL_S, queue_s_max=QUEUE_S_MAX)
        return known[step]

    return of


def prefill_s(device: Hardware, tokens: int) -> float:
    """A prompt alone on a worker, in chunks of the largest step."""
    starts = range(0, tokens, CHUNK_TOKENS)
    return sum(
        device.table.step_s([(start, min(CHUNK_TOKENS, tokens - start))], 0, 0) for start in starts
    )


def arrivals(setting: Setting) -> Iterator[TraceRequest]:
    """The phases one after the other. What a request allows stands in its `client_id`."""
    for index, phase in enumerate(setting.phases):
        trace = traces.read(setting.folder, phase.trace, setting.seed)
        part = trace.window(phase.start_s, setting.seconds).where(fits).scaled(phase.factor)
        for row in part.rows():
            at_s = row.at_s + index * setting.seconds
            yield replace(row, at_s=at_s, client_id=str(phase.output_tokens_max))


def fits(row: TraceRequest) -> bool:
    return row.prompt_tokens + row.output_tokens <= MAX_MODEL_LEN - OUTPUT_ROOM


def play(setting: Setting, name: str) -> Result:
    """One policy over all phases."""
    device = hardware.read(setting.calibration)
    client = Client(slo_of(device), 1, tokens_max_of=lambda row: int(row.client_id))
    kappa = kappa_for(load_kappas(), TTFT_S, ITL_S)
    policy = protocol.Policy.for_targets(TTFT_S, ITL_S, kappa)
    config = ControlPlaneConfig(prefix_block_tokens=BLOCK_TOKENS)
    run = Replay(config, device, client, setting.seed, BLOCK_TOKENS, policy)
    if name != OURS:
        run.handle(domain.PlannerOrdered("shadow", "bench"))
    for role in roles_of(name):
        run.add(role)
    seconds = setting.seconds * len(setting.phases)
    records = run.run(arrivals(setting), seconds)
    by_phase = [
        [item for item in records if item.at_s // setting.seconds == index]
        for index in range(len(setting.phases))
    ]
    return Result(
        name=name,
        requests=tuple(map(len, by_phase)),
        good=_counts(by_phase, lambda item: item.is_good),
        ttft_met=_counts(
            by_phase, lambda item: item.ttft_s is not None and item.ttft_s <= item.ttft_target_s
        ),
        gaps_met=_counts(
            by_phase, lambda item: item.is_done and item.gap_s_max <= item.itl_target_s
        ),
        itl_ms_p99=_itl_ms_p99(run),
        flips=sum(not plan.is_shadow for _, plan in run.plans),
        handed_off=sum(item.was_handed_off for item in records),
    )


def _counts(
    by_phase: Sequence[Sequence[Record]], holds: Callable[[Record], bool]
) -> tuple[int, ...]:
    return tuple(sum(map(holds, items)) for items in by_phase)


def _itl_ms_p99(run: Replay) -> float:
    """Rounded up to whole milliseconds."""
    counts = [sum(member.worker.gaps[ms] for member in run.members) for ms in range(GAP_MS_MAX + 1)]
    seen, wanted = 0, 0.99 * sum(counts)
    for ms, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return float(ms)
    return float(GAP_MS_MAX)


def run(setting: Setting, processes: int, say: Callable[[str], None]) -> dict[str, object]:
    """Every policy, and the planner against the best of them."""
    results = {}
    with Pool(processes) as pool:
        for result in pool.imap_unordered(partial(play, setting), (OURS, *STATICS)):
            results[result.name] = result
            say(f"{result}")
    return figures(setting, results)


def figures(setting: Setting, results: dict[str, Result]) -> dict[str, object]:
    """Named as the benchmark prints them; shares of good requests, and ratios of their counts."""
    ours, mixed = results[OURS], results[MIXED]
    statics = [results[name] for name in STATICS]
    answer: dict[str, object] = {"split_seconds_per_phase": setting.seconds}
    ratios = []
    for index, phase in enumerate(setting.phases):
        best = max(statics, key=lambda item: (item.good[index], item.name))
        ratios.append(ours.good[index] / max(1, best.good[index]))
        answer |= {
            f"split_{phase.trace}_vs_best_static": ratios[-1],
            f"split_{phase.trace}_best_static": best.name,
            f"split_{phase.trace}_best_attainment": best.good[index] / max(1, best.requests[index]),
            f"split_{phase.trace}_attainment": ours.good[index] / max(1, ours.requests[index]),
        }
    single = max((results[name] for name in SPLITS), key=lambda item: (item.goodput, item.name))
    return answer | {
        "split_vs_best_static_worst_phase": min(ratios),
        "split_vs_best_single": ours.goodput / max(1, single.goodput),
        "split_best_single": single.name,
        "split_vs_mixed": ours.goodput / max(1, mixed.goodput),
        "split_itl_ms_p99": ours.itl_ms_p99,
        "split_itl_ms_p99_mixed": mixed.itl_ms_p99,
        "split_flips": ours.flips,
        "split_policies": {
            name: {
                "attainment": [
                    good / max(1, requests)
                    for good, requests in zip(item.good, item.requests, strict=True)
                ],
                "goodput": item.goodput,
                "itl_ms_p99": item.itl_ms_p99,
                "handed_off": item.handed_off,
            }
            for name, item in sorted(results.items())
        },
    }


def search(setting: Setting, processes: int, say: Callable[[str], None]) -> dict[str, object]:
    """For each phase the factor at which its best fixed split attains ATTAINED, by halving."""
    found: dict[str, object] = {}
    for phase in setting.phases:
        low, high = phase.factor / SEARCH_SPAN, phase.factor * SEARCH_SPAN
        for _ in range(SEARCH_STEPS):
            factor = (low * high) ** 0.5
            alone = replace(setting, phases=(replace(phase, factor=factor),))
            with Pool(processes) as pool:
                results = pool.map(partial(play, alone), STATICS)
            best = max(results, key=lambda item: (item.goodput, item.name))
            share = best.goodput / max(1, best.requests[0])
            say(f"{phase.trace} x {factor:.3f}: {best.name} attains {share:.4f}")
            low, high = (factor, high) if share >= ATTAINED else (low, factor)
        found[phase.trace] = round((low * high) ** 0.5, 3)
    return found
