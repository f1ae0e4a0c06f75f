"""Django admin for what operators edit by hand; facts are shown read-only."""

from typing import Any

from django.contrib import admin, messages
from django.forms import ModelForm
from django.http import HttpRequest

from console import contracts, state
from console.auth import OPERATOR_PREFIX, TENANT_PREFIX, mint_key
from console.models import (
    ApiKey,
    ApiToken,
    Batch,
    ContractRow,
    File,
    Model,
    PlanRecord,
    Quota,
    RequestRecord,
    SLOClassRow,
    Tenant,
    Worker,
)
from controlplane.contracts import Preview

admin.site.site_header = "Slackwater"
admin.site.site_title = "Slackwater"
admin.site.index_title = "Administration"


class FactsAdmin(admin.ModelAdmin):
    """Rows that the system writes: to be read and found, never changed here."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class QuotaInline(admin.StackedInline):
    model = Quota
    can_delete = False


@admin.register(Tenant)
class TenantAdmin(admin.ModelAdmin):
    list_display = ["slug", "name", "default_class", "concurrency", "weight", "is_active"]
    list_filter = ["is_active", "default_class"]
    list_select_related = ["default_class", "quota"]
    search_fields = ["slug", "name"]
    inlines = [QuotaInline]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["slug"] if obj else []  # the slug is the id of the tenant's requests and salt

    @admin.display(description="requests in flight, at most")
    def concurrency(self, tenant: Tenant) -> Any:
        return tenant.quota.concurrency_max if hasattr(tenant, "quota") else None


class CredentialAdmin(admin.ModelAdmin):
    """Keys and tokens: made here with the secret shown once, afterwards only switched off."""

    prefix = TENANT_PREFIX
    owner = "tenant"

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [*([self.owner] if obj else []), "public_id", "last4"]

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
            return
        minted = mint_key(self.prefix)
        obj.public_id, obj.last4 = minted.public_id, minted.last4
        obj.secret_hmac = minted.secret_hmac
        super().save_model(request, obj, form, change)
        text = f"Copy the secret now, it is shown only this once: {minted.text}"
        self.message_user(request, text, messages.WARNING)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # switch it off: its requests go on naming it


@admin.register(ApiKey)
class ApiKeyAdmin(CredentialAdmin):
    list_display = ["__str__", "tenant", "name", "is_active", "expires_at", "created_at"]
    list_filter = ["is_active", "tenant"]
    list_select_related = ["tenant"]
    search_fields = ["public_id", "name", "tenant__slug"]


@admin.register(ApiToken)
class ApiTokenAdmin(CredentialAdmin):
    prefix = OPERATOR_PREFIX
    owner = "user"
    list_display = ["__str__", "user", "name", "is_active", "expires_at", "created_at"]
    list_filter = ["is_active"]
    list_select_related = ["user"]
    search_fields = ["public_id", "name", "user__username"]


@admin.register(Quota)
class QuotaAdmin(admin.ModelAdmin):
    list_display = ["tenant", "concurrency_max", "updated_at"]
    list_select_related = ["tenant"]
    search_fields = ["tenant__slug"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["tenant"] if obj else []


class ContractForm(ModelForm):
    """Refuses what the live workers could not keep; says with numbers why."""

    preview: tuple[Preview, ...] = ()

    def _post_clean(self) -> None:
        """Here the instance has its new values and its own rules have been checked."""
        super()._post_clean()
        current = state.get()
        if current is None or self.errors:
            return
        wanted = contracts.changed(self.instance, current.snapshot.current)

        async def preview() -> tuple[Preview, ...]:
            return current.fleet.preview(wanted)

        self.preview = current.call(preview)
        for item in self.preview:
            if item.refusal is not None and item.capacity is not None:
                self.add_error(None, item.refusal.message)


@admin.register(ContractRow)
class ContractAdmin(admin.ModelAdmin):
    form = ContractForm
    list_display = ["tenant", "model", "slo_class", "requests_per_min", "tokens_per_min"]
    list_filter = ["slo_class"]
    list_select_related = ["tenant", "model", "slo_class"]
    search_fields = ["tenant__slug", "model__model_id"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["tenant", "model", "slo_class"] if obj else []

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        for item in form.preview:
            self.message_user(request, contracts.effect_text(item))


@admin.register(SLOClassRow)
class SLOClassAdmin(admin.ModelAdmin):
    list_display = ["name", "rank", "service_tier", "ttft_s_p99", "itl_s_p99", "deadline_s", "note"]
    search_fields = ["name"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["name"] if obj else []


@admin.register(Model)
class ModelAdmin(admin.ModelAdmin):
    list_display = ["model_id", "max_model_len", "gpu_hour_usd", "is_active", "folder"]
    list_filter = ["is_active"]
    search_fields = ["model_id"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["model_id"] if obj else []


@admin.register(Worker)
class WorkerAdmin(FactsAdmin):
    list_display = ["name", "worker_id", "role", "status", "engine", "device", "heard_at"]
    list_filter = ["status", "role"]
    search_fields = ["name", "worker_id"]

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return request.user.has_perm("console.delete_worker")  # forget one that is gone


@admin.register(RequestRecord)
class RequestRecordAdmin(FactsAdmin):
    list_display = ["request_id", "tenant_id", "class_name", "status", "ttft_ms", "arrived_at"]
    list_filter = ["status", "class_name", "is_batch", "is_demo_history"]
    date_hierarchy = "arrived_at"
    search_fields = ["request_id"]


@admin.register(PlanRecord)
class PlanRecordAdmin(FactsAdmin):
    list_display = ["at", "kind", "__str__", "by", "is_shadow", "reason"]
    list_filter = ["kind", "is_shadow", "is_demo_history"]


@admin.register(Batch)
class BatchAdmin(FactsAdmin):
    list_display = ["batch_id", "tenant", "model_id", "status", "num_lines", "created_at"]
    list_filter = ["status"]
    list_select_related = ["tenant"]
    search_fields = ["batch_id"]


@admin.register(File)
class FileAdmin(FactsAdmin):
    list_display = ["file_id", "tenant", "purpose", "filename", "num_bytes", "created_at"]
    list_filter = ["purpose"]
    list_select_related = ["tenant"]
    search_fields = ["file_id"]
