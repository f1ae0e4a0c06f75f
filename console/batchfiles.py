"""Submitted batch files: every line is checked before the first is stored.

Lines have OpenAI's batch format. Limits: reliability.md §4 and OpenAI's own (50,000 lines, 200 MB).
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from django.db import transaction

from console.apierrors import ApiError
from console.batchresults import stored_path, write_whole
from console.caps import load_json, quote
from console.models import Batch, BatchLine, File, Tenant
from console.models.files import BATCH_ENDED
from console.quotes import SLACK_MAX, Quote, Work, work_of
from console.quotes import quote as quote_work
from controlplane.certificate import Admitted, Refused

FILE_BYTES_MAX = 200 * 1000 * 1000
LINE_BYTES_MAX = 1 << 20
LINES_MAX = 50_000
CUSTOM_ID_CHARS_MAX = 64
OPEN_BATCHES_MAX = 64  # of one tenant; together they bound the rows that wait
ERRORS_MAX = 100  # mistakes listed for one file
INSERT_ROWS = 500
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
WINDOW_MIN, WINDOW_MAX = timedelta(minutes=1), timedelta(days=7)
_WINDOW = re.compile(r"^([1-9][0-9]{0,5})([smhd])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
PREFIX_BYTES, PREFIX_BLOCKS = 256, 16  # of a prompt, that lines are ordered by
_LINE_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class LineError:
    """A mistake in a submitted file; `line` counts from 1, None means the file as a whole."""

    code: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Line:
    """A valid line."""

    custom_id: str
    url: str
    model_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """A valid file: what all its lines have in common, and how many there are."""

    url: str
    model_id: str
    num_lines: int
    sizes: tuple[tuple[int, int | None], ...]  # (prompt bytes, output limit) of each line


@dataclass(frozen=True, slots=True)
class Invalid:
    """A file that is not accepted, with its first mistakes."""

    errors: tuple[LineError, ...]


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A valid file whose window cannot be promised."""

    quote: Quote

    def __str__(self) -> str:
        refused = self.quote.outcome
        assert isinstance(refused, Refused), refused
        why = (
            f"needs {refused.need_s:.0f} GPU-seconds by then, batches before it included;"
            f" {refused.low_s:.0f} are certain"
        )
        if refused.earliest_s is None:
            return f"{why}; no deadline within 7 days is possible"
        return f"{why}; the earliest possible deadline is {in_words(refused.earliest_s)} from now"


def window_of(text: str) -> timedelta | None:
    """`90m`, `4h`, `7d`: between a minute and 7 days, else None."""
    match = _WINDOW.match(text)
    if match is None:
        return None
    window = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return window if WINDOW_MIN <= window <= WINDOW_MAX else None


def in_words(seconds: float) -> str:
    """`45m`, `3h20m`, `2d4h`: as `window_of` could have been given, rounded up to minutes."""
    minutes = -int(-seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "m")]
    return "".join(f"{n}{unit}" for n, unit in parts if n) or "0m"


def submit(
    tenant: Tenant, path: Path, window: str, now: datetime, model_ids: Iterable[str]
) -> Batch | Invalid | Infeasible:
    """Keep a copy of the file, check the copy, promise its window and store its lines, all or
    nothing. While nothing has been measured a batch is taken without a promise."""
    length = window_of(window)
    assert length is not None, window
    if tenant.batches.exclude(status__in=BATCH_ENDED).count() >= OPEN_BATCHES_MAX:
        message = f"{tenant.slug} has {OPEN_BATCHES_MAX} open batches already"
        return Invalid((LineError("too_many_batches", message),))
    file_id = f"file-{secrets.token_hex(12)}"
    stored = stored_path(tenant.slug, file_id)
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return Invalid((LineError("file_too_large", f"more than {FILE_BYTES_MAX} bytes"),))
        with path.open("rb") as source:
            num_bytes = write_whole(stored, iter(lambda: source.read(1 << 20), b""))
    except OSError as error:
        return Invalid((LineError("file_unreadable", f"{path}: {error.strerror}"),))
    known = frozenset(model_ids)
    summary = validate(stored, known)
    if isinstance(summary, Invalid):
        stored.unlink()
        return summary
    with transaction.atomic():  # one at a time: two files may not be promised the same capacity
        work = work_of(summary.sizes, summary.model_id)
        quoted = quote_work(summary.model_id, work, length.total_seconds(), now)
        if quoted is not None and isinstance(quoted.outcome, Refused):
            stored.unlink()
            return Infeasible(quoted)
        values = _quoted(work, quoted, now)
        batch = _create(tenant, path.name, stored, num_bytes, summary, window, now, values)
        rows = (
            BatchLine(
                batch=batch,
                line_index=index,
                custom_id=line.custom_id,
                model_id=line.model_id,
                body=line.body,
                prefix_key=prefix_key(line.body),
            )
            for index, line in enumerate(_valid_lines(stored, known))
        )
        while part := list(islice(rows, INSERT_ROWS)):
            BatchLine.objects.bulk_create(part)
    return batch


def quote_file(
    path: Path, window: str, now: datetime, model_ids: Iterable[str]
) -> Quote | Invalid | None:
    """What `submit` would promise; nothing is kept. None while nothing has been measured."""
    length = window_of(window)
    assert length is not None, window
    try:
        summary = validate(path, frozenset(model_ids))
    except OSError as error:
        return Invalid((LineError("file_unreadable", f"{path}: {error.strerror}"),))
    if isinstance(summary, Invalid):
        return summary
    work = work_of(summary.sizes, summary.model_id)
    return quote_work(summary.model_id, work, length.total_seconds(), now)


def _create(
    tenant: Tenant,
    filename: str,
    stored: Path,
    num_bytes: int,
    summary: Summary,
    window: str,
    now: datetime,
    values: dict[str, Any],
) -> Batch:
    length = window_of(window)
    assert length is not None, window
    input_file = File.objects.create(
        file_id=stored.stem,
        tenant=tenant,
        filename=filename[:255],
        purpose="batch",
        path=str(stored),
        num_bytes=num_bytes,
        created_at=now,
    )
    return Batch.objects.create(
        batch_id=f"batch_{secrets.token_hex(12)}",
        tenant=tenant,
        input_file=input_file,
        endpoint=summary.url,
        model_id=summary.model_id,
        completion_window=window,
        num_lines=summary.num_lines,
        created_at=now,
        expires_at=now + length,
        **values,
    )


def _quoted(work: Work, quoted: Quote | None, now: datetime) -> dict[str, Any]:
    """The columns of a new batch's quote."""
    values: dict[str, Any] = {
        "line_tokens": work.line_tokens,
        "line_tokens_max": work.line_tokens_max,
    }
    if quoted is not None and isinstance(quoted.outcome, Admitted):
        slack = min(quoted.outcome.slack, SLACK_MAX)
        values |= {
            "expected_s": quoted.finish.expected_s,
            "finish_from": now + timedelta(seconds=quoted.finish.from_s),
            "finish_by": now + timedelta(seconds=quoted.finish.by_s),
            "eta": now + timedelta(seconds=quoted.finish.expected_s),
            "quoted_slack": slack,
            "slack": slack,
        }
    return values


def prompt_of(body: dict[str, Any]) -> bytes:
    """What a line begins with, byte for byte, for its size and its place beside others."""
    return json.dumps(body.get("messages", body.get("prompt")), ensure_ascii=False).encode()


def prefix_key(body: dict[str, Any]) -> str:
    """Sorting by it walks the tree of common prefixes depth first: four digits of a chained hash
    for each leading block of the prompt."""
    prompt, digits, chain = prompt_of(body), "", b""
    for start in range(0, PREFIX_BLOCKS * PREFIX_BYTES, PREFIX_BYTES):
        if start >= len(prompt):
            break
        chain = hashlib.sha256(chain + prompt[start : start + PREFIX_BYTES]).digest()
        digits += chain.hex()[:4]
    return digits


def _output_limit(body: dict[str, Any]) -> int | None:
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    return limit if isinstance(limit, int) and limit > 0 else None


def validate(path: Path, model_ids: frozenset[str]) -> Summary | Invalid:
    """What a file holds, or what is wrong with it. One endpoint and one model per file; memory is
    bounded by one line and all custom ids."""
    errors: list[LineError] = []
    seen: set[str] = set()
    first: Line | None = None
    sizes: list[tuple[int, int | None]] = []
    for number, raw in _raw_lines(path):
        if number > LINES_MAX:
            errors.append(LineError("too_many_lines", f"more than {LINES_MAX} lines"))
            break
        line = parse_line(raw, number, model_ids)
        if isinstance(line, Line):
            line = _check_against(line, number, seen, first)
        if isinstance(line, Line):
            seen.add(line.custom_id)
            sizes.append((len(prompt_of(line.body)), _output_limit(line.body)))
            first = first or line
            continue
        errors.append(line)
        if line.code == "line_too_long" or len(errors) >= ERRORS_MAX:
            break
    if errors:
        return Invalid(tuple(errors))
    if first is None:
        return Invalid((LineError("empty_file", "no request in this file"),))
    return Summary(first.url, first.model_id, len(seen), tuple(sizes))


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank, cut one byte above LINE_BYTES_MAX."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LINE_BYTES_MAX + 1):
            number += 1
            if raw.strip():
                yield number, raw


def _valid_lines(path: Path, model_ids: frozenset[str]) -> Iterator[Line]:
    """The lines of a file that `validate` has accepted."""
    for number, raw in _raw_lines(path):
        line = parse_line(raw, number, model_ids)
        assert isinstance(line, Line), f"{path} line {number} changed after it was checked"
        yield line


def parse_line(raw: bytes, number: int, model_ids: frozenset[str]) -> Line | LineError:
    """One line on its own; its body is read as strictly as a body of `/v1`."""
    if len(raw) > LINE_BYTES_MAX:
        return LineError("line_too_long", f"more than {LINE_BYTES_MAX} bytes", number)
    row = load_json(raw)
    if isinstance(row, ApiError):
        return LineError("invalid_json", row.message, number)
    unknown = sorted(set(row) - _LINE_KEYS)
    if unknown:
        return LineError("unknown_field", f"unknown field {quote(unknown[0])}", number)
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= CUSTOM_ID_CHARS_MAX:
        message = f"custom_id must be a string of 1 to {CUSTOM_ID_CHARS_MAX} characters"
        return LineError("invalid_custom_id", message, number)
    if row.get("method") != "POST":
        return LineError("invalid_method", "method must be POST", number)
    if row.get("url") not in ENDPOINTS:
        return LineError("invalid_url", f"url must be one of {', '.join(ENDPOINTS)}", number)
    if not isinstance(body, dict):
        return LineError("invalid_body", "body must be an object", number)
    model_id = body.get("model")
    if not isinstance(model_id, str) or model_id not in model_ids:
        return LineError("model_not_found", f"no model {quote(str(model_id))}", number)
    if body.get("stream"):
        return LineError("invalid_body", "batch lines cannot stream", number)
    return Line(custom_id, row["url"], model_id, body)


def _check_against(line: Line, number: int, seen: set[str], first: Line | None) -> Line | LineError:
    """What a line may not be beside the others."""
    if line.custom_id in seen:
        return LineError("duplicate_custom_id", f"custom_id {quote(line.custom_id)} again", number)
    if first is not None and line.url != first.url:
        return LineError("mismatched_url", f"url differs from the first line's {first.url}", number)
    if first is not None and line.model_id != first.model_id:
        message = f"model differs from the first line's {first.model_id}"
        return LineError("mismatched_model", message, number)
    return line
