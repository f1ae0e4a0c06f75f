"""A cluster under load: its capacity by a sweep, what is left of it in overload, and a burst.

Eight modelled workers that prefill and decode, two classes (WORKLOAD), clients who come back
exactly when a refusal told them to. Goodput counts requests by the strict rule: first token and
every gap in time; refused ones and late ones count for nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from multiprocessing import Pool

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.latency import CONTEXT_TILE, prompt_context_token_s, prompt_token_s
from controlplane.protocol import Policy
from controlplane.sim import hardware, traces
from controlplane.sim.replay import MODEL_ID, Client, Record, Replay
from controlplane.sim.traces import Trace, TraceRequest

NUM_WORKERS = 8
BLOCK_TOKENS = 64
CHAT = domain.SLOClass("chat", 0, 0.5, 0.03)  # I0 of algorithms.md section 3
CODE = domain.SLOClass("code", 1, 2.0, 0.1)  # I1
CODE_SHARE = 0.25  # of the requests; start value
WORKLOAD = "75 % azure2023_conv as chat (500/30 ms), 25 % azure2023_code as code (2 s/100 ms)"
UNLOADED_FACTOR = 2.5  # a long prompt's TTFT target over its prefill alone (algorithms.md 3)
OUTPUT_TOKENS_MAX = 2048
TENANTS = tuple(f"tenant-{index}" for index in range(8))
UNLIMITED = 10**12
STEP_TOKENS = 8192  # what a GPU's activations have room for; the ITL target ends steps before
WARM_S, MEASURED_S = 20.0, 60.0
FACTORS = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.5)
SAMPLE_S = 60.0  # of the trace, for the nominal rate
OVERLOAD, OVERLOAD_S = 1.3, 120.0
BURST_BASE, BURST_FACTOR, BURST_S = 0.4, 10.0, 30.0
BURST_AT_S, AFTER_S = 40.0, 200.0
RETRIES_MAX = 5
RECOVERED_SHARE = 0.99  # of a class's requests in time
RECOVERED_WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the workload and the device come from, and how much to run."""

    traces: str  # folder
    calibration: str = ""  # file; empty: the packaged step times
    processes: int = 2
    seed: int = 1
    num_workers: int = NUM_WORKERS
    time_share: float = 1.0  # of the virtual seconds; below 1 for tests

    def seconds(self, whole_s: float) -> float:
        return self.time_share * whole_s


@dataclass(frozen=True, slots=True)
class Load:
    """One run: requests per second of the two traces together, and a burst on top of it."""

    bench: Bench
    rate_per_s: float
    seconds: float
    burst_per_s: float = 0.0  # more, for BURST_S from burst_at_s on
    burst_at_s: float = 0.0
    retries_max: int = 0
    may_refuse: bool = True
    skipped: frozenset[int] = frozenset()  # arrivals, by number, that never come

    def rows(self) -> Iterator[TraceRequest]:
        """In order of arrival."""
        rows = mixed(self.bench, self.rate_per_s, self.seconds)
        if self.burst_per_s:
            seconds = self.bench.seconds(BURST_S)
            more = (
                replace(row, at_s=row.at_s + self.burst_at_s)
                for row in mixed(self.bench, self.burst_per_s, seconds)
            )
            rows = merge(rows, more, key=lambda row: row.at_s)
        return rows


def mixed(bench: Bench, rate_per_s: float, seconds: float) -> Iterator[TraceRequest]:
    """The two traces at their shares of the rate, each request with the name of its class."""
    parts = []
    shares = ((CHAT, "azure2023_conv", 1.0 - CODE_SHARE), (CODE, "azure2023_code", CODE_SHARE))
    for slo, name, share in shares:
        trace = traces.read(bench.traces, name, bench.seed)
        scaled = trace.scaled(share * rate_per_s / trace.rate_per_s)
        parts.append(_named(slo.name, scaled.window(0.0, seconds)))
    return merge(*(part.rows() for part in parts), key=lambda row: row.at_s)


def _named(name: str, trace: Trace) -> Trace:
    return trace.map(lambda row: replace(row, client_id=name))


def slo_of(row: TraceRequest) -> domain.SLOClass:
    """Its class; a prompt that alone takes long gets the time for it."""
    slo = CODE if row.client_id == CODE.name else CHAT
    prompt = row.prompt_tokens
    alone_s = 21e-6 * prompt + 0.6e-9 * prompt * prompt  # the calibration's prefill table
    return replace(slo, ttft_s_p99=max(slo.ttft_s_p99, UNLOADED_FACTOR * alone_s))


def play(load: Load) -> list[Record]:
    """Run it on a fresh cluster whose workers keep their roles."""
    bench = load.bench
    config = ControlPlaneConfig(prefix_block_tokens=BLOCK_TOKENS)
    client = Client(slo_of, OUTPUT_TOKENS_MAX, TENANTS, load.retries_max, skipped=load.skipped)
    device = hardware.read(bench.calibration)
    policy = Policy(chunk_tokens_max=STEP_TOKENS, step_tokens_max=STEP_TOKENS)
    replay = Replay(config, device, client, bench.seed, BLOCK_TOKENS, policy)
    replay.handle(domain.PlannerOrdered("shadow", "bench"))
    for _ in range(bench.num_workers):
        replay.add()
    if load.may_refuse:
        replay.handle(domain.ContractsSet(_contracts()))
    return replay.run(load.rows(), load.seconds)


def _contracts() -> tuple[domain.Contract, ...]:
    """Every tenant may ask for anything, and is refused what would be late."""
    return tuple(
        domain.Contract(
            tenant, MODEL_ID, slo.name, UNLIMITED, UNLIMITED, UNLIMITED, when_late="reject"
        )
        for tenant in TENANTS
        for slo in (CHAT, CODE)
    )


def play_all(loads: Sequence[Load]) -> Iterator[list[Record]]:
    """The records of each, in order, as they are ready."""
    with Pool(min(loads[0].bench.processes, len(loads))) as pool:
        yield from pool.imap(play, loads)


def nominal_per_s(bench: Bench) -> float:
    """Requests per second whose marginal work fills steps of the strictest ITL target: the 1.0 of
    the sweep. A fluid bound from the step model (algorithms.md section 3, bound 4)."""
    model = hardware.read(bench.calibration).profile()
    rows = list(mixed(bench, 50.0, SAMPLE_S))
    per_context_s = model.per_context_token_s
    per_pair_s = prompt_context_token_s(model) / CONTEXT_TILE
    row_s = model.per_token_s + model.per_sequence_s + model.per_token_over_s[0]
    work_s = 0.0
    for row in rows:
        prompt, output = row.prompt_tokens, row.output_tokens
        work_s += prompt_token_s(model) * prompt + 0.5 * per_pair_s * prompt**2
        work_s += output * (row_s + per_context_s * (prompt + 0.5 * output))
    busy = 1.0 - model.base_s / CHAT.itl_s_p99
    return bench.num_workers * busy * len(rows) / work_s


def within(records: Sequence[Record], start_s: float, end_s: float) -> list[Record]:
    return [record for record in records if start_s <= record.at_s < end_s]


def goodput(records: Sequence[Record], start_s: float, end_s: float) -> float:
    """Good requests per second of those submitted in [start_s, end_s)."""
    return sum(record.is_good for record in within(records, start_s, end_s)) / (end_s - start_s)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The best goodput of the sweep, and the sweep: (requests/s offered, good/s)."""

    per_s: float
    rows: tuple[tuple[float, float], ...]


def capacity(bench: Bench, say: Callable[[str], None]) -> Capacity:
    nominal = nominal_per_s(bench)
    warm_s = bench.seconds(WARM_S)
    end_s = warm_s + bench.seconds(MEASURED_S)
    loads = [Load(bench, factor * nominal, end_s) for factor in FACTORS]
    rows = []
    for load, records in zip(loads, play_all(loads), strict=True):
        rows.append((load.rate_per_s, goodput(records, warm_s, end_s)))
        say(f"sweep: {load.rate_per_s:.0f} requests/s offered, {rows[-1][1]:.1f} good/s")
    return Capacity(max(good for _, good in rows), tuple(rows))


def overload(bench: Bench, found: Capacity, say: Callable[[str], None]) -> dict[str, object]:
    """OVERLOAD times as many requests as the cluster can serve in time.

    goodput_share: good/s over capacity."""
    warm_s = bench.seconds(WARM_S)
    end_s = warm_s + bench.seconds(OVERLOAD_S)
    records = play(Load(bench, OVERLOAD * found.per_s, end_s))
    good = goodput(records, warm_s, end_s)
    say(f"overload: {good:.1f} good/s of {found.per_s:.1f}")
    return {
        "goodput_share": good / found.per_s,
        "goodput_per_s": good,
        "capacity_per_s": found.per_s,
        "refused_share": _share(record.code != "" for record in within(records, warm_s, end_s)),
        "late_share": _share(
            record.is_done and not record.is_good for record in within(records, warm_s, end_s)
        ),
        "rejected_after_admission": rejected_later(records),
        "ok": good >= 0.97 * found.per_s,
    }


def burst(bench: Bench, found: Capacity, say: Callable[[str], None]) -> dict[str, object]:
    """BURST_FACTOR times a base load for BURST_S; refused clients come back when told.

    goodput_share: good requests of those submitted during it, per second, over capacity;
    retry_success: retries served in time; recovered_s: after its end, until every class is in time
    for good, in windows of RECOVERED_WINDOW_S."""
    at_s, seconds = bench.seconds(BURST_AT_S), bench.seconds(BURST_S)
    base = BURST_BASE * found.per_s
    load = Load(
        bench,
        base,
        at_s + seconds + bench.seconds(AFTER_S),
        (BURST_FACTOR - 1.0) * base,
        at_s,
        RETRIES_MAX,
    )
    records = play(load)
    good = goodput(records, at_s, at_s + seconds)
    refused = [record for record in records if record.code]
    retries = [record for record in records if record.attempt]
    success = _share(record.is_good for record in retries)
    recovered = recovered_s(records, at_s + seconds, load.seconds)
    say(f"burst: {good:.1f} good/s of {found.per_s:.1f}, {len(retries)} retries")
    told = _share(record.retry_after_s is not None for record in refused)
    return {
        "goodput_share": good / found.per_s,
        "retry_success": success,
        "retries": len(retries),
        "refusals_with_retry_after": told,
        "retry_after_s_max": max((r.retry_after_s or 0.0 for r in refused), default=0.0),
        "recovered_s": recovered,
        "rejected_after_admission": rejected_later(records),
        "ok": good >= 0.9 * found.per_s and success >= 0.95 and told == 1.0 and recovered <= 10.0,
    }


def rejected_later(records: Sequence[Record]) -> int:
    """Requests rejected although they had been admitted as feasible."""
    return sum(record.was_admitted and record.code != "" for record in records)


def recovered_s(records: Sequence[Record], end_s: float, until_s: float) -> float:
    """Seconds after end_s from which on every class has its share in time, in every window."""
    worst_s, start_s = 0.0, end_s
    while start_s + RECOVERED_WINDOW_S <= until_s:
        window = within(records, start_s, start_s + RECOVERED_WINDOW_S)
        for name in {record.class_name for record in window}:
            own = [record.is_good for record in window if record.class_name == name]
            if sum(own) < RECOVERED_SHARE * len(own) - 1.0:  # one request is no trend
                worst_s = start_s + RECOVERED_WINDOW_S - end_s
        start_s += RECOVERED_WINDOW_S
    return worst_s


def _share(values: Iterator[bool]) -> float:
    counted = list(values)
    return sum(counted) / len(counted) if counted else 1.0
