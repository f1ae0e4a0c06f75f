"""Facts about finished requests and role changes; written in bulk by `console.writer`."""

from django.db import models


class RequestRecord(models.Model):
    """One request from acceptance to its last byte, with the decision that placed it."""

    request_id = models.CharField(max_length=64, unique=True)
    tenant_id = models.CharField(max_length=64)
    key_id = models.CharField(max_length=8, blank=True)
    model_id = models.CharField(max_length=128)
    class_name = models.CharField(max_length=64)
    service_tier = models.CharField(max_length=16)
    endpoint = models.CharField(max_length=16)  # chat | completions | batch
    is_batch = models.BooleanField(default=False)
    stream = models.BooleanField(default=False)
    status = models.CharField(max_length=16)  # completed | cancelled | failed | rejected | expired
    finish_reason = models.CharField(max_length=16, blank=True)
    error_code = models.CharField(max_length=64, blank=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    cached_tokens = models.PositiveIntegerField(default=0)
    output_tokens = models.PositiveIntegerField(default=0)
    arrived_at = models.DateTimeField()
    queue_ms = models.FloatField(null=True)
    ttft_ms = models.FloatField(null=True)
    itl_ms_p99 = models.FloatField(null=True)
    itl_ms_mean = models.FloatField(null=True)
    e2e_ms = models.FloatField(null=True)
    split = models.CharField(max_length=8, blank=True)  # local | handoff | "" when never placed
    prefill_worker = models.CharField(max_length=64, blank=True)
    decode_worker = models.CharField(max_length=64, blank=True)
    failovers = models.PositiveSmallIntegerField(default=0)
    handoff_bytes = models.BigIntegerField(default=0)
    handoff_ms = models.FloatField(null=True)
    handoff_recomputed_tokens = models.PositiveIntegerField(default=0)
    predicted_ttft_ms = models.FloatField(null=True)
    decision = models.JSONField(default=dict)  # controlplane.decisions.Explanation, or empty
    is_demo_history = models.BooleanField(default=False)
    gpu_prefill_s = models.FloatField(default=0.0)  # worker seconds charged to it
    gpu_decode_s = models.FloatField(default=0.0)

    class Meta:
        ordering = ["-arrived_at", "-id"]
        indexes = [
            models.Index(fields=["-arrived_at", "-id"], name="request_newest"),
            models.Index(fields=["tenant_id", "-arrived_at"], name="request_tenant_newest"),
            models.Index(fields=["class_name", "-arrived_at"], name="request_class_newest"),
            models.Index(fields=["status", "-arrived_at"], name="request_status_newest"),
        ]

    def __str__(self) -> str:
        return self.request_id


class PlanRecord(models.Model):
    """One change of the plan, by the planner or by a named operator, and why: a worker's role or
    model, a start (`worker_id` is then its name) or a drain. In shadow mode it only would have
    been made."""

    at = models.DateTimeField(db_index=True)
    kind = models.CharField(max_length=8, default="role")  # role | model | start | drain | stop
    is_shadow = models.BooleanField(default=False)
    model_before = models.CharField(max_length=128, blank=True)
    model_after = models.CharField(max_length=128, blank=True)
    worker_id = models.CharField(max_length=64)
    role_before = models.CharField(max_length=8)
    role_after = models.CharField(max_length=8)
    by = models.CharField(max_length=150)
    reason = models.CharField(max_length=500)
    is_demo_history = models.BooleanField(default=False)

    class Meta:
        ordering = ["-at", "-id"]

    def __str__(self) -> str:
        if self.kind == "role":
            return f"{self.worker_id} {self.role_before} -> {self.role_after}"
        if self.kind == "model":
            return f"{self.worker_id} {self.model_before} -> {self.model_after or 'no model'}"
        return f"{self.kind} {self.worker_id} ({self.role_after}, {self.model_name})"

    @property
    def model_name(self) -> str:
        return self.model_after or self.model_before
