"""One request's explanation as pages, `/api/v1` and `manage.py explain` show it.

What is stored is a `controlplane.decisions.Explanation` in seconds; here it is found, in the
database or in the running plane, and put into words, rows and milliseconds.
"""

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from console import state
from console.fleet import Fleet
from console.models import RequestRecord
from controlplane.decisions import Explanation

MS_PER_S = 1000.0
DIGITS = 9  # of a converted time
_SECONDS, _MILLISECONDS = re.compile(r"_s(?=_|$)"), re.compile(r"_ms(?=_|$)")  # in names
BOUNDS = {
    "only_one": "the only worker that could take it",
    "cost": "all in time with room to spare: the cheapest, and of equals the fullest",
    "score": "in time, but not by much: the best of latency and load",
    "damage": "nobody was predicted to be in time: where it does least damage",
    "batch": "a batch line: where the fewest of them run",
    "filters": "no worker passed the filters",
    "hold": "too much was queued at every worker",
    "order": "others were before it",
}
CAUSES = {
    "submitted": "",
    "replaced": "moved before its start",
    "refused": "its worker refused it",
    "failover": "its worker was lost",
    "handoff_failed": "its KV transfer failed",
    "planned": "its worker was to do something else",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A promise, what was predicted of it, and what came. Seconds; None: nothing to show."""

    name: str
    target_s: float | None
    predicted_s: float | None
    predicted_s_p99: float | None
    measured_s: float | None

    @property
    def is_over(self) -> bool:
        return None not in (self.target_s, self.measured_s) and self.measured_s > self.target_s

    @property
    def error(self) -> str:
        """How far the prediction was off, in words."""
        if self.predicted_s is None or self.measured_s is None:
            return ""
        off_s = self.measured_s - self.predicted_s
        if self.measured_s <= 0.0 or abs(off_s) < 0.0005:
            return "as predicted"
        share = abs(off_s) / self.measured_s
        return f"{share * 100:.0f} % {'slower' if off_s > 0 else 'faster'} than predicted"


async def _ask(fleet: Fleet, request_id: str) -> Explanation | None:
    return fleet.explain(request_id)


def of_running(request_id: str) -> dict[str, Any] | None:
    """From the plane of this process. Raises TimeoutError when its loop does not answer."""
    current = state.get()
    found = None if current is None else current.call(_ask, current.fleet, request_id)
    return None if found is None else msgspec.to_builtins(found)


def find(request_id: str) -> dict[str, Any] | None:
    """The stored explanation, else that of a request which has not ended."""
    stored = RequestRecord.objects.filter(request_id=request_id).values_list("decision", flat=True)
    decision = stored.first()
    return decision or of_running(request_id)


def comparisons(explained: dict[str, Any]) -> list[Comparison]:
    """TTFT, ITL and, for a prompt computed apart, its transfer."""
    outcome = explained.get("outcome")
    if not outcome:
        return []
    rows = [
        Comparison(
            "TTFT",
            explained["ttft_s_target"],
            outcome["ttft_s_predicted"],
            outcome["ttft_s_p99_predicted"],
            outcome["ttft_s"],
        ),
        Comparison(
            "ITL p99",
            explained["itl_s_target"],
            outcome["itl_s_predicted"],
            None,
            outcome["itl_s_p99"],
        ),
    ]
    if outcome["transfer_s_predicted"] is not None:
        predicted_s, took_s = outcome["transfer_s_predicted"], outcome["transfer_s"]
        rows.append(Comparison("KV transfer", None, predicted_s, None, took_s))
    return rows


def decision_rows(explained: dict[str, Any]) -> list[dict[str, Any]]:
    """Each decision with its chosen workers marked, and codes as words."""
    rows = []
    for record in explained.get("records", ()):
        placement = record.get("placement") or {}
        chosen = {placement.get("prefill_worker"), placement.get("decode_worker")} - {None}
        words = {
            "bound_text": BOUNDS.get(record["bound"], record["bound"]),
            "cause_text": CAUSES[record["cause"]],
        }
        rows.append({**record, **words, "chosen": chosen})
    return rows


def in_ms(explained: dict[str, Any]) -> dict[str, Any]:
    """As public JSON has it: milliseconds, and the names say so."""
    shown: dict[str, Any] = _in_unit(explained, _SECONDS, "_ms", MS_PER_S)
    return shown


def in_seconds(shown: dict[str, Any]) -> dict[str, Any]:
    """Public JSON back in seconds."""
    explained: dict[str, Any] = _in_unit(shown, _MILLISECONDS, "_s", 1.0 / MS_PER_S)
    return explained


def _in_unit(value: Any, unit: re.Pattern[str], name: str, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return [_in_unit(item, unit, name, factor) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        if not unit.search(key):
            found[key] = _in_unit(item, unit, name, factor)
        else:
            number = None if item is None else round(item * factor, DIGITS)
            found[unit.sub(name, key, count=1)] = number
    return found
