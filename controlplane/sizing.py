"""How many workers a load needs: a queue for prompts, a row budget for decoding.

Sources: Erlang C; the p99 of waiting in G/G/c by Kimura's scaling of M/M/c (as in inference-fleet-
sim, arXiv:2603.16054), with the correction that our simulation found (algorithms.md 2e): the
formula is 6 to 18 % low for one or two servers and within -6..+16 % for more.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt

from controlplane.latency import StepFeatures, step_s
from controlplane.protocol import StepModel

WORKERS_MAX = 64  # of one model and role that are looked for
BUSY_MAX = 0.85  # of a prefill pool
FEW_SERVERS, FEW_FACTOR, MANY_FACTOR = 2, 1.25, 1.1
ROWS_MAX = 1024
NORMAL_P99 = 2.33


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


def prefill_workers(load: PromptLoad, ttft_s: float, transfer_s: float) -> int:
    """The fewest that keep p99 of waiting, computing and moving within the target.

    A target below the service time alone is met by no number: then the fewest that are not too
    busy. At most WORKERS_MAX."""
    if load.per_s <= 0.0:
        return 0
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


def decode_workers(load: DecodeLoad, model: StepModel, itl_s: float, kv_tokens: int) -> int:
    """The fewest whose rows hold the concurrency that 99 of 100 moments need."""
    if load.per_s <= 0.0:
        return 0
    rows = rows_max(model, load.context_tokens, itl_s, kv_tokens)
    step = step_s(model, StepFeatures(rows, int(rows * load.context_tokens)))
    concurrent = load.per_s * load.output_tokens * step
    peak = concurrent + NORMAL_P99 * sqrt(concurrent * load.dispersion)
    return min(WORKERS_MAX, max(1, ceil(peak / rows)))
