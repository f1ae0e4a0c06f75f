"""Which HTTP answer each refusal of the plane becomes."""

import pytest

from console.apierrors import RETRY_S_MAX, ApiError, of_rejection
from controlplane.domain import Rejected


@pytest.mark.parametrize(
    ("code", "status", "answered"),
    [
        ("tenant_concurrency", 429, "rate_limit_exceeded"),
        ("queue_full", 503, "overloaded"),
        ("no_worker", 503, "overloaded"),
        ("model_not_served", 503, "overloaded"),
        ("retries_exhausted", 503, "overloaded"),
        ("draining", 503, "draining"),
        ("queue_timeout", 504, "deadline_exceeded"),
        ("prompt_too_long", 400, "context_length_exceeded"),
        ("worker_error", 500, "worker_error"),
        ("poison_request", 500, "poison_request"),
    ],
)
def test_every_rejection_has_its_answer(code, status, answered):
    error = of_rejection(Rejected(code, "because", 1.5), "default")
    assert (error.status, error.code, error.message) == (status, answered, "because")
    may_repeat = code not in ("retries_exhausted", "worker_error", "poison_request")
    assert error.should_retry is (None if may_repeat else False)


def test_flex_is_refused_as_openai_does_it():
    error = of_rejection(Rejected("queue_full", "full", 2.0), "flex")
    assert (error.status, error.code) == (429, "resource_unavailable")
    assert of_rejection(Rejected("draining", "", None), "flex").status == 503


@pytest.mark.parametrize(
    ("retry_s", "seconds", "milliseconds"),
    [
        (0.0, b"1", b"1"),
        (0.04, b"1", b"40"),
        (1.0, b"1", b"1000"),
        (1.001, b"2", b"1001"),
        (10_000.0, b"%d" % RETRY_S_MAX, b"%d" % (RETRY_S_MAX * 1000)),
    ],
)
def test_retry_hint_is_never_shorter_than_predicted_nor_too_long_for_the_client(
    retry_s, seconds, milliseconds
):
    headers = dict(ApiError(503, "overloaded", "x", retry_after_s=retry_s).headers())
    assert headers == {b"retry-after": seconds, b"retry-after-ms": milliseconds}


def test_should_retry_is_said_only_when_decided():
    assert ApiError(429, "c", "m").headers() == []
    assert ApiError(429, "c", "m", should_retry=False).headers() == [(b"x-should-retry", b"false")]
    assert ApiError(500, "c", "m", should_retry=True).headers() == [(b"x-should-retry", b"true")]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (504, "server_error"),
    ],
)
def test_type_follows_the_status(status, kind):
    assert ApiError(status, "c", "m").body()["error"]["type"] == kind
