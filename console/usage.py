"""Cost of a period by group, beside the period before it, and by hour or day.

Each number comes from `costs.attribute` over the minutes it is about: a whole period for the rows,
one hour or day for a step. A group's steps may so add up to another share of the idle time than its
row has; all groups together cost the same in both, which is what all GPUs cost.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from console.costs import CostLine, Dimension, Key, attribute, by
from console.facts import CostFact, GpuFact

Step = Literal["hour", "day"]
View = Literal["attributed", "cash"]


@dataclass(frozen=True, slots=True)
class Row:
    """One group in this period and in the one before, None where it had none."""

    key: Key
    line: CostLine
    before: CostLine | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Rows by falling cost, their sums, and the cost of each group in each step."""

    rows: list[Row]
    total: CostLine
    total_before: CostLine
    steps: list[datetime]
    lines_by_step: list[dict[Key, CostLine]]


def of_period(
    costs: Iterable[CostFact],
    gpus: Iterable[GpuFact],
    since: datetime,
    until: datetime,
    step: Step,
    dimensions: Sequence[Dimension],
) -> Usage:
    """Usage of [since, until); the facts reach back over the period before, which is as long."""
    minutes: dict[datetime, tuple[list[CostFact], list[GpuFact]]]
    minutes = defaultdict(lambda: ([], []))
    now: tuple[list[CostFact], list[GpuFact]] = ([], [])
    before: tuple[list[CostFact], list[GpuFact]] = ([], [])
    for index, facts in enumerate((costs, gpus)):
        for fact in facts:
            if fact.minute < since:
                before[index].append(fact)
            else:
                now[index].append(fact)
                minutes[start_of(fact.minute, step)][index].append(fact)
    lines = by(attribute(*now), dimensions)
    old = by(attribute(*before), dimensions)
    rows = [Row(key, line, old.pop(key, None)) for key, line in lines.items()]
    rows += [Row(key, CostLine(), line) for key, line in old.items()]
    rows.sort(key=lambda row: (-row.line.usd, row.key))
    steps = steps_between(since, until, step)
    return Usage(
        rows=rows,
        total=_sum(row.line for row in rows),
        total_before=_sum(row.before for row in rows if row.before is not None),
        steps=steps,
        lines_by_step=[by(attribute(*minutes[at]), dimensions) for at in steps],
    )


def usd_of(line: CostLine, view: View) -> float:
    """Dollars of a line in a view."""
    return line.usd if view == "attributed" else line.cash_usd


def change_ratio(now: float, before: float) -> float | None:
    """How much more than before, as a share of it; None when there was nothing before."""
    return None if before <= 0.0 else now / before - 1.0


def start_of(moment: datetime, step: Step) -> datetime:
    """The hour or the day (UTC) that a moment is in."""
    hour = moment.replace(minute=0, second=0, microsecond=0)
    return hour if step == "hour" else hour.replace(hour=0)


def steps_between(since: datetime, until: datetime, step: Step) -> list[datetime]:
    """All hours or days that [since, until) touches, also those without any use."""
    steps, at = [], start_of(since, step)
    while at < until:
        steps.append(at)
        at += timedelta(hours=1) if step == "hour" else timedelta(days=1)
    return steps


def flat(row: Row, names: Sequence[Dimension], parts: dict[str, str]) -> dict[str, Any]:
    """A row as it is exported: `parts` are its group's names."""
    before = CostLine() if row.before is None else row.before
    return {
        **{name: parts[name] for name in names},
        **row.line.row(),
        "usd_before": round(before.usd, 9),
        "cash_usd_before": round(before.cash_usd, 9),
    }


def _sum(lines: Iterable[CostLine]) -> CostLine:
    total = CostLine()
    for line in lines:
        total.add(line)
    return total
