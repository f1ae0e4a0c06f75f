"""Numbers as operators read them: the same wording as static/console/format.js.

Every filter takes None for "nothing measured" and answers NO_DATA; none ever shows NaN.
"""

import math
from datetime import datetime
from typing import Any

from django import template
from django.utils import timezone

register = template.Library()

NO_DATA = "no data"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
STATUS_WORDS = {  # status -> (icon in _icons.html, word)
    "ok": ("ok", "ok"),
    "missed": ("missed", "missed"),
    "burning": ("warn", "burning"),
    "firing": ("missed", "firing"),
    "acknowledged": ("warn", "acknowledged"),
    "resolved": ("ok", "resolved"),
    "no_data": ("none", "no data"),
    "live": ("ok", "live"),
    "suspect": ("warn", "suspect"),
    "loading": ("drain", "loading"),
    "draining": ("drain", "draining"),
    "drained": ("drain", "drained"),
    "lost": ("missed", "lost"),
    "completed": ("ok", "completed"),
    "cancelled": ("none", "cancelled"),
    "failed": ("missed", "failed"),
    "rejected": ("warn", "rejected"),
    "expired": ("warn", "expired"),
    "running": ("run", "running"),
    "claimed": ("run", "running"),
    "validating": ("run", "validating"),
    "in_progress": ("run", "in progress"),
    "finalizing": ("run", "finalizing"),
    "cancelling": ("drain", "cancelling"),
    "active": ("ok", "active"),
    "expiring": ("warn", "ends soon"),
    "revoked": ("none", "revoked"),
    "disabled": ("none", "disabled"),
    "pending": ("none", "pending"),
    "queued": ("none", "queued"),
}
_UNKNOWN = ("none", "unknown")


def _number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if value is None or value == "" or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


@register.filter
def ms(value: Any) -> str:
    """Milliseconds: `4.2 ms`, `182 ms`, `1.24 s`, `12.4 s`."""
    number = _number(value)
    if number is None:
        return NO_DATA
    if number == 0:
        return "0 ms"
    if number < 10:
        return f"{number:.1f} ms"
    if number < 1_000:
        return f"{number:.0f} ms"
    return f"{number / 1_000:.2f} s" if number < 10_000 else f"{number / 1_000:.1f} s"


@register.filter
def ms_of_s(value: Any) -> str:
    """Seconds from the core, shown as milliseconds or seconds."""
    number = _number(value)
    return NO_DATA if number is None else ms(number * 1_000)


@register.filter
def rate(value: Any) -> str:
    """Events per second without the unit: `0`, `4.2`, `1,820`, `12.3k`."""
    number = _number(value)
    if number is None:
        return NO_DATA
    if number == 0:
        return "0"
    if number < 10:
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 10_000 else f"{number / 1_000:,.1f}k"


@register.filter
def count(value: Any) -> str:
    """A whole number with thousands separators."""
    number = _number(value)
    return NO_DATA if number is None else f"{number:,.0f}"


@register.filter
def usd(value: Any) -> str:
    """Dollars with the digits that matter: `$12.40`, `$0.128`, `$0.0031`."""
    number = _number(value)
    if number is None:
        return NO_DATA
    if number == 0:
        return "$0"
    digits = 2 if number >= 1 else 3 if number >= 0.01 else 4
    return f"${number:,.{digits}f}"


@register.filter
def percent(ratio: Any) -> str:
    """A ratio 0–1 as a percentage: `98.7 %`, `100 %`, `0 %`."""
    number = _number(ratio)
    if number is None:
        return NO_DATA
    return f"{number * 100:.0f} %" if number in (0, 1) else f"{number * 100:.1f} %"


@register.filter
def share(ratio: Any) -> str:
    """A ratio as the width of a bar, kept within 0–100; nothing measured is an empty bar."""
    number = _number(ratio) or 0.0
    return f"{min(max(number, 0.0), 1.0) * 100:.1f}%"


@register.filter
def size(num_bytes: Any) -> str:
    """Bytes in binary units."""
    number = _number(num_bytes)
    if number is None:
        return NO_DATA
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


@register.filter
def age(seconds: Any) -> str:
    """How long ago, coarsely: `3 s`, `4 min`, `2 h`, `3 d`."""
    number = _number(seconds)
    if number is None:
        return NO_DATA
    for unit_s, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if number >= unit_s:
            return f"{number / unit_s:.0f} {name}"
    return f"{max(number, 0):.0f} s"


@register.filter
def ago(moment: datetime | None) -> str:
    """Age of a stored time."""
    return NO_DATA if moment is None else age((timezone.now() - moment).total_seconds())


@register.filter
def dash(text: str) -> str:
    """NO_DATA as an en dash, for dense tables whose caption says what it means."""
    return "–" if text == NO_DATA else text


@register.filter
def ratio(value: Any, whole: Any) -> float | None:
    """value / whole, None when either is unknown or the whole is nothing."""
    part, total = _number(value), _number(whole)
    return None if part is None or not total else part / total


@register.inclusion_tag("console/_status.html")
def status(value: str, path: str = "") -> dict[str, str]:
    """Colour, icon and word of a status; `path` names the live value that replaces it."""
    icon, word = STATUS_WORDS.get(value, _UNKNOWN)
    return {"value": value, "icon": icon, "word": word, "path": path}
