"""What pages read of the running control plane, and the one way in which they act on it.

Outside `serve` there is none: readers give None and pages show their empty states.
"""

from collections.abc import Sequence
from concurrent.futures import TimeoutError as CallTimeout
from typing import Any

from console import livefeed, plans, queueview, state, workerview
from console.models import PlanOrder
from controlplane import domain
from controlplane.contracts import Preview
from controlplane.ledger import AccountView


def frame() -> dict[str, Any] | None:
    """The newest live frame; None without a server, or when its loop does not answer in time."""
    current = state.get()
    return None if current is None else _ask(current, livefeed.newest, current)


def history() -> dict[str, Any] | None:
    """The kept points of the live charts."""
    current = state.get()
    return None if current is None else _ask(current, livefeed.history, current)


def view() -> domain.ClusterView | None:
    """Workers and live requests now."""
    current = state.get()

    async def read(server: state.ServerState) -> domain.ClusterView:
        return server.fleet.view()

    return None if current is None else _ask(current, read, current)


def queues(tenant_id: str) -> dict[str, Any] | None:
    """Who waits and how promises stand, see console.queueview."""
    current = state.get()

    async def read(server: state.ServerState) -> dict[str, Any]:
        return queueview.context(server, tenant_id)

    return None if current is None else _ask(current, read, current)


def cancel(request_id: str) -> bool:
    """End a request that runs in `/v1`; False when it does not."""
    current = state.get()

    async def act(server: state.ServerState) -> bool:
        return server.running.cancel(request_id)

    return current is not None and _ask(current, act, current) is True


def worker_page(worker_id: str) -> dict[str, Any] | None:
    """One worker in detail, see console.workerview; None when it is not known."""
    current = state.get()

    async def read(server: state.ServerState) -> dict[str, Any] | None:
        return workerview.context(server, worker_id)

    return None if current is None else _ask(current, read, current)


def joining(name: str) -> tuple[domain.WorkerView | None, str]:
    """The worker of that name, and why the newest that called itself so was refused."""
    current = state.get()

    async def read(server: state.ServerState) -> tuple[domain.WorkerView | None, str]:
        fleet = server.fleet
        known = (item for item in fleet.view().workers if item.name == name)
        joined = next((item for item in known if item.status != "lost"), None)
        refused = [why for refused_name, why in fleet.refusals if refused_name == name]
        return joined, refused[-1] if refused else ""

    found = None if current is None else _ask(current, read, current)
    return (None, "") if found is None else found


def worker(worker_id: str) -> domain.WorkerView | None:
    """One worker by id."""
    now = view()
    known = () if now is None else now.workers
    return next((found for found in known if found.worker_id == worker_id), None)


def accounts() -> tuple[AccountView, ...]:
    """Contracts in force and where each stands; empty without a server."""
    current = state.get()

    async def read(server: state.ServerState) -> tuple[AccountView, ...]:
        return server.fleet.accounts()

    return () if current is None else _ask(current, read, current) or ()


def preview(contracts: Sequence[domain.Contract]) -> tuple[Preview, ...]:
    """What these contracts would commit; empty without a server."""
    current = state.get()

    async def read(server: state.ServerState) -> tuple[Preview, ...]:
        return server.fleet.preview(contracts)

    return () if current is None else _ask(current, read, current) or ()


def refresh() -> None:
    """Rows have changed: the gateway knows before the answer is out."""
    current = state.get()
    if current is not None:
        current.snapshot.refresh()


def plan(order: PlanOrder) -> PlanOrder:
    """Carry out an order to the planner here and now; it is stored with what came of it."""
    current = state.get()
    outcome: tuple[str, bool] | None = None
    if current is not None:

        async def act(server: state.ServerState) -> tuple[str, bool]:
            return plans.carry_out(server.fleet, order)

        outcome = _ask(current, act, current)
    answer, is_done = (plans.NO_SERVER, False) if outcome is None else outcome
    order.state = "done" if is_done else "refused"
    order.answer = answer[: plans.ANSWER_MAX]
    order.save()
    return order


def order(event: domain.RoleOrdered | domain.DrainOrdered) -> bool:
    """Give an operator's order to the plane; False when no server took it."""
    current = state.get()
    if current is None:
        return False

    async def act(server: state.ServerState) -> bool:
        server.fleet.handle(event)
        return True

    return _ask(current, act, current) is True


def _ask(current: state.ServerState, function: Any, *args: Any) -> Any:
    try:
        return current.call(function, *args)
    except CallTimeout:
        return None
