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
    gpu_prefill_s: float = 0.0  # worker seconds charged to it, of all its workers
    gpu_decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HarvestFact:
    """What a model's workers did since the last such fact; added to the row of its time."""

    at: datetime
    model_id: str
    seconds: float
    worker_s: float
    member_s: float
    online_s: float
    batch_s: float
    batch_tokens: float
    backlog_s: float


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


@dataclass(frozen=True, slots=True)
class CostFact:
    """Requests of one tenant, model and class that ended in one minute; see CostMinute."""

    minute: datetime
    run: str  # of the server
    tenant_id: str
    model_id: str
    class_name: str
    is_batch: bool
    requests: int
    prompt_tokens: int
    output_tokens: int
    prefill_gpu_s: float
    decode_gpu_s: float


@dataclass(frozen=True, slots=True)
class GpuFact:
    """How the workers of one model spent one minute, as they measured it; see GpuMinute."""

    minute: datetime
    run: str
    model_id: str
    online_s: float
    batch_s: float
    batch_fixed_s: float  # of batch_s: its share of what a step costs with any rows
    idle_s: float
    gpu_hour_usd: float  # the price at that time
