"""What the page of one worker shows; pure functions of views, no row of the database is read."""

from collections.abc import Iterable, Mapping
from typing import Any

from console import livefeed, state
from controlplane import domain
from controlplane.gpuledger import GpuView

REQUESTS_MAX = 50  # rows of what it holds


def part(current: state.ServerState, query: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Template and context of what the live socket replaces; on the event loop."""
    found = context(current, query.get("worker", "")) or {"worker": None}
    return "console/worker.html#swap", found


def context(current: state.ServerState, worker_id: str) -> dict[str, Any] | None:
    """Everything about one worker that changes by the second; None when it is not known."""
    view = current.fleet.view()
    worker = next((item for item in view.workers if item.worker_id == worker_id), None)
    if worker is None:
        return None
    spent = next((g for g in current.fleet.gpu_seconds() if g.worker_id == worker_id), None)
    return {
        "worker": worker,
        "load": worker.load,
        "kv": kv_shares(worker),
        "step_error": step_error(worker),
        "gpu": None if spent is None else gpu_rows(spent),
        "gpu_view": spent,
        "held": held_rows(view, worker_id),
    }


def kv_shares(worker: domain.WorkerView) -> dict[str, float] | None:
    """Shares of the KV blocks: of sequences (of batch among them), cached, free."""
    load = worker.load
    if load is None or not load.kv_blocks_total:
        return None
    total = load.kv_blocks_total
    used = total - load.kv_blocks_free - load.kv_blocks_cached
    return {
        "used": used / total,
        "batch": load.kv_blocks_held_batch / total,
        "cached": load.kv_blocks_cached / total,
        "free": load.kv_blocks_free / total,
    }


def step_error(worker: domain.WorkerView) -> float | None:
    """Of the last step: measured over predicted, less 1."""
    load = worker.load
    if load is None or load.predicted_s <= 0.0 or load.measured_s <= 0.0:
        return None
    return load.measured_s / load.predicted_s - 1.0


def gpu_rows(view: GpuView) -> list[dict[str, Any]]:
    """Where its time went since it started, by lane and stage."""
    spent = view.spent
    lanes = (
        ("interactive, prefill", "s1", spent.online_prefill_s),
        ("interactive, decode", "s1", spent.online_decode_s),
        ("batch, prefill", "s2", spent.batch_prefill_s),
        ("batch, decode", "s2", spent.batch_decode_s),
        ("idle", "", spent.idle_s),
    )
    total_s = spent.total_s
    return [
        {"name": name, "tone": tone, "seconds": s, "share": s / total_s if total_s else None}
        for name, tone, s in lanes
    ]


def held_rows(view: domain.ClusterView, worker_id: str) -> list[dict[str, Any]]:
    """Requests that it computes or decodes, the longest first."""
    held: Iterable[domain.RequestView] = (
        request
        for request in view.requests
        if request.placement is not None
        and worker_id in (request.placement.prefill_worker, request.placement.decode_worker)
    )
    mine = domain.ClusterView((), tuple(held), (), ())
    return livefeed.request_rows(mine)[:REQUESTS_MAX]
