"""Submitted files are checked whole and strictly; result files are written whole."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from console import batchcheck, batchfiles
from console.batchcheck import (
    LINE_BYTES_MAX,
    Invalid,
    Line,
    LineError,
    Summary,
    parse_line,
    prompt_of,
    validate,
)
from console.batchresults import assemble, result_line, stored_path, write_whole
from console.models import Batch, BatchLine, File
from tests.console import rows

KNOWN = frozenset([rows.MODEL_ID, "other"])


@pytest.fixture(autouse=True)
def var(settings: Any, tmp_path: Path) -> Path:
    settings.SLACKWATER_VAR = tmp_path / "var"
    return settings.SLACKWATER_VAR


def raw(**changes: Any) -> bytes:
    row = {**rows.line("a"), **changes}
    return json.dumps({k: v for k, v in row.items() if v is not ...}).encode()


def test_a_valid_line_is_read() -> None:
    line = parse_line(raw(), 1, KNOWN)
    assert isinstance(line, Line)
    assert (line.custom_id, line.url, line.model_id) == ("a", "/v1/chat/completions", "tiny")
    assert line.body["max_tokens"] == 4


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"x", "invalid_json"),
        (b"[]", "invalid_json"),
        (b"\xff{}", "invalid_json"),
        (b'{"custom_id":"a","custom_id":"b"}', "invalid_json"),
        (raw(body={"model": "tiny", "temperature": float("nan")}), "invalid_json"),
        (raw(body={"model": "tiny", "prompt": "\x00"}), "invalid_json"),
        (raw(body={"model": "tiny", "prompt": "\ud800"}), "invalid_json"),
        (b'{"body":' + b"[" * 100_000 + b"}", "invalid_json"),
        (raw(extra=1), "unknown_field"),
        (raw(custom_id=...), "invalid_custom_id"),
        (raw(custom_id=""), "invalid_custom_id"),
        (raw(custom_id="x" * 65), "invalid_custom_id"),
        (raw(custom_id=7), "invalid_custom_id"),
        (raw(method="GET"), "invalid_method"),
        (raw(url="/v1/embeddings"), "invalid_url"),
        (raw(url="http://169.254.169.254/"), "invalid_url"),
        (raw(body=[]), "invalid_body"),
        (raw(body={}), "model_not_found"),
        (raw(body={"model": "secret"}), "model_not_found"),
        (raw(body={"model": ["tiny"]}), "model_not_found"),
        (raw(body={"model": "tiny", "stream": True}), "invalid_body"),
        (b" " * (LINE_BYTES_MAX + 1), "line_too_long"),
    ],
)
def test_a_bad_line_is_named(text: bytes, code: str) -> None:
    error = parse_line(text, 7, KNOWN)
    assert isinstance(error, LineError)
    assert (error.code, error.line) == (code, 7)
    assert str(error).startswith("line 7: ")
    assert len(str(error)) < 300


def file_of(tmp_path: Path, *lines: bytes) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_a_file_is_summed_up(tmp_path: Path) -> None:
    path = file_of(tmp_path, raw(), b"", b"  ", raw(custom_id="b"))
    size = (len(prompt_of(json.loads(raw())["body"])), 4)
    assert validate(path, KNOWN) == Summary("/v1/chat/completions", "tiny", 2, (size, size))


def codes(found: Summary | Invalid) -> list[tuple[str, int | None]]:
    assert isinstance(found, Invalid)
    return [(error.code, error.line) for error in found.errors]


def test_lines_of_a_file_fit_together(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        raw(),
        raw(),
        raw(custom_id="b", url="/v1/completions"),
        raw(custom_id="c", body={"model": "other"}),
        b"{",
    )
    assert codes(validate(path, KNOWN)) == [
        ("duplicate_custom_id", 2),
        ("mismatched_url", 3),
        ("mismatched_model", 4),
        ("invalid_json", 5),
    ]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert codes(validate(file_of(tmp_path, b"", b" "), KNOWN)) == [("empty_file", None)]


def test_the_limits_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchcheck, "LINES_MAX", 3)
    fits = file_of(tmp_path, *(raw(custom_id=f"c{i}") for i in range(3)))
    summary = validate(fits, KNOWN)
    assert isinstance(summary, Summary) and summary.num_lines == len(summary.sizes) == 3
    over = file_of(tmp_path, *(raw(custom_id=f"c{i}") for i in range(4)))
    assert codes(validate(over, KNOWN)) == [("too_many_lines", None)]
    monkeypatch.setattr(batchcheck, "ERRORS_MAX", 2)
    assert len(codes(validate(file_of(tmp_path, b"{", b"{", b"{"), KNOWN))) == 2


def test_a_line_without_an_end_costs_one_line_of_memory(tmp_path: Path) -> None:
    path = file_of(tmp_path, b"x" * (3 * LINE_BYTES_MAX))
    assert codes(validate(path, KNOWN)) == [("line_too_long", 1)]


@pytest.mark.django_db
def test_a_submitted_file_is_kept_privately_with_its_lines(tmp_path: Path, var: Path) -> None:
    batch = rows.make_batch(rows.make_tenant(), tmp_path, num_lines=3)
    stored = Path(batch.input_file.path)
    assert stored.is_relative_to(var / "files" / "acme")
    assert stored.read_bytes() == (tmp_path / "in.jsonl").read_bytes()
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert (batch.status, batch.num_lines, batch.model_id) == ("in_progress", 3, "tiny")
    assert (batch.expires_at - batch.created_at).total_seconds() == 86_400
    lines = list(batch.lines.order_by("line_index"))
    assert [(line.line_index, line.custom_id) for line in lines] == [
        (0, "c0"),
        (1, "c1"),
        (2, "c2"),
    ]
    assert lines[1].body["messages"][0]["content"] == "say c1"
    assert {line.status for line in lines} == {"pending"}


@pytest.mark.django_db
def test_a_refused_file_leaves_nothing(tmp_path: Path, var: Path) -> None:
    tenant = rows.make_tenant()
    for path in (file_of(tmp_path, raw(), b"{"), tmp_path / "absent.jsonl", tmp_path):
        outcome = batchfiles.submit(tenant, path, "24h", timezone.now(), KNOWN)
        assert isinstance(outcome, Invalid)
    assert not File.objects.exists()
    assert not Batch.objects.exists()
    assert [path for path in var.rglob("*") if path.is_file()] == []


@pytest.mark.django_db
def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batchfiles, "FILE_BYTES_MAX", 10)
    outcome = batchfiles.submit(
        rows.make_tenant(), file_of(tmp_path, raw()), "24h", timezone.now(), KNOWN
    )
    assert codes(outcome) == [("file_too_large", None)]


@pytest.mark.django_db
def test_a_tenant_has_at_most_so_many_open_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batchfiles, "OPEN_BATCHES_MAX", 2)
    tenant = rows.make_tenant()
    first = rows.make_batch(tenant, tmp_path)
    rows.make_batch(tenant, tmp_path)
    path = tmp_path / "in.jsonl"
    outcome = batchfiles.submit(tenant, path, "24h", timezone.now(), KNOWN)
    assert codes(outcome) == [("too_many_batches", None)]
    Batch.move(first.pk, ("in_progress",), "cancelled")
    rows.make_batch(tenant, tmp_path)


def test_a_whole_file_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    assert write_whole(path, [b"one", b"two"]) == 6
    assert write_whole(path, [b"three"]) == 5
    assert path.read_bytes() == b"three"
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


def test_a_failure_half_way_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_whole(path, [b"old"])

    def fail() -> Any:
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def end_lines(batch: Batch, *statuses: str) -> None:
    for line, status in zip(batch.lines.order_by("line_index"), statuses, strict=True):
        response = {"status_code": 200, "body": {"n": line.line_index}}
        error = {"code": "invalid_value", "message": "no"} if status == "failed" else None
        BatchLine.objects.filter(pk=line.pk).update(status=status, response=response, error=error)


def read(file: File | None) -> dict[str, Any]:
    assert file is not None
    lines = [json.loads(line) for line in Path(file.path).read_text().splitlines()]
    assert file.num_bytes == Path(file.path).stat().st_size
    return {line["custom_id"]: line for line in lines}


@pytest.mark.django_db
def test_results_go_to_an_output_and_an_error_file(tmp_path: Path) -> None:
    batch = rows.make_batch(rows.make_tenant(), tmp_path)
    end_lines(batch, "completed", "failed", "completed")
    ended = assemble(batch.pk, timezone.now())
    assert ended is not None
    assert ended.status == "completed"
    output, errors = read(ended.output_file), read(ended.error_file)
    assert list(output) == ["c0", "c2"]
    assert set(output["c0"]) == {"id", "custom_id", "response", "error"}
    assert output["c2"]["response"]["body"] == {"n": 2}
    assert errors["c1"]["error"] == {"code": "invalid_value", "message": "no"}


@pytest.mark.django_db
@pytest.mark.parametrize("status", ["pending", "claimed"])
def test_a_batch_with_a_line_left_does_not_end(tmp_path: Path, status: str) -> None:
    batch = rows.make_batch(rows.make_tenant(), tmp_path)
    end_lines(batch, "completed", status, "completed")
    assert assemble(batch.pk, timezone.now()) is None
    batch.refresh_from_db()
    assert batch.status == "in_progress"


@pytest.mark.django_db
def test_assembling_twice_gives_one_file_and_one_end(tmp_path: Path) -> None:
    batch = rows.make_batch(rows.make_tenant(), tmp_path)
    end_lines(batch, "completed", "completed", "completed")
    # A crash after the file was written and before the batch was ended:
    Batch.objects.update(status="finalizing")
    write_whole(stored_path("acme", f"file-{batch.batch_id[6:]}-output"), [b"half a fi"])
    ended = assemble(batch.pk, timezone.now())
    assert ended is not None
    assert assemble(batch.pk, timezone.now()) is None
    assert File.objects.filter(purpose="batch_output").count() == 1
    assert list(read(ended.output_file)) == ["c0", "c1", "c2"]


@pytest.mark.django_db
def test_unfinished_lines_say_why(tmp_path: Path) -> None:
    batch = rows.make_batch(rows.make_tenant(), tmp_path)
    end_lines(batch, "completed", "expired", "cancelled")
    ended = assemble(batch.pk, timezone.now())
    assert ended is not None
    assert ended.status == "expired"
    errors = read(ended.error_file)
    assert errors["c1"]["error"]["code"] == "batch_expired"
    assert errors["c2"]["error"]["code"] == "batch_cancelled"
    assert list(read(ended.output_file)) == ["c0"]


def test_a_result_is_one_line_whatever_the_text() -> None:
    line = BatchLine(pk=5, custom_id="a\nb\u2028", response={"t": "x\ny"}, status="completed")
    written = result_line(line)
    assert written.count(b"\n") == 1
    assert json.loads(written)["id"] == "batch_req_5"
