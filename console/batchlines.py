"""One line of a batch: what the gateway runs for it, and what is stored of the outcome."""

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from console.apierrors import ApiError, invalid, of_rejection
from console.batchclaims import ClaimedLine
from console.gateway import Completion, GenerateSpec, Refusal
from console.requests import parse_chat, parse_completion
from console.snapshot import Snapshot
from console.tokens import Tokenizers

CHAT_URL = "/v1/chat/completions"
STATUS_TRANSIENT = (429, 500, 502, 503, 504)  # another try later can help


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line ended with; `error` is set for everything but a completion."""

    status: str  # completed | failed | cancelled
    request_id: str
    response: dict[str, Any] | None
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class NotNow:
    """The cluster cannot take the line at present; it stays pending."""

    reason: str


def spec_of_line(
    line: ClaimedLine, snapshot: Snapshot, tokenizers: Tokenizers
) -> GenerateSpec | ApiError:
    """The line read as a request of its tenant, in the batch class.

    Without a seed the draws come from the line's identity: a repetition after a crash says the
    same."""
    tenant = snapshot.tenants.get(line.tenant_id)
    batch_class = snapshot.class_of_tier("batch")
    if tenant is None:
        return ApiError(403, "tenant_inactive", f"The tenant {line.tenant_id} is not active.")
    if batch_class is None:
        return ApiError(500, "no_batch_class", "No SLO class has the tier batch.")
    parse = parse_chat if line.url == CHAT_URL else parse_completion
    parsed = parse(line.body, snapshot, tokenizers, tenant)
    if isinstance(parsed, ApiError):
        return parsed
    if parsed.stream:
        return invalid("Batch lines cannot stream.", "stream")
    sampling = parsed.sampling
    if not parsed.is_seeded:
        sampling = msgspec.structs.replace(sampling, seed=_seed(line))
    return GenerateSpec(
        tenant=tenant,
        key_id="",
        model_id=parsed.model.model_id,
        tokenizer=parsed.tokenizer,
        slo=batch_class.slo,
        service_tier="batch",
        endpoint="batch",
        prompt_ids=parsed.prompt_ids,
        sampling=sampling,
        is_seeded=True,
        stop=parsed.stop,
        stream=False,
        is_batch=True,
    )


def of_outcome(line: ClaimedLine, outcome: Completion | Refusal) -> Answer | NotNow:
    """What the gateway gave, as stored."""
    if isinstance(outcome, Refusal):
        error = of_rejection(outcome.rejected, "batch")
        return NotNow(error.code) if error.status in STATUS_TRANSIENT else of_error(error)
    response = {
        "status_code": 200,
        "request_id": outcome.request_id,
        "body": _body(line, outcome),
    }
    return Answer("completed", outcome.request_id, response, None)


def of_error(error: ApiError) -> Answer | NotNow:
    """A refused line: its response is the error body that HTTP would have got."""
    if error.status in STATUS_TRANSIENT:
        return NotNow(error.code)
    response = {"status_code": error.status, "request_id": "", "body": error.body()}
    return Answer("failed", "", response, {"code": error.code, "message": error.message})


def _seed(line: ClaimedLine) -> int:
    digest = hashlib.sha256(f"{line.batch_id}|{line.custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _body(line: ClaimedLine, outcome: Completion) -> dict[str, Any]:
    """The object that the endpoint answers with."""
    usage = {
        "prompt_tokens": outcome.usage.prompt_tokens,
        "completion_tokens": outcome.usage.output_tokens,
        "total_tokens": outcome.usage.prompt_tokens + outcome.usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.usage.cached_tokens},
    }
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": outcome.finish_reason,
        "logprobs": None,
    }
    if line.url == CHAT_URL:
        prefix, kind = "chatcmpl", "chat.completion"
        choice["message"] = {"role": "assistant", "content": outcome.text, "refusal": None}
    else:
        prefix, kind = "cmpl", "text_completion"
        choice["text"] = outcome.text
    return {
        "id": f"{prefix}-{outcome.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": line.model_id,
        "choices": [choice],
        "usage": usage,
        "service_tier": "batch",
        "system_fingerprint": None,
    }
