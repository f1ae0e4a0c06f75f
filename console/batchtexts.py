"""What the batch commands print of batches and quotes, as JSON and in words."""

from datetime import datetime
from typing import Any

from console import batchfiles
from console.models import Batch
from console.models.files import BATCH_ENDED
from console.quotes import SLACK_MAX, Quote
from controlplane.certificate import Refused

NOTHING_MEASURED = "no quote: too little was measured here to promise a finish on"


def shown(batch: Batch) -> dict[str, Any]:
    """A batch as `--json` prints it."""
    counts = batch.counts()
    return {
        "id": batch.batch_id,
        "tenant": batch.tenant.slug,
        "model": batch.model_id,
        "endpoint": batch.endpoint,
        "window": batch.completion_window,
        "status": batch.status,
        "total": batch.num_lines,
        "completed": counts["completed"],
        "failed": counts["failed"] + counts["expired"] + counts["cancelled"],
        "in_flight": counts["claimed"],
        "pending": counts["pending"],
        "created_at": batch.created_at.isoformat(),
        "expires_at": batch.expires_at.isoformat(),
        "is_paused": batch.is_paused,
        "quote": {
            "finish_from": _text(batch.finish_from),
            "finish_by": _text(batch.finish_by),
            "slack": batch.quoted_slack,
        }
        if batch.finish_by
        else None,
        "slack": batch.slack,
        "eta": _text(batch.eta),
        "ended_at": batch.ended_at.isoformat() if batch.ended_at else None,
        "output_file": batch.output_file.path if batch.output_file else None,
        "error_file": batch.error_file.path if batch.error_file else None,
    }


def quoted(quote: Quote) -> dict[str, Any]:
    """A quote as `--json` prints it; seconds from now."""
    outcome, ends = quote.outcome, quote.finish
    is_feasible = not isinstance(outcome, Refused)
    return {
        "is_measured": True,
        "is_feasible": is_feasible,
        "earliest_deadline_s": quote.earliest_s,
        "slack": None if isinstance(outcome, Refused) else min(outcome.slack, SLACK_MAX),
        "expected_s": round(ends.expected_s, 1),
        "finish_from_s": round(ends.from_s, 1),
        "finish_by_s": round(ends.by_s, 1),
    }


def promise(batch: Batch, now: datetime) -> str:
    """The quote of a batch that has just been submitted, in a line."""
    if batch.finish_by is None or batch.finish_from is None or batch.expected_s is None:
        return NOTHING_MEASURED
    from_s = (batch.finish_from - now).total_seconds()
    by_s = (batch.finish_by - now).total_seconds()
    return quote_words(batch.expected_s, from_s, by_s, batch.quoted_slack or 0.0)


def quote_words(expected_s: float, from_s: float, by_s: float, slack: float) -> str:
    words = batchfiles.in_words
    most = min(slack, SLACK_MAX)
    return (
        f"quote: expected in {words(expected_s)}, with 90 % between {words(from_s)} and"
        f" {words(by_s)}; slack {most:.2f}"
    )


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def status_line(batch: Batch) -> str:
    row = shown(batch)
    text = (
        f"{row['id']}  {row['status']}  {row['completed']}/{row['total']} done"
        f"  {row['failed']} failed  {row['in_flight']} in flight"
    )
    if batch.is_paused:
        text += "  paused"
    if batch.status in BATCH_ENDED or batch.slack is None or batch.eta is None:
        return text
    return f"{text}  slack {batch.slack:.2f}  ETA {batch.eta:%Y-%m-%d %H:%M} UTC"
