"""Costs of past minutes from their stored rows: what `manage.py costs` and the API answer."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

from console.costs import DIMENSIONS, CostLine, Dimension, attribute, by
from console.facts import CostFact, GpuFact
from console.models import CostMinute, GpuMinute

HOURS_MAX = 31 * 24  # that one report reads; a minute has few rows
ROWS_PER_READ = 2_000


def report(hours: float, dimensions: Sequence[Dimension], now: datetime) -> dict[str, Any]:
    """Lines of the last hours, the dearest first, and their sum; reads the database."""
    assert 0.0 < hours <= HOURS_MAX, f"{hours} hours, at most {HOURS_MAX}"
    since = now - timedelta(hours=hours)
    costs, gpus = facts_between(since, now)
    found = attribute(costs, gpus)
    lines = by(found, dimensions)
    total = CostLine()
    for line in lines.values():
        total.add(line)
    names = [name for name in DIMENSIONS if name in dimensions]
    rows = [
        {name: part for name, part in zip(DIMENSIONS, key, strict=True) if name in names}
        | line.row()
        for key, line in sorted(lines.items(), key=lambda item: (-item[1].usd, item[0]))
    ]
    return {
        "since": since.astimezone(UTC).isoformat(),
        "hours": hours,
        "by": names,
        "lines": rows,
        "total": total.row(),
    }


def facts_between(since: datetime, until: datetime) -> tuple[Iterator[CostFact], Iterator[GpuFact]]:
    """The minutes in [since, until), the oldest first: two queries, whatever their number."""
    return (
        _facts(CostMinute, CostFact, since, until),
        _facts(GpuMinute, GpuFact, since, until),
    )


def _facts(row_type: Any, fact_type: Any, since: datetime, until: datetime) -> Any:
    names = [spec.name for spec in fields(fact_type)]
    found = row_type.objects.filter(minute__gte=since, minute__lt=until).values_list(*names)
    return (fact_type(*values) for values in found.iterator(ROWS_PER_READ))
