"""Split: how workers are divided into prefill and decode, what the forecast asks for, every change
with its reason, and orders to the planner: shadow mode, apply, roll back, override."""

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from console import audit, plans
from console.auth import operator_required
from console.forms import PlanFilter, RoleForm
from console.middleware import chart_page
from console.models import PlanOrder, PlanRecord
from console.pages import cluster
from console.pages.requests import query_of
from console.pages.workers import flip_effects, other_role
from controlplane import domain

PAGE_ROWS = 30
ORDERS_SHOWN = 5
ACTIONS = ("shadow", "auto", "apply", "rollback", "role")
TITLES = {
    "shadow": "Switch shadow mode on",
    "auto": "Let the planner act",
    "apply": "Apply a recommendation",
    "rollback": "Roll back the planner's newest change",
    "role": "Override a role",
}


@operator_required
@chart_page
@require_safe
def split(request: HttpRequest) -> HttpResponse:
    """The division now and as forecast, and the plan's history; filters stand in the address."""
    form = PlanFilter(request.GET)
    before = request.GET.get("before", "")
    is_readable = before.isdecimal() and int(before) < 1 << 62
    rows = plans.history(PAGE_ROWS + 1, form.conditions(), int(before) if is_readable else None)
    frame = cluster.frame()
    context = {
        "page": "split",
        "frame": frame,
        "is_serving": frame is not None,
        "mode": plans.mode() if frame is None else frame["planner_mode"],
        "splits": [] if frame is None else [_with_step(row) for row in frame["splits"]],
        "workers": [] if frame is None else frame["workers"],
        "form": form,
        "rows": [{"plan": row, "can_apply": _can_apply(row)} for row in rows[:PAGE_ROWS]],
        "older": query_of(request, str(rows[PAGE_ROWS - 1].pk)) if len(rows) > PAGE_ROWS else "",
        "query": query_of(request),
        "is_first": not is_readable,
        "orders": PlanOrder.objects.all()[:ORDERS_SHOWN],
    }
    is_part = request.GET.get("part") == "now"
    return render(request, f"console/split.html{'#now' if is_part else ''}", context)


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def order(request: HttpRequest, action: str) -> HttpResponse:
    """Preview an order to the planner, then give it."""
    if action not in ACTIONS:
        raise Http404(f"no order {action}")
    asked = request.POST if request.method == "POST" else request.GET
    record = _record(asked.get("plan", "")) if action == "apply" else None
    worker_id = asked.get("worker", "") if record is None else record.worker_id
    worker = cluster.worker(worker_id) if worker_id else None
    if action == "role" and worker is None:
        raise Http404(f"no worker {worker_id}")
    role = "" if worker is None else other_role(worker.role)
    form = RoleForm(asked if "role" in asked else {"role": role})
    by = request.user.get_username()
    try:
        made = _order(action, by, record, worker_id, form)
    except ValueError as error:
        messages.error(request, f"{str(error).capitalize()}.")
        return redirect("pages:split")
    if request.method == "POST" and made is not None:
        return _carried_out(request, cluster.plan(made))
    context = {
        "page": "split",
        "action": action,
        "title": TITLES[action],
        "record": record,
        "worker": worker,
        "form": form if action == "role" else None,
        "effects": effects(action, record, worker, form["role"].value()),
    }
    return render(request, "console/split_order.html", context)


def effects(
    action: str, record: PlanRecord | None, worker: domain.WorkerView | None, role: str
) -> list[str]:
    """What the order would mean, in sentences."""
    if action == "shadow":
        return [
            "The planner goes on deciding, and only records what it would have done.",
            "Roles and models stay as they are until you apply a recommendation or override one.",
        ]
    if action == "auto":
        return ["From its next plan on the planner carries out its own changes, one at a time."]
    if action == "rollback":
        return [
            "The worker of the planner's newest change that still stands goes back to what it was.",
            "The planner then leaves that worker alone for ten minutes.",
        ]
    lines = ["The planner leaves this worker alone for ten minutes afterwards."]
    if worker is None:
        return [f"{record}: this worker is not here any more."]
    if record is not None:
        lines = [f"{record}. {record.reason}", *lines]
        role = record.role_after
    if record is None or record.kind == "role":
        view = cluster.view()
        known = () if view is None else view.workers
        peers = [peer for peer in known if peer.worker_id != worker.worker_id]
        lines += flip_effects(worker, role, peers)
    return lines


def _order(
    action: str, by: str, record: PlanRecord | None, worker_id: str, form: RoleForm
) -> PlanOrder | None:
    """The order that was asked for; None when its role is none. Raises ValueError with the reason
    when a recommendation cannot be applied."""
    value = ""
    if record is not None:
        action, worker_id, value = plans.order_of(record)
    elif action == "role":
        if not form.is_valid():
            return None
        value = form.cleaned_data["role"]
    else:
        worker_id = ""
    return plans.made(action, by, worker_id, value)


def _carried_out(request: HttpRequest, order: PlanOrder) -> HttpResponse:
    """Say what came of it, and go back to the page."""
    if order.state == "done":
        audit.record(request.user, order, order.answer)
        messages.success(request, f"{order}: {order.answer}.")
    else:
        messages.error(request, f"{order} was refused: {order.answer}.")
    return redirect("pages:split")


def _record(text: str) -> PlanRecord:
    known = PlanRecord.objects.filter(is_demo_history=False)
    record = known.filter(pk=int(text)).first() if text.isdecimal() and len(text) < 19 else None
    if record is None:
        raise Http404(f"no plan {text}")
    return record


def _can_apply(record: PlanRecord) -> bool:
    try:
        plans.order_of(record)
    except ValueError:
        return False
    return True


def _with_step(row: dict[str, Any]) -> dict[str, Any]:
    """A model's row with the division that would satisfy the forecast, in one sentence."""
    if row["need_prefill"] is None:
        return {**row, "advice": ""}
    total = row["num_prefill"] + row["num_others"]
    if row["need_prefill"] + row["need_others"] > total:
        text = (
            f"needs {row['need_prefill'] + row['need_others'] - total} more than the {total} here"
        )
    elif row["need_prefill"] > row["num_prefill"]:
        text = f"{row['need_prefill'] - row['num_prefill']} more to prefill"
    elif row["need_others"] > row["num_others"]:
        text = f"{row['need_others'] - row['num_others']} more to decode"
    else:
        text = "as it is"
    return {**row, "advice": text}
