"""Filter, score, pick: where one request runs now, or why it has to wait.

Candidates in two stages: the holders of its prefix and a sample by load, so that the cost of a
decision does not grow with the cluster. Among workers that are well in time the cheapest wins, and
of equally cheap ones the fullest, which keeps others whole for batch and for role changes; among
workers that are just in time, or late, the one that does least damage. Source: algorithms.md 2c
(PolyServe's best fit, Preble's choice between cache and load).
"""

from collections.abc import Callable, Sequence
from itertools import islice

import msgspec
from msgspec.structs import replace

from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates, can_pair, choose, threshold_tokens
from controlplane.domain import Bound, Candidate, Placement
from controlplane.pools import LoadLevels, Pool
from controlplane.registry import Worker
from controlplane.scorers import Ask, Option, measure

COST_EQUAL = 1.05  # costs within 5 % of the least are equal


class Route(msgspec.Struct, frozen=True):
    """A placement, or None and the reason; with all numbers that were compared."""

    placement: Placement | None
    reason: str
    split_reason: str
    candidates: tuple[Candidate, ...]
    uncached_tokens: int
    threshold_tokens: int
    queue_s: float  # predicted wait on the best worker
    num_first: int = 1  # workers that may compute its prompt
    bound: Bound = "filters"

    @property
    def first(self) -> Candidate:
        """The worker of the placement that computes the prompt."""
        assert self.placement is not None, self.reason
        return self.candidates[0]


def route(
    ask: Ask,
    pool: Pool | None,
    rates: TransferRates,
    config: ControlPlaneConfig,
    uniform: Callable[[], float],
    can_split: bool,
) -> Route:
    """`pool` serves the model. `can_split` is False for a request that has lost its worker."""
    if pool is None:
        return _nowhere([], pool, config)
    if ask.request.slo.is_batch:
        return _route_batch(ask, pool, config, uniform)
    decoders, prefillers = pool.decoders, pool.prefillers
    missing = ""
    if not len(decoders):
        decoders, prefillers = prefillers, LoadLevels()
        missing = "no decode worker is live"
    elif not len(prefillers):
        missing = "no prefill worker is live"
    options = _options(decoders, ask, config, uniform, is_prefill=False)
    local = _pick(options, ask, config)
    if local is None and len(prefillers) and all(option.worker.is_out for option in options):
        missing = "no decode worker can be reached"
        decoders, prefillers = prefillers, LoadLevels()
        options += _options(decoders, ask, config, uniform, is_prefill=False)
        local = _pick(options, ask, config)
    if local is None:
        return _nowhere(options, pool, config)
    if not can_split or not len(prefillers):
        why = missing or "a request that moves is computed where it goes on"
        return _settle(ask, local, None, options, len(decoders), why, config)
    return _with_split(ask, local, options, pool, rates, config, uniform)


def _options(
    side: LoadLevels,
    ask: Ask,
    config: ControlPlaneConfig,
    uniform: Callable[[], float],
    is_prefill: bool,
) -> list[Option]:
    """Measured workers of one side. In a small cluster all; else the holders of the longest prefix
    and a sample, and a larger sample when none of those can take it."""
    if len(side) <= config.measure_all_max:
        return [measure(worker, ask, config, is_prefill) for worker in side.all()]
    holders = [worker for name in _longest(ask, config) if (worker := side.get(name))]
    near = {worker.worker_id: worker for worker in holders}
    for worker in side.sample(config.sampled_max, uniform):
        near.setdefault(worker.worker_id, worker)
    options = [measure(worker, ask, config, is_prefill) for worker in near.values()]
    if not any(option.candidate.eligible for option in options):
        for worker in side.sample(config.sampled_again, uniform):
            if worker.worker_id not in near:
                options.append(measure(worker, ask, config, is_prefill))
    return options


def _longest(ask: Ask, config: ControlPlaneConfig) -> list[str]:
    """The workers that hold most of its prefix."""
    hits = ask.hits
    if len(hits) <= config.holders_measured:
        return list(hits)
    order = sorted(
        hits, key=lambda name: (-hits[name].device_blocks - hits[name].host_blocks, name)
    )
    return order[: config.holders_measured]


def _pick(options: Sequence[Option], ask: Ask, config: ControlPlaneConfig) -> Option | None:
    """The best of the eligible ones; None without any."""
    able = [option for option in options if option.candidate.eligible]
    if not able:
        return None
    easy = [option for option in able if _is_easy(option, ask, config)]
    if easy:
        cost_s_max = COST_EQUAL * min(option.cost_s for option in easy) + 1e-9
        cheap = [option for option in easy if option.cost_s <= cost_s_max]
        return min(cheap, key=lambda option: (-option.load, *worker_order(option.worker)))
    timely = [option for option in able if _is_timely(option, ask, config)]
    return min(timely or able, key=lambda option: option.order)


def _is_easy(option: Option, ask: Ask, config: ControlPlaneConfig) -> bool:
    """It is well in time, so that cost may decide."""
    row = option.candidate
    return (
        row.ttft_s_p99 <= config.fit_share * ask.ttft_s_left
        and row.itl_s <= config.fit_itl_share * ask.request.slo.itl_s_p99
    )


def _is_timely(option: Option, ask: Ask, config: ControlPlaneConfig) -> bool:
    row = option.candidate
    ttft_s_max = (1.0 - config.late_margin) * ask.ttft_s_left
    return row.ttft_s_p99 <= ttft_s_max and row.itl_s <= ask.request.slo.itl_s_p99


def _bound(
    chosen: Option, options: Sequence[Option], ask: Ask, config: ControlPlaneConfig
) -> Bound:
    """What made it this one of the eligible."""
    if ask.request.slo.is_batch:
        return "batch"
    if sum(option.candidate.eligible for option in options) == 1:
        return "only_one"
    if _is_easy(chosen, ask, config):
        return "cost"
    return "score" if _is_timely(chosen, ask, config) else "damage"


def worker_order(worker: Worker) -> tuple[int, str]:
    """Oldest first: ids count up."""
    return (len(worker.worker_id), worker.worker_id)


def _with_split(
    ask: Ask,
    local: Option,
    options: list[Option],
    pool: Pool,
    rates: TransferRates,
    config: ControlPlaneConfig,
    uniform: Callable[[], float],
) -> Route:
    model_id = ask.request.model_id
    num_local, num_remote = len(pool.decoders), len(pool.prefillers)
    uncached = ask.request.prompt_tokens - local.candidate.cached_tokens
    floor = config.handoff_tokens_min
    eligible = [option for option in options if option.candidate.eligible]
    target = min(eligible, key=lambda option: (option.candidate.itl_s, option.order))
    per_token = target.worker.model(model_id).kv_bytes_per_token
    num_bytes = per_token * ask.request.prompt_tokens  # a transfer shares no cached block
    remotes = []
    for option in _options(pool.prefillers, ask, config, uniform, is_prefill=True):
        if not can_pair(option.worker, target.worker, model_id):
            continue
        pair = (option.worker.worker_id, target.worker.worker_id)
        moved_s = rates.transfer_s(pair, num_bytes)
        row = option.candidate
        row = replace(
            row,
            transfer_s=moved_s,
            ttft_s=row.ttft_s + moved_s,
            ttft_s_p99=row.ttft_s_p99 + moved_s,
        )
        remotes.append(replace(option, candidate=row))
    every = options + remotes
    able = [option for option in remotes if option.candidate.eligible]
    if not able and uncached < floor:
        why = f"{uncached} uncached tokens are below the handoff threshold of {floor}"
        return _settle(ask, local, None, every, num_local, why, config, floor)
    if not able:
        why = remotes[0].candidate.reason if remotes else "its KV does not fit the decode worker"
        why = f"no prefill worker can take it: {why}"
        return _settle(ask, local, None, every, num_local, why, config)
    remote = min(able, key=lambda option: (option.candidate.ttft_s, option.order))
    pair = (remote.worker.worker_id, target.worker.worker_id)
    threshold = threshold_tokens(
        local.worker,
        local.worker.num_online_decoding,
        rates.setup_s(pair),
        per_token * rates.seconds_per_byte(pair),
        rates.is_apart(local.worker.worker_id),
        config,
    )
    is_handoff, why = choose(
        uncached,
        threshold,
        local.candidate,
        remote.candidate,
        ask.ttft_s_left,
        rates.is_due(pair, ask.now_s),
        config,
    )
    if not is_handoff:
        return _settle(ask, local, None, every, num_local, why, config, threshold)
    if ask.request.output_tokens_max == 1:
        row = remote.candidate
        row = replace(
            row,
            transfer_s=0.0,
            ttft_s=row.ttft_s - row.transfer_s,
            ttft_s_p99=row.ttft_s_p99 - row.transfer_s,
        )
        why = f"{why}; its one output token ends it there, so nothing is handed off"
        alone = replace(remote, candidate=row)
        return _settle(ask, alone, None, every, num_remote, why, config, threshold)
    return _settle(ask, target, remote, every, num_remote, why, config, threshold)


def _route_batch(
    ask: Ask, pool: Pool, config: ControlPlaneConfig, uniform: Callable[[], float]
) -> Route:
    """Any role will do: the step scheduler lets batch rows fill only what online rows leave. A line
    that may have killed a worker is tried only where others can still take what is interactive."""
    if ask.is_struck and len(pool.decoders) + len(pool.prefillers) < 2:
        why = "it may have killed a worker, and is not tried on the last one"
        return Route(None, why, "", (), 0, 0, 0.0)
    options = _options(pool.decoders, ask, config, uniform, is_prefill=False)
    options += _options(pool.prefillers, ask, config, uniform, is_prefill=False)
    able = [option for option in options if option.candidate.eligible]
    if not able:
        return _nowhere(options, pool, config)
    best = min(
        able, key=lambda option: (option.worker.num_batch, option.worker.num_online, option.order)
    )
    why = "a batch line runs on one worker, in what online work leaves"
    return _settle(ask, best, None, options, len(able), why, config)


def _settle(
    ask: Ask,
    decode: Option,
    prefill: Option | None,
    options: Sequence[Option],
    num_first: int,
    why: str,
    config: ControlPlaneConfig,
    threshold: int = 0,
) -> Route:
    """Take the chosen worker(s), unless so much is queued there that waiting here is fairer."""
    first, last = (prefill or decode).candidate, decode.candidate
    uncached = ask.request.prompt_tokens - first.cached_tokens
    chosen = [prefill.candidate, last] if prefill else [last]
    names = {row.worker_id for row in chosen}
    others = [option for option in options if option.candidate.worker_id not in names]
    others.sort(key=lambda option: option.order)
    rows = (*chosen, *(option.candidate for option in others))[: config.candidates_max]
    if first.queue_s > ask.hold_s:
        reason = (
            f"{first.worker_id} has {first.queue_s * 1000.0:.0f} ms of prompts before it, more than"
            f" the {ask.hold_s * 1000.0:.0f} ms that may wait at a worker"
        )
        return Route(None, reason, why, rows, uncached, threshold, first.queue_s, num_first, "hold")
    placement = Placement(
        split="handoff" if prefill else "local",
        prefill_worker=first.worker_id,
        decode_worker=last.worker_id,
        predicted_ttft_s=first.ttft_s,
        predicted_itl_s=last.itl_s,
    )
    where = (
        f"{first.worker_id} computes the prompt, {last.worker_id} decodes"
        if prefill
        else f"{last.worker_id} computes and decodes"
    )
    reason = (
        f"{where}: predicted TTFT {first.ttft_s * 1000.0:.0f} ms (wait"
        f" {first.queue_s * 1000.0:.0f}, prefill"
        f" {first.prefill_s * 1000.0:.0f}, transfer {first.transfer_s * 1000.0:.0f}) against"
        f" {ask.ttft_s_left * 1000.0:.0f} ms left, step {last.itl_s * 1000.0:.0f} ms"
    )
    bound = _bound(prefill or decode, options, ask, config)
    return Route(placement, reason, why, rows, uncached, threshold, first.queue_s, num_first, bound)


def _nowhere(options: Sequence[Option], pool: Pool | None, config: ControlPlaneConfig) -> Route:
    rows = tuple(option.candidate for option in options[: config.candidates_max])
    why = [f"{row.worker_id}: {row.reason}" for row in rows[:3]]
    if not why and pool is not None:
        why = [f"{name}: {status}" for name, status in islice(pool.away.items(), 3)]
    return Route(None, "; ".join(why) or "no worker serves the model", "", rows, 0, 0, 0.0)
