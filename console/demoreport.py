"""What a demo did: counted from the request table, and compared with `/metrics`."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from django.db.models import Count, Q, QuerySet, Sum

from console.models import PlanRecord, RequestRecord

PLAN_CHANGES_MAX = 100  # in one report, the newest

# Value of a sample of /metrics by name and labels, summed over the labels that are not given.
ReadMetric = Callable[[str, dict[str, str]], float]


@dataclass(frozen=True, slots=True)
class PlanChange:
    """What the planner, or an operator, changed; `at_s` after the demo's start."""

    at_s: float
    what: str
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Counts since this start of the demo. Latencies are those of interactive requests."""

    handoff: int
    handoff_bytes: int
    handoff_recomputed_tokens: int
    local: int
    interactive: int  # completed requests that are no batch lines
    batch_lines: int
    batch_tokens: int
    interactive_tokens: int
    failed: int
    first_token_s: float | None
    ttft_ms_p99: float | None
    itl_ms_p99: float | None
    mix_shift_s: float | None = None  # when the load's prompts changed, after the demo's start
    plan_changes: list[PlanChange] = field(default_factory=list)  # oldest first

    @property
    def batch_token_share(self) -> float:
        total = self.batch_tokens + self.interactive_tokens
        return self.batch_tokens / total if total else 0.0

    def lines(self) -> list[str]:
        """For people, at the end of a demo."""
        return [
            f"interactive {self.interactive} requests ({self.local} local, {self.handoff} by"
            f" handoff, {self.handoff_bytes / 1e6:.0f} MB of KV moved), TTFT p99"
            f" {_ms(self.ttft_ms_p99)}, ITL p99 {_ms(self.itl_ms_p99)}",
            f"batch {self.batch_lines} lines, {100 * self.batch_token_share:.0f} % of output"
            f" tokens; failed {self.failed}",
            *(
                f"plan at {change.at_s:.0f} s by {change.by}: {change.what}: {change.reason}"
                for change in self.plan_changes
            ),
        ]


def count(
    since: datetime,
    first_token_s: float | None,
    num_client_errors: int,
    mix_shift_s: float | None = None,
) -> Report:
    """Reads the request table; `num_client_errors` are requests that only the load saw fail."""
    rows = RequestRecord.objects.filter(arrived_at__gte=since, is_demo_history=False)
    online, batch = rows.filter(is_batch=False), rows.filter(is_batch=True)
    sums = rows.aggregate(
        handoff=Count("id", filter=Q(split="handoff")),
        local=Count("id", filter=Q(split="local")),
        handoff_bytes=Sum("handoff_bytes", default=0),
        recomputed=Sum("handoff_recomputed_tokens", default=0),
        failed=Count("id", filter=Q(status__in=("failed", "rejected", "expired"))),
    )
    return Report(
        handoff=sums["handoff"],
        handoff_bytes=sums["handoff_bytes"],
        handoff_recomputed_tokens=sums["recomputed"],
        local=sums["local"],
        interactive=online.filter(status="completed").count(),
        batch_lines=batch.filter(status="completed").count(),
        batch_tokens=_tokens(batch),
        interactive_tokens=_tokens(online),
        failed=max(sums["failed"], num_client_errors),
        first_token_s=first_token_s,
        ttft_ms_p99=quantile(online.values_list("ttft_ms", flat=True), 0.99),
        itl_ms_p99=quantile(online.values_list("itl_ms_p99", flat=True), 0.99),
        mix_shift_s=mix_shift_s,
        plan_changes=plan_changes(since),
    )


def plan_changes(since: datetime) -> list[PlanChange]:
    """Those that were carried out."""
    rows = PlanRecord.objects.filter(at__gte=since, is_demo_history=False, is_shadow=False)
    newest = list(rows.order_by("-at", "-id")[:PLAN_CHANGES_MAX])
    return [
        PlanChange((row.at - since).total_seconds(), str(row), row.by, row.reason)
        for row in reversed(newest)
    ]


def _tokens(rows: "QuerySet[RequestRecord]") -> int:
    total: int = rows.aggregate(total=Sum("output_tokens", default=0))["total"]
    return total


def quantile(values: Iterable[float | None], q: float) -> float | None:
    """The smallest value that at least the share `q` of all does not exceed; None without data."""
    known = sorted(value for value in values if value is not None)
    return known[max(0, math.ceil(q * len(known)) - 1)] if known else None


def differences(report: Report, read_metric: ReadMetric) -> list[str]:
    """Where `/metrics` counts otherwise than the table; empty when both agree."""
    pairs: Sequence[tuple[str, dict[str, str], int]] = (
        ("slackwater_placements_total", {"kind": "handoff"}, report.handoff),
        ("slackwater_placements_total", {"kind": "local"}, report.local),
        ("slackwater_handoff_bytes_total", {}, report.handoff_bytes),
        (
            "slackwater_handoff_recomputed_tokens_total",
            {},
            report.handoff_recomputed_tokens,
        ),
        ("slackwater_batch_lines_total", {"status": "completed"}, report.batch_lines),
        (
            "slackwater_requests_total",
            {"status": "completed"},
            report.interactive + report.batch_lines,
        ),
    )
    found = []
    for name, labels, counted in pairs:
        measured = int(read_metric(name, labels))
        if measured != counted:
            found.append(f"{name}{labels or ''} says {measured}, the request table {counted}")
    return found


def write_json(path: Path, report: Report) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(asdict(report), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _ms(value: float | None) -> str:
    return "no data" if value is None else f"{value:.0f} ms"
