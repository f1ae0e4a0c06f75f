"""Errors of `/api/v1/` as problem details (RFC 9457): `application/problem+json`."""

from http import HTTPStatus
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db.models import ProtectedError
from django.http import Http404
from rest_framework.exceptions import APIException, ErrorDetail, ValidationError
from rest_framework.renderers import JSONRenderer
from rest_framework.response import Response
from rest_framework.views import exception_handler


class ProblemRenderer(JSONRenderer):
    """JSON whose type says that it is an error."""

    media_type = "application/problem+json"


class Unavailable(APIException):
    """This process runs no control plane, or it did not answer in time."""

    status_code = 503
    default_detail = "The control plane does not run in this process."
    default_code = "unavailable"


class InUse(APIException):
    """Other rows need the one that shall be deleted."""

    status_code = 422
    default_code = "in_use"


def handle(error: Exception, context: dict[str, Any]) -> Response | None:
    """DRF's exception handler; None (then a 500 without detail) for what is a bug."""
    if isinstance(error, ProtectedError):
        error = InUse(f"{len(error.protected_objects)} other objects use it.")
    response = exception_handler(error, context)
    if response is None:
        return None
    status = response.status_code
    problem = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": _code(error),
    }
    if isinstance(error, ValidationError):
        problem["detail"] = "Some fields are not valid."
        problem["errors"] = response.data
    else:
        problem["detail"] = str(getattr(error, "detail", "")) or HTTPStatus(status).description
    headers = {
        name: response.headers[name]
        for name in ("WWW-Authenticate", "Retry-After")
        if name in response.headers
    }
    answer = Response(problem, status=status, headers=headers)
    request = context["request"]
    request.accepted_renderer = ProblemRenderer()
    request.accepted_media_type = ProblemRenderer.media_type
    return answer


def _code(error: Exception) -> str:
    if isinstance(error, Http404):
        return "not_found"
    if isinstance(error, PermissionDenied):
        return "permission_denied"
    detail = getattr(error, "detail", None)
    if isinstance(detail, ErrorDetail):
        return detail.code
    return getattr(error, "default_code", "error")
