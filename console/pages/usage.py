"""Usage and cost: who spent what, from the minutes that the server has stored."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from django import forms
from django.http import HttpRequest, HttpResponse, QueryDict
from django.shortcuts import render
from django.urls import reverse
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.http import require_safe

from console import usage as periods
from console.auth import operator_required
from console.costreport import facts_between
from console.costs import DIMENSIONS, CostLine, Dimension, Key
from console.middleware import chart_page
from console.pages import exports
from console.usage import Usage, View

RANGES = {
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "31d": timedelta(days=31),
}
RANGE_DEFAULT = "24h"
HISTORY_RANGE = {"31d": "all"}  # what the request history calls it, where it differs
TRACES_MAX = 7  # groups that a chart tells apart; the rest is one more
STEPS_IN_TABLE = 48
VIEWS = (("attributed", "attributed"), ("cash", "incremental cash"))


class UsageFilter(forms.Form):
    """What the page shows; all of it stands in the query string."""

    range = forms.ChoiceField(
        label="Period", required=False, choices=[(name, name) for name in RANGES]
    )
    step = forms.ChoiceField(
        label="Steps", required=False, choices=[("", "auto"), ("hour", "hours"), ("day", "days")]
    )
    view = forms.ChoiceField(label="Cost", required=False, choices=VIEWS)
    by = forms.MultipleChoiceField(
        label="Group by",
        required=False,
        choices=[(name, name) for name in DIMENSIONS],
        widget=forms.CheckboxSelectMultiple,
    )

    def __init__(self, query: QueryDict) -> None:
        data = query.copy()
        data.setdefault("range", RANGE_DEFAULT)
        data.setdefault("view", "attributed")
        if "by" not in data:
            data.setlist("by", ["tenant"])
        super().__init__(data)
        for name in ("range", "step", "view", "by"):
            self.fields[name].widget.attrs["data-submit"] = ""

    def values(self) -> dict[str, Any]:
        """The accepted choices; a value that is no choice is the default."""
        self.is_valid()
        chosen = self.cleaned_data
        range_name = chosen.get("range") or RANGE_DEFAULT
        is_long = RANGES[range_name] > timedelta(days=2)
        return {
            "range": range_name,
            "step": chosen.get("step") or ("day" if is_long else "hour"),
            "view": chosen.get("view") or "attributed",
            "by": chosen.get("by") or ["tenant"],
        }


@operator_required
@chart_page
@require_safe
def usage(request: HttpRequest) -> HttpResponse:
    """Groups by cost, their steps as a chart, or the rows as a file."""
    form = UsageFilter(request.GET)
    chosen = form.values()
    now = timezone.now()
    names = [name for name in DIMENSIONS if name in chosen["by"]]
    found = read(now, RANGES[chosen["range"]], chosen["step"], names)
    rows = [shown(row, names, chosen) for row in found.rows]
    if request.GET.get("format") in exports.KINDS:
        flat = [periods.flat(row["row"], names, row["parts"]) for row in rows]
        columns = list(periods.flat(periods.Row(("", "", ""), CostLine(), None), names, BLANK))
        return exports.download(flat, columns, request.GET["format"], "usage")
    traces = traces_of(found, names, chosen["view"])
    context = {
        "page": "usage",
        "form": form,
        "chosen": chosen,
        "names": names,
        "rows": rows,
        "total": {
            **summary(found.total, chosen["view"]),
            "change_ratio": periods.change_ratio(
                periods.usd_of(found.total, chosen["view"]),
                periods.usd_of(found.total_before, chosen["view"]),
            ),
            "usd_before": periods.usd_of(found.total_before, chosen["view"]),
        },
        "traces": traces,
        "bars": json.dumps({"x": [at.isoformat() for at in found.steps], "traces": traces}),
        "steps": steps_table(found, chosen["view"]),
        "query": urlencode(
            [
                (k, v)
                for k in request.GET
                for v in request.GET.getlist(k)
                if v and k not in ("format", "page")
            ]
        ),
    }
    is_part = bool(getattr(request, "htmx", False))
    return render(request, f"console/usage.html{'#results' if is_part else ''}", context)


BLANK = dict.fromkeys(DIMENSIONS, "")


def read(now: datetime, length: timedelta, step: periods.Step, names: list[Dimension]) -> Usage:
    """The period that ends now, from two queries that also read the period before."""
    since = now.astimezone(UTC) - length
    costs, gpus = facts_between(since - length, now)
    return periods.of_period(costs, gpus, since, now, step, names)


def shown(row: periods.Row, names: list[Dimension], chosen: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it, with the address of its requests."""
    view = chosen["view"]
    before = 0.0 if row.before is None else periods.usd_of(row.before, view)
    parts = dict(zip(DIMENSIONS, row.key, strict=True))
    history = HISTORY_RANGE.get(chosen["range"], chosen["range"])
    filters = [(name, parts[name]) for name in ("tenant", "class") if parts[name]]
    return {
        **summary(row.line, view),
        "row": row,
        "parts": parts,
        "names": [parts[name] for name in names],
        "usd_before": before,
        "change_ratio": periods.change_ratio(periods.usd_of(row.line, view), before),
        "requests_url": f"{reverse('pages:history')}?{urlencode([*filters, ('range', history)])}",
    }


def summary(line: CostLine, view: View) -> dict[str, Any]:
    """The figures of a line in the chosen view."""
    dollars = periods.usd_of(line, view)
    return {
        "line": line,
        "usd": dollars,
        "idle_ratio": line.idle_gpu_s / line.gpu_s if line.gpu_s else None,
        "usd_per_million": line.per_million(dollars, line.tokens),
        "usd_per_million_output": line.per_million(dollars, line.output_tokens),
    }


def title_of(key: Key, names: list[Dimension]) -> str:
    """`acme / m / interactive`, of the dimensions that are grouped by."""
    parts = dict(zip(DIMENSIONS, key, strict=True))
    return " / ".join(parts[name] for name in names)


def traces_of(found: Usage, names: list[Dimension], view: View) -> list[dict[str, Any]]:
    """Dollars of each step by group, the dearest groups apart and the others in one."""
    keys = [row.key for row in found.rows if periods.usd_of(row.line, view) > 0.0]
    groups = [(title_of(key, names), [key]) for key in keys[:TRACES_MAX]]
    if keys[TRACES_MAX:]:
        groups.append((f"{len(keys) - TRACES_MAX} more", keys[TRACES_MAX:]))
    traces = []
    for index, (name, members) in enumerate(groups):
        values = [
            sum(periods.usd_of(lines[key], view) for key in members if key in lines)
            for lines in found.lines_by_step
        ]
        traces.append({"name": name, "colour": index + 1, "y": values})
    return traces


def steps_table(found: Usage, view: View) -> list[dict[str, Any]]:
    """Sums of the newest steps, the newest first."""
    made = []
    for at, lines in list(zip(found.steps, found.lines_by_step, strict=True))[-STEPS_IN_TABLE:]:
        total = CostLine()
        for line in lines.values():
            total.add(line)
        made.append({"at": at, **summary(total, view)})
    return made[::-1]
