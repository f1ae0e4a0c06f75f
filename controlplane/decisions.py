"""Decision records: what was decided for a request, on which numbers, in sentences."""

from controlplane.domain import DecisionRecord, Rejected
from controlplane.failover import Tracked
from controlplane.router import Route


def placed(tracked: Tracked, route: Route, waited_s: float) -> DecisionRecord:
    return _record(tracked, "placed", route.reason, waited_s, route)


def queued(tracked: Tracked, route: Route, waited_s: float) -> DecisionRecord:
    return _record(tracked, "queued", f"waits: {route.reason}", waited_s, route)


def _record(
    tracked: Tracked, outcome: str, reason: str, waited_s: float, route: Route
) -> DecisionRecord:
    """The reason says first what made a running request move, then why it is surplus."""
    assert outcome in ("placed", "queued"), outcome
    parts = [tracked.move_reason, tracked.demotion.message if tracked.demotion else "", reason]
    return DecisionRecord(
        request_id=tracked.request_id,
        epoch=tracked.epoch,
        outcome="placed" if outcome == "placed" else "queued",
        reason="; ".join(part for part in parts if part),
        split_reason=route.split_reason,
        waited_s=waited_s,
        uncached_tokens=route.uncached_tokens,
        handoff_threshold_tokens=route.threshold_tokens,
        placement=route.placement,
        candidates=route.candidates,
        tier=tracked.tier,
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
