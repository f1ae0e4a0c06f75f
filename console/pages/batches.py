"""Batches: progress of each, what was promised, the lines of one; pause, resume and cancel."""

from typing import Any

from django.contrib import messages
from django.db.models import Count, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from console import batchclaims
from console.auth import operator_required
from console.models import Batch, BatchLine
from console.models.files import BATCH_ENDED, LINE_ENDED
from controlplane.escalation import LEVEL_NAMES

BATCHES_SHOWN = 50
LINES_SHOWN = 100
LINE_FILTERS = ("pending", "claimed", "completed", "failed", "cancelled", "expired")


@operator_required
@require_safe
def batches(request: HttpRequest) -> HttpResponse:
    """The newest batches with their progress."""
    newest = Batch.objects.order_by("-created_at", "-id").values("pk")[:BATCHES_SHOWN]
    rows = with_progress(Batch.objects.filter(pk__in=[row["pk"] for row in newest]))
    context = {
        "page": "batches",
        "rows": rows,
        "num_batches": Batch.objects.count(),
        "is_running": any(not row["is_ended"] for row in rows),
    }
    is_part = request.GET.get("part") == "rows"
    return render(request, f"console/batches.html{'#rows' if is_part else ''}", context)


@operator_required
@require_safe
def detail(request: HttpRequest, batch_id: str) -> HttpResponse:
    """One batch: progress, errors by code, and its lines."""
    found = get_object_or_404(Batch, batch_id=batch_id)
    (row,) = with_progress(Batch.objects.filter(pk=found.pk))
    lines = found.lines.all()
    chosen = request.GET.get("line", "")
    if chosen in LINE_FILTERS:
        lines = lines.filter(status=chosen)
    context = {
        "page": "batches",
        "row": row,
        "lines": lines.order_by("line_index").defer("body", "response")[:LINES_SHOWN],
        "num_lines": lines.count(),
        "lines_shown": LINES_SHOWN,
        "chosen": chosen,
        "line_filters": LINE_FILTERS,
        "errors": errors_by_code(found),
    }
    is_part = request.GET.get("part") == "progress"
    return render(request, f"console/batch.html{'#progress' if is_part else ''}", context)


@operator_required
@require_POST
def pause(request: HttpRequest, batch_id: str) -> HttpResponse:
    """Start no further line; those in hand end, and the deadline stays."""
    get_object_or_404(Batch, batch_id=batch_id)
    if batchclaims.pause(batch_id):
        messages.success(request, f"{batch_id} is paused; its deadline stays.")
    else:
        messages.error(request, f"{batch_id} is paused already or has ended.")
    return _back(request, batch_id)


@operator_required
@require_POST
def resume(request: HttpRequest, batch_id: str) -> HttpResponse:
    """Go on with a paused batch."""
    get_object_or_404(Batch, batch_id=batch_id)
    if batchclaims.resume(batch_id):
        messages.success(request, f"{batch_id} goes on.")
    else:
        messages.error(request, f"{batch_id} is not paused.")
    return _back(request, batch_id)


@operator_required
@require_POST
def cancel(request: HttpRequest, batch_id: str) -> HttpResponse:
    """Stop a batch: its open lines end as cancelled; results so far are kept."""
    get_object_or_404(Batch, batch_id=batch_id)
    if batchclaims.cancel(batch_id, timezone.now()):
        messages.success(request, f"{batch_id} is being cancelled; finished lines are kept.")
    else:
        messages.error(request, f"{batch_id} has ended or is being cancelled already.")
    return _back(request, batch_id)


def _back(request: HttpRequest, batch_id: str) -> HttpResponse:
    """To the page whose button it was."""
    if request.POST.get("from") == "list":
        return redirect("pages:batches")
    return redirect("pages:batch", batch_id=batch_id)


def with_progress(found: QuerySet[Batch]) -> list[dict[str, Any]]:
    """The batches, newest first, each with its progress; one query counts all their lines."""
    batches = list(found.select_related("tenant", "input_file").order_by("-created_at", "-id"))
    lines = BatchLine.objects.filter(batch__in=batches).order_by()
    counts: dict[int, dict[str, int]] = {batch.pk: {} for batch in batches}
    for pk, status, n in lines.values_list("batch", "status").annotate(n=Count("id")):
        counts[pk][status] = n
    return [progress(batch, counts[batch.pk]) for batch in batches]


def progress(batch: Batch, counts: dict[str, int]) -> dict[str, Any]:
    """Shares of the bar, and time left: as the certificate expects it, or else by the pace so far.

    `counts` has the number of lines in each state; a state without lines may be absent."""
    now = timezone.now()
    is_ended = batch.status in BATCH_ENDED
    total = batch.num_lines or 1
    completed, failed = counts.get("completed", 0), counts.get("failed", 0)
    num_ended = sum(counts.get(status, 0) for status in LINE_ENDED)
    elapsed_s = ((batch.ended_at or now) - batch.created_at).total_seconds()
    left_s = None
    if not is_ended and batch.eta is not None:
        left_s = max(0.0, (batch.eta - now).total_seconds())
    elif not is_ended and num_ended and elapsed_s > 0 and not batch.is_paused:
        left_s = (batch.num_lines - num_ended) * elapsed_s / num_ended
    deadline_s = (batch.expires_at - now).total_seconds()
    return {
        "batch": batch,
        "completed": completed,
        "failed": failed,
        "running": counts.get("claimed", 0),
        "completed_ratio": completed / total,
        "failed_ratio": failed / total,
        "is_ended": is_ended,
        "elapsed_s": elapsed_s,
        "left_s": left_s,
        "deadline_s": None if is_ended else max(deadline_s, 0.0),
        "is_late": left_s is not None and left_s > deadline_s,
        "is_open": batch.status == "in_progress",
        "level": LEVEL_NAMES[batch.level],
        "slack": None if batch.slack is None or is_ended else f"{batch.slack:.2f}",
        "is_short": batch.slack is not None and batch.slack < 0.0,
        "quote": quote_of(batch),
    }


def quote_of(batch: Batch) -> dict[str, Any] | None:
    """What was promised at submit, in seconds from then; None when nothing had been measured."""
    if batch.finish_from is None or batch.finish_by is None:
        return None
    return {
        "from_s": (batch.finish_from - batch.created_at).total_seconds(),
        "by_s": (batch.finish_by - batch.created_at).total_seconds(),
        "slack": f"{batch.quoted_slack:.2f}",
    }


def errors_by_code(batch: Batch) -> list[tuple[str, int]]:
    """How often each error code occurred among the failed lines, most frequent first."""
    codes = (
        BatchLine.objects.filter(batch=batch, status__in=("failed", "expired"))
        .values_list("error__code")
        .annotate(n=Count("id"))
        .order_by("-n")
    )
    return [(code or "response", n) for code, n in codes]
