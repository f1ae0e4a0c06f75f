"""What a decision would have been otherwise: on the next worker, in another class, and what would
have let a refused request in. Computed from the record's own numbers when somebody asks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from controlplane.domain import Candidate, DecisionRecord, SLOClass

# What would have let it in, by code of domain.Rejected; `late` has numbers instead.
REMEDIES = {
    "tenant_concurrency": "one request less of this tenant in flight, or a higher limit",
    "contract_concurrency": "one request less under this contract, or a higher concurrency",
    "contract_rate": "a slower pace, or a contract with more requests or tokens per minute",
    "contract_budget": "a larger budget, or the next period",
    "queue_full": "a shorter queue",
    "overloaded": "less load on the whole cluster, or more workers",
    "overload_share": "less load of this tenant while the cluster is overloaded",
    "queue_timeout": "a class that may wait longer, or room before its limit",
    "no_worker": "a live worker",
    "model_not_served": "a worker that serves the model",
    "prompt_too_long": "fewer tokens in prompt and output together, or a larger worker",
    "draining": "this console after its restart, or another one",
    "over_commit": "less committed to contracts, or more workers",
    "retries_exhausted": "workers that stay",
    "poison_request": "nothing: workers died or failed with it",
    "worker_error": "a worker that does not fail",
}


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """`is_met`: it would have been in time so, or let in."""

    kind: Literal["worker", "class", "remedy"]
    name: str
    is_met: bool
    ttft_s: float | None  # predicted from the arrival, p99
    itl_s: float | None
    text: str


def best_of(record: DecisionRecord) -> Candidate | None:
    """The row whose TTFT counts: of the worker that computes the prompt, or the best eligible."""
    if record.placement is not None:
        name = record.placement.prefill_worker
        return next((row for row in record.candidates if row.worker_id == name), None)
    return next((row for row in record.candidates if row.eligible), None)


def counterfactuals(
    record: DecisionRecord, slo: SLOClass, classes: Iterable[SLOClass], margin: float
) -> tuple[Counterfactual, ...]:
    """The next best worker, each other class, and for a refusal what was in the way. `margin` is
    the share of a TTFT target that admission keeps free."""
    best = best_of(record)
    found = [*_workers(record, best, slo, margin)]
    if best is not None:
        others = [item for item in classes if item.name != slo.name]
        itl_s = record.placement.predicted_itl_s if record.placement else best.itl_s
        found += [_class(item, record, best, itl_s, margin) for item in others]
    if record.outcome == "rejected":
        found += _remedies(record, best, slo, margin)
    return tuple(found)


def _is_met(ttft_s: float, itl_s: float, slo: SLOClass, margin: float) -> bool:
    return slo.is_batch or (ttft_s <= (1.0 - margin) * slo.ttft_s_p99 and itl_s <= slo.itl_s_p99)


def _workers(
    record: DecisionRecord, best: Candidate | None, slo: SLOClass, margin: float
) -> Iterator[Counterfactual]:
    """Rows stand best first behind the chosen ones."""
    placement = record.placement
    if placement is None or best is None:
        return
    chosen = {placement.prefill_worker, placement.decode_worker}
    others = [row for row in record.candidates if row.worker_id not in chosen]
    if not others:
        return
    row = next((row for row in others if row.eligible), others[0])
    ttft_s = record.after_s + row.ttft_s_p99
    if not row.eligible:
        text = f"{row.worker_id} could not take it: {row.reason}"
        yield Counterfactual("worker", row.worker_id, False, None, None, text)
        return
    later_ms = 1000.0 * (row.ttft_s - best.ttft_s)
    text = (
        f"{row.worker_id} would have given the first token {abs(later_ms):.0f} ms"
        f" {'later' if later_ms >= 0.0 else 'sooner'} and steps of {1000.0 * row.itl_s:.0f} ms"
    )
    is_met = _is_met(ttft_s, row.itl_s, slo, margin)
    yield Counterfactual("worker", row.worker_id, is_met, ttft_s, row.itl_s, text)


def _class(
    slo: SLOClass, record: DecisionRecord, best: Candidate, itl_s: float, margin: float
) -> Counterfactual:
    ttft_s = record.after_s + best.ttft_s_p99
    is_met = _is_met(ttft_s, itl_s, slo, margin)
    if slo.is_batch:
        text = f"{slo.name}: taken without a latency target, after all online work"
        return Counterfactual("class", slo.name, True, None, None, text)
    text = (
        f"{slo.name}: {'in time' if is_met else 'late'}, TTFT p99 {1000.0 * ttft_s:.0f} ms of"
        f" {1000.0 * slo.ttft_s_p99:.0f}, step {1000.0 * itl_s:.0f} ms of"
        f" {1000.0 * slo.itl_s_p99:.0f}"
    )
    return Counterfactual("class", slo.name, is_met, ttft_s, itl_s, text)


def _remedies(
    record: DecisionRecord, best: Candidate | None, slo: SLOClass, margin: float
) -> Iterator[Counterfactual]:
    """Time, and what stood in the way."""
    if record.retry_after_s is not None:
        text = f"the same request {record.retry_after_s:.1f} s later"
        yield Counterfactual("remedy", "retry", True, None, None, text)
    if record.bound != "late":
        text = REMEDIES[record.bound]
        is_met = record.bound != "poison_request"
        yield Counterfactual("remedy", record.bound, is_met, None, None, text)
        return
    if best is None:
        return
    needed_s = (record.after_s + best.ttft_s_p99) / (1.0 - margin)
    if needed_s > slo.ttft_s_p99:
        text = f"a TTFT target of {1000.0 * needed_s:.0f} ms or more"
        yield Counterfactual("remedy", "ttft_target", True, needed_s, best.itl_s, text)
    if best.itl_s > slo.itl_s_p99:
        text = f"an ITL target of {1000.0 * best.itl_s:.0f} ms or more"
        yield Counterfactual("remedy", "itl_target", True, None, best.itl_s, text)
    alone_s = record.after_s + (best.ttft_s_p99 / best.ttft_s if best.ttft_s else 1.0) * (
        best.ttft_s - best.queue_s
    )
    is_met = _is_met(alone_s, best.itl_s, slo, margin)
    text = (
        f"{best.worker_id} without the {1000.0 * best.queue_s:.0f} ms of prompts before it:"
        f" TTFT p99 {1000.0 * alone_s:.0f} ms"
    )
    yield Counterfactual("remedy", "idle_worker", is_met, alone_s, best.itl_s, text)
