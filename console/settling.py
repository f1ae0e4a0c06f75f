"""What is stored of a request at its end: its progress and outcome as one fact."""

import math
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from console.facts import RequestFact, RequestStatus
from console.generation import GenerateSpec, LiveRequest
from controlplane import domain
from controlplane.decisions import Explanation


@dataclass(slots=True)
class Progress:
    """Times and counts of one generation, on the fleet's clock."""

    arrived_at_s: float
    arrived_at: datetime
    first_at_s: float | None = None
    placed_at_s: float | None = None
    last_at_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # at most output_tokens_max
    output_tokens: int = 0

    @property
    def itl_s_p99(self) -> float:
        """Of the gaps so far; 0 without any."""
        gaps_s = sorted(self.gaps_s)
        return gaps_s[math.ceil(0.99 * len(gaps_s)) - 1] if gaps_s else 0.0


def status_of(rejected: domain.Rejected, progress: Progress) -> RequestStatus:
    if rejected.code == "queue_timeout":
        return "expired"
    if progress.first_at_s is not None or rejected.code in (
        "retries_exhausted",
        "worker_error",
        "poison_request",
    ):
        return "failed"
    return "rejected"


def fact_of(
    spec: GenerateSpec,
    live: LiveRequest,
    progress: Progress,
    explanation: Explanation | None,
    now_s: float,
    status: RequestStatus,
    finish_reason: str,
    error_code: str,
) -> RequestFact:
    placement, first_at_s = live.placement, progress.first_at_s
    start_s, placed_at_s = progress.arrived_at_s, progress.placed_at_s
    gaps_s = progress.gaps_s
    return RequestFact(
        request_id=live.request_id,
        tenant_id=spec.tenant.tenant_id,
        key_id=spec.key_id,
        model_id=spec.model_id,
        class_name=spec.slo.name,
        service_tier=spec.service_tier,
        endpoint=spec.endpoint,
        is_batch=spec.is_batch,
        stream=spec.stream,
        status=status,
        finish_reason=finish_reason,
        error_code=error_code,
        prompt_tokens=len(spec.prompt_ids),
        cached_tokens=live.cached_tokens,
        output_tokens=progress.output_tokens,
        arrived_at=progress.arrived_at,
        queue_ms=None if placed_at_s is None else (placed_at_s - start_s) * 1000,
        ttft_ms=None if first_at_s is None else (first_at_s - start_s) * 1000,
        itl_ms_p99=progress.itl_s_p99 * 1000 if gaps_s else None,
        itl_ms_mean=sum(gaps_s) / len(gaps_s) * 1000 if gaps_s else None,
        e2e_ms=(now_s - start_s) * 1000,
        split="" if placement is None else placement.split,
        prefill_worker="" if placement is None else placement.prefill_worker,
        decode_worker="" if placement is None else placement.decode_worker,
        failovers=live.failovers,
        handoff_bytes=live.handoff_bytes,
        handoff_ms=live.handoff_ms if live.handoff_bytes else None,
        handoff_recomputed_tokens=live.handoff_recomputed_tokens,
        predicted_ttft_ms=None if placement is None else placement.predicted_ttft_s * 1000,
        gpu_prefill_s=sum(prefill_s for prefill_s, _ in live.gpu_s.values()),
        gpu_decode_s=sum(decode_s for _, decode_s in live.gpu_s.values()),
        decision=msgspec.to_builtins(explanation) if explanation else {},
    )
