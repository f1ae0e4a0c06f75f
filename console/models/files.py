"""Files and batches. A line is claimed, finished and released by one conditional update each."""

from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import models
from django.db.models import F

from console.models.tenants import Tenant

PURPOSES = (("batch", "batch"), ("batch_output", "batch_output"))
BATCH_STATUSES = tuple(
    (name, name)
    for name in (
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    )
)
BATCH_ENDED = ("failed", "completed", "expired", "cancelled")
LINE_STATUSES = tuple(
    (name, name) for name in ("pending", "claimed", "completed", "failed", "cancelled", "expired")
)
LINE_ENDED = ("completed", "failed", "cancelled", "expired")


class File(models.Model):
    """Bytes below `var/files`; the stored name is made by the server, `filename` is only data."""

    file_id = models.CharField(max_length=64, unique=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="files")
    filename = models.CharField(max_length=255)
    purpose = models.CharField(max_length=16, choices=PURPOSES)
    path = models.CharField(max_length=1024)
    num_bytes = models.BigIntegerField()
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True, db_index=True)  # None: kept until deleted

    class Meta:
        ordering = ["-created_at", "-id"]

    def __str__(self) -> str:
        return self.file_id

    def is_in_use(self) -> bool:
        """A batch that has not ended was made of it, or shows it."""
        made_of = Batch.objects.filter(input_file=self).exclude(status__in=BATCH_ENDED)
        return made_of.exists()

    def forget(self) -> None:
        """Remove row and bytes; batches made of it keep their own rows."""
        Batch.objects.filter(input_file=self).update(input_file=None)
        self.delete()
        Path(self.path).unlink(missing_ok=True)


class Batch(models.Model):
    """A file of requests with a deadline; its counts are those of its lines."""

    batch_id = models.CharField(max_length=64, unique=True)
    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="batches")
    input_file = models.ForeignKey(File, on_delete=models.SET_NULL, null=True, related_name="+")
    output_file = models.ForeignKey(File, on_delete=models.SET_NULL, null=True, related_name="+")
    error_file = models.ForeignKey(File, on_delete=models.SET_NULL, null=True, related_name="+")
    endpoint = models.CharField(max_length=32)
    model_id = models.CharField(max_length=128)
    completion_window = models.CharField(max_length=8)
    status = models.CharField(max_length=16, choices=BATCH_STATUSES, default="in_progress")
    num_lines = models.PositiveIntegerField()
    metadata = models.JSONField(default=dict)
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    errors = models.JSONField(default=list)  # mistakes of the file: {code, message, line}
    output_kept = models.DurationField(null=True)  # of output and error file; None: as others
    checked_by = models.CharField(max_length=128, blank=True)  # incarnation that reads the file
    in_progress_at = models.DateTimeField(null=True)
    cancelling_at = models.DateTimeField(null=True)
    finalizing_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)
    is_paused = models.BooleanField(default=False)  # no further line starts
    # Cost tokens (controlplane.harvest): of one line as estimated at submit, and of what is done.
    line_tokens = models.FloatField(default=0.0)
    line_tokens_max = models.FloatField(default=0.0)
    done_tokens = models.FloatField(default=0.0)
    # The quote; None when nothing had been measured that it could rest on.
    expected_s = models.FloatField(null=True)
    finish_from = models.DateTimeField(null=True)
    finish_by = models.DateTimeField(null=True)
    quoted_slack = models.FloatField(null=True)
    # As tested last, once a minute.
    slack = models.FloatField(null=True)
    eta = models.DateTimeField(null=True)
    level = models.PositiveSmallIntegerField(default=0)
    is_demo_history = models.BooleanField(default=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        indexes = [models.Index(fields=["status", "expires_at"], name="batch_open")]
        verbose_name_plural = "batches"

    def __str__(self) -> str:
        return self.batch_id

    def counts(self) -> dict[str, int]:
        """Lines by status, every status named."""
        counted = dict(
            self.lines.values_list("status")
            .annotate(n=models.Count("id"))
            .values_list("status", "n")
        )
        return {name: counted.get(name, 0) for name, _ in LINE_STATUSES}

    @classmethod
    def move(cls, pk: int, before: tuple[str, ...], after: str, **values: Any) -> bool:
        """Change the status if it is still one of `before`; False: another process was first."""
        return cls.objects.filter(pk=pk, status__in=before).update(status=after, **values) == 1


class BatchLine(models.Model):
    """One request of a batch. Only the incarnation that claimed a line may finish it."""

    batch = models.ForeignKey(Batch, on_delete=models.CASCADE, related_name="lines")
    line_index = models.PositiveIntegerField()
    custom_id = models.CharField(max_length=64)
    model_id = models.CharField(max_length=128)
    body = models.JSONField()
    prefix_key = models.CharField(max_length=64, blank=True)  # lines in this order share prefixes
    status = models.CharField(max_length=16, choices=LINE_STATUSES, default="pending")
    claimed_by = models.CharField(max_length=128, blank=True)
    claimed_until = models.DateTimeField(null=True)
    attempts = models.PositiveSmallIntegerField(default=0)
    request_id = models.CharField(max_length=64, blank=True)
    response = models.JSONField(null=True)
    error = models.JSONField(null=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["batch_id", "line_index"]
        constraints = [
            models.UniqueConstraint(fields=["batch", "custom_id"], name="line_custom_id_once"),
            models.UniqueConstraint(fields=["batch", "line_index"], name="line_index_once"),
        ]
        indexes = [
            models.Index(fields=["batch", "status", "prefix_key", "id"], name="line_next"),
            models.Index(fields=["claimed_by"], name="line_claimed_by"),
        ]

    def __str__(self) -> str:
        return self.custom_id

    @classmethod
    def claim(cls, pk: int, incarnation: str, until: datetime) -> bool:
        """Take a pending line for this incarnation; False: another one got it first."""
        claimed = cls.objects.filter(pk=pk, status="pending").update(
            status="claimed",
            claimed_by=incarnation,
            claimed_until=until,
            attempts=F("attempts") + 1,
        )
        return claimed == 1

    @classmethod
    def finish(
        cls, pk: int, incarnation: str, status: str, cost_tokens: float = 0.0, **values: Any
    ) -> bool:
        """End a line that this incarnation holds; False: it was released or cancelled meanwhile.
        What it cost is added to its batch."""
        ended = cls.objects.filter(pk=pk, status="claimed", claimed_by=incarnation).update(
            status=status, claimed_by="", claimed_until=None, **values
        )
        if ended and cost_tokens:
            Batch.objects.filter(lines=pk).update(done_tokens=F("done_tokens") + cost_tokens)
        return ended == 1
