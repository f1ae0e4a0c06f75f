"""Batches: progress of each, and the lines of one."""

from typing import Any

from django.contrib import messages
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from console import batchclaims
from console.auth import operator_required
from console.models import Batch, BatchLine
from console.models.files import BATCH_ENDED, LINE_ENDED

BATCHES_SHOWN = 100
LINES_SHOWN = 100
LINE_FILTERS = ("pending", "claimed", "completed", "failed", "cancelled", "expired")


@operator_required
@require_safe
def batches(request: HttpRequest) -> HttpResponse:
    """The newest batches with their progress."""
    rows = [progress(batch) for batch in with_counts()[:BATCHES_SHOWN]]
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
    row = progress(get_object_or_404(with_counts(), batch_id=batch_id))
    lines = row["batch"].lines.all()
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
        "errors": errors_by_code(row["batch"]),
    }
    is_part = request.GET.get("part") == "progress"
    return render(request, f"console/batch.html{'#progress' if is_part else ''}", context)


@operator_required
@require_POST
def cancel(request: HttpRequest, batch_id: str) -> HttpResponse:
    """Stop a batch: its open lines end as cancelled; results so far are kept."""
    get_object_or_404(Batch, batch_id=batch_id)
    if batchclaims.cancel(batch_id, timezone.now()):
        messages.success(request, f"{batch_id} is being cancelled; finished lines are kept.")
    else:
        messages.error(request, f"{batch_id} has ended or is being cancelled already.")
    return redirect("pages:batch", batch_id=batch_id)


def with_counts() -> QuerySet[Batch]:
    """Batches, newest first, with the number of lines in each state."""
    return Batch.objects.select_related("tenant", "input_file").annotate(
        num_completed=Count("lines", filter=Q(lines__status="completed")),
        num_failed=Count("lines", filter=Q(lines__status="failed")),
        num_running=Count("lines", filter=Q(lines__status="claimed")),
        num_ended=Count("lines", filter=Q(lines__status__in=LINE_ENDED)),
        num_rows=Count("lines"),
    )


def progress(batch: Any) -> dict[str, Any]:
    """Shares of the bar, time left, and the finish that the pace so far would give."""
    now = timezone.now()
    is_ended = batch.status in BATCH_ENDED
    total = batch.num_lines or 1
    # Demo history keeps no lines: a completed one counts as whole.
    is_whole = batch.num_rows == 0 and batch.status == "completed"
    completed = batch.num_lines if is_whole else batch.num_completed
    elapsed_s = ((batch.ended_at or now) - batch.created_at).total_seconds()
    left_s = None
    if not is_ended and batch.num_ended and elapsed_s > 0:
        left_s = (batch.num_lines - batch.num_ended) * elapsed_s / batch.num_ended
    deadline_s = (batch.expires_at - now).total_seconds()
    return {
        "batch": batch,
        "completed": completed,
        "failed": batch.num_failed,
        "running": batch.num_running,
        "completed_ratio": completed / total,
        "failed_ratio": batch.num_failed / total,
        "is_ended": is_ended,
        "elapsed_s": elapsed_s,
        "left_s": left_s,
        "deadline_s": None if is_ended else max(deadline_s, 0.0),
        "is_late": left_s is not None and left_s > deadline_s,
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
