"""Contracts: what a tenant may ask of a model in a class, and what it is promised."""

from typing import Any

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models

from console.models.base import Versioned
from console.models.fleet import Model, SLOClassRow
from console.models.tenants import CONCURRENCY_MAX, Tenant
from controlplane.domain import Contract

REQUESTS_PER_MIN_MAX = 1_000_000
TOKENS_PER_MIN_MAX = 2_000_000_000
ATTAINMENT_MAX = 0.9999
CHOICES = (("surplus", "serve in what others leave"), ("reject", "refuse with a retry time"))


class ContractRow(Versioned):
    """One tenant, model and class. Without one a tenant has its quota and no promise."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="contracts")
    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="contracts")
    slo_class = models.ForeignKey(SLOClassRow, on_delete=models.PROTECT, verbose_name="class")
    requests_per_min = models.PositiveIntegerField(
        validators=[MinValueValidator(1), MaxValueValidator(REQUESTS_PER_MIN_MAX)]
    )
    tokens_per_min = models.PositiveIntegerField(
        validators=[MinValueValidator(1), MaxValueValidator(TOKENS_PER_MIN_MAX)],
        help_text="prompt and output together; the worst case is reserved, what is unused returned",
    )
    concurrency_max = models.PositiveIntegerField(
        "requests in flight",
        validators=[MinValueValidator(1), MaxValueValidator(CONCURRENCY_MAX)],
    )
    attainment = models.FloatField(
        default=0.99,
        validators=[MinValueValidator(0.5), MaxValueValidator(ATTAINMENT_MAX)],
        help_text="share of requests within the class's targets",
    )
    over_limit = models.CharField("above its rates", max_length=8, choices=CHOICES)
    when_late = models.CharField("when it would be late", max_length=8, choices=CHOICES)
    budget_tokens = models.PositiveBigIntegerField(
        "tokens per month", null=True, blank=True, validators=[MinValueValidator(1)]
    )
    budget_usd = models.FloatField(
        "dollars per month", null=True, blank=True, validators=[MinValueValidator(0.0)]
    )
    usd_per_million_prompt = models.FloatField(default=0.0, validators=[MinValueValidator(0.0)])
    usd_per_million_output = models.FloatField(default=0.0, validators=[MinValueValidator(0.0)])

    class Meta:
        ordering = ["tenant__slug", "model__model_id", "slo_class__rank"]
        verbose_name = "contract"
        constraints = [
            models.UniqueConstraint(
                fields=["tenant", "model", "slo_class"], name="one_contract_per_key"
            )
        ]

    def __str__(self) -> str:
        return f"{self.tenant}/{self.model}/{self.slo_class}"

    def clean(self) -> None:
        rates: list[Any] = [self.requests_per_min, self.tokens_per_min]
        if None not in rates and self.tokens_per_min < self.requests_per_min:
            raise ValidationError({"tokens_per_min": "Each request has at least one token."})

    def as_domain(self, period: str) -> Contract:
        """The contract as the control plane reads it."""
        slo = self.slo_class
        return Contract(
            tenant_id=self.tenant.slug,
            model_id=self.model.model_id,
            class_name=slo.name,
            requests_per_min=self.requests_per_min,
            tokens_per_min=self.tokens_per_min,
            concurrency_max=self.concurrency_max,
            attainment=self.attainment,
            over_limit="reject" if self.over_limit == "reject" else "surplus",
            when_late="reject" if self.when_late == "reject" else "surplus",
            budget_tokens=self.budget_tokens,
            budget_usd=self.budget_usd,
            period=period,
            usd_per_million_prompt=self.usd_per_million_prompt,
            usd_per_million_output=self.usd_per_million_output,
            itl_s=slo.itl_s_p99,
            is_batch=slo.is_batch,
        )
