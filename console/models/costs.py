"""GPU time by the minute: what requests were charged and how workers spent theirs.

Written in bulk by `console.writer`, a few rows a minute; costs are computed when they are read.
"""

from django.db import models


class CostMinute(models.Model):
    """Requests of one tenant, model and class that ended in this minute of this run of the server:
    a restart adds rows to its minute, and readers sum."""

    minute = models.DateTimeField(db_index=True)
    run = models.CharField(max_length=32)
    tenant_id = models.CharField(max_length=64)
    model_id = models.CharField(max_length=128)
    class_name = models.CharField(max_length=64)
    is_batch = models.BooleanField()
    requests = models.PositiveIntegerField()
    prompt_tokens = models.PositiveBigIntegerField()
    output_tokens = models.PositiveBigIntegerField()
    prefill_gpu_s = models.FloatField()
    decode_gpu_s = models.FloatField()

    class Meta:
        ordering = ["minute", "id"]
        constraints = [
            models.UniqueConstraint(
                fields=["minute", "run", "tenant_id", "model_id", "class_name"],
                name="one_cost_per_key_and_minute",
            )
        ]

    def __str__(self) -> str:
        return f"{self.minute} {self.tenant_id}/{self.model_id}/{self.class_name}"


class GpuMinute(models.Model):
    """How the workers of one model spent this minute; all of it, if they lost count of none."""

    minute = models.DateTimeField(db_index=True)
    run = models.CharField(max_length=32)
    model_id = models.CharField(max_length=128)
    online_s = models.FloatField()
    batch_s = models.FloatField()
    batch_fixed_s = models.FloatField()
    idle_s = models.FloatField()
    gpu_hour_usd = models.FloatField()

    class Meta:
        ordering = ["minute", "id"]
        constraints = [
            models.UniqueConstraint(
                fields=["minute", "run", "model_id"], name="one_gpu_row_per_model_and_minute"
            )
        ]

    def __str__(self) -> str:
        return f"{self.minute} {self.model_id}"
