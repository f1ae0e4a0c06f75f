"""Request id, content security policy and static files of every page that Django answers."""

import re
import secrets
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseNotModified
from django.http.response import HttpResponseBase
from whitenoise.middleware import WhiteNoiseMiddleware
from whitenoise.responders import StaticFile

from console import audit

View = Callable[..., HttpResponseBase]

POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# Plotly 7.1 (plotly.js 4.1.1) sets style attributes for heatmaps and appends one stylesheet with
# this hash; measured in Chromium 156, no violation in either colour scheme.
PLOTLY_STYLE_HASH = "sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o="
CHART_POLICY = POLICY.replace(
    "style-src 'self'",
    f"style-src 'self' '{PLOTLY_STYLE_HASH}'; style-src-attr 'unsafe-inline'",
)
SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def chart_page(view: View) -> View:
    """Mark a view whose page draws charts: its policy lets Plotly set style attributes."""

    @wraps(view)
    def wrapped(*args: Any, **kwargs: Any) -> HttpResponseBase:
        response = view(*args, **kwargs)
        response.headers["Content-Security-Policy"] = CHART_POLICY
        return response

    return wrapped


class SecurityMiddleware:
    """Sends the policy of the page and an `x-request-id` with each response."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        sent = request.headers.get("x-request-id", "")
        request_id = sent if REQUEST_ID.fullmatch(sent) else f"req-{secrets.token_hex(12)}"
        request.request_id = request_id  # type: ignore[attr-defined]
        response = self.get_response(request)
        response.headers.setdefault("x-request-id", request_id)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        response.headers.setdefault(
            "Permissions-Policy", "camera=(), geolocation=(), microphone=()"
        )
        return response


class AuditMiddleware:
    """After a request that may have written, the admin's new entries join the audit chain."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        response = self.get_response(request)
        if request.method not in SAFE_METHODS and request.user.is_authenticated:
            audit.feed()
        return response


class StaticMiddleware(WhiteNoiseMiddleware):
    """WhiteNoise whose answers are plain bytes: a file iterator would be read whole under ASGI
    anyway, with a warning for each response."""

    @staticmethod
    def serve(static_file: StaticFile, request: HttpRequest) -> HttpResponseBase:
        answer = static_file.get_response(request.method, request.META)
        if answer.status == 304:
            response: HttpResponse = HttpResponseNotModified()
        else:
            body = b""
            if answer.file is not None:
                with answer.file:
                    body = answer.file.read()
            response = HttpResponse(body, status=int(answer.status))
            del response.headers["Content-Type"]
        for key, value in answer.headers:
            response.headers[key] = value
        return response
