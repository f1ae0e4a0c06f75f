"""How many workers a load needs, and how near so many are to their limits: a queue for prompts, a
row budget for decoding.

Sources: Erlang C; the p99 of waiting in G/G/c by Kimura's scaling of M/M/c (as in inference-fleet-
sim, arXiv:2603.16054), with the correction that our simulation found (algorithms.md 2e): the
formula is 6 to 18 % low for one or two servers and within -6..+16 % for more. Priors of what real
workers lose against their models, and of queues: AIConfigurator, arXiv:2601.06288.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log, sqrt

from controlplane.latency import StepFeatures, step_s
from controlplane.protocol import StepModel

WORKERS_MAX = 64  # of one model and role that are looked for
BUSY_MAX = 0.85  # of a prefill pool
FEW_SERVERS, FEW_FACTOR, MANY_FACTOR = 2, 1.25, 1.1
ROWS_MAX = 1024
WAIT_SHARE_MIN = 0.1  # of the TTFT target
WAIT_MAX = 10.0  # share of the room for waiting that a pool which is just not overloaded may show
NORMAL_P99 = 2.33
DECODE_SHARE = 0.6  # of the ITL target that decode steps are planned to fill: batch still fits


@dataclass(frozen=True, slots=True)
class Corrections:
    """Factors on what the models say of prefill speed, of decode speed and of TTFT. The defaults
    are priors, until our own observations are many (demand.py)."""

    prefill: float = 0.90
    decode: float = 0.92
    ttft: float = 1.8


EXACT = Corrections(1.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class PromptLoad:
    """Prompts that a pool of prefill workers gets."""

    per_s: float
    service_s: float  # mean
    service_s_p99: float
    service_cv2: float  # squared coefficient of variation
    arrival_cv2: float = 1.0  # or the index of dispersion at a window of about the wait


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival waits; `load` in servers. 1 when the pool is overloaded."""
    if load >= servers:
        return 1.0
    term = total = 1.0  # load^k / k!, scaled by nothing: fine up to WORKERS_MAX
    for k in range(1, servers):
        term *= load / k
        total += term
    term *= load / servers
    waits = term * servers / (servers - load)
    return waits / (total + waits)


def wait_s_p99(load: PromptLoad, servers: int) -> float:
    """Seconds that 99 of 100 prompts do not wait longer than; infinite when overloaded."""
    offered = load.per_s * load.service_s
    if offered >= servers:
        return float("inf")
    waits = erlang_c(servers, offered)
    if waits <= 0.01:
        return 0.0
    spread = (load.arrival_cv2 + load.service_cv2) / 2.0
    free_per_s = servers / load.service_s - load.per_s
    factor = FEW_FACTOR if servers <= FEW_SERVERS else MANY_FACTOR
    return factor * log(waits / 0.01) * spread / free_per_s


def slowed(load: PromptLoad, factor: float) -> PromptLoad:
    """The same prompts on workers that take so many times as long."""
    service_s, p99_s = factor * load.service_s, factor * load.service_s_p99
    return replace(load, service_s=service_s, service_s_p99=p99_s)


def prefill_workers(
    load: PromptLoad, ttft_s: float, transfer_s: float, corrections: Corrections = EXACT
) -> int:
    """The fewest that keep p99 of waiting, computing and moving within the target.

    A target below the service time alone is met by no number: then the fewest that are not too
    busy. At most WORKERS_MAX."""
    if load.per_s <= 0.0:
        return 0
    load = slowed(load, 1.0 / corrections.prefill)
    ttft_s /= corrections.ttft
    least = min(WORKERS_MAX, max(1, ceil(load.per_s * load.service_s / BUSY_MAX)))
    room_s = ttft_s - load.service_s_p99 - transfer_s
    if room_s <= 0.0:
        return least
    for servers in range(least, WORKERS_MAX + 1):
        if wait_s_p99(load, servers) <= room_s:
            return servers
    return WORKERS_MAX


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """Sequences that a pool of decode workers gets."""

    per_s: float
    output_tokens: float  # mean
    context_tokens: float  # mean, of a row
    dispersion: float = 1.0  # of arrivals over the life of a sequence


def rows_max(model: StepModel, context_tokens: float, itl_s: float, kv_tokens: int) -> int:
    """The most decode rows whose step stays within the target and whose KV fits, at least 1."""
    low, high = 1, ROWS_MAX
    while low < high:
        rows = (low + high + 1) // 2
        seconds = step_s(model, StepFeatures(rows, int(rows * context_tokens)))
        if seconds <= itl_s and rows * context_tokens <= kv_tokens:
            low = rows
        else:
            high = rows - 1
    return low


def decode_workers(
    load: DecodeLoad,
    model: StepModel,
    itl_s: float,
    kv_tokens: int,
    corrections: Corrections = EXACT,
) -> int:
    """The fewest whose rows hold the concurrency that 99 of 100 moments need."""
    if load.per_s <= 0.0:
        return 0
    rows = rows_max(model, load.context_tokens, corrections.decode * itl_s, kv_tokens)
    step = step_s(model, StepFeatures(rows, int(rows * load.context_tokens))) / corrections.decode
    return min(WORKERS_MAX, max(1, ceil(_peak_rows(load, step) / rows)))


def _peak_rows(load: DecodeLoad, step: float) -> float:
    """Concurrent sequences that 99 of 100 moments do not exceed."""
    concurrent = load.per_s * load.output_tokens * step
    return concurrent + NORMAL_P99 * sqrt(concurrent * load.dispersion)


# --- a pool of workers, of unequal speed and memory ----------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """What is asked of one model."""

    long: PromptLoad  # prompts that are handed off where there are prefill workers
    short: PromptLoad  # prompts that are computed where they decode
    outputs: DecodeLoad
    ttft_s: float
    itl_s: float
    corrections: Corrections = EXACT


@dataclass(frozen=True, slots=True)
class Station:
    """One worker as sizing sees it."""

    token_s: float  # of a prompt token
    model: StepModel
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Strain:
    """Shares of what is allowed; above 1 a target is predicted to be missed."""

    wait: float  # p99 of waiting, of what the TTFT target leaves for it
    busy: float  # of prefill, against BUSY_MAX
    rows: float  # of decode rows within the ITL target and the KV
    num_prefill: int

    @property
    def worst(self) -> float:
        return max(self.wait, self.busy, self.rows)


def strain(
    load: ModelLoad, stations: Sequence[Station], token_s: float, transfer_s: float
) -> Strain:
    """Of the best division of these workers into prefill and decode; found by enumeration, for at
    most WORKERS_MAX of them: more share the load in equal parts.

    Sizes were measured on workers of `token_s` seconds per prompt token in the mean; a worker that
    is twice as fast counts as two."""
    if load.outputs.per_s <= 0.0:
        return Strain(0.0, 0.0, 0.0, 0)
    if not stations:
        return Strain(inf, inf, inf, 0)
    if len(stations) > WORKERS_MAX:
        load = _shared(load, len(stations) / WORKERS_MAX)
        stations = stations[:WORKERS_MAX]
    itl_s = DECODE_SHARE * load.corrections.decode * load.itl_s
    context = load.outputs.context_tokens
    rows = [rows_max(item.model, context, itl_s, item.kv_tokens) for item in stations]
    steps = [
        step_s(item.model, StepFeatures(count, int(count * context)))
        for item, count in zip(stations, rows, strict=True)
    ]
    peak = _peak_rows(load.outputs, sum(steps) / len(steps) / load.corrections.decode)
    speed = sum(token_s / item.token_s for item in stations)
    found = []
    for count in range(len(stations)):
        share = (len(stations) - count) / len(stations)  # that decodes
        rows_share = peak / (sum(rows) * share)
        found.append(
            _divided(load, count, (1.0 - share) * speed, share * speed, rows_share, transfer_s)
        )
    return min(found, key=lambda item: (item.worst, item.num_prefill))


def _divided(
    load: ModelLoad,
    num_prefill: int,
    prefill_speed: float,
    decode_speed: float,
    rows: float,
    transfer_s: float,
) -> Strain:
    """With so much speed on each side. Prompts that are computed where they decode get the time
    that decode steps leave."""
    slow = 1.0 / load.corrections.prefill
    left = 1.0 - DECODE_SHARE * min(rows, 1.0)
    local = _merged([load.short] if num_prefill else [load.short, load.long])
    local = slowed(local, slow)
    room_s = _room_s(load, local, 0.0)
    wait, busy = _queue(slowed(local, 1.0 / left), decode_speed, room_s)
    if num_prefill:
        apart = slowed(load.long, slow)
        room_s = _room_s(load, apart, transfer_s)
        wait_apart, busy_apart = _queue(apart, prefill_speed, room_s)
        wait, busy = max(wait, wait_apart), max(busy, busy_apart)
    return Strain(wait, busy, rows, num_prefill)


def _room_s(load: ModelLoad, prompts: PromptLoad, transfer_s: float) -> float:
    """What the TTFT target leaves for waiting; a tenth of it where the service leaves less, since
    no number of workers mends that."""
    room_s = load.ttft_s / load.corrections.ttft - prompts.service_s_p99 - transfer_s
    return max(room_s, WAIT_SHARE_MIN * load.ttft_s)


def _queue(prompts: PromptLoad, speed: float, room_s: float) -> tuple[float, float]:
    """Shares of waiting and of time."""
    if prompts.per_s <= 0.0:
        return 0.0, 0.0
    servers = max(1, int(speed + 1e-9))
    prompts = slowed(prompts, servers / speed)
    busy = prompts.per_s * prompts.service_s / servers
    if busy >= 1.0:  # a queue without end; the more so, the more is asked
        return WAIT_MAX * busy, busy / BUSY_MAX
    return min(wait_s_p99(prompts, servers) / room_s, WAIT_MAX), busy / BUSY_MAX


def _merged(loads: Sequence[PromptLoad]) -> PromptLoad:
    """Two kinds of prompts in one queue: moments add up by rate."""
    per_s = sum(load.per_s for load in loads)
    if per_s <= 0.0:
        return PromptLoad(0.0, 1.0, 1.0, 1.0)
    mean_s = sum(load.per_s * load.service_s for load in loads) / per_s
    square = sum(
        load.per_s * load.service_s**2 * (1.0 + load.service_cv2) for load in loads
    ) / per_s  # fmt: skip
    p99_s = max(load.service_s_p99 for load in loads if load.per_s > 0.0)
    dispersion = max(load.arrival_cv2 for load in loads)
    cv2 = max(0.0, square / mean_s**2 - 1.0) if mean_s > 0.0 else 0.0  # all prompts cached: no work
    return PromptLoad(per_s, mean_s, p99_s, cv2, dispersion)


def _shared(load: ModelLoad, parts: float) -> ModelLoad:
    """The load of one of so many equal parts of a pool."""
    return replace(
        load,
        long=replace(load.long, per_s=load.long.per_s / parts),
        short=replace(load.short, per_s=load.short.per_s / parts),
        outputs=replace(load.outputs, per_s=load.outputs.per_s / parts),
    )
