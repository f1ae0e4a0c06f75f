"""What a batch file may hold: every line is checked before the first is stored.

Lines have OpenAI's batch format. Limits: reliability.md §4 and OpenAI's own (50,000 lines, 200 MB).
Pure, so that `python -m console.batchcheck FILE` can do it in a process of its own, with limits on
its memory and time: model ids as a JSON list on stdin, a summary or mistakes as JSON on stdout.
"""

import dataclasses
import hashlib
import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console.apierrors import ApiError
from console.caps import load_json, quote

FILE_BYTES_MAX = 200 * 1000 * 1000
LINE_BYTES_MAX = 1 << 20
LINES_MAX = 50_000
CUSTOM_ID_CHARS_MAX = 64
ERRORS_MAX = 100  # mistakes listed for one file
MEMORY_BYTES_MAX = 1 << 30  # of address space
CPU_S_MAX = 120
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
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


def valid_lines(path: Path, model_ids: frozenset[str]) -> Iterator[Line]:
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


def main() -> None:
    """The child process; see the module."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    found = validate(Path(sys.argv[1]), frozenset(json.load(sys.stdin)))
    print(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main()
