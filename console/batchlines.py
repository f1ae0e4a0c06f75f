"""One line of a batch: what the gateway runs for it, and what is stored of the outcome."""

import hashlib
import time
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from console.apierrors import ApiError, invalid, of_rejection
from console.batchclaims import ClaimedLine
from console.generation import Completion, GenerateSpec, Refusal, Shape
from console.grammars import grammar_refused
from console.requests import parse_chat, parse_completion, spec_of
from console.snapshot import Snapshot
from console.sse import Envelope, GenerateEndpoint, body_json
from console.tokens import Tokenizers
from controlplane.errors import ConfigError
from controlplane.harvest import cost_tokens

CHAT_URL = "/v1/chat/completions"
STATUS_TRANSIENT = (429, 500, 502, 503, 504)  # another try later can help


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line ended with; `error` is set for everything but a completion."""

    status: str  # completed | failed | cancelled
    request_id: str
    response: dict[str, Any] | None
    error: dict[str, Any] | None
    cost_tokens: float = 0.0  # controlplane.harvest


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
    try:
        parsed = parse(line.body, snapshot, tokenizers, tenant)
    except ConfigError as error:  # the model's folder is unreadable now
        return ApiError(503, "model_unavailable", str(error))
    if isinstance(parsed, ApiError):
        return parsed
    if parsed.stream:
        return invalid("Batch lines cannot stream.", "stream")
    if parsed.num_choices > 1:
        return invalid("A batch line has one choice; send it n times.", "n")
    problem = tokenizers.grammars.check(parsed.sampling.grammar)
    if problem:
        return grammar_refused(problem)
    sampling = parsed.sampling
    if not parsed.is_seeded:
        sampling = msgspec.structs.replace(sampling, seed=_seed(line))
    return replace(
        spec_of(parsed, tenant, "", "batch"),
        slo=batch_class.slo,
        service_tier="batch",
        sampling=sampling,
        is_seeded=True,
        is_batch=True,
    )


def of_outcome(line: ClaimedLine, shape: Shape, outcome: Completion | Refusal) -> Answer | NotNow:
    """What the gateway gave, as stored."""
    if isinstance(outcome, Refusal):
        error = of_rejection(outcome.rejected, "batch")
        return NotNow(error.code) if error.status in STATUS_TRANSIENT else of_error(error)
    endpoint: GenerateEndpoint = "chat" if line.url == CHAT_URL else "completions"
    envelope = Envelope(endpoint, outcome.request_id, line.model_id, "batch", int(time.time()))
    response = {
        "status_code": 200,
        "request_id": outcome.request_id,
        "body": body_json(envelope, [outcome], shape),
    }
    tokens = cost_tokens(outcome.usage.prompt_tokens, outcome.usage.output_tokens)
    return Answer("completed", outcome.request_id, response, None, tokens)


def of_error(error: ApiError) -> Answer | NotNow:
    """A refused line: its response is the error body that HTTP would have got."""
    if error.status in STATUS_TRANSIENT:
        return NotNow(error.code)
    response = {"status_code": error.status, "request_id": "", "body": error.body()}
    return Answer("failed", "", response, {"code": error.code, "message": error.message})


def _seed(line: ClaimedLine) -> int:
    digest = hashlib.sha256(f"{line.batch_id}|{line.custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
