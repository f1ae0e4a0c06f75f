"""What work has cost, for operators and their tools."""

from typing import Any

from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers, viewsets
from rest_framework.request import Request
from rest_framework.response import Response

from console.costreport import HOURS_MAX, report
from console.costs import DIMENSIONS


class CostQuery(serializers.Serializer[Any]):
    """What to report."""

    hours = serializers.FloatField(default=24.0, min_value=0.02, max_value=HOURS_MAX)
    by = serializers.MultipleChoiceField(choices=DIMENSIONS, required=False)


class CostViewSet(viewsets.ViewSet):
    """GPU seconds and dollars by tenant, model and class: attributed and as incremental cash."""

    @extend_schema(
        operation_id="costs_report",
        parameters=[
            OpenApiParameter("hours", float, description="back from now, 24 by default"),
            OpenApiParameter("by", str, many=True, enum=DIMENSIONS, description="default: all"),
        ],
        responses={200: OpenApiTypes.OBJECT},
    )
    def list(self, request: Request) -> Response:
        query = CostQuery(data=request.query_params)
        query.is_valid(raise_exception=True)
        wanted = query.validated_data.get("by") or DIMENSIONS
        names = [name for name in DIMENSIONS if name in wanted]
        return Response(report(query.validated_data["hours"], names, timezone.now()))
