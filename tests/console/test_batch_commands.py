"""`manage.py batch`, `operator` and `seed_demo`: output, exit codes, repetition."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.utils import timezone

from console import batchresults
from console.auth import find_operator_token
from console.batchtexts import NOTHING_MEASURED
from console.models import (
    ApiToken,
    Batch,
    BatchLine,
    Model,
    PlanRecord,
    RequestRecord,
    Tenant,
)
from tests.console import rows

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def demo(settings: Any, tmp_path: Path) -> Tenant:
    settings.SLACKWATER_VAR = tmp_path / "var"
    rows.make_model()
    return rows.make_tenant("demo")


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    return rows.write_lines(tmp_path / "jobs.jsonl", [rows.line("a"), rows.line("b")])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*words: Any, out: io.StringIO | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    stdout, stderr = out or io.StringIO(), io.StringIO()
    try:
        call_command(*(str(word) for word in words), stdout=stdout, stderr=stderr)
    except SystemExit as end:
        return int(end.code or 0), stdout.getvalue(), stderr.getvalue()
    except CommandError as error:
        return error.returncode, stdout.getvalue(), str(error)
    return 0, stdout.getvalue(), stderr.getvalue()


def end(batch: Batch, *statuses: str) -> None:
    """As a serving process would end it."""
    for line, status in zip(batch.lines.order_by("pk"), statuses, strict=True):
        BatchLine.objects.filter(pk=line.pk).update(status=status, response={"n": 1})
    assert batchresults.assemble(batch.pk, timezone.now()) is not None


def test_a_job_is_submitted_watched_and_fetched(jobs: Path, tmp_path: Path) -> None:
    code, out, _ = run("batch", "submit", jobs)
    batch = Batch.objects.get()
    line = f"{batch.batch_id}  in_progress  0/2 done  0 failed  0 in flight\n"
    assert (code, out) == (0, f"{line}{NOTHING_MEASURED}\n")
    assert run("batch", "status", batch.batch_id)[:2] == (0, line)
    output = tmp_path / "out.jsonl"
    assert run("batch", "fetch", batch.batch_id, "-o", output)[0] == 1
    assert not output.exists()
    end(batch, "completed", "completed")
    code, out, _ = run("batch", "fetch", batch.batch_id, "-o", output)
    assert (code, out) == (0, f"output written to {output}\n")
    ids = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert ids == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_everything_can_be_had_as_json(jobs: Path, tmp_path: Path) -> None:
    submitted = json.loads(run("batch", "submit", jobs, "--json")[1])
    assert (submitted["status"], submitted["total"], submitted["pending"]) == ("in_progress", 2, 2)
    [listed] = json.loads(run("batch", "status", "--json")[1])
    assert listed == submitted == json.loads(run("batch", "status", listed["id"], "--json")[1])
    assert json.loads(run("batch", "cancel", listed["id"], "--json")[1])["status"] == "cancelled"
    fetched = json.loads(run("batch", "fetch", listed["id"], "-o", tmp_path / "o", "--json")[1])
    assert fetched["written"] == {"output": str(tmp_path / "o")}


def test_a_bad_file_is_a_usage_error_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"custom_id": 1}\n{\n')
    code, out, err = run("batch", "submit", path)
    assert (code, out) == (2, "")
    assert [line.split(":")[1] for line in err.splitlines()] == [" line 1", " line 2"]
    errors = json.loads(run("batch", "submit", path, "--json")[1])["errors"]
    assert [error["line"] for error in errors] == [1, 2]
    assert run("batch", "submit", tmp_path / "absent")[0] == 2
    assert not Batch.objects.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("submit", "{jobs}", "--tenant", "nobody"),
        ("status", "batch_none"),
        ("fetch", "batch_none", "-o", "/tmp/x"),
        ("cancel", "batch_none"),
    ],
)
def test_an_unknown_name_is_a_usage_error(jobs: Path, words: tuple[str, ...]) -> None:
    assert run("batch", *(word.format(jobs=jobs) for word in words))[0] == 2


def test_an_inactive_tenant_or_model_takes_no_jobs(jobs: Path) -> None:
    Model.objects.update(is_active=False)
    assert run("batch", "submit", jobs)[0] == 2
    Model.objects.update(is_active=True)
    Tenant.objects.update(is_active=False)
    assert run("batch", "submit", jobs)[0] == 2


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (("completed", "completed"), 0),
        (("completed", "failed"), 1),
        (("completed", "expired"), 3),
    ],
)
def test_the_exit_code_tells_how_it_ended(
    jobs: Path, tmp_path: Path, statuses: tuple[str, ...], code: int
) -> None:
    run("batch", "submit", jobs)
    batch = Batch.objects.get()
    end(batch, *statuses)
    assert run("batch", "status", batch.batch_id)[0] == code
    target, errors = tmp_path / "o", tmp_path / "e"
    assert run("batch", "fetch", batch.batch_id, "-o", target, "--errors", errors)[0] == code
    assert len(target.read_text().splitlines()) == statuses.count("completed")
    assert len(errors.read_text().splitlines()) == 2 - statuses.count("completed")


def test_a_cancelled_job_ends_at_once_when_nothing_is_in_hand(jobs: Path) -> None:
    run("batch", "submit", jobs)
    batch = Batch.objects.get()
    assert "cancelled" in run("batch", "cancel", batch.batch_id)[1]
    assert run("batch", "cancel", batch.batch_id)[0] == 1
    assert run("batch", "status", batch.batch_id)[0] == 1


def test_a_line_in_hand_keeps_a_cancelled_job_open(jobs: Path) -> None:
    run("batch", "submit", jobs)
    batch = Batch.objects.get()
    BatchLine.objects.filter(custom_id="a").update(status="claimed", claimed_by="h:1:1:x")
    assert "cancelling" in run("batch", "cancel", batch.batch_id)[1]
    assert batch.counts() | {"failed": 0} == {
        "pending": 0,
        "claimed": 1,
        "completed": 0,
        "failed": 0,
        "cancelled": 1,
        "expired": 0,
    }


def test_waiting_ends_with_the_job(jobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(seconds: float) -> None:
        end(Batch.objects.get(), "completed", "completed")

    clock = SimpleNamespace(sleep=work)  # the command reads nothing else of it
    monkeypatch.setattr("console.management.commands.batch.time", clock)
    code, out, _ = run("batch", "submit", jobs, "--wait")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].endswith("2 lines")
    assert lines[1] == NOTHING_MEASURED and "0/2 done" in lines[2]
    assert "2/2 done" in lines[-1]


def test_an_output_that_cannot_be_written_is_one_line(jobs: Path, tmp_path: Path) -> None:
    run("batch", "submit", jobs)
    batch = Batch.objects.get()
    end(batch, "completed", "completed")
    code, _, err = run("batch", "fetch", batch.batch_id, "-o", tmp_path / "no" / "folder")
    assert code == 1
    assert "No such file" in err


def test_a_terminal_gets_a_table(jobs: Path) -> None:
    run("batch", "submit", jobs)
    out = run("batch", "status", out=Terminal())[1]
    assert "┃" in out
    assert Batch.objects.get().batch_id in out


# --- operator ------------------------------------------------------------------------------------


def test_an_operator_gets_a_login_and_a_token() -> None:
    made = json.loads(run("operator", "create", "olga", "--json")[1])
    user = authenticate(username="olga", password=made["password"])
    assert user is not None
    assert user.is_staff
    token = find_operator_token(made["token"])
    assert token is not None
    assert token.user == user


def test_creating_again_keeps_the_password_and_adds_a_token() -> None:
    first = json.loads(run("operator", "create", "olga", "--json")[1])
    code, out, _ = run("operator", "create", "olga")
    assert code == 0
    assert "(unchanged)" in out
    assert "not shown again" in out
    assert authenticate(username="olga", password=first["password"]) is not None
    assert ApiToken.objects.count() == 2


def test_a_password_is_read_from_stdin_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("123\n"))
    code, _, err = run("operator", "create", "olga", "--password-stdin")
    assert code == 2
    assert "too short" in err
    assert not User.objects.exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("a fine long phrase\n"))
    assert run("operator", "create", "olga", "--password-stdin")[0] == 0
    assert authenticate(username="olga", password="a fine long phrase") is not None


@pytest.mark.parametrize("name", ["", "a b!", "<b>"])
def test_a_name_that_is_no_username_is_refused(name: str) -> None:
    assert run("operator", "create", name)[0] == 2
    assert not User.objects.exists()


# --- seed_demo -----------------------------------------------------------------------------------


def test_the_history_is_marked_old_and_made_once() -> None:
    code, out, _ = run("seed_demo")
    assert code == 0
    num = RequestRecord.objects.count()
    assert num > 500
    assert out == f"{num} requests of 7 days\n"
    assert not RequestRecord.objects.filter(is_demo_history=False).exists()
    assert not PlanRecord.objects.filter(is_demo_history=False).exists()
    newest = RequestRecord.objects.first()
    assert newest is not None
    assert newest.arrived_at < timezone.now()
    assert set(RequestRecord.objects.values_list("class_name", flat=True)) == {
        "interactive",
        "standard",
        "flex",
        "batch",
    }
    assert set(RequestRecord.objects.values_list("split", flat=True)) == {"local", "handoff"}
    assert run("seed_demo")[1] == "history is there already\n"
    assert RequestRecord.objects.count() == num


def test_the_same_seed_gives_the_same_history() -> None:
    def drawn(seed: int) -> list[tuple[Any, ...]]:
        RequestRecord.objects.all().delete()
        PlanRecord.objects.all().delete()
        Batch.objects.all().delete()
        rows.batchfiles.File.objects.all().delete()
        run("seed_demo", "--seed", seed, "--days", 1)
        columns = ("request_id", "class_name", "prompt_tokens", "ttft_ms", "split")
        return list(RequestRecord.objects.order_by("request_id").values_list(*columns))

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first


def test_live_rows_do_not_hinder_the_history_and_stay() -> None:
    RequestRecord.objects.create(request_id="g1-x", tenant_id="demo", arrived_at=timezone.now())
    run("seed_demo", "--days", 1)
    assert RequestRecord.objects.filter(is_demo_history=False).count() == 1
    assert RequestRecord.objects.filter(is_demo_history=True).exists()


@pytest.mark.parametrize("words", [("--days", "0"), ("--days", "32"), ("--tenant", "nobody")])
def test_impossible_wishes_are_usage_errors(words: tuple[str, str]) -> None:
    assert run("seed_demo", *words)[0] == 2
