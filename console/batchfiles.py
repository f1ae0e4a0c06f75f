"""Submitted batch files: every line is checked before the first is stored.

Lines have OpenAI's batch format. Limits: reliability.md §4 and OpenAI's own (50,000 lines, 200 MB).
"""

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

FILE_BYTES_MAX = 200 * 1000 * 1000
LINE_BYTES_MAX = 1 << 20
LINES_MAX = 50_000
CUSTOM_ID_CHARS_MAX = 64
OPEN_BATCHES_MAX = 64  # of one tenant; together they bound the rows that wait
ERRORS_MAX = 100  # mistakes listed for one file
INSERT_ROWS = 500
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
WINDOWS = {
    "1h": timedelta(hours=1),
    "4h": timedelta(hours=4),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
}
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


@dataclass(frozen=True, slots=True)
class Invalid:
    """A file that is not accepted, with its first mistakes."""

    errors: tuple[LineError, ...]


def submit(
    tenant: Tenant, path: Path, window: str, now: datetime, model_ids: Iterable[str]
) -> Batch | Invalid:
    """Keep a copy of the file, check the copy and store its lines, all or nothing."""
    assert window in WINDOWS, window
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
    with transaction.atomic():
        batch = _create(tenant, path.name, stored, num_bytes, summary, window, now)
        rows = (
            BatchLine(
                batch=batch,
                line_index=index,
                custom_id=line.custom_id,
                model_id=line.model_id,
                body=line.body,
            )
            for index, line in enumerate(_valid_lines(stored, known))
        )
        while part := list(islice(rows, INSERT_ROWS)):
            BatchLine.objects.bulk_create(part)
    return batch


def _create(
    tenant: Tenant,
    filename: str,
    stored: Path,
    num_bytes: int,
    summary: Summary,
    window: str,
    now: datetime,
) -> Batch:
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
        expires_at=now + WINDOWS[window],
    )


def validate(path: Path, model_ids: frozenset[str]) -> Summary | Invalid:
    """What a file holds, or what is wrong with it. One endpoint and one model per file; memory is
    bounded by one line and all custom ids."""
    errors: list[LineError] = []
    seen: set[str] = set()
    first: Line | None = None
    for number, raw in _raw_lines(path):
        if number > LINES_MAX:
            errors.append(LineError("too_many_lines", f"more than {LINES_MAX} lines"))
            break
        line = parse_line(raw, number, model_ids)
        if isinstance(line, Line):
            line = _check_against(line, number, seen, first)
        if isinstance(line, Line):
            seen.add(line.custom_id)
            first = first or line
            continue
        errors.append(line)
        if line.code == "line_too_long" or len(errors) >= ERRORS_MAX:
            break
    if errors:
        return Invalid(tuple(errors))
    if first is None:
        return Invalid((LineError("empty_file", "no request in this file"),))
    return Summary(first.url, first.model_id, len(seen))


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
