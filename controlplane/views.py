"""Immutable pictures of the plane's state for pages and metrics."""

from collections.abc import Iterable
from itertools import islice

from controlplane.config import ControlPlaneConfig
from controlplane.domain import RequestView, WorkerView
from controlplane.failover import Tracked
from controlplane.protocol import Role
from controlplane.registry import Worker


def workers(
    members: Iterable[Worker], now_s: float, config: ControlPlaneConfig
) -> tuple[WorkerView, ...]:
    known = list(members)
    roles = {worker.role for worker in known if worker.status == "live"}
    return tuple(_worker(worker, roles, now_s, config) for worker in known)


def _worker(
    worker: Worker, roles: set[Role], now_s: float, config: ControlPlaneConfig
) -> WorkerView:
    hello = worker.hello
    is_suspect = worker.status == "live" and worker.is_suspect(now_s, config)
    return WorkerView(
        worker_id=worker.worker_id,
        epoch=worker.epoch,
        name=hello.name,
        engine=hello.engine,
        engine_version=hello.engine_version,
        role=worker.role,
        status="suspect" if is_suspect else worker.status,
        device=hello.device,
        models=tuple(hello.models),
        block_tokens=hello.block_tokens,
        num_blocks=hello.num_blocks,
        handoff_address=hello.handoff_address,
        heard_ago_s=max(0.0, now_s - worker.heard_at_s),
        load=worker.load,
        requests=len(worker.reservations),
        exception=_exception(worker, roles, now_s),
    )


def _exception(worker: Worker, roles: set[Role], now_s: float) -> str:
    """Why it gets no work; or, roles being preferences, that it does the other role's work too."""
    if worker.is_ejected(now_s):
        left_s = worker.ejected_until_s - now_s
        return f"gets no work for another {left_s:.0f} s: {worker.eject_reason}"
    if worker.is_on_trial:
        return f"tried with one request at a time: {worker.eject_reason}"
    if worker.status != "live" or "mixed" in roles:
        return ""
    if worker.role == "prefill" and "decode" not in roles:
        return "serves decode too: no decode worker is live"
    if worker.role == "decode" and "prefill" not in roles:
        return "serves prefill too: no prefill worker is live"
    return ""


def requests(
    tracked: Iterable[Tracked], now_s: float, requests_max: int
) -> tuple[RequestView, ...]:
    """The oldest `requests_max`."""
    return tuple(
        RequestView(
            request_id=item.request_id,
            tenant_id=item.request.tenant_id,
            model_id=item.request.model_id,
            class_name=item.request.slo.name,
            phase=item.phase,
            epoch=item.epoch,
            age_s=max(0.0, now_s - item.request.arrived_at_s),
            phase_s=max(0.0, now_s - item.phase_at_s),
            prompt_tokens=item.request.prompt_tokens,
            placement=item.placement,
        )
        for item in islice(tracked, requests_max)
    )
