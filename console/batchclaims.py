"""Which lines run next: claims, leases, expiry and cancellation as conditional updates on rows.

Everything here runs in the writer's transaction and is safe when several processes do it at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Exists, F, OuterRef

from console.incarnation import is_dead
from console.models import Batch, BatchLine
from controlplane.backfill import Allotment, OpenBatch

LEASE = timedelta(seconds=60)  # a holder that is silent this long loses its lines
BATCHES_MAX = 256  # open batches that are weighed against each other, earliest deadline first
ATTEMPTS_MAX = 3  # a line that made its run fail this often has failed

OPEN = ("in_progress", "finalizing", "cancelling")


@dataclass(frozen=True, slots=True)
class ClaimedLine:
    """A line that this incarnation shall run."""

    line_pk: int
    batch_pk: int
    batch_id: str
    tenant_id: str
    custom_id: str
    model_id: str
    url: str
    body: dict[str, Any]
    attempts: int  # this one included


@dataclass(frozen=True, slots=True)
class Round:
    """What one look at the tables found."""

    open: tuple[OpenBatch, ...]  # batches with lines to start
    cancelling: frozenset[int]  # batches whose lines in hand shall stop
    ended: tuple[int, ...]  # batches without a line left to run


def look(in_flight: Mapping[int, int], pending_max: int, now: datetime) -> Round:
    """End what is cancelled or too late; say what could run. `in_flight` are lines in hand by
    batch; of the lines that wait no more than pending_max are counted."""
    _end_pending(Batch.objects.filter(status="cancelling"), "cancelled", now)
    _end_pending(Batch.objects.filter(status="in_progress", expires_at__lte=now), "expired", now)
    is_pending = BatchLine.objects.filter(batch=OuterRef("pk"), status="pending")
    running = Batch.objects.filter(Exists(is_pending), status="in_progress", is_paused=False)
    is_left = BatchLine.objects.filter(batch=OuterRef("pk"), status__in=("pending", "claimed"))
    open_batches = Batch.objects.filter(status__in=OPEN)
    return Round(
        open=tuple(
            OpenBatch(
                batch_id=batch.pk,
                tenant_id=batch.tenant.slug,
                weight=batch.tenant.weight,
                model_id=batch.model_id,
                deadline_s=(batch.expires_at - now).total_seconds(),
                pending=batch.lines.filter(status="pending").order_by()[:pending_max].count(),
                in_flight=in_flight.get(batch.pk, 0),
            )
            for batch in running.select_related("tenant").order_by("expires_at", "pk")[:BATCHES_MAX]
        ),
        cancelling=frozenset(
            Batch.objects.filter(status="cancelling").values_list("pk", flat=True)
        ),
        ended=tuple(open_batches.filter(~Exists(is_left)).values_list("pk", flat=True)),
    )


def _end_pending(batches: Any, status: str, now: datetime) -> None:
    BatchLine.objects.filter(batch__in=batches, status="pending").update(
        status=status, ended_at=now
    )


def claim(
    allotments: Sequence[Allotment], incarnation: str, now: datetime
) -> tuple[ClaimedLine, ...]:
    """Lines of running batches, as many of each as allotted, neighbours by prefix."""
    claimed: list[ClaimedLine] = []
    for allotment in allotments:
        claimed += _claim(allotment, incarnation, now)
    return tuple(claimed)


def _claim(allotment: Allotment, incarnation: str, now: datetime) -> list[ClaimedLine]:
    lines = (
        BatchLine.objects.filter(
            status="pending",
            batch_id=allotment.batch_id,
            batch__status="in_progress",
            batch__is_paused=False,
        )
        .select_related("batch__tenant")
        .order_by("prefix_key", "pk")[: allotment.lines]
    )
    return [
        ClaimedLine(
            line_pk=line.pk,
            batch_pk=line.batch_id,
            batch_id=line.batch.batch_id,
            tenant_id=line.batch.tenant.slug,
            custom_id=line.custom_id,
            model_id=line.model_id,
            url=line.batch.endpoint,
            body=line.body,
            attempts=line.attempts + 1,
        )
        for line in lines
        if BatchLine.claim(line.pk, incarnation, now + LEASE)
    ]


def renew(incarnation: str, now: datetime) -> int:
    """Extend the lease of every line this incarnation holds."""
    held = BatchLine.objects.filter(status="claimed", claimed_by=incarnation)
    return held.update(claimed_until=now + LEASE)


def release(line_pk: int, incarnation: str, attempts: int) -> bool:
    """Put a line back; `attempts` counts only runs that failed by the line's own doing."""
    return (
        BatchLine.objects.filter(pk=line_pk, status="claimed", claimed_by=incarnation).update(
            status="pending", claimed_by="", claimed_until=None, attempts=attempts
        )
        == 1
    )


def release_all(incarnation: str) -> int:
    """Put back every line this incarnation holds, as if it had not been tried."""
    held = BatchLine.objects.filter(status="claimed", claimed_by=incarnation)
    return held.update(
        status="pending", claimed_by="", claimed_until=None, attempts=F("attempts") - 1
    )


def release_dead(incarnation: str, now: datetime) -> int:
    """Put back the lines of runs that are over, or whose lease has lapsed; gives how many."""
    claimed = BatchLine.objects.filter(status="claimed").exclude(claimed_by=incarnation)
    holders = claimed.order_by("claimed_by").values_list("claimed_by", flat=True).distinct()
    dead = [holder for holder in holders if is_dead(holder)]
    free = {"status": "pending", "claimed_by": "", "claimed_until": None}
    released = claimed.filter(claimed_by__in=dead).update(**free)
    return released + claimed.filter(claimed_until__lte=now).update(**free)


def pause(batch_id: str) -> bool:
    """Start no further line of a batch; those in hand go on, and its deadline stays. False: it is
    paused already, has ended or does not exist."""
    running = Batch.objects.filter(batch_id=batch_id, status="in_progress", is_paused=False)
    return running.update(is_paused=True, slack=None, eta=None, level=0) == 1


def resume(batch_id: str) -> bool:
    """Go on with a batch that was paused. False: it is not paused."""
    paused = Batch.objects.filter(batch_id=batch_id, status="in_progress", is_paused=True)
    return paused.update(is_paused=False) == 1


def retry_failed(batch_id: str, now: datetime) -> int:
    """Run the failed lines of a batch again, of one that has ended too while its window is open:
    it goes on until they have ended, and its files are written anew. Gives their number."""
    batch = Batch.objects.filter(batch_id=batch_id, expires_at__gt=now).first()
    if batch is None:
        return 0
    again = batch.lines.filter(status="failed").update(
        status="pending", attempts=0, request_id="", response=None, error=None, ended_at=None
    )
    if again:
        Batch.move(batch.pk, ("completed", "finalizing"), "in_progress", ended_at=None)
    return again


def cancel(batch_id: str, now: datetime) -> bool:
    """Ask for the end of a batch; lines in hand stop, the others never start. False: it has ended
    or does not exist."""
    batch = Batch.objects.filter(batch_id=batch_id).first()
    if batch is None:
        return False
    if Batch.move(batch.pk, ("validating",), "cancelled", cancelling_at=now, ended_at=now):
        return True
    if not Batch.move(batch.pk, ("in_progress",), "cancelling", cancelling_at=now):
        return False
    _end_pending(Batch.objects.filter(pk=batch.pk), "cancelled", now)
    return True
