"""Tenants, keys, classes, quotas and models as REST resources for operators."""

from datetime import timedelta
from typing import Any

from django.contrib.admin.models import ADDITION, CHANGE, DELETION, LogEntry
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.utils import extend_schema, extend_schema_view
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import ValidationError
from rest_framework.pagination import PageNumberPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import BaseSerializer

from console import keys, state
from console.api.serializers import (
    KeySerializer,
    ModelSerializer,
    NewKeySerializer,
    QuotaSerializer,
    RotationSerializer,
    SLOClassSerializer,
    TenantSerializer,
)
from console.models import ApiKey, Model, Quota, SLOClassRow, Tenant


class OperatorTokenScheme(OpenApiAuthenticationExtension):
    """How operators authenticate, for the schema; registered by being defined."""

    target_class = "console.auth.OperatorTokenAuthentication"
    name = "operatorToken"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer"}


class Pages(PageNumberPagination):
    """`?page=` and `?page_size=`, at most 200 rows."""

    page_size = 50
    page_size_query_param = "page_size"
    max_page_size = 200


class Audited:
    """Every write leaves a LogEntry and is in force at once in this process.

    Stands before DRF's mixins, whose hooks it replaces."""

    pagination_class = Pages
    http_method_names = ["get", "post", "patch", "delete", "head", "options"]

    def perform_create(self, serializer: BaseSerializer) -> None:
        self._record(serializer.save(), ADDITION, "created")

    def perform_update(self, serializer: BaseSerializer) -> None:
        names = ", ".join(sorted(serializer.validated_data))
        self._record(serializer.save(), CHANGE, f"changed {names}")

    def perform_destroy(self, instance: Any) -> None:
        primary_key = instance.pk
        instance.delete()
        instance.pk = primary_key  # the entry names what was deleted
        self._record(instance, DELETION, "deleted")

    def _record(self, instance: Any, action_flag: int, what: str) -> None:
        LogEntry.objects.log_actions(
            self.request.user.pk,
            [instance],
            action_flag,
            change_message=f"{what} through the API",
            single_object=True,
        )
        current = state.get()
        if current is not None:
            current.snapshot.refresh()


class TenantViewSet(
    Audited,
    mixins.ListModelMixin,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    viewsets.GenericViewSet,
):
    """Customers or teams. A tenant is switched off, never deleted: its requests name it."""

    queryset = Tenant.objects.select_related("default_class").order_by("slug")
    serializer_class = TenantSerializer
    lookup_field = "slug"


@extend_schema_view(create=extend_schema(responses={201: NewKeySerializer}))
class KeyViewSet(
    Audited,
    mixins.ListModelMixin,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    viewsets.GenericViewSet,
):
    """API keys. The secret is in the answer to the creation and nowhere else."""

    queryset = ApiKey.objects.select_related("tenant").order_by("created_at", "pk")
    lookup_field = "public_id"

    def get_serializer_class(self) -> type[BaseSerializer]:
        return NewKeySerializer if self.action == "create" else KeySerializer

    @extend_schema(request=RotationSerializer, responses={201: NewKeySerializer})
    @action(detail=True, methods=["post"])
    def rotate(self, request: Request, public_id: str) -> Response:
        """A new key with the same rights; the old one expires after the overlap."""
        old = self.get_object()
        asked = RotationSerializer(data=request.data)
        asked.is_valid(raise_exception=True)
        if not old.is_active or old.replaced_by is not None:
            raise ValidationError({"detail": "This key is switched off or was rotated before."})
        new = keys.rotate(old, timedelta(hours=asked.validated_data["overlap_hours"]))
        return Response(NewKeySerializer(new).data, status=201)


class SLOClassViewSet(
    Audited,
    mixins.ListModelMixin,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.DestroyModelMixin,
    viewsets.GenericViewSet,
):
    """Latency promises. A class that a tenant has as its default cannot be deleted."""

    queryset = SLOClassRow.objects.order_by("rank", "name")
    serializer_class = SLOClassSerializer
    lookup_field = "name"
    lookup_value_regex = "[a-z0-9._-]+"


class QuotaViewSet(
    Audited,
    mixins.ListModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    viewsets.GenericViewSet,
):
    """Limits of tenants."""

    queryset = Quota.objects.select_related("tenant").order_by("tenant__slug")
    serializer_class = QuotaSerializer
    lookup_field = "tenant__slug"
    lookup_url_kwarg = "tenant"
    lookup_value_regex = "[a-z0-9._-]+"


class ModelViewSet(
    Audited,
    mixins.ListModelMixin,
    mixins.CreateModelMixin,
    mixins.RetrieveModelMixin,
    mixins.UpdateModelMixin,
    mixins.DestroyModelMixin,
    viewsets.GenericViewSet,
):
    """Models that tenants may name."""

    queryset = Model.objects.order_by("model_id")
    serializer_class = ModelSerializer
    lookup_field = "model_id"
    lookup_value_regex = "[A-Za-z0-9._/-]+?"
