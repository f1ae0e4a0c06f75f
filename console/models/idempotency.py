"""Answers kept under a client's Idempotency-Key."""

from django.db import models


class IdempotencyRecord(models.Model):
    """One key of one tenant. `status` None: its request still runs, in that incarnation."""

    tenant_id = models.CharField(max_length=64)  # the tenant's slug
    key = models.CharField(max_length=255)
    body_sha256 = models.CharField(max_length=64)
    incarnation = models.CharField(max_length=128)
    status = models.PositiveSmallIntegerField(null=True)
    headers = models.JSONField(default=list)  # pairs of texts
    body = models.BinaryField(default=b"")
    created_at = models.DateTimeField(db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["tenant_id", "key"], name="one_answer_per_key")
        ]

    def __str__(self) -> str:
        return f"{self.tenant_id}:{self.key}"
