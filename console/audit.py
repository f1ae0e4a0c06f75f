"""What operators change leaves an entry: who, what and when."""

from typing import Any

from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db.models import Model

TEXT_MAX = 200  # of an object's name, LogEntry's own limit


def record(user: Any, row: Model, words: str, flag: int = CHANGE, name: str = "") -> LogEntry:
    """One entry about a row that was written; `name` stands for a row that has no table."""
    return LogEntry.objects.create(
        user_id=user.pk,
        content_type=ContentType.objects.get_for_model(type(row)),
        object_id=name or str(row.pk),
        object_repr=(name or str(row))[:TEXT_MAX],
        action_flag=flag,
        change_message=words,
    )
