"""Models, SLO classes and the workers that have been members."""

from typing import Any

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models

from console.models.base import Versioned, model_id_validator, name_validator
from controlplane.domain import SLOClass

DAY_S = 86_400.0
TARGET_S_MIN = 0.001
TARGET_S_MAX = 7 * DAY_S
RANK_MAX = 99
CONTEXT_TOKENS_MAX = 1_048_576

SERVICE_TIERS = (
    ("priority", "priority"),
    ("default", "default"),
    ("flex", "flex"),
    ("batch", "batch (Batch API)"),
)
ROLES = (("prefill", "prefill"), ("decode", "decode"), ("mixed", "mixed"))

# Shipped promises (design.md §4): TTFT p99 / ITL p99; the batch class promises a deadline only.
# A flex request waits less than ten minutes, the default timeout of the OpenAI client.
DEFAULT_CLASSES: tuple[dict[str, Any], ...] = (
    {
        "name": "interactive",
        "rank": 0,
        "service_tier": "priority",
        "ttft_s_p99": 0.5,
        "itl_s_p99": 0.03,
        "queue_s_max": 30.0,
        "price_factor": 2.0,
    },
    {
        "name": "standard",
        "rank": 1,
        "service_tier": "default",
        "ttft_s_p99": 2.0,
        "itl_s_p99": 0.1,
        "queue_s_max": 60.0,
        "price_factor": 1.0,
    },
    {
        "name": "flex",
        "rank": 2,
        "service_tier": "flex",
        "ttft_s_p99": 10.0,
        "itl_s_p99": 0.2,
        "queue_s_max": 540.0,
        "price_factor": 0.5,
    },
    {
        "name": "batch",
        "rank": 3,
        "service_tier": "batch",
        "ttft_s_p99": DAY_S,
        "itl_s_p99": 60.0,
        "is_batch": True,
        "deadline_s": DAY_S,
        "queue_s_max": DAY_S,
        "price_factor": 0.5,
    },
)

_target = (MinValueValidator(TARGET_S_MIN), MaxValueValidator(TARGET_S_MAX))


class SLOClassRow(Versioned):
    """A named latency promise that tenants and requests choose by `service_tier`."""

    name = models.CharField(max_length=64, unique=True, validators=[name_validator])
    rank = models.PositiveSmallIntegerField(
        validators=[MaxValueValidator(RANK_MAX)], help_text="0 is served first"
    )
    service_tier = models.CharField(max_length=16, choices=SERVICE_TIERS, unique=True)
    ttft_s_p99 = models.FloatField("TTFT p99 target (s)", validators=_target)
    itl_s_p99 = models.FloatField("ITL p99 target (s)", validators=_target)
    is_batch = models.BooleanField(default=False)
    deadline_s = models.FloatField(
        "deadline (s)", null=True, blank=True, validators=_target, help_text="batch classes only"
    )
    queue_s_max = models.FloatField(
        "longest wait (s)",
        default=30.0,
        validators=_target,
        help_text="a request that waits longer ends as expired",
    )
    price_factor = models.FloatField(
        default=1.0, validators=[MinValueValidator(0.0), MaxValueValidator(100.0)]
    )
    note = models.CharField(
        max_length=120, blank=True, help_text="shown beside the targets, e.g. why they were scaled"
    )

    class Meta:
        ordering = ["rank", "name"]
        verbose_name = "SLO class"
        verbose_name_plural = "SLO classes"

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        if self.is_batch != (self.deadline_s is not None):
            raise ValidationError(
                {"deadline_s": "A deadline is for batch classes, and they need one."}
            )
        if self.is_batch != (self.service_tier == "batch"):
            raise ValidationError({"service_tier": "The tier 'batch' is for batch classes only."})

    def as_domain(self) -> SLOClass:
        """The promise as the control plane reads it."""
        return SLOClass(
            name=self.name,
            rank=self.rank,
            ttft_s_p99=self.ttft_s_p99,
            itl_s_p99=self.itl_s_p99,
            is_batch=self.is_batch,
            deadline_s=self.deadline_s,
            queue_s_max=self.queue_s_max,
        )


def ensure_default_classes() -> int:
    """Create those shipped classes that are absent; gives how many were made."""
    made = 0
    for values in DEFAULT_CLASSES:
        _, is_new = SLOClassRow.objects.get_or_create(
            name=values["name"], defaults={k: v for k, v in values.items() if k != "name"}
        )
        made += is_new
    return made


class Model(Versioned):
    """A model that tenants may name; `folder` holds its tokenizer, empty for modelled engines."""

    model_id = models.CharField(max_length=128, unique=True, validators=[model_id_validator])
    folder = models.CharField(max_length=1024, blank=True)
    max_model_len = models.PositiveIntegerField(
        "context (tokens)",
        validators=[MinValueValidator(16), MaxValueValidator(CONTEXT_TOKENS_MAX)],
    )
    gpu_hour_usd = models.FloatField(
        "GPU-hour price ($)",
        null=True,
        blank=True,
        validators=[MinValueValidator(0.0), MaxValueValidator(10_000.0)],
        help_text="empty: the GPU_HOUR_USD setting",
    )
    is_active = models.BooleanField(default=True)

    class Meta:
        ordering = ["model_id"]

    def __str__(self) -> str:
        return self.model_id


class PlanOrder(models.Model):
    """An operator's order to the planner, given outside of the serving process, which takes queued
    rows and answers them. The newest `shadow` or `auto` that was done is the planner's mode."""

    at = models.DateTimeField()
    action = models.CharField(max_length=8)  # role | model | drain | rollback | shadow | auto
    worker_id = models.CharField(max_length=64, blank=True)
    value = models.CharField(max_length=128, blank=True)  # the role, or the model
    by = models.CharField(max_length=150)
    state = models.CharField(max_length=8, default="queued")  # queued | taken | done | refused
    answer = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["state", "id"], name="planorder_state")]

    def __str__(self) -> str:
        return f"{self.action} {self.worker_id} {self.value}".strip()


class Worker(models.Model):
    """A worker that has joined at least once; the live state is in the control plane's memory."""

    name = models.CharField(max_length=128, unique=True)
    worker_id = models.CharField(max_length=64)
    role = models.CharField(max_length=8, choices=ROLES)
    engine = models.CharField(max_length=64)
    device = models.CharField(max_length=128)
    status = models.CharField(max_length=16, default="live")
    joined_at = models.DateTimeField()
    heard_at = models.DateTimeField()

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class CapacityBin(models.Model):
    """What the time of a model's workers went into in one quarter of an hour. GPU-seconds.

    Rolled up from `controlplane.harvest`; kept for 28 days, which bounds the rows of a model."""

    model_id = models.CharField(max_length=128)
    start = models.DateTimeField()
    seconds = models.FloatField(default=0.0)  # measured
    worker_s = models.FloatField(default=0.0)
    member_s = models.FloatField(default=0.0)
    online_s = models.FloatField(default=0.0)
    batch_s = models.FloatField(default=0.0)
    batch_tokens = models.FloatField(default=0.0)
    backlog_s = models.FloatField(default=0.0)

    class Meta:
        ordering = ["model_id", "start"]
        constraints = [models.UniqueConstraint(fields=["model_id", "start"], name="one_bin")]

    def __str__(self) -> str:
        return f"{self.model_id} {self.start:%Y-%m-%d %H:%M}"
