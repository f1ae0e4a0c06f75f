"""What the server stores about a finished request and about a change of plan: one row each."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

RequestStatus = Literal["completed", "cancelled", "failed", "rejected", "expired"]
Endpoint = Literal["chat", "completions", "responses", "batch"]


@dataclass(frozen=True, slots=True)
class RequestFact:
    """A request at its end; the columns of model RequestRecord. None where nothing was measured."""

    request_id: str
    tenant_id: str
    key_id: str
    model_id: str
    class_name: str
    service_tier: str
    endpoint: Endpoint
    is_batch: bool
    stream: bool
    status: RequestStatus
    finish_reason: str
    error_code: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    arrived_at: datetime
    queue_ms: float | None
    ttft_ms: float | None
    itl_ms_p99: float | None
    itl_ms_mean: float | None
    e2e_ms: float
    split: str  # local | handoff | "" when never placed
    prefill_worker: str
    decode_worker: str
    failovers: int
    handoff_bytes: int
    handoff_ms: float | None
    handoff_recomputed_tokens: int
    predicted_ttft_ms: float | None
    decision: dict[str, Any] = field(default_factory=dict)  # a controlplane.decisions.Explanation
    is_demo_history: bool = False


@dataclass(frozen=True, slots=True)
class PlanFact:
    """The plan has changed: what, by whom and why; the columns of model PlanRecord."""

    at: datetime
    worker_id: str
    role_before: str
    role_after: str
    by: str
    reason: str
    kind: str = "role"
    is_shadow: bool = False
    model_before: str = ""
    model_after: str = ""
