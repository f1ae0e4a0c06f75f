"""Requests that have not started where they were put: would another worker start them sooner?

Conditions change between a placement and the start of a prompt: others finish early, a worker slows
down, a new one joins. Cheaper than a duplicate: nothing has been computed for them yet. Source:
algorithms.md 2c, stealing instead of hedging.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest

from controlplane.config import ControlPlaneConfig
from controlplane.failover import Tracked
from controlplane.registry import Worker
from controlplane.scorers import prefill_s, prompt_step_s


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that its worker has not started, with the wait that is left there."""

    tracked: Tracked
    worker_id: str
    wait_s: float
    ttft_s: float  # the wait and its own prompt
    is_silent: bool = False  # the worker may be dead: nobody knows what it does


def not_started(
    workers: Iterable[Worker],
    tracked: Mapping[str, Tracked],
    config: ControlPlaneConfig,
    now_s: float,
) -> list[Waiting]:
    """The requests with the longest waits, longest first; at most replace_scan. A suspect worker
    starts nothing before it would be given up."""
    found: list[Waiting] = []
    for worker in workers:
        if worker.status == "live":
            found += _at(worker, tracked, config, worker.is_suspect(now_s, config))
    return nlargest(
        config.replace_scan, found, key=lambda item: (item.wait_s, item.tracked.request_id)
    )


def _at(
    worker: Worker, tracked: Mapping[str, Tracked], config: ControlPlaneConfig, is_silent: bool
) -> list[Waiting]:
    """Prompts are computed about in the order they were given, those of the surplus tier after all
    others; what the worker has reported less is what it has done of the first ones."""
    pace = worker.pace
    left = pace.ahead_tokens_all
    prompts = [
        held
        for held in worker.reservations.values()
        if held.is_prefilling and held.stage != "decode" and not held.is_batch
    ]
    prompts.sort(key=lambda held: held.is_surplus)
    done = max(0, sum(held.prefill_tokens for held in prompts) - left)
    found, ahead = [], -done
    for held in prompts:
        item = tracked[held.request_id]
        chunk_step_s = prompt_step_s(pace, item.request.slo)
        wait_s = prefill_s(pace, 0, ahead, chunk_step_s) if ahead > 0 else 0.0
        ahead += held.prefill_tokens
        if is_silent:
            wait_s = max(wait_s, config.dead_s_min)
        if wait_s < config.replace_s_min or item.num_replaced >= config.replaces_max:
            continue
        if item.phase != "prefill" or item.has_first_token:
            continue
        own_s = prefill_s(pace, 0, held.prefill_tokens, chunk_step_s)
        found.append(Waiting(item, worker.worker_id, wait_s, wait_s + own_s, is_silent))
    return found
