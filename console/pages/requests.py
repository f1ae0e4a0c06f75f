"""Requests: those running now, the history with filters, and why one request went where it went."""

from datetime import datetime
from typing import Any

from django.contrib import messages
from django.db.models import Count, Max, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.http import require_POST, require_safe

from console import audit, explaining, livefeed, waterfall
from console.auth import operator_required
from console.forms import RANGES, HistoryFilter, known_classes
from console.models import RequestRecord
from console.pages import cluster, exports

PAGE_ROWS = 50
RECENT_ROWS = 15
COUNT_MAX = 10_000  # rows counted and exported; more reads "more than"
ERROR_STATUSES = ("failed", "rejected", "expired")
ERRORS_SHOWN = 8  # groups
EXPORT_FIELDS = (
    *(
        "request_id",
        "tenant_id",
        "key_id",
        "class_name",
        "model_id",
        "endpoint",
        "status",
        "finish_reason",
    ),
    *("error_code", "arrived_at", "queue_ms", "ttft_ms", "itl_ms_mean", "itl_ms_p99", "e2e_ms"),
    *("prompt_tokens", "cached_tokens", "output_tokens", "split", "prefill_worker"),
    *("decode_worker", "failovers", "is_demo_history"),
)


@operator_required
@require_safe
def live(request: HttpRequest) -> HttpResponse:
    """Requests in flight, filled by the live feed, and the last ones that ended."""
    recent = RequestRecord.objects.filter(is_demo_history=False)[:RECENT_ROWS]
    if request.GET.get("part") == "recent":
        return render(request, "console/requests_live.html#recent", {"recent": recent})
    view = cluster.view()
    context = {
        "page": "requests",
        "rows": [] if view is None else livefeed.request_rows(view),
        "recent": recent,
        "is_serving": view is not None,
    }
    return render(request, "console/requests_live.html", context)


@operator_required
@require_safe
def history(request: HttpRequest) -> HttpResponse:
    """Ended requests, newest first; filters and the cursor stand in the query string."""
    form = HistoryFilter(request.GET, class_names=known_classes())
    filters = form.values()
    found = matching(filters, timezone.now())
    num_found = found[: COUNT_MAX + 1].count()
    if request.GET.get("format") in exports.KINDS:
        rows = found[:COUNT_MAX].values(*EXPORT_FIELDS)
        return exports.download(list(rows), EXPORT_FIELDS, request.GET["format"], "requests")
    rows = list(before(found, request.GET.get("before", ""))[: PAGE_ROWS + 1])
    context = {
        "page": "history",
        "form": form,
        "rows": rows[:PAGE_ROWS],
        "num_found": min(num_found, COUNT_MAX),
        "is_more": num_found > COUNT_MAX,
        "is_first": not request.GET.get("before"),
        "query": query_of(request),
        "older": query_of(request, cursor(rows[PAGE_ROWS - 1])) if len(rows) > PAGE_ROWS else "",
        "filters": filters,
        "errors": errors(request, found),
    }
    is_part = bool(getattr(request, "htmx", False))
    return render(request, f"console/requests_history.html{'#results' if is_part else ''}", context)


def matching(filters: dict[str, Any], now: datetime) -> QuerySet[RequestRecord]:
    """The records that pass the filters; a range counts back from `now`."""
    found = RequestRecord.objects.all()
    within = RANGES[filters["range"]]
    if within is not None:
        found = found.filter(arrived_at__gte=now - within)
    if not filters.get("demo"):
        found = found.filter(is_demo_history=False)
    if filters.get("q"):
        found = found.filter(request_id__startswith=filters["q"])
    if filters.get("worker"):
        worker = filters["worker"]
        found = found.filter(Q(prefill_worker=worker) | Q(decode_worker=worker))
    if filters.get("reason"):
        reason = filters["reason"]
        found = found.filter(Q(error_code=reason) | Q(error_code="", finish_reason=reason))
    columns = {
        "status": "status",
        "split": "split",
        "tenant": "tenant_id",
        "class": "class_name",
        "key": "key_id",
        "model": "model_id",
    }
    given = {column: filters[name] for name, column in columns.items() if filters.get(name)}
    return found.filter(**given)


def errors(request: HttpRequest, found: QuerySet[RequestRecord]) -> list[dict[str, Any]]:
    """What went wrong among the newest COUNT_MAX, by status and reason, most frequent first; each
    with the query string that leaves only it."""
    ended_badly = found.filter(status__in=ERROR_STATUSES)
    newest = ended_badly.order_by("-arrived_at", "-id").values("pk")[:COUNT_MAX]
    groups = (
        RequestRecord.objects.filter(pk__in=newest)
        .order_by()
        .values("status", "error_code")
        .annotate(
            n=Count("pk"),
            tenants=Count("tenant_id", distinct=True),
            newest=Max("arrived_at"),
        )
        .order_by("-n", "status", "error_code")[:ERRORS_SHOWN]
    )
    kept = {name: value for name, value in request.GET.items() if name not in ("before", "format")}
    return [
        {
            **row,
            "query": urlencode({**kept, "status": row["status"], "reason": row["error_code"]}),
        }
        for row in groups
    ]


def cursor(record: RequestRecord) -> str:
    """Where the next page begins: after this record."""
    return f"{record.arrived_at.isoformat()}~{record.pk}"


def before(found: QuerySet[RequestRecord], text: str) -> QuerySet[RequestRecord]:
    """Records older than a cursor; a cursor that cannot be read is the beginning."""
    moment, _, key = text.partition("~")
    try:
        at, pk = datetime.fromisoformat(moment.replace(" ", "+")), int(key)
        is_readable = at.tzinfo is not None and abs(pk) < 1 << 62
    except ValueError:
        is_readable = False
    if not is_readable:
        return found
    return found.filter(Q(arrived_at__lt=at) | Q(arrived_at=at, pk__lt=pk))


def query_of(request: HttpRequest, before_cursor: str = "") -> str:
    """The query string with its filters, without empty ones, and with another cursor."""
    kept = [(k, v) for k, v in request.GET.items() if v and k not in ("before", "format")]
    return urlencode([*kept, ("before", before_cursor)] if before_cursor else kept)


@operator_required
@require_safe
def detail(request: HttpRequest, request_id: str) -> HttpResponse:
    """One request: where its time went, each decision with its candidates, promise and outcome."""
    record = RequestRecord.objects.filter(request_id=request_id).first()
    if record is None:
        running = running_row(request_id)
        if running is None:
            raise Http404(f"no request {request_id}")
        explained = explaining.of_running(request_id) or {}
        context = {"page": "requests", "row": running, **explained_context(explained)}
        return render(request, "console/request_live.html", context)
    explained = record.decision
    target_s = explained.get("ttft_s_target")
    target_ms = None if target_s is None else target_s * explaining.MS_PER_S
    context = {
        "page": "history",
        "record": record,
        "bars": waterfall.bars(record, target_ms),
        "target_ms": target_ms,
        "comparisons": explaining.comparisons(explained),
        **explained_context(explained),
    }
    return render(request, "console/request.html", context)


@operator_required
@require_POST
def cancel(request: HttpRequest, request_id: str) -> HttpResponse:
    """End a running request: its client gets an error, its worker stops."""
    if cluster.cancel(request_id):
        audit.record(request.user, RequestRecord(), "cancelled", name=request_id)
        messages.success(request, f"{request_id} is cancelled; its client was told.")
    else:
        messages.error(
            request, f"{request_id} does not run here; a batch line is cancelled with its batch."
        )
    return redirect("pages:requests")


def running_row(request_id: str) -> dict[str, Any] | None:
    """The request as the plane sees it, when it has not ended."""
    view = cluster.view()
    rows = [] if view is None else livefeed.request_rows(view)
    return next((row for row in rows if row["request_id"] == request_id), None)


def explained_context(explained: dict[str, Any]) -> dict[str, Any]:
    """What `_decisions.html` shows."""
    return {
        "decisions": explaining.decision_rows(explained),
        "left_out": explained.get("records_left_out", 0),
        "counterfactuals": explained.get("counterfactuals", ()),
    }
