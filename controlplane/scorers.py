"""What a worker would do with one more request: filters, predicted seconds and a score, per worker.

Only online work counts as load: batch rows and the KV they hold give way (design.md section 11).
"""

from dataclasses import dataclass

from controlplane.config import ControlPlaneConfig
from controlplane.domain import Candidate, GenerateRequest
from controlplane.latency import (
    CONTEXT_TILE,
    StepFeatures,
    prompt_context_token_s,
    prompt_token_s,
    step_s,
)
from controlplane.protocol import StepModel
from controlplane.registry import Worker

TTFT_WEIGHT = 0.7  # start value: TTFT differs more between workers than a step does
ROOM_S_MIN = 1e-3  # of a step, for prompts, however strict the ITL target is
ROOM_SHARE_MIN = 0.1  # of the ITL target: a late decode row slows a prompt, it does not stop it


@dataclass(frozen=True, slots=True)
class Ask:
    """One request at the moment of routing."""

    request: GenerateRequest
    now_s: float
    ttft_s_left: float
    cached_blocks: dict[str, int]  # leading prefix blocks by worker, of the index's block size
    avoid: frozenset[str]  # workers that have just refused it
    is_surplus: bool = False

    def cached_tokens(self, worker: Worker, config: ControlPlaneConfig) -> int:
        """Prompt tokens that the worker need not compute, in whole blocks of its own size; the
        last prompt token is always computed."""
        tokens = self.cached_blocks.get(worker.worker_id, 0) * config.prefix_block_tokens
        tokens = min(tokens, self.request.prompt_tokens - 1)
        return tokens - tokens % worker.hello.block_tokens


def blocks_needed(worker: Worker, request: GenerateRequest, output_tokens: int) -> int:
    """A worker reserves all it may need at once; the last output id never needs KV."""
    tokens = request.prompt_tokens + max(1, output_tokens) - 1
    return -(-tokens // worker.hello.block_tokens)


def prefill_s(
    model: StepModel, start: int, tokens: int, beside: StepFeatures, itl_s: float
) -> float:
    """Seconds to compute prompt tokens [start, start + tokens) in chunks beside decode rows.

    Each step may last `itl_s`; what the decode rows (or an empty step's base) take of it is paid
    once per chunk. Source: algorithms.md 2d, F_local = W + u·g·theta / (theta - A_dec).
    """
    passes = -(-tokens // CONTEXT_TILE)
    work_s = prompt_token_s(model) * tokens
    work_s += prompt_context_token_s(model) * passes * (start + (tokens + 1) // 2)
    fixed_s = max(model.base_s, step_s(model, beside))
    room_s = max(itl_s - fixed_s, ROOM_SHARE_MIN * itl_s, ROOM_S_MIN)
    num_steps = max(1, int(-(-work_s // room_s)))
    return num_steps * fixed_s + work_s


def online_step(worker: Worker) -> StepFeatures:
    """The decode step of the online sequences placed on the worker."""
    return StepFeatures(worker.num_online_decoding, worker.online_context_tokens)


def ineligible_reason(worker: Worker, ask: Ask, config: ControlPlaneConfig, output: int) -> str:
    """Why the worker cannot take the request now, else an empty string."""
    request = ask.request
    if worker.status != "live":
        return worker.status
    if worker.is_suspect(ask.now_s, config):
        silent_s = ask.now_s - worker.heard_at_s
        return f"nothing heard for {silent_s:.1f} s, in one step for {worker.busy_s:.1f} s"
    if worker.worker_id in ask.avoid:
        return "refused this request a moment ago"
    model = worker.model(request.model_id)
    total = request.prompt_tokens + request.output_tokens_max
    if total > model.max_model_len:
        return f"prompt and output of {total} tokens, at most {model.max_model_len}"
    if request.slo.is_batch:
        if worker.num_batch >= config.batch_rows_max:
            return f"{worker.num_batch} batch sequences, at most {config.batch_rows_max}"
    elif worker.num_online >= config.sequences_max:
        return f"{worker.num_online} online sequences, at most {config.sequences_max}"
    needed = blocks_needed(worker, request, output)
    free = worker.blocks_free(request.slo.is_batch)
    if request.slo.is_batch or (ask.is_surplus and worker.num_online):
        free -= int(config.batch_kv_reserve * worker.hello.num_blocks)
    if needed > free:
        return f"needs {needed} KV blocks, {max(0, free)} free"
    return ""


def measure(worker: Worker, ask: Ask, config: ControlPlaneConfig, is_prefill: bool) -> Candidate:
    """The worker's candidate row: `is_prefill` asks for the prompt only, else for all of it."""
    request = ask.request
    model = worker.step_model
    beside = online_step(worker)
    cached = ask.cached_tokens(worker, config)
    itl_target_s = request.slo.itl_s_p99
    queue_s = _wait_s(worker, ask)
    own_s = prefill_s(model, cached, request.prompt_tokens - cached, beside, itl_target_s)
    joined = beside.with_tokens(request.prompt_tokens, 1)
    itl_s = step_s(model, joined)
    output = 1 if is_prefill else request.output_tokens_max
    reason = ineligible_reason(worker, ask, config, output)
    ttft_s = queue_s + own_s
    return Candidate(
        worker_id=worker.worker_id,
        role=worker.role,
        eligible=not reason,
        reason=reason,
        queue_s=queue_s,
        prefill_s=own_s,
        transfer_s=0.0,
        ttft_s=ttft_s,
        itl_s=itl_s,
        cached_tokens=cached,
        free_blocks=max(0, worker.blocks_free(request.slo.is_batch)),
        score=score(ttft_s, ask.ttft_s_left, itl_s, itl_target_s),
    )


def _wait_s(worker: Worker, ask: Ask) -> float:
    """Until the prompt starts: prompts given before it, less what the step in hand has done of
    them, or else the rest of that step."""
    load = worker.load
    beside = online_step(worker)
    itl_s = ask.request.slo.itl_s_p99
    ahead = worker.prefill_tokens_ahead(ask.is_surplus)
    reported = min(ahead, load.prefill_tokens_waiting) if load else 0
    wait_s = prefill_s(worker.step_model, 0, ahead, beside, itl_s) if ahead else 0.0
    in_step_s = worker.busy_s + max(0.0, ask.now_s - worker.heard_at_s)
    if reported:
        done_s = prefill_s(worker.step_model, 0, reported, beside, itl_s)
        wait_s = max(0.0, wait_s - min(in_step_s, done_s))
    elif load and load.running_online + load.running_batch + load.waiting_batch:
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
