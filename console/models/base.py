"""Common to rows that the serving process keeps in memory: the time of their last change."""

from typing import Any

from django.core.validators import RegexValidator
from django.db import models
from django.utils import timezone

# Names that appear in URLs, metrics labels and headers.
name_validator = RegexValidator(
    r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?\Z",
    "1 to 64 lower-case letters, digits, '.', '_' or '-', beginning and ending with one of the "
    "former two",
)
# Model ids may hold capitals and a slash, as on model hubs.
model_id_validator = RegexValidator(
    r"^[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?\Z",
    "1 to 128 letters, digits, '.', '_', '/' or '-', beginning and ending with one of the former "
    "two",
)


class VersionedQuerySet(models.QuerySet[Any]):
    """A queryset whose `update` also moves `updated_at`, which is how a change is noticed."""

    def update(self, **values: Any) -> int:
        values.setdefault("updated_at", timezone.now())
        return super().update(**values)


class Versioned(models.Model):
    """A row that `snapshot.SnapshotKeeper` watches by (count, latest `updated_at`)."""

    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True, db_index=True)

    objects = VersionedQuerySet.as_manager()

    class Meta:
        abstract = True
