"""Decision records: what was decided for a request, on which numbers, in sentences."""

from controlplane.domain import DecisionRecord, Rejected
from controlplane.router import Route


def placed(request_id: str, epoch: int, route: Route, waited_s: float, why: str) -> DecisionRecord:
    """`why` says what made a running request move, and is empty for a first start."""
    reason = f"{why}; {route.reason}" if why else route.reason
    return _record(request_id, epoch, "placed", reason, waited_s, route)


def queued(request_id: str, epoch: int, route: Route, waited_s: float, why: str) -> DecisionRecord:
    reason = f"{why}; {route.reason}" if why else route.reason
    return _record(request_id, epoch, "queued", f"waits: {reason}", waited_s, route)


def _record(
    request_id: str, epoch: int, outcome: str, reason: str, waited_s: float, route: Route
) -> DecisionRecord:
    assert outcome in ("placed", "queued"), outcome
    return DecisionRecord(
        request_id=request_id,
        epoch=epoch,
        outcome="placed" if outcome == "placed" else "queued",
        reason=reason,
        split_reason=route.split_reason,
        waited_s=waited_s,
        uncached_tokens=route.uncached_tokens,
        handoff_threshold_tokens=route.threshold_tokens,
        placement=route.placement,
        candidates=route.candidates,
    )


def rejected(request_id: str, epoch: int, outcome: Rejected, waited_s: float) -> DecisionRecord:
    return DecisionRecord(
        request_id=request_id,
        epoch=epoch,
        outcome="rejected",
        reason=f"{outcome.code}: {outcome.message}",
        split_reason="",
        waited_s=waited_s,
        uncached_tokens=0,
        handoff_threshold_tokens=0,
        placement=None,
    )
