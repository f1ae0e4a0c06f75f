"""Rules that watch the running system, and what they have found."""

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q

KINDS = (
    ("burn_rate", "error budget burns, lower of 5 min and 1 h"),
    ("worker_lost", "worker silent, seconds"),
    ("queue_wait", "longest wait, share of what its class allows"),
    ("budget", "month's budget used, share"),
    ("batch_slack", "batch: need over capacity before its deadline"),
)
# Kind, threshold, for_s. Burn rate: The Site Reliability Workbook, 2018, chapter 5.
DEFAULTS = (
    ("burn_rate", 14.4, 60.0),
    ("worker_lost", 5.0, 0.0),
    ("queue_wait", 0.5, 10.0),
    ("budget", 0.9, 0.0),
    ("batch_slack", 1.0, 60.0),
)
VALUE_MAX = 1_000_000.0
FOR_S_MAX = 86_400.0


class AlertRule(models.Model):
    """An alert opens when a reading of this kind stays at or above the threshold for `for_s`."""

    kind = models.CharField(max_length=16, choices=KINDS, unique=True)
    threshold = models.FloatField(validators=[MinValueValidator(0.0), MaxValueValidator(VALUE_MAX)])
    for_s = models.FloatField(
        "for (s)", validators=[MinValueValidator(0.0), MaxValueValidator(FOR_S_MAX)]
    )
    is_active = models.BooleanField("on", default=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return self.kind


class Alert(models.Model):
    """One finding of a rule about one subject, until it is resolved by itself."""

    rule = models.ForeignKey(AlertRule, on_delete=models.CASCADE, related_name="alerts")
    subject = models.CharField(max_length=300)
    state = models.CharField(max_length=12, default="firing")  # firing | acknowledged | resolved
    text = models.CharField(max_length=500)
    value = models.FloatField()
    opened_at = models.DateTimeField()
    acknowledged_at = models.DateTimeField(null=True)
    acknowledged_by = models.CharField(max_length=150, blank=True)
    resolved_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-opened_at", "-id"]
        constraints = [
            models.UniqueConstraint(
                fields=["rule", "subject"],
                condition=Q(resolved_at=None),
                name="one_open_alert_per_subject",
            )
        ]

    def __str__(self) -> str:
        return f"{self.rule} {self.subject}"


def ensure_default_rules() -> None:
    """The rules that ship, where one of them is missing; what an operator changed stays."""
    for kind, threshold, for_s in DEFAULTS:
        AlertRule.objects.get_or_create(
            kind=kind, defaults={"threshold": threshold, "for_s": for_s}
        )
