"""Strict JSON: what a request body may look like before anybody interprets it.

Python's `json` takes NaN, 1e999, duplicate keys and lone surrogates, recurses as deep as it is told
to, and turns 9 MB of `{}` into 237 MB of objects. One pass over the bytes bounds depth and
size first; the parse that follows has a hook for each remaining trap.
"""

import json
import math
import re
from typing import Any

from console.apierrors import ApiError, invalid

BODY_BYTES_MAX = 4 << 20
JSON_DEPTH_MAX = 32
JSON_NODES_MAX = 20_000
INTEGER_MAX = 1 << 53  # beyond it JSON readers disagree
INTEGER_DIGITS_MAX = 16
QUOTED_CHARS_MAX = 80  # how much of a client's text an error message repeats

# Strings whole, so that brackets inside them do not count. Possessive: linear on any input.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
_SUSPECT_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_BOM = b"\xef\xbb\xbf"


class _BadJSON(ValueError):
    """Raised by the hooks of the parse, turned into an ApiError by `load_json`."""


def load_json(raw: bytes) -> dict[str, Any] | ApiError:
    """The JSON object in a body, or why it is refused. Integers are within 2^53, floats finite,
    keys unique, strings valid Unicode without NUL."""
    if len(raw) > BODY_BYTES_MAX:
        return ApiError(
            413, "request_too_large", f"The body is larger than {BODY_BYTES_MAX} bytes."
        )
    if raw.startswith(_BOM):
        return invalid("The body starts with a byte order mark; send plain UTF-8.")
    problem = _structure_problem(raw)
    if problem is not None:
        return invalid(problem)
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
        if _SUSPECT_ESCAPE.search(raw):
            _check_strings(value)
    except UnicodeDecodeError as error:
        return invalid(f"The body is not valid UTF-8 at byte {error.start}.")
    except _BadJSON as error:
        return invalid(str(error))
    except json.JSONDecodeError as error:
        return invalid(f"The body is not valid JSON: {error.msg} at character {error.pos}.")
    if not isinstance(value, dict):
        return invalid("The body must be a JSON object.")
    return value


def quote(text: str) -> str:
    """Client text as it may stand in an error message: short, printable, on one line."""
    return ascii(text[:QUOTED_CHARS_MAX]) + ("…" if len(text) > QUOTED_CHARS_MAX else "")


def _structure_problem(raw: bytes) -> str | None:
    """Depth and number of values, without building any. Work is bounded by JSON_NODES_MAX."""
    depth = depth_max = 0
    nodes = strings = 0
    for match in _STRUCTURE.finditer(raw):
        mark = raw[match.start()]
        if mark == 0x22:  # a quoted string: a key or a value, so at most two for each node
            strings += 1
        elif mark in b"[{":
            depth += 1
            nodes += 1
            depth_max = max(depth, depth_max)
        elif mark in b"]}":
            depth -= 1
        else:
            nodes += 1
        if depth_max > JSON_DEPTH_MAX:
            return f"The JSON is nested deeper than {JSON_DEPTH_MAX} levels."
        if nodes > JSON_NODES_MAX or strings > 2 * JSON_NODES_MAX:
            return f"The JSON has more than {JSON_NODES_MAX} values."
        if depth < 0:
            return "The body is not valid JSON: a bracket closes that was never opened."
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _BadJSON(f"The key {quote(key)} appears twice in one JSON object.")
            seen.add(key)
    return value


def _constant(name: str) -> Any:
    raise _BadJSON(f"{name} is not a JSON number.")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > INTEGER_DIGITS_MAX or abs(int(digits)) > INTEGER_MAX:
        raise _BadJSON(f"The integer {quote(digits)} is outside of -2^53 to 2^53.")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _BadJSON(f"The number {quote(digits)} is too large.")
    return value


def _check_strings(value: Any) -> None:
    """Walk all strings for what an escape can smuggle in; depth and size are bounded already."""
    if isinstance(value, str):
        if "\x00" in value:
            raise _BadJSON("A string contains the character NUL.")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise _BadJSON("A string contains half of a surrogate pair.")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
