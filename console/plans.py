"""Plan records and orders to the planner, for commands, pages and the serving process.

A command puts an order into the database and waits for its answer; the serving process, which owns
the planner, looks for orders once a second. An order that nobody took in time is withdrawn, so that
a server started later does not act on it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import DatabaseError
from django.db.models import Q
from django.utils import timezone

from console.fleet import Fleet
from console.models import PlanOrder, PlanRecord, Worker
from console.writer import FactWriter
from controlplane import domain

POLL_S = 1.0
ORDER_S_MAX = 30.0  # an older order is not carried out
APPLY_S_MAX = 3600.0  # an older recommendation says nothing of today's load
ANSWER_MAX = 500  # characters that are stored
ORDERS_MAX = 20  # taken at once
MODES = ("auto", "shadow")
NO_SERVER = "no server took it: is `manage.py serve` running?"

logger = logging.getLogger(__name__)


def history(limit: int, where: Q | None = None, before_id: int | None = None) -> list[PlanRecord]:
    """The newest changes that pass the filter, first the newest; no demo history. With an id those
    recorded before it."""
    found = PlanRecord.objects.filter(where or Q(), is_demo_history=False)
    if before_id is not None:
        found = found.filter(pk__lt=before_id).order_by("-pk")
    return list(found[:limit])


def mode() -> domain.PlannerMode:
    """Of the newest order that was carried out."""
    newest = PlanOrder.objects.filter(action__in=MODES, state="done").first()
    return "shadow" if newest is not None and newest.action == "shadow" else "auto"


def status() -> dict[str, Any]:
    """The planner's mode, the workers by role, and the newest change that was carried out."""
    live = Worker.objects.exclude(status="lost").order_by("name")
    done = PlanRecord.objects.filter(is_demo_history=False, is_shadow=False).first()
    return {
        "mode": mode(),
        "workers": [
            {"worker_id": row.worker_id, "name": row.name, "role": row.role, "status": row.status}
            for row in live
        ],
        "roles": dict(sorted(Counter(row.role for row in live if row.status == "live").items())),
        "newest": None if done is None else shown(done),
    }


def shown(row: PlanRecord) -> dict[str, Any]:
    """JSON of a record."""
    return {
        "id": row.pk,
        "at": row.at.isoformat(),
        "kind": row.kind,
        "worker_id": row.worker_id,
        "role_before": row.role_before,
        "role_after": row.role_after,
        "model_before": row.model_before,
        "model_after": row.model_after,
        "by": row.by,
        "shadow": row.is_shadow,
        "reason": row.reason,
    }


def made(action: str, by: str, worker_id: str = "", value: str = "") -> PlanOrder:
    """An order that is not stored yet."""
    return PlanOrder(at=timezone.now(), action=action, worker_id=worker_id, value=value, by=by)


def place(action: str, by: str, worker_id: str = "", value: str = "") -> PlanOrder:
    """An order for the serving process."""
    order = made(action, by, worker_id, value)
    order.save()
    return order


def note_mode(mode: domain.PlannerMode, by: str) -> None:
    """The mode was set in the serving process: it holds after a restart too."""
    PlanOrder.objects.create(at=timezone.now(), action=mode, by=by, state="done")


def withdraw(order: PlanOrder) -> bool:
    """Take back what nobody has taken; False when somebody did meanwhile."""
    queued = PlanOrder.objects.filter(pk=order.pk, state="queued")
    return queued.update(state="refused", answer=NO_SERVER) == 1


def order_of(record: PlanRecord) -> tuple[str, str, str]:
    """Action, worker and value that carry out a recommendation. Raises ValueError with the reason
    when it cannot be."""
    if not record.is_shadow:
        raise ValueError(f"plan {record.pk} was carried out when it was made")
    if record.at < timezone.now() - timedelta(seconds=APPLY_S_MAX):
        raise ValueError(f"plan {record.pk} is of {record.at:%Y-%m-%d %H:%M}: too old to apply")
    match record.kind:
        case "role":
            return "role", record.worker_id, record.role_after
        case "model":
            return "model", record.worker_id, record.model_after
        case "drain":
            return "drain", record.worker_id, ""
    raise ValueError(f"plan {record.pk} starts a worker: switch shadow mode off instead")


class OrderDesk:
    """Takes orders in the serving process."""

    def __init__(self, fleet: Fleet, writer: FactWriter) -> None:
        self._fleet = fleet
        self._writer = writer
        self._is_mode_known = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.turn()
            except DatabaseError as error:
                logger.warning("plan orders not read: %s", error)
            await asyncio.sleep(POLL_S)

    async def turn(self) -> None:
        """At first the mode that was in force; then the orders that wait."""
        if not self._is_mode_known:
            self._fleet.handle(domain.PlannerOrdered(await self._writer.call(mode), ""))
            self._is_mode_known = True
        for order in await self._writer.call(_take):
            answer, is_done = carry_out(self._fleet, order)
            logger.info("plan order=%s by=%s answer=%s", order, order.by, answer)
            await self._writer.call(_answer, order.pk, answer, is_done)


def carry_out(fleet: Fleet, order: PlanOrder) -> tuple[str, bool]:
    """What came of it, and whether it was done. On the server's event loop."""
    event = _event(order)
    if event is None:
        return f"unknown order {order}", False
    before = fleet.view()
    workers = {worker.worker_id: worker for worker in before.workers}
    if order.worker_id and order.worker_id not in workers:
        return f"no worker {order.worker_id}", False
    fleet.handle(event)
    after = fleet.view()
    if order.action in MODES:
        return f"the planner's mode is {after.planner_mode}", True
    if order.action == "drain":
        return f"{order.worker_id} drains", True
    if after.plans[:1] == before.plans[:1]:
        return _unchanged(order, workers.get(order.worker_id)), False
    return after.plans[0].reason, True


def _unchanged(order: PlanOrder, worker: domain.WorkerView | None) -> str:
    if worker is None:
        return "nothing of the planner's stands that could be undone"
    if order.action == "role" and worker.role == order.value:
        return f"{order.worker_id} has the role {order.value} already"
    return f"{order.worker_id} cannot take {order.value}"


def _event(order: PlanOrder) -> domain.Event | None:
    make: dict[str, Callable[[], domain.Event]] = {
        "role": lambda: domain.RoleOrdered(order.worker_id, order.value, order.by),  # type: ignore[arg-type]
        "model": lambda: domain.ModelOrdered(order.worker_id, order.value, order.by),
        "drain": lambda: domain.DrainOrdered(order.worker_id, order.by),
        "rollback": lambda: domain.PlanRolledBack(order.by),
        "shadow": lambda: domain.PlannerOrdered("shadow", order.by),
        "auto": lambda: domain.PlannerOrdered("auto", order.by),
    }
    return make[order.action]() if order.action in make else None


def _take() -> list[PlanOrder]:
    """Runs in the writer's transaction."""
    queued = PlanOrder.objects.filter(state="queued")
    queued.filter(at__lt=timezone.now() - timedelta(seconds=ORDER_S_MAX)).update(
        state="refused", answer=f"older than {ORDER_S_MAX:.0f} s when a server saw it"
    )
    taken = list(queued.order_by("id")[:ORDERS_MAX])
    PlanOrder.objects.filter(pk__in=[order.pk for order in taken]).update(state="taken")
    return taken


def _answer(order_id: int, answer: str, is_done: bool) -> None:
    state = "done" if is_done else "refused"
    PlanOrder.objects.filter(pk=order_id).update(state=state, answer=answer[:ANSWER_MAX])
