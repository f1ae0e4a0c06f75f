"""Tenants, their keys and limits, and the tokens of operators."""

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models

from console.models.base import Versioned, name_validator
from console.models.fleet import SLOClassRow

CONCURRENCY_MAX = 4096  # requests in flight that one tenant may be allowed
CONCURRENCY_DEFAULT = 64
WEIGHT_MAX = 1_000.0


SCOPES = ("generate", "files", "batches", "models", "usage")  # what a key may be limited to
MODEL_IDS_MAX = 64  # named on one key


def validate_scopes(value: object) -> None:
    known = isinstance(value, list) and all(scope in SCOPES for scope in value)
    if not known or len(set(value)) < len(value):
        raise ValidationError(f"a list of {', '.join(SCOPES)}, each at most once")


def validate_model_ids(value: object) -> None:
    are_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not are_texts or len(value) > MODEL_IDS_MAX:
        raise ValidationError(f"a list of at most {MODEL_IDS_MAX} model ids")


class Tenant(Versioned):
    """A customer or team that owns keys, limits and cost; `slug` is its id everywhere else."""

    slug = models.CharField(max_length=64, unique=True, validators=[name_validator])
    name = models.CharField(max_length=128)
    default_class = models.ForeignKey(
        SLOClassRow,
        on_delete=models.PROTECT,
        limit_choices_to={"is_batch": False},
        help_text="serves requests without a service_tier",
    )
    is_active = models.BooleanField(default=True)
    weight = models.FloatField(
        default=1.0,
        validators=[MinValueValidator(0.0), MaxValueValidator(WEIGHT_MAX)],
        help_text="share of the GPUs where tenants wait for each other; 0: only what others leave",
    )

    class Meta:
        ordering = ["slug"]

    def __str__(self) -> str:
        return self.slug


class Quota(Versioned):
    """Limits of one tenant; a tenant without a row has the defaults."""

    tenant = models.OneToOneField(Tenant, on_delete=models.CASCADE, related_name="quota")
    concurrency_max = models.PositiveIntegerField(
        "requests in flight",
        default=CONCURRENCY_DEFAULT,
        validators=[MinValueValidator(1), MaxValueValidator(CONCURRENCY_MAX)],
    )

    class Meta:
        ordering = ["tenant__slug"]

    def __str__(self) -> str:
        return f"quota of {self.tenant}"


class Credential(Versioned):
    """What is stored of a secret that was shown once: its public id and an HMAC with the pepper."""

    name = models.CharField(max_length=128, blank=True)
    public_id = models.CharField(max_length=8, unique=True, editable=False)
    secret_hmac = models.BinaryField(max_length=32, editable=False)
    last4 = models.CharField(max_length=4, editable=False)
    is_active = models.BooleanField(default=True)
    expires_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        abstract = True


class ApiKey(Credential):
    """A tenant's key for `/v1`, `sk-sw-…`."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="keys")
    scopes = models.JSONField(
        default=list, blank=True, validators=[validate_scopes], help_text="none: everything"
    )
    model_ids = models.JSONField(
        "models",
        default=list,
        blank=True,
        validators=[validate_model_ids],
        help_text="ids of the models it may name; none: all",
    )
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    replaced_by = models.ForeignKey(
        "self", on_delete=models.SET_NULL, null=True, blank=True, editable=False, related_name="+"
    )

    class Meta:
        ordering = ["tenant__slug", "created_at"]
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"sk-sw-{self.public_id}-…{self.last4}"


class ApiToken(Credential):
    """An operator's token for `/api/v1/`, `op-sw-…`; it can do what its user can."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_tokens"
    )

    class Meta:
        ordering = ["user__username", "created_at"]
        verbose_name = "operator token"

    def __str__(self) -> str:
        return f"op-sw-{self.public_id}-…{self.last4}"
