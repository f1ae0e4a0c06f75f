"""Quotes of batches: measured capacity, promises that hold together, and what is told of them."""

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from console import batchcheck, batchclaims, batchfiles, quotes
from console.capacitybins import BIN_S, KEPT, add_harvest, capacity_of, start_of
from console.facts import HarvestFact
from console.models import Batch, BatchLine, CapacityBin, Tenant
from controlplane.certificate import Admitted, Refused
from controlplane.harvest import cost_tokens
from tests.console import rows
from tests.console.pagecast import client_of, make_record

pytestmark = pytest.mark.django_db

TOKEN_S = 0.01  # GPU-seconds per cost token in these tests
WORKERS = 2.0


@pytest.fixture(autouse=True)
def demo(settings: Any, tmp_path: Path) -> Tenant:
    settings.SLACKWATER_VAR = tmp_path / "var"
    rows.make_model()
    return rows.make_tenant("demo")


def fact(at: datetime, online: float = 0.5, **changes: float) -> HarvestFact:
    """A quarter of an hour in which batch took all that online work left."""
    worker_s = WORKERS * BIN_S
    batch_s = (1.0 - online) * worker_s
    values = {
        "seconds": BIN_S,
        "worker_s": worker_s,
        "member_s": worker_s,
        "online_s": online * worker_s,
        "batch_s": batch_s,
        "batch_tokens": batch_s / TOKEN_S,
        "backlog_s": BIN_S,
    }
    return HarvestFact(at=at, model_id=rows.MODEL_ID, **(values | changes))


def measure(days: int = 8, online: float = 0.5) -> None:
    now = timezone.now()
    CapacityBin.objects.bulk_create(
        CapacityBin(
            start=start_of(now - timedelta(seconds=BIN_S * index)),
            **as_dict(fact(now, online)),
        )
        for index in range(days * 96)
    )


def as_dict(found: HarvestFact) -> dict[str, Any]:
    return {name: getattr(found, name) for name in HarvestFact.__slots__ if name != "at"}


def jobs(folder: Path, num_lines: int = 4, max_tokens: int = 100) -> Path:
    lines = [rows.line(f"c{index}", max_tokens=max_tokens) for index in range(num_lines)]
    return rows.write_lines(folder / "jobs.jsonl", lines)


def run(*words: Any) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        call_command("batch", *(str(word) for word in words), stdout=stdout, stderr=stderr)
    except SystemExit as end:
        return int(end.code or 0), stdout.getvalue(), stderr.getvalue()
    except CommandError as error:
        return error.returncode, stdout.getvalue(), str(error)
    return 0, stdout.getvalue(), stderr.getvalue()


# --- history -------------------------------------------------------------------------------------


def test_facts_add_up_in_their_quarter_hour():
    at = datetime(2026, 1, 5, 10, 7, tzinfo=UTC)
    for minute in range(2):
        add_harvest(fact(at + timedelta(minutes=minute), seconds=60.0, batch_tokens=7.0))
    add_harvest(fact(at + timedelta(minutes=10)))
    first, second = CapacityBin.objects.order_by("start")
    assert (first.start.minute, first.seconds, first.batch_tokens) == (0, 120.0, 14.0)
    assert second.start.minute == 15


def test_rows_older_than_28_days_make_room():
    at = datetime(2026, 1, 5, 10, 7, tzinfo=UTC)
    add_harvest(fact(at))
    add_harvest(fact(at + KEPT))
    assert CapacityBin.objects.count() == 2
    add_harvest(fact(at + KEPT + timedelta(seconds=BIN_S)))
    assert CapacityBin.objects.count() == 2


def test_capacity_is_what_was_measured():
    measure()
    found = capacity_of(rows.MODEL_ID, timezone.now())
    assert found is not None
    assert found.token_s == pytest.approx(TOKEN_S)
    assert (found.supply.num_workers, found.supply.phi) == (WORKERS, pytest.approx(1.0))
    forecast = found.forecast(86_400.0)
    assert forecast.mean_s[-1] == pytest.approx(0.5 * WORKERS * 86_400.0, rel=0.02)
    assert capacity_of("other", timezone.now()) is None


def test_time_of_lost_workers_is_no_capacity():
    now = timezone.now()
    add_harvest(fact(now, worker_s=0.75 * WORKERS * BIN_S))
    found = capacity_of(rows.MODEL_ID, now)
    assert found is not None and found.supply.failed == pytest.approx(0.25)


def test_nothing_measured_promises_nothing(tmp_path: Path):
    assert run("quote", jobs(tmp_path)) == (
        0, "no quote: too little was measured here to promise a finish on\n", "",
    )  # fmt: skip
    assert json.loads(run("quote", jobs(tmp_path), "--json")[1]) == {"is_measured": False}
    code, out, _ = run("submit", jobs(tmp_path))
    assert code == 0 and "\nno quote" in out
    batch = Batch.objects.get()
    assert (batch.finish_by, batch.slack, batch.expected_s) == (None, None, None)
    assert batch.line_tokens > 200.0  # two for each output token, and the prompt


# --- what a file costs ---------------------------------------------------------------------------


def test_an_output_is_expected_to_be_as_long_as_usual():
    assert quotes.work_of([(400, 300)], rows.MODEL_ID).line_tokens == cost_tokens(100, 300)
    for index in range(quotes.OUTPUT_RECORDS_MIN):
        make_record(f"b{index}", is_batch=True, model_id=rows.MODEL_ID, output_tokens=40)
    work = quotes.work_of([(400, 300), (400, 10), (400, None)], rows.MODEL_ID)
    costs = [cost_tokens(100, output) for output in (40, 10, 40)]
    assert work.line_tokens == pytest.approx(sum(costs) / 3)
    assert work.line_tokens_max == max(costs)


@pytest.mark.parametrize(
    ("text", "minutes"), [("1m", 1), ("90m", 90), ("4h", 240), ("7d", 10_080), ("3600s", 60)]
)
def test_a_window_is_a_number_and_a_unit(text: str, minutes: int):
    assert batchfiles.window_of(text) == timedelta(minutes=minutes)


@pytest.mark.parametrize("text", ["", "0h", "59s", "8d", "4 h", "1w", "-1h", "99999999d", "4h\n"])
def test_no_other_window_is_taken(text: str):
    assert batchfiles.window_of(text) is None


def test_lines_that_share_a_prefix_stand_together():
    shared = "You are a careful assistant. " * 20
    bodies = [{"prompt": f"{lead}{n}"} for n in range(3) for lead in (shared, "other " * 60)]
    ordered = sorted(bodies, key=batchcheck.prefix_key)
    starts = [body["prompt"][:5] for body in ordered]
    assert starts in (["You a"] * 3 + ["other"] * 3, ["other"] * 3 + ["You a"] * 3)
    assert len(batchcheck.prefix_key({"prompt": "x" * 99_999})) == 64


# --- promises ------------------------------------------------------------------------------------


def test_a_submitted_batch_carries_its_quote(tmp_path: Path):
    measure()
    code, out, _ = run("submit", jobs(tmp_path), "--deadline", "4h")
    batch = Batch.objects.get()
    assert (code, batch.completion_window) == (0, "4h")
    assert "\nquote: expected in " in out
    assert batch.created_at < batch.finish_from < batch.finish_by < batch.expires_at
    assert batch.quoted_slack == batch.slack > 0.5
    shown = json.loads(run("status", batch.batch_id, "--json")[1])
    assert shown["quote"]["slack"] == batch.quoted_slack and shown["eta"]
    assert "slack" in run("status", batch.batch_id)[1]


def test_a_deadline_that_cannot_be_promised_is_refused_with_one_that_can(tmp_path: Path):
    """100 lines of 2,000 output tokens take 40 GPU-seconds each; a quarter hour has 900 of them."""
    measure()
    path = jobs(tmp_path, num_lines=100, max_tokens=2_000)
    code, out, err = run("submit", path, "--deadline", "15m", "--json")
    told = json.loads(out)
    assert code == 1 and not told["is_feasible"] and not Batch.objects.exists()
    assert not list((tmp_path / "var").rglob("*.jsonl"))
    assert "15m cannot be promised" in err and "earliest possible deadline is" in err
    again = json.loads(run("quote", path, "--deadline", "15m", "--json")[1])
    assert again["earliest_deadline_s"] == pytest.approx(told["earliest_deadline_s"], rel=0.1)
    minutes = int(told["earliest_deadline_s"]) // 60 + 1
    assert run("quote", path, "--deadline", f"{minutes}m")[0] == 0
    assert run("submit", path, "--deadline", f"{minutes}m")[0] == 0


def test_what_is_promised_is_not_promised_again(tmp_path: Path):
    measure()
    path = jobs(tmp_path, num_lines=100, max_tokens=2_000)
    assert run("quote", path, "--deadline", "2h")[0] == 0
    assert run("submit", path, "--deadline", "2h")[0] == 0
    assert run("quote", path, "--deadline", "2h")[0] == 1
    batch = Batch.objects.get()
    assert run("pause", batch.batch_id)[0] == 0  # asks for nothing until it is resumed
    assert run("quote", path, "--deadline", "2h")[0] == 0


def test_a_bad_deadline_or_file_is_a_usage_error(tmp_path: Path):
    assert run("submit", jobs(tmp_path), "--deadline", "soon")[0] != 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    assert run("quote", bad)[0] == 2
    assert run("quote", tmp_path / "absent")[0] == 2


# --- once a minute -------------------------------------------------------------------------------


def test_slack_and_eta_follow_what_is_done(tmp_path: Path):
    measure()
    assert run("submit", jobs(tmp_path, 100, 2_000), "--deadline", "6h")[0] == 0
    batch = Batch.objects.get()
    before, eta = batch.slack, batch.eta
    lines = batch.lines.values_list("pk", flat=True)[:50]
    BatchLine.objects.filter(pk__in=list(lines)).update(status="completed")
    Batch.objects.update(done_tokens=50 * batch.line_tokens)
    least = quotes.assess(timezone.now())
    batch.refresh_from_db()
    assert least == {rows.MODEL_ID: pytest.approx(batch.slack)}
    assert batch.slack > before and batch.eta < eta


def test_lines_that_cost_more_than_expected_eat_the_slack(tmp_path: Path):
    measure()
    run("submit", jobs(tmp_path, 100, 2_000), "--deadline", "6h")
    batch = Batch.objects.get()
    lines = list(batch.lines.values_list("pk", flat=True)[:30])
    BatchLine.objects.filter(pk__in=lines).update(status="completed")
    found = []
    for factor in (1.0, 3.0):
        Batch.objects.update(done_tokens=factor * 30 * batch.line_tokens)
        found.append(quotes.assess(timezone.now())[rows.MODEL_ID])
    assert found[1] < found[0]


def test_a_batch_that_has_ended_teaches_the_interval(tmp_path: Path):
    now = timezone.now()
    for took_s in (50.0, 200.0):
        batch = rows.make_batch(Tenant.objects.get(), tmp_path)
        Batch.objects.filter(pk=batch.pk).update(
            status="completed", expected_s=100.0, created_at=now,
            ended_at=now + timedelta(seconds=took_s),
        )  # fmt: skip
    assert len(quotes.ratios(rows.MODEL_ID)) == 2


def test_work_that_keeps_coming_is_a_rate_after_a_day(tmp_path: Path):
    measure()
    now = timezone.now()
    batch = rows.make_batch(Tenant.objects.get(), tmp_path)
    found = capacity_of(rows.MODEL_ID, now)
    assert found is not None
    assert quotes.inflow(rows.MODEL_ID, found, now) == []
    begun = now - timedelta(days=2)
    Batch.objects.update(created_at=begun, expires_at=begun + timedelta(hours=4))
    ((window_s, rate),) = quotes.inflow(rows.MODEL_ID, found, now)
    assert window_s == 14_400.0
    assert rate == pytest.approx(batch.num_lines * batch.line_tokens * TOKEN_S / 172_800.0)


def test_a_refusal_says_what_is_missing():
    measure()
    work = quotes.Work(1_000, 2_000.0, 2_000.0)
    quoted = quotes.quote(rows.MODEL_ID, work, 600.0, timezone.now())
    assert quoted is not None and isinstance(quoted.outcome, Refused)
    assert quoted.outcome.need_s > 20_000.0 > quoted.outcome.low_s
    at = quotes.quote(rows.MODEL_ID, work, quoted.earliest_s, timezone.now())
    assert at is not None and isinstance(at.outcome, Admitted)


# --- pause and resume ----------------------------------------------------------------------------


def test_a_paused_batch_starts_no_line_until_it_is_resumed(tmp_path: Path):
    batch, now = rows.make_batch(Tenant.objects.get(), tmp_path), timezone.now()
    assert batchclaims.pause(batch.batch_id) and not batchclaims.pause(batch.batch_id)
    assert batchclaims.look({}, 8, now).open == ()
    assert batchclaims.resume(batch.batch_id) and not batchclaims.resume(batch.batch_id)
    assert [found.pending for found in batchclaims.look({}, 8, now).open] == [3]


def test_the_command_pauses_and_resumes_once(tmp_path: Path):
    batch = rows.make_batch(Tenant.objects.get(), tmp_path)
    assert "paused" in run("pause", batch.batch_id)[1]
    assert run("pause", batch.batch_id)[0] == 1
    assert run("resume", batch.batch_id)[0] == 0
    assert run("resume", batch.batch_id)[0] == 1
    assert run("pause", "batch_none")[0] == 2


def test_pages_show_the_quote_and_take_orders(tmp_path: Path):
    measure()
    run("submit", jobs(tmp_path), "--deadline", "4h")
    batch, operator = Batch.objects.get(), client_of()
    text = operator.get(f"/batches/{batch.batch_id}/").content.decode()
    assert "with 90 %" in text and "harvest" in text and f"{batch.slack:.2f}" in text
    listed = operator.get("/batches/").content.decode()
    assert f"{batch.slack:.2f}" in listed and "Pause" in listed
    address = f"/batches/{batch.batch_id}"
    answer = operator.post(f"{address}/pause/", {"from": "list"})
    assert (answer.status_code, answer.url) == (302, "/batches/")
    assert "Resume" in operator.get("/batches/").content.decode()
    assert operator.post(f"{address}/resume/", follow=True).status_code == 200
    batch.refresh_from_db()
    assert not batch.is_paused
    assert "is not paused" in operator.post(f"{address}/resume/", follow=True).content.decode()


@pytest.mark.parametrize("order", ["pause", "resume"])
def test_orders_are_for_operators_by_post(tmp_path: Path, order: str):
    batch = rows.make_batch(Tenant.objects.get(), tmp_path)
    operator, stranger = client_of(), client_of("eve", is_staff=False)
    assert operator.get(f"/batches/{batch.batch_id}/{order}/").status_code == 405
    assert operator.post(f"/batches/nothing/{order}/").status_code == 404
    assert stranger.post(f"/batches/{batch.batch_id}/{order}/").status_code == 403
