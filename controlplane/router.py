"""Filter, score, pick: where one request runs now, or why it has to wait.

Ties go to the worker with fewer requests, then to the lower id, so a replay routes the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest

from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates, can_pair, choose, threshold_tokens
from controlplane.domain import Candidate, Placement
from controlplane.registry import Worker
from controlplane.scorers import Ask, measure, online_step


@dataclass(frozen=True, slots=True)
class Route:
    """A placement, or None and the reason; with all numbers that were compared."""

    placement: Placement | None
    reason: str
    split_reason: str
    candidates: tuple[Candidate, ...]
    uncached_tokens: int
    threshold_tokens: int
    queue_s: float  # predicted wait on the best worker
    num_first: int = 1  # workers that may compute its prompt


@dataclass(frozen=True, slots=True)
class _Option:
    worker: Worker
    candidate: Candidate

    @property
    def order(self) -> tuple[bool, float, int, int, str]:
        worker_id = self.worker.worker_id
        return (
            not self.candidate.eligible,
            -self.candidate.score,
            len(self.worker.reservations),
            len(worker_id),
            worker_id,
        )


def route(
    ask: Ask,
    workers: Sequence[Worker],
    rates: TransferRates,
    config: ControlPlaneConfig,
    can_split: bool,
) -> Route:
    """`workers` serve the model. `can_split` is False for a request that has lost its worker."""
    if ask.request.slo.is_batch:
        return _route_batch(ask, workers, config)
    live = [worker for worker in workers if worker.status == "live"]
    decoders = [worker for worker in live if worker.role != "prefill"]
    prefillers = [worker for worker in live if worker.role == "prefill"]
    missing = ""
    if not decoders:
        decoders, prefillers = prefillers, []
        missing = "no decode worker is live"
    elif not prefillers:
        missing = "no prefill worker is live"
    options = _ranked(decoders, ask, config, is_prefill=False)
    if not options or not options[0].candidate.eligible:
        return _nowhere(options, workers, config)
    local = options[0]
    if not can_split or not prefillers:
        why = missing or "a request that moves is computed where it goes on"
        return _settle(ask, local.candidate, None, options, why, config)
    return _with_split(ask, options, prefillers, rates, config)


def _with_split(
    ask: Ask,
    options: list[_Option],
    prefillers: Sequence[Worker],
    rates: TransferRates,
    config: ControlPlaneConfig,
) -> Route:
    local = options[0]
    model_id = ask.request.model_id
    eligible = [option for option in options if option.candidate.eligible]
    target = min(eligible, key=lambda option: (option.candidate.itl_s, option.order))
    per_token = target.worker.model(model_id).kv_bytes_per_token
    num_bytes = per_token * ask.request.prompt_tokens  # a transfer shares no cached block
    remotes = []
    for option in _ranked(prefillers, ask, config, is_prefill=True):
        if not can_pair(option.worker, target.worker, model_id):
            continue
        pair = (option.worker.worker_id, target.worker.worker_id)
        moved_s = rates.transfer_s(pair, num_bytes)
        row = option.candidate
        row = replace(row, transfer_s=moved_s, ttft_s=row.ttft_s + moved_s)
        remotes.append(_Option(option.worker, row))
    every = sorted(options + remotes, key=lambda option: option.order)
    able = [option for option in remotes if option.candidate.eligible]
    uncached = ask.request.prompt_tokens - local.candidate.cached_tokens
    floor = config.handoff_tokens_min
    if not able and uncached < floor:
        why = f"{uncached} uncached tokens are below the handoff threshold of {floor}"
        return _settle(ask, local.candidate, None, every, why, config, floor)
    if not able:
        why = remotes[0].candidate.reason if remotes else "its KV does not fit the decode worker"
        why = f"no prefill worker can take it: {why}"
        return _settle(ask, local.candidate, None, every, why, config)
    remote = min(able, key=lambda option: (option.candidate.ttft_s, option.order))
    pair = (remote.worker.worker_id, target.worker.worker_id)
    threshold = threshold_tokens(
        local.worker,
        online_step(local.worker).rows,
        per_token * rates.seconds_per_byte(pair),
        config,
    )
    is_handoff, why = choose(
        uncached, threshold, local.candidate, remote.candidate, ask.ttft_s_left, config
    )
    if not is_handoff:
        return _settle(ask, local.candidate, None, every, why, config, threshold)
    if ask.request.output_tokens_max == 1:
        alone = remote.candidate
        alone = replace(alone, transfer_s=0.0, ttft_s=alone.ttft_s - alone.transfer_s)
        why = f"{why}; its one output token ends it there, so nothing is handed off"
        return _settle(ask, alone, None, every, why, config, threshold)
    return _settle(ask, target.candidate, remote.candidate, every, why, config, threshold)


def _ranked(
    workers: Sequence[Worker], ask: Ask, config: ControlPlaneConfig, is_prefill: bool
) -> list[_Option]:
    near = _shortlist(workers, ask, config)
    options = [_Option(worker, measure(worker, ask, config, is_prefill)) for worker in near]
    return sorted(options, key=lambda option: option.order)


def _shortlist(workers: Sequence[Worker], ask: Ask, config: ControlPlaneConfig) -> Sequence[Worker]:
    """The workers worth measuring in a large cluster: those with the fewest prompt tokens to
    compute before the first output id, their own cached ones taken off."""
    if len(workers) <= config.measured_max:
        return workers

    def order(worker: Worker) -> tuple[bool, int, int, int, str]:
        waiting = worker.load.prefill_tokens_waiting if worker.load else 0
        tokens = waiting + worker.prefill_tokens_given - ask.cached_tokens(worker, config)
        is_out = worker.worker_id in ask.avoid or not worker.is_accepting(ask.now_s, config)
        return (is_out, tokens, worker.num_online, len(worker.worker_id), worker.worker_id)

    return nsmallest(config.measured_max, workers, key=order)


def _route_batch(ask: Ask, workers: Sequence[Worker], config: ControlPlaneConfig) -> Route:
    """Any role will do: the step scheduler lets batch rows fill only what online rows leave."""
    options = _ranked(workers, ask, config, is_prefill=False)
    able = [option for option in options if option.candidate.eligible]
    if not able:
        return _nowhere(options, workers, config)
    best = min(
        able, key=lambda option: (option.worker.num_batch, option.worker.num_online, option.order)
    )
    why = "a batch line runs on one worker, in what online work leaves"
    return _settle(ask, best.candidate, None, options, why, config)


def _settle(
    ask: Ask,
    decode: Candidate,
    prefill: Candidate | None,
    options: Sequence[_Option],
    why: str,
    config: ControlPlaneConfig,
    threshold: int = 0,
) -> Route:
    """Take the chosen worker(s), unless so much is queued there that waiting here is fairer."""
    first = prefill or decode
    uncached = ask.request.prompt_tokens - first.cached_tokens
    rows = tuple(option.candidate for option in options)
    chosen = {decode.worker_id, first.worker_id}
    rows = tuple(row for row in rows if row.worker_id in chosen) + tuple(
        row for row in rows if row.worker_id not in chosen
    )
    rows = rows[: config.candidates_max]
    num_first = sum(row.eligible and (not prefill or row.role == prefill.role) for row in rows)
    hold_s = max(config.hold_s_min, ask.request.slo.ttft_s_p99)
    if first.queue_s > hold_s and not ask.request.slo.is_batch:
        reason = (
            f"{first.worker_id} has {first.queue_s * 1000.0:.0f} ms of prompts before it, more than"
            f" the {hold_s * 1000.0:.0f} ms that may wait at a worker"
        )
        return Route(None, reason, why, rows, uncached, threshold, first.queue_s, num_first)
    placement = Placement(
        split="handoff" if prefill else "local",
        prefill_worker=first.worker_id,
        decode_worker=decode.worker_id,
        predicted_ttft_s=first.ttft_s,
        predicted_itl_s=decode.itl_s,
    )
    where = (
        f"{first.worker_id} computes the prompt, {decode.worker_id} decodes"
        if prefill
        else f"{decode.worker_id} computes and decodes"
    )
    reason = (
        f"{where}: predicted TTFT {first.ttft_s * 1000.0:.0f} ms (wait"
        f" {first.queue_s * 1000.0:.0f}, prefill"
        f" {first.prefill_s * 1000.0:.0f}, transfer {first.transfer_s * 1000.0:.0f}) against"
        f" {ask.ttft_s_left * 1000.0:.0f} ms left, step {decode.itl_s * 1000.0:.0f} ms"
    )
    return Route(placement, reason, why, rows, uncached, threshold, first.queue_s, num_first)


def _nowhere(
    options: Sequence[_Option], workers: Sequence[Worker], config: ControlPlaneConfig
) -> Route:
    rows = tuple(option.candidate for option in options[: config.candidates_max])
    why = [f"{row.worker_id}: {row.reason}" for row in rows]
    if not why:
        why = [f"{worker.worker_id}: {worker.status}" for worker in workers]
    return Route(None, "; ".join(why[:3]) or "no worker serves the model", "", rows, 0, 0, 0.0)
