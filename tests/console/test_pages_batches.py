"""Batches: progress, finish against the deadline, lines with their errors, cancel."""

import re
from datetime import timedelta

import pytest
from django.utils import timezone

from console.models import Batch
from console.pages import batches
from tests.console.pagecast import client_of, make_batch

pytestmark = pytest.mark.django_db


def progress(batch):
    (row,) = batches.with_progress(Batch.objects.filter(pk=batch.pk))
    return row


def test_the_newest_batch_comes_first_whatever_its_number_of_lines():
    now = timezone.now()
    for index, statuses in enumerate(((), ("pending",), ("completed", "pending"))):
        make_batch(statuses, created_at=now + timedelta(seconds=(index * 7) % 3))
    rows = batches.with_progress(Batch.objects.all())
    moments = [row["batch"].created_at for row in rows]
    assert moments == sorted(moments, reverse=True) and len(moments) == 3


def test_without_a_batch_the_page_gives_the_command(operator):
    text = operator.get("/batches/").content.decode()
    assert "No batch yet" in text and "python manage.py batch submit lines.jsonl" in text


def test_progress_counts_lines_by_their_state():
    row = progress(make_batch(("completed", "completed", "failed", "claimed", "pending")))
    assert (row["completed"], row["failed"], row["running"]) == (2, 1, 1)
    assert (row["completed_ratio"], row["failed_ratio"]) == (0.4, 0.2)


def test_the_finish_follows_from_the_pace_so_far():
    row = progress(make_batch(("completed", "pending", "pending", "pending")))
    assert row["left_s"] == pytest.approx(180, rel=0.1) and not row["is_late"]


def test_a_finish_after_the_deadline_is_late():
    soon = timezone.now() + timedelta(seconds=30)
    assert progress(make_batch(("completed", *["pending"] * 9), expires_at=soon))["is_late"]


def test_without_an_ended_line_no_finish_is_promised():
    row = progress(make_batch(("pending", "claimed")))
    assert row["left_s"] is None and not row["is_late"] and row["deadline_s"] > 0


def test_an_ended_batch_says_how_long_it_took():
    now = timezone.now()
    row = progress(make_batch(("completed",), status="completed", ended_at=now))
    assert row["is_ended"] and row["elapsed_s"] == pytest.approx(60, abs=5)
    assert row["deadline_s"] is None


@pytest.mark.parametrize(("status", "polls"), [("in_progress", True), ("completed", False)])
def test_a_page_asks_again_only_while_something_runs(operator, status, polls):
    make_batch(status=status, ended_at=timezone.now())
    assert ("every 2s" in operator.get("/batches/").content.decode()) == polls
    assert ("every 2s" in operator.get("/batches/batch_0/").content.decode()) == polls


@pytest.mark.parametrize(
    ("address", "part"), [("/batches/", "rows"), ("/batches/batch_0/", "progress")]
)
def test_what_is_asked_again_comes_alone(operator, address, part):
    make_batch()
    text = operator.get(address, {"part": part}).content.decode()
    assert "<html" not in text and f'hx-get="{address}?part={part}"' in text


def test_lines_can_be_filtered_and_name_their_errors(operator):
    make_batch(("completed", "failed", "failed"))
    text = operator.get("/batches/batch_0/", {"line": "failed"}).content.decode()
    assert re.findall(r"line-\d", text) == ["line-1", "line-2"] and "busy" in text
    assert "tenant_concurrency × 2" in text


def test_an_unknown_line_filter_shows_all(operator):
    make_batch(("completed", "failed"))
    text = operator.get("/batches/batch_0/", {"line": "nonsense"}).content.decode()
    assert re.findall(r"line-\d", text) == ["line-0", "line-1"]


def test_lines_above_the_maximum_are_counted_and_not_shown(operator):
    make_batch(("pending",) * (batches.LINES_SHOWN + 1))
    context = operator.get("/batches/batch_0/").context
    assert len(context["lines"]) == batches.LINES_SHOWN
    assert context["num_lines"] == batches.LINES_SHOWN + 1


def test_batches_above_the_maximum_are_counted_and_not_shown(operator):
    for _ in range(batches.BATCHES_SHOWN + 1):
        make_batch(())
    context = operator.get("/batches/").context
    assert len(context["rows"]) == batches.BATCHES_SHOWN
    assert context["num_batches"] == batches.BATCHES_SHOWN + 1


def test_demo_history_is_marked(operator):
    make_batch(is_demo_history=True)
    assert "demo history" in operator.get("/batches/").content.decode()
    assert "demo history" in operator.get("/batches/batch_0/").content.decode()


def test_cancel_stops_what_is_open_and_says_so(operator):
    make_batch(("completed", "pending"))
    response = operator.post("/batches/batch_0/cancel/", follow=True)
    assert "is being cancelled" in response.content.decode()
    batch = Batch.objects.get()
    assert batch.status == "cancelling" and batch.counts()["pending"] == 0


def test_a_batch_that_ended_cannot_be_cancelled(operator):
    make_batch(status="completed", ended_at=timezone.now())
    response = operator.post("/batches/batch_0/cancel/", follow=True)
    assert "has ended" in response.content.decode()
    assert Batch.objects.get().status == "completed"


def test_cancel_is_for_operators_by_post(operator):
    make_batch()
    assert operator.get("/batches/batch_0/cancel/").status_code == 405
    assert operator.post("/batches/nothing/cancel/").status_code == 404
    stranger = client_of("eve", is_staff=False)
    assert stranger.post("/batches/batch_0/cancel/").status_code == 403
    assert Batch.objects.get().status == "in_progress"
