"""JSON shapes of `/api/v1/`; durations are milliseconds here, and the names say so."""

from typing import Any

from django.db import transaction
from django.utils import timezone
from rest_framework import serializers

from console import keys
from console.models import ApiKey, Model, Quota, SLOClassRow, Tenant
from console.models.fleet import TARGET_S_MAX, TARGET_S_MIN
from console.models.tenants import CONCURRENCY_DEFAULT, CONCURRENCY_MAX, MODEL_IDS_MAX, SCOPES

MS_PER_S = 1000.0


class StrictSerializer(serializers.ModelSerializer):
    """Names the fields that it does not know instead of dropping them."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = sorted(set(data) - set(self.fields))
            if unknown:
                raise serializers.ValidationError({unknown[0][:80]: ["Unknown field."]})
        return super().to_internal_value(data)


class MillisecondsField(serializers.FloatField):
    """A column of seconds, read and written as milliseconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            min_value=TARGET_S_MIN * MS_PER_S, max_value=TARGET_S_MAX * MS_PER_S, **options
        )

    def to_representation(self, value: float) -> float:
        return round(value * MS_PER_S, 6)

    def run_validation(self, data: Any = serializers.empty) -> Any:
        value = super().run_validation(data)
        return value / MS_PER_S if isinstance(value, float) else value


class TenantSerializer(StrictSerializer):
    default_class = serializers.SlugRelatedField(
        slug_field="name", queryset=SLOClassRow.objects.filter(is_batch=False)
    )
    concurrency_max = serializers.IntegerField(
        min_value=1, max_value=CONCURRENCY_MAX, required=False, write_only=True
    )

    class Meta:
        model = Tenant
        fields = [
            "slug",
            "name",
            "default_class",
            "is_active",
            "weight",
            "concurrency_max",
            "created_at",
            "updated_at",
        ]
        read_only_fields = ["created_at", "updated_at"]

    def validate_slug(self, slug: str) -> str:
        if self.instance is not None and slug != self.instance.slug:
            raise serializers.ValidationError("The slug of a tenant cannot change.")
        return slug

    def create(self, values: dict[str, Any]) -> Tenant:
        limit = values.pop("concurrency_max", CONCURRENCY_DEFAULT)
        with transaction.atomic():
            tenant = super().create(values)
            Quota.objects.create(tenant=tenant, concurrency_max=limit)
        return tenant

    def update(self, tenant: Tenant, values: dict[str, Any]) -> Tenant:
        limit = values.pop("concurrency_max", None)
        with transaction.atomic():
            if limit is not None:
                Quota.objects.update_or_create(tenant=tenant, defaults={"concurrency_max": limit})
            return super().update(tenant, values)

    def to_representation(self, tenant: Tenant) -> dict[str, Any]:
        shown = super().to_representation(tenant)
        quota = Quota.objects.filter(tenant=tenant).first()
        shown["concurrency_max"] = CONCURRENCY_DEFAULT if quota is None else quota.concurrency_max
        return shown


class KeySerializer(StrictSerializer):
    """A key without its secret."""

    tenant = serializers.SlugRelatedField(slug_field="slug", queryset=Tenant.objects.all())
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=SCOPES), required=False, max_length=len(SCOPES)
    )
    models = serializers.ListField(
        source="model_ids",
        child=serializers.CharField(max_length=128),
        required=False,
        max_length=MODEL_IDS_MAX,
    )

    class Meta:
        model = ApiKey
        fields = [
            "public_id",
            "tenant",
            "name",
            "last4",
            "is_active",
            "expires_at",
            "scopes",
            "models",
            "last_used_at",
            "created_at",
            "updated_at",
        ]
        read_only_fields = ["public_id", "last4", "last_used_at", "created_at", "updated_at"]

    def validate_tenant(self, tenant: Tenant) -> Tenant:
        if self.instance is not None and tenant != self.instance.tenant:
            raise serializers.ValidationError("A key cannot change its tenant.")
        return tenant

    def validate_expires_at(self, expires_at: Any) -> Any:
        if expires_at is not None and expires_at <= timezone.now():
            raise serializers.ValidationError("This time has passed.")
        return expires_at


class NewKeySerializer(KeySerializer):
    """A key at its creation: the only answer that holds the secret."""

    key = serializers.CharField(read_only=True)

    class Meta(KeySerializer.Meta):
        fields = [*KeySerializer.Meta.fields, "key"]
        read_only_fields = [*KeySerializer.Meta.read_only_fields, "key"]

    def create(self, values: dict[str, Any]) -> ApiKey:
        return keys.create(values.pop("tenant"), **values)


class RotationSerializer(serializers.Serializer):
    """How long the old key stays good beside the new one."""

    overlap_hours = serializers.FloatField(min_value=0.0, max_value=24.0 * 30, default=24.0)


class QuotaSerializer(StrictSerializer):
    tenant = serializers.SlugRelatedField(slug_field="slug", read_only=True)

    class Meta:
        model = Quota
        fields = ["tenant", "concurrency_max", "updated_at"]
        read_only_fields = ["tenant", "updated_at"]


class SLOClassSerializer(StrictSerializer):
    ttft_ms_p99 = MillisecondsField(source="ttft_s_p99")
    itl_ms_p99 = MillisecondsField(source="itl_s_p99")
    deadline_ms = MillisecondsField(source="deadline_s", required=False, allow_null=True)
    queue_ms_max = MillisecondsField(source="queue_s_max", required=False)

    class Meta:
        model = SLOClassRow
        fields = [
            "name",
            "rank",
            "service_tier",
            "ttft_ms_p99",
            "itl_ms_p99",
            "is_batch",
            "deadline_ms",
            "queue_ms_max",
            "price_factor",
            "note",
            "updated_at",
        ]
        read_only_fields = ["updated_at"]

    def validate_name(self, name: str) -> str:
        if self.instance is not None and name != self.instance.name:
            raise serializers.ValidationError("The name of a class cannot change.")
        return name

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row's own rule, on what the row would become."""
        row = SLOClassRow()
        for name in ("is_batch", "deadline_s", "service_tier"):
            old = getattr(self.instance, name, getattr(row, name))
            setattr(row, name, values.get(name, old))
        row.clean()
        return values


class ModelSerializer(StrictSerializer):
    class Meta:
        model = Model
        fields = [
            "model_id",
            "folder",
            "max_model_len",
            "gpu_hour_usd",
            "is_active",
            "created_at",
            "updated_at",
        ]
        read_only_fields = ["created_at", "updated_at"]

    def validate_model_id(self, model_id: str) -> str:
        if self.instance is not None and model_id != self.instance.model_id:
            raise serializers.ValidationError("The id of a model cannot change.")
        return model_id


class WorkerSerializer(serializers.Serializer):
    """A member of the cluster as the control plane sees it now."""

    worker_id = serializers.CharField()
    name = serializers.CharField()
    engine = serializers.CharField()
    role = serializers.CharField()
    status = serializers.CharField()
    device = serializers.CharField()
    models = serializers.ListField(child=serializers.CharField())
    requests = serializers.IntegerField()
    kv_used_ratio = serializers.FloatField(allow_null=True)
    heard_ago_ms = serializers.FloatField()
    exception = serializers.CharField(allow_blank=True)


class PlannerSerializer(serializers.Serializer):
    mode = serializers.ChoiceField(choices=["auto", "shadow"])


class RoleSerializer(serializers.Serializer):
    role = serializers.ChoiceField(choices=["prefill", "decode", "mixed"])
