"""Where a request's time went, as bars on one scale from its arrival to its last byte."""

from dataclasses import dataclass

from console.models import RequestRecord


@dataclass(frozen=True, slots=True)
class Bar:
    """One phase; positions are per cent of the whole."""

    name: str
    start_percent: float
    width_percent: float
    target_percent: float | None  # where the TTFT target stands, None outside the scale
    ms: float


def bars(record: RequestRecord, ttft_target_ms: float | None) -> list[Bar]:
    """Phases in order; empty when the request ended before anything was measured.

    The client gets its first token when the decode worker has the KV, so a transfer ends at TTFT;
    as it streams layer by layer, its beginning lies in the prefill that it follows here."""
    end_ms = record.e2e_ms or 0.0
    if end_ms <= 0:
        return []
    queue_ms = min(record.queue_ms or 0.0, end_ms)
    first_ms = end_ms if record.ttft_ms is None else min(max(record.ttft_ms, queue_ms), end_ms)
    moved_ms = (record.handoff_ms or 0.0) if record.split == "handoff" else 0.0
    transfer_ms = min(moved_ms, first_ms - queue_ms)
    if record.ttft_ms is None and record.queue_ms is None:
        spans = [("queue", 0.0, end_ms)]
    else:
        computed_ms = first_ms - transfer_ms
        spans = [("queue", 0.0, queue_ms), ("prefill", queue_ms, computed_ms)]
        if record.split == "handoff":
            spans.append(("transfer", computed_ms, first_ms))
        spans.append(("decode", first_ms, end_ms))
    target = None
    if ttft_target_ms is not None and ttft_target_ms <= end_ms:
        target = 100 * ttft_target_ms / end_ms
    return [
        Bar(
            name=name,
            start_percent=round(100 * start_ms / end_ms, 3),
            width_percent=round(100 * (stop_ms - start_ms) / end_ms, 3),
            target_percent=target if name != "decode" else None,
            ms=stop_ms - start_ms,
        )
        for name, start_ms, stop_ms in spans
    ]
