"""The promises, the load, the cost and the trouble of now; empty, it shows the first steps."""

import json
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.http import require_safe

from console.auth import operator_required
from console.middleware import chart_page
from console.models import Model, PlanRecord, RequestRecord, SLOClassRow
from console.pages import cluster
from console.pages.workers import join_command

PLANS_SHOWN = 6
PARTS = ("checklist", "tiles", "strip", "plans")
MILLISECONDS = 1000


@operator_required
@chart_page
@require_safe
def overview(request: HttpRequest) -> HttpResponse:
    """The page, or one of its parts when the live feed says that its shape has changed."""
    part = request.GET.get("part", "")
    template = f"console/overview.html#{part}" if part in PARTS else "console/overview.html"
    return render(request, template, context(request))


@operator_required
@require_safe
def live_history(request: HttpRequest) -> HttpResponse:
    """The last minutes of the live charts, for a page that begins or has missed frames."""
    points = cluster.history() or {"seq": 0, "t": [], "charts": {}}
    return JsonResponse(points, headers={"cache-control": "no-store"})


def context(request: HttpRequest) -> dict[str, Any]:
    """Values for first paint; the live feed goes on from there."""
    rows_by_name = {row.name: row for row in SLOClassRow.objects.all()}
    frame = cluster.frame() or empty_frame(list(rows_by_name.values()))
    classes = []
    for values in frame["classes"]:
        row = rows_by_name.get(values["name"])
        classes.append(
            {
                **values,
                "note": "" if row is None else row.note,
                "deadline_s": None if row is None else row.deadline_s,
            }
        )
    promised = [row for row in classes if not row["is_batch"]]
    return {
        "page": "overview",
        "frame": frame,
        "shapes": frame["shapes"],
        "classes": classes,
        "promised": promised,
        "promise_traces": json.dumps(promise_traces([row["name"] for row in promised])),
        "workers": frame["workers"],
        "plans": PlanRecord.objects.filter(is_demo_history=False)[:PLANS_SHOWN],
        "steps": first_steps(request, frame),
    }


def promise_traces(names: list[str]) -> list[dict[str, Any]]:
    """TTFT and ITL of each class, in the order of livefeed.charts."""
    return [
        {"name": f"{name} {unit}", "colour": index + 1, "dash": dash}
        for index, name in enumerate(names)
        for dash, unit in enumerate(("TTFT", "ITL"))
    ]


def empty_frame(rows: list[SLOClassRow]) -> dict[str, Any]:
    """The frame of a console whose control plane does not run: every class without data."""
    unmeasured = ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "attainment")
    return {
        "classes": [
            {
                "name": row.name,
                "is_batch": row.is_batch,
                "ttft_target_ms": row.ttft_s_p99 * MILLISECONDS,
                "itl_target_ms": row.itl_s_p99 * MILLISECONDS,
                "requests": 0,
                "status": "no_data",
                **dict.fromkeys(unmeasured),
            }
            for row in rows
        ],
        "tokens_per_s": {"interactive": None, "batch": None},
        "usd_per_million": {"interactive": None, "batch": None},
        "workers": [],
        "counters": {},
        "running": None,
        "queued_total": None,
        "shapes": {"classes": "", "workers": "", "plans": "", "setup": ""},
    }


def first_steps(request: HttpRequest, frame: dict[str, Any]) -> dict[str, Any]:
    """The checklist of an empty console; it hides when every step is done."""
    model = Model.objects.filter(is_active=True).first()
    model_id = "MODEL" if model is None else model.model_id
    has_worker = any(worker["status"] == "live" for worker in frame["workers"])
    has_request = frame["counters"].get("requests_total", 0) > 0
    if not has_request:
        has_request = RequestRecord.objects.filter(is_demo_history=False).exists()
    host = request.get_host()
    body = json.dumps(
        {"model": model_id, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    )
    curl = (
        f"curl -N {request.scheme}://{host}/v1/chat/completions \\\n"
        '  -H "Authorization: Bearer $SLACKWATER_KEY" '
        f"-H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
    rows = [
        {
            "id": "step-worker",
            "title": "Add a worker",
            "is_done": has_worker,
            "help": "A worker dials in by itself; Workers → Add worker makes its token.",
            "command": join_command(request, "TOKEN", "mixed"),
        },
        {
            "id": "step-model",
            "title": "Name a model that tenants may use",
            "is_done": model is not None,
            "help": "Under Tenants & keys → Models, or by the demo.",
            "command": "make demo",
        },
        {
            "id": "step-request",
            "title": "Send the first request",
            "is_done": has_request,
            "help": "With a tenant key, from here or in the Playground.",
            "command": curl,
        },
    ]
    return {"rows": rows, "is_done": all(row["is_done"] for row in rows)}
