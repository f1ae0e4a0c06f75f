"""What a worker would do with one more request: filters, predicted seconds and a score, per worker.

Only online work counts as load: batch rows and the KV they hold give way (design.md section 11).
"""

from collections.abc import Callable, Mapping
from math import ceil, inf

import msgspec

from controlplane.batchroom import ALL_USED, Lengths, blocks_left
from controlplane.calibration import Bucket, bucket_of
from controlplane.config import ControlPlaneConfig
from controlplane.domain import Candidate, GenerateRequest, SLOClass
from controlplane.latency import CONTEXT_TILE
from controlplane.prefixes import Hit
from controlplane.protocol import ALONE_TTFT_SHARE
from controlplane.registry import Pace, Worker

TTFT_WEIGHT = 0.7  # start value: TTFT differs more between workers than a step does
ROOM_S_MIN = 1e-3  # of a step, for prompts, however strict the ITL target is
ROOM_SHARE_MIN = 0.1  # of the ITL target: a late decode row slows a prompt, it does not stop it


class Ask(msgspec.Struct, frozen=True):
    """One request at the moment of routing."""

    request: GenerateRequest
    now_s: float
    ttft_s_left: float
    hits: Mapping[str, Hit]  # leading prefix blocks by worker, of the index's block size
    avoid: frozenset[str]  # workers that have just refused it
    is_surplus: bool = False
    is_struck: bool = False
    hold_s: float = inf  # of prompts before it on a worker; with more it waits in our queue
    margin: Callable[[Bucket], float] = lambda bucket: 1.0  # of a TTFT's p99 over its mean
    lengths: Lengths = ALL_USED  # of the model's batch lines

    def cached_tokens(self, worker: Worker, config: ControlPlaneConfig) -> tuple[int, int]:
        """Prompt tokens that the worker need not compute, in whole blocks of its own size, and how
        many of them come from its host tier; the last prompt token is always computed."""
        hit = self.hits.get(worker.worker_id)
        if hit is None:
            return 0, 0
        size, own = config.prefix_block_tokens, worker.hello.block_tokens
        tokens = min((hit.device_blocks + hit.host_blocks) * size, self.request.prompt_tokens - 1)
        tokens -= tokens % own
        return tokens, max(0, tokens - hit.device_blocks * size)


def blocks_needed(worker: Worker, request: GenerateRequest, output_tokens: int) -> int:
    """A worker reserves all it may need at once; the last output id never needs KV."""
    tokens = request.prompt_tokens + (output_tokens or 1) - 1
    return -(-tokens // worker.hello.block_tokens)


def prompt_step_s(pace: Pace, slo: SLOClass) -> float:
    """How long a step with a chunk of this class may last, as the worker's scheduler plans it."""
    if pace.is_decoding:
        return max(slo.itl_s_p99, slo.gap_s_max)
    return max(slo.itl_s_p99, ALONE_TTFT_SHARE * slo.ttft_s_p99)


def prefill_s(pace: Pace, start: int, tokens: int, chunk_step_s: float) -> float:
    """Seconds to compute prompt tokens [start, start + tokens) in chunks beside its decode rows.

    Each step may last `chunk_step_s`; what the decode rows (or an empty step's base) take of it is
    paid once per chunk. Source: algorithms.md 2d, F_local = W + u·g·theta / (theta - A_dec).
    """
    return _in_chunks_s(pace, prompt_work_s(pace, start, tokens), chunk_step_s)


def _in_chunks_s(pace: Pace, work_s: float, chunk_step_s: float) -> float:
    fixed_s = pace.fixed_s
    room_s = chunk_step_s - fixed_s
    if room_s < ROOM_SHARE_MIN * chunk_step_s or room_s < ROOM_S_MIN:
        room_s = max(ROOM_SHARE_MIN * chunk_step_s, ROOM_S_MIN)
    return (ceil(work_s / room_s) or 1) * fixed_s + work_s


def prompt_work_s(pace: Pace, start: int, tokens: int) -> float:
    """Marginal seconds of prompt tokens [start, start + tokens): u·g + attention."""
    passes = -(-tokens // CONTEXT_TILE)
    return pace.token_s * tokens + pace.chunk_context_s * passes * (start + (tokens + 1) // 2)


def ineligible_reason(worker: Worker, ask: Ask, config: ControlPlaneConfig, output: int) -> str:
    """Why the worker cannot take the request now, else an empty string."""
    request = ask.request
    if worker.status != "live":
        return worker.status
    if worker.is_suspect(ask.now_s, config):
        silent_s = ask.now_s - worker.heard_at_s
        return f"nothing heard for {silent_s:.1f} s, in one step for {worker.busy_s:.1f} s"
    if worker.is_ejected(ask.now_s):
        return f"ejected for another {worker.ejected_until_s - ask.now_s:.0f} s"
    if not request.slo.is_batch and (reason := worker.trial_reason):
        return reason
    if worker.num_struck or (ask.is_struck and worker.num_unproven):
        return "a request that may have killed a worker is tried alone"
    if worker.worker_id in ask.avoid:
        return "refused this request a moment ago"
    total = request.prompt_tokens + request.output_tokens_max
    max_model_len = worker.max_model_len[request.model_id]
    if total > max_model_len:
        return f"prompt and output of {total} tokens, at most {max_model_len}"
    if request.slo.is_batch:
        if worker.num_batch >= config.batch_rows_max:
            return f"{worker.num_batch} batch sequences, at most {config.batch_rows_max}"
    else:
        rows_max = config.sequences_max
        if ask.is_surplus:
            rows_max -= int(config.surplus_reserve * rows_max)
        if worker.num_online >= rows_max:
            return f"{worker.num_online} online sequences, at most {rows_max}"
    needed = blocks_needed(worker, request, output)
    pace = worker.pace
    free = pace.blocks_free_batch if request.slo.is_batch else pace.blocks_free
    if request.slo.is_batch or (ask.is_surplus and worker.num_online):
        free -= int(config.batch_kv_reserve * worker.hello.num_blocks)
    if needed > free:
        return f"needs {needed} KV blocks, {max(0, free)} free"
    if request.slo.is_batch:
        grown = ask.lengths.share(worker.num_batch + 1) * needed
        left = blocks_left(worker, ask.lengths, config)
        if grown > left:
            return f"may need {grown:.0f} KV blocks, {max(0.0, left):.0f} left when batch has grown"
    return ""


class Option(msgspec.Struct, frozen=True):
    """A worker with its row, and what choosing between rows takes beyond it."""

    worker: Worker
    candidate: Candidate
    cost_s: float  # GPU-seconds of its prompt, and what it adds to the steps of others
    load: float  # share of the worker's rows in use

    @property
    def order(self) -> tuple[bool, float, int, int, str]:
        """Best score first; ties by requests, then by age of the worker."""
        worker_id = self.worker.worker_id
        return (
            not self.candidate.eligible,
            -self.candidate.score,
            len(self.worker.reservations),
            len(worker_id),
            worker_id,
        )


def measure(worker: Worker, ask: Ask, config: ControlPlaneConfig, is_prefill: bool) -> Option:
    """What the worker would do: `is_prefill` asks for the prompt only, else for all of it."""
    request, pace, slo = ask.request, worker.pace, ask.request.slo
    cached, restored = ask.cached_tokens(worker, config)
    chunk_step_s = prompt_step_s(pace, slo)
    queue_s = _wait_s(worker, pace, ask, chunk_step_s)
    restore_s = config.restore_share * pace.token_s * restored
    prompt_s = prompt_work_s(pace, cached, request.prompt_tokens - cached)
    own_s = _in_chunks_s(pace, prompt_s, chunk_step_s) + restore_s
    ttft_s = queue_s + own_s
    added_s = pace.row_s + pace.model.per_context_token_s * (request.prompt_tokens + 1)
    itl_s = (pace.beside_s or pace.model.base_s) + added_s
    output = 1 if is_prefill else request.output_tokens_max
    reason = ineligible_reason(worker, ask, config, output)
    free = pace.blocks_free_batch if slo.is_batch else pace.blocks_free
    candidate = Candidate(
        worker.worker_id,
        worker.role,
        not reason,
        reason,
        queue_s,
        own_s,
        0.0,
        ttft_s,
        itl_s,
        cached,
        max(0, free),
        score(ttft_s, ask.ttft_s_left, itl_s, slo.itl_s_p99),
        ask.margin(bucket_of(queue_s, own_s, cached, is_prefill)) * ttft_s,
        0.0 if is_prefill else added_s,
        cached // worker.hello.block_tokens,
    )
    work_s = prompt_s + restore_s
    return Option(
        worker,
        candidate,
        work_s if is_prefill else work_s + added_s * pace.rows,
        worker.num_online / config.sequences_max,
    )


def _wait_s(worker: Worker, pace: Pace, ask: Ask, chunk_step_s: float) -> float:
    """Until the prompt starts: prompts given before it, less what the step in hand has done of
    them, or else the rest of that step."""
    load = worker.load
    ahead = pace.ahead_tokens_all if ask.is_surplus else pace.ahead_tokens
    wait_s = prefill_s(pace, 0, ahead, chunk_step_s) if ahead else 0.0
    if load is None:
        return wait_s
    reported = min(ahead, load.prefill_tokens_waiting)
    in_step_s = worker.busy_s + max(0.0, ask.now_s - worker.heard_at_s)
    if reported:
        done_s = wait_s if reported == ahead else prefill_s(pace, 0, reported, chunk_step_s)
        wait_s = max(0.0, wait_s - min(in_step_s, done_s))
    elif load.running_online or load.running_batch or load.waiting_batch:
        wait_s += max(0.0, load.predicted_s - in_step_s)
    return wait_s


def score(ttft_s: float, ttft_target_s: float, itl_s: float, itl_target_s: float) -> float:
    """1.0 for no latency at all, 0.5 for exactly the targets, towards 0.0 beyond them."""
    ttft_target_s = max(ttft_target_s, 1e-3)  # a late request still prefers the sooner worker
    ttft_score = ttft_target_s / (ttft_target_s + ttft_s)
    itl_score = itl_target_s / (itl_target_s + itl_s)
    result = TTFT_WEIGHT * ttft_score + (1.0 - TTFT_WEIGHT) * itl_score
    assert 0.0 <= result <= 1.0, (ttft_s, ttft_target_s, itl_s, itl_target_s)
    return result
