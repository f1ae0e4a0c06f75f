"""What operators change leaves an event: who, what, when, and the values before and after.

Events are a chain: each carries the digest of the one before it. Writes of the pages append theirs
in the transaction of the write; what Django's admin and the REST API log is fed in after each
request that may write (middleware), and before the chain is checked or shown.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.serializers.json import DjangoJSONEncoder
from django.db import connection, transaction
from django.db.models import Max, Model
from django.utils import timezone

from console.models.audit import GENESIS, AuditEvent

TEXT_MAX = 200  # of an object's name, LogEntry's own limit
FEED_MAX = 500  # entries that one call feeds; the next call goes on
FEED_WINDOW = 1_000  # entries behind the newest fed one that may have been committed after it
ROWS_PER_READ = 2_000
ACTIONS = {ADDITION: "create", CHANGE: "change", DELETION: "delete"}


def record(
    user: Any,
    row: Model,
    words: str,
    flag: int = CHANGE,
    name: str = "",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> AuditEvent:
    """One event about a row that was written; `name` stands for a row that has no table."""
    with transaction.atomic():
        _lock()
        entry = LogEntry.objects.create(
            user_id=user.pk,
            content_type=ContentType.objects.get_for_model(type(row)),
            object_id=name or str(row.pk),
            object_repr=(name or str(row))[:TEXT_MAX],
            action_flag=flag,
            change_message=words,
        )
        return _append(entry, user.get_username(), before or {}, after or {})


def feed() -> int:
    """Append the admin's entries that are not in the chain yet; gives how many."""
    with transaction.atomic():
        _lock()
        newest = AuditEvent.objects.aggregate(newest=Max("log_entry_id"))["newest"] or 0
        fed = AuditEvent.objects.filter(log_entry_id__gt=newest - FEED_WINDOW)
        entries = LogEntry.objects.filter(pk__gt=newest - FEED_WINDOW).exclude(
            pk__in=fed.values("log_entry_id")
        )
        found = list(entries.select_related("user", "content_type").order_by("pk")[:FEED_MAX])
        for entry in found:
            _append(entry, entry.user.get_username(), {}, {})
    return len(found)


def feed_all() -> None:
    """Feed until nothing is left; each call moves on by FEED_MAX entries."""
    while feed() == FEED_MAX:
        continue


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """`weight 1.0 → 2.0, name …` of the values that differ; empty when none does."""
    names = [name for name in after if before.get(name) != after[name]]
    return ", ".join(f"{name} {before.get(name)} → {after[name]}" for name in names)


def first_broken() -> tuple[int, AuditEvent | None, str]:
    """(events checked, the first event that does not hold, why); None and "" when all hold."""
    previous, expected, checked = GENESIS, 1, 0
    for event in AuditEvent.objects.order_by("sequence").iterator(ROWS_PER_READ):
        if event.sequence != expected:
            return checked, event, f"event {expected} is missing"
        if event.previous != previous:
            return checked, event, "it does not follow the event before it"
        if event.digest != event.computed():
            return checked, event, "its values are not those that were written"
        previous, expected, checked = event.digest, expected + 1, checked + 1
    return checked, None, ""


def _append(
    entry: LogEntry, actor: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> AuditEvent:
    """The next event of the chain; the caller holds its lock."""
    last = AuditEvent.objects.order_by("-sequence").only("sequence", "digest").first()
    event = AuditEvent(
        sequence=1 if last is None else last.sequence + 1,
        at=_utc(entry.action_time or timezone.now()),
        actor=actor,
        action=ACTIONS[entry.action_flag],
        object_type="" if entry.content_type is None else entry.content_type.model,
        object_id=(entry.object_id or "")[:TEXT_MAX],
        object_text=entry.object_repr,
        words=entry.get_change_message(),
        before=_text(before),
        after=_text(after),
        log_entry_id=entry.pk,
        previous=GENESIS if last is None else last.digest,
    )
    event.digest = event.computed()
    event.save(force_insert=True)
    return event


def _utc(moment: datetime) -> datetime:
    """As it will be read back, since its text is hashed."""
    return moment.astimezone(UTC)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, cls=DjangoJSONEncoder, sort_keys=True)


def _lock() -> None:
    """One writer of the chain at a time. SQLite's transactions are IMMEDIATE and so already are."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE console_auditevent IN EXCLUSIVE MODE")
