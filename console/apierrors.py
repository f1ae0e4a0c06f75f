"""Errors of `/v1` in OpenAI's shape: one frozen value per refusal, and where outcomes map to."""

from dataclasses import dataclass
from typing import Any

from controlplane.domain import Rejected

RETRY_S_MAX = 120.0  # the official client does not retry at all when told to wait longer

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """A refusal as the client sees it. `should_retry` None leaves the choice to the client."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Retry hints; seconds for every client, milliseconds for OpenAI's."""
        headers = []
        if self.retry_after_s is not None:
            retry_ms = max(1, round(min(self.retry_after_s, RETRY_S_MAX) * 1000))
            headers.append((b"retry-after", b"%d" % -(-retry_ms // 1000)))
            headers.append((b"retry-after-ms", b"%d" % retry_ms))
        if self.should_retry is not None:
            headers.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return headers


def invalid(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    """400: the request itself is wrong, trying again cannot help."""
    return ApiError(400, code, message, param)


def model_not_found(model_id: str) -> ApiError:
    return ApiError(
        404,
        "model_not_found",
        f"The model {model_id[:80]!r} does not exist or this key may not use it.",
        "model",
    )


def insufficient_scope(scope: str) -> ApiError:
    return ApiError(403, "insufficient_scope", f"This key has no scope `{scope}`.")


# The tenant's own limit is 429; what the cluster lacks is 503, or 504 after a wait.
_REJECTIONS = {
    "tenant_concurrency": (429, "rate_limit_exceeded"),
    "contract_rate": (429, "rate_limit_exceeded"),
    "contract_concurrency": (429, "rate_limit_exceeded"),
    "contract_budget": (429, "insufficient_quota"),
    "late": (503, "overloaded"),
    "overloaded": (503, "overloaded"),
    "overload_share": (429, "rate_limit_exceeded"),
    "queue_full": (503, "overloaded"),
    "no_worker": (503, "overloaded"),
    "model_not_served": (503, "overloaded"),
    "retries_exhausted": (503, "overloaded"),
    "poison_request": (500, "poison_request"),
    "draining": (503, "draining"),
    "queue_timeout": (504, "deadline_exceeded"),
    "worker_error": (500, "worker_error"),
}

# A request that several workers died of, or that one failed on, must not be sent by itself again.
_NOT_AGAIN = ("retries_exhausted", "worker_error", "poison_request")


def of_rejection(rejected: Rejected, service_tier: str) -> ApiError:
    """What the client is told when the plane refuses; `flex` work is refused as OpenAI does it."""
    if rejected.code == "prompt_too_long":
        return invalid(rejected.message, "messages", "context_length_exceeded")
    status, code = _REJECTIONS[rejected.code]
    if service_tier == "flex" and code == "overloaded":
        status, code = 429, "resource_unavailable"
    should_retry = False if rejected.code in _NOT_AGAIN else None
    return ApiError(status, code, rejected.message, None, rejected.retry_after_s, should_retry)
