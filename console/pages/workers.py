"""Workers: who they are, what they do, and the orders an operator can give: add, flip, drain."""

import json

from django.contrib import messages
from django.db.models import Q
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import urlencode
from django.views.decorators.http import require_http_methods, require_safe

from console import audit, jointokens, plans
from console.auth import operator_required
from console.forms import AddWorkerForm, RoleForm
from console.middleware import chart_page
from console.models import Model, PlanRecord, Worker
from console.pages import cluster
from controlplane import domain

PLANS_SHOWN = 20
CHANGES_SHOWN = 10  # on the page of one worker


@operator_required
@require_safe
def workers(request: HttpRequest) -> HttpResponse:
    """All workers the plane knows, and the latest role changes."""
    frame = cluster.frame()
    view = cluster.view()
    context = {
        "page": "workers",
        "frame": frame,
        "workers": [] if view is None else rows(view),
        "is_serving": view is not None,
        "shape": "" if frame is None else frame["shapes"]["workers"],
        "plans": PlanRecord.objects.all()[:PLANS_SHOWN],
    }
    is_part = request.GET.get("part") == "rows"
    return render(request, f"console/workers.html{'#rows' if is_part else ''}", context)


def rows(view: domain.ClusterView) -> list[dict[str, object]]:
    """Each worker with the shares that bars show; None before its first report."""
    made = []
    for worker in view.workers:
        load, used = worker.load, None
        if load is not None and load.kv_blocks_total:
            held = load.kv_blocks_total - load.kv_blocks_free - load.kv_blocks_cached
            used = held / load.kv_blocks_total
        made.append({"worker": worker, "load": load, "kv_used_ratio": used})
    return made


@operator_required
@chart_page
@require_safe
def detail(request: HttpRequest, worker_id: str) -> HttpResponse:
    """One worker: what it holds, how its steps compare with their predictions, where its time
    went."""
    found = cluster.worker_page(worker_id)
    if found is None:
        raise Http404(f"no worker {worker_id}")
    path = f"workers/{worker_id}"
    context = {
        **found,
        "page": "workers",
        "topics": f"overview,worker&{urlencode({'worker': worker_id})}",
        "step_paths": json.dumps([f"{path}/step_ms", f"{path}/predicted_ms"]),
        "row_paths": json.dumps([f"{path}/online_rows", f"{path}/batch_rows"]),
        "plans": plans.history(CHANGES_SHOWN, Q(worker_id=worker_id)),
    }
    return render(request, "console/worker.html", context)


@operator_required
@require_safe
def joining(request: HttpRequest, name: str) -> HttpResponse:
    """Has the worker of this name dialled in? A fragment that asks again until it has."""
    worker, refusal = cluster.joining(name)
    context = {"name": name, "worker": worker, "refusal": "" if worker else refusal}
    return render(request, "console/_joining.html", context)


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def add(request: HttpRequest) -> HttpResponse:
    """Make a one-use join token and show the command that a new worker runs; shown once."""
    form = AddWorkerForm(request.POST or None)
    context: dict[str, object] = {"page": "workers", "form": form}
    if request.method == "POST" and form.is_valid():
        token = jointokens.mint(form.cleaned_data["name"])
        context["command"] = join_command(request, token, **form.cleaned_data)
        context["name"] = form.cleaned_data["name"]
        context["life_minutes"] = int(jointokens.LIFE_S // 60)
        audit.record(request.user, Worker(), "made a join token", name=form.cleaned_data["name"])
    return render(request, "console/worker_add.html", context)


def join_command(
    request: HttpRequest,
    token: str,
    role: str,
    name: str = "worker-1",
    device: str = "cpu",
    engine: str = "native",
) -> str:
    """The command that starts a worker against this console."""
    scheme = "wss" if request.is_secure() else "ws"
    model = Model.objects.filter(is_active=True).exclude(folder="").first()
    parts = [
        f"python -m gpuworkers --join {scheme}://{request.get_host()}/ws/worker --token {token}",
        f"--name {name} --role {role} --device {device} --engine {engine}",
    ]
    if engine == "native":
        folder, model_id = ("DIR", "MODEL") if model is None else (model.folder, model.model_id)
        parts.append(f"--model {folder} --model-id {model_id}")
    return " \\\n  ".join(parts)


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def flip(request: HttpRequest, worker_id: str) -> HttpResponse:
    """Preview a change of role, then order it. Sequences in hand go on; no weights are loaded."""
    worker = _find(worker_id)
    asked = request.POST if request.method == "POST" else request.GET
    form = RoleForm(asked if "role" in asked else {"role": other_role(worker.role)})
    if request.method == "POST" and form.is_valid():
        event = domain.RoleOrdered(
            worker_id, form.cleaned_data["role"], request.user.get_username()
        )
        return _ordered(request, event, f"role {worker.role} → {form.cleaned_data['role']}")
    view = cluster.view()
    peers = [] if view is None else [w for w in view.workers if w.worker_id != worker_id]
    return render(
        request,
        "console/worker_order.html",
        {
            "page": "workers",
            "order": "flip",
            "worker": worker,
            "form": form,
            "effects": flip_effects(worker, form["role"].value(), peers),
        },
    )


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def drain(request: HttpRequest, worker_id: str) -> HttpResponse:
    """Preview a drain, then order it."""
    worker = _find(worker_id)
    if request.method == "POST":
        event = domain.DrainOrdered(worker_id, request.user.get_username())
        return _ordered(request, event, "drain")
    return render(
        request,
        "console/worker_order.html",
        {
            "page": "workers",
            "order": "drain",
            "worker": worker,
            "effects": [
                f"{worker.requests} request(s) placed on it finish there.",
                "It takes nothing new and reports drained when it is empty.",
                "Start the worker again to bring it back.",
            ],
        },
    )


def other_role(role: str) -> str:
    return {"prefill": "decode", "decode": "prefill", "mixed": "decode"}[role]


def flip_effects(worker: domain.WorkerView, role: str, peers: list[domain.WorkerView]) -> list[str]:
    """What the change would mean, in sentences; the last one warns when a role loses its worker."""
    effects = [
        f"{worker.requests} request(s) placed on it finish there; none is lost or moved.",
        "It takes effect with the worker's next step and loads no weights.",
    ]
    live = [peer.role for peer in peers if peer.status == "live"]
    for needed in ("prefill", "decode"):
        if role not in (needed, "mixed") and needed not in live and "mixed" not in live:
            effects.append(
                f"No other live worker has the role {needed}: this one goes on serving it as an "
                "exception."
            )
    return effects


def _find(worker_id: str) -> domain.WorkerView:
    worker = cluster.worker(worker_id)
    if worker is None:
        raise Http404(f"no worker {worker_id}")
    return worker


def _ordered(
    request: HttpRequest, event: domain.RoleOrdered | domain.DrainOrdered, words: str
) -> HttpResponse:
    """Order, audit, and go back to the list."""
    if cluster.order(event):
        audit.record(request.user, Worker(), words, name=event.worker_id)
        messages.success(request, f"{event.worker_id}: {words} ordered.")
    else:
        messages.error(request, "The control plane did not take the order; nothing has changed.")
    return redirect(reverse("pages:workers") + "?" + urlencode({"ordered": event.worker_id}))
