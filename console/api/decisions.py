"""Why a request went where it went, as a REST resource: stored, or of a request that still runs."""

from typing import Any

from django.http import Http404
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers, viewsets
from rest_framework.request import Request
from rest_framework.response import Response

from console import explaining
from console.api.errors import Unavailable


class ExplanationSerializer(serializers.Serializer):
    """Every decision about a request, its outcome and what else could have been; milliseconds."""

    request_id = serializers.CharField()
    tenant_id = serializers.CharField()
    model_id = serializers.CharField()
    class_name = serializers.CharField()
    prompt_tokens = serializers.IntegerField()
    output_tokens_max = serializers.IntegerField()
    ttft_ms_target = serializers.FloatField(allow_null=True)
    itl_ms_target = serializers.FloatField(allow_null=True)
    records = serializers.ListField(child=serializers.DictField())
    records_left_out = serializers.IntegerField()
    transfers = serializers.ListField(child=serializers.DictField())
    outcome = serializers.DictField(allow_null=True)
    counterfactuals = serializers.ListField(child=serializers.DictField())


@extend_schema(parameters=[OpenApiParameter("request_id", str, OpenApiParameter.PATH)])
class DecisionViewSet(viewsets.ViewSet):
    """By the id that answers carry as `x-slackwater-decision-id`."""

    lookup_field = "request_id"
    lookup_value_regex = "[A-Za-z0-9._-]{1,64}"
    serializer_class = ExplanationSerializer

    @extend_schema(responses=ExplanationSerializer)
    def retrieve(self, request: Request, request_id: str, **kwargs: Any) -> Response:
        try:
            explained = explaining.find(request_id)
        except TimeoutError:
            raise Unavailable("The control plane did not answer in time.") from None
        if explained is None:
            raise Http404(f"no decision about request {request_id}")
        return Response(explaining.in_ms(explained))
