"""The frame that pages show: alerts with reasons, chart values in order, bounded history."""

import asyncio
import json
import logging
import math

import pytest

from console import livefeed
from controlplane import domain
from tests.console.memoryserver import MemoryServer
from tests.console.pageserver import state_of


def make_row(**changes):
    row = {
        "name": "interactive",
        "is_batch": False,
        "ttft_ms_p50": 100.0,
        "ttft_ms_p99": 250.0,
        "ttft_target_ms": 500.0,
        "itl_ms_p50": 10.0,
        "itl_ms_p99": 15.0,
        "itl_target_ms": 30.0,
        "attainment": 1.0,
        "requests": 3,
        "status": "ok",
    }
    return row | changes


def make_worker(**changes):
    row = {"worker_id": "w1", "role": "mixed", "status": "live", "exception": "", "heard_ago_s": 0}
    return row | changes


def make_frame(classes=(), workers=(), requests_total=0):
    return {
        "classes": list(classes),
        "workers": list(workers),
        "tokens_per_s": {"interactive": 12.5, "batch": 3.0},
        "queued": {"interactive": 2, "batch": 1},
        "counters": {"requests_total": requests_total},
    }


def make_view(requests=(), plans=()):
    return domain.ClusterView((), tuple(requests), (), tuple(plans))


def make_request(index, phase="decode", split="local", age_s=1.0):
    placement = domain.Placement(split, "w1", "w2", 0.1, 0.01)
    return domain.RequestView(
        f"r{index:04d}", "acme", "m", "interactive", phase, 1, age_s, 0.5, 100, placement
    )


def test_a_missed_target_is_an_alert_that_names_the_target():
    row = make_row(ttft_ms_p99=612.0, status="missed")
    assert livefeed.alerts(make_frame([row])) == [
        {"level": "bad", "text": "interactive: TTFT p99 is over its target of 500 ms"}
    ]


def test_kept_promises_and_live_workers_are_no_alert():
    assert livefeed.alerts(make_frame([make_row()], [make_worker()])) == []


@pytest.mark.parametrize("status", ["suspect", "lost"])
def test_a_silent_worker_is_an_alert(status):
    (alert,) = livefeed.alerts(make_frame(workers=[make_worker(status=status)]))
    assert alert["level"] == "bad" and f"w1 is {status}" in alert["text"]


def test_an_exception_of_roles_is_a_warning():
    worker = make_worker(exception="serves prefill too: no prefill worker is live")
    (alert,) = livefeed.alerts(make_frame(workers=[worker]))
    assert alert["level"] == "warn" and alert["text"].startswith("w1 serves prefill too")


def test_alerts_stop_at_the_maximum_and_count_the_rest():
    workers = [make_worker(worker_id=f"w{i}", status="lost") for i in range(20)]
    lines = livefeed.alerts(make_frame(workers=workers))
    assert len(lines) == livefeed.ALERTS_MAX
    assert lines[-1]["text"] == f"and {20 - livefeed.ALERTS_MAX + 1} more"
    assert len(livefeed.alerts(make_frame(workers=workers[: livefeed.ALERTS_MAX]))) == 8


def test_chart_values_follow_the_order_of_the_classes_and_leave_batch_out():
    rows = [make_row(), make_row(name="batch", is_batch=True), make_row(name="flex")]
    rows[2] |= {"ttft_ms_p99": None, "itl_ms_p99": None}
    assert livefeed.charts(make_frame(rows)) == {
        "tokens": [12.5, 3.0],
        "promise": [50.0, 50.0, None, None],
        "queues": [2, 1, 0],
    }


def test_a_shape_changes_with_roles_and_members_and_not_with_numbers():
    def shape(worker):
        return livefeed.enriched(make_frame(workers=[worker]), make_view(), 1)["shapes"]["workers"]

    assert shape(make_worker()) == shape(make_worker(kv_used_ratio=0.9))
    assert shape(make_worker()) != shape(make_worker(role="decode"))
    assert shape(make_worker()) != shape(make_worker(worker_id="w2"))


def test_a_role_change_changes_the_shape_of_the_plans():
    plan = domain.PlanChanged("w1", "prefill", "decode", "planner", "because")
    before = livefeed.enriched(make_frame(), make_view(), 1)["shapes"]["plans"]
    after = livefeed.enriched(make_frame(), make_view(plans=[plan]), 2)["shapes"]["plans"]
    assert before != after


def test_queued_requests_are_summed_over_the_classes():
    assert livefeed.enriched(make_frame(), make_view(), 1)["queued_total"] == 3


def test_a_frame_never_carries_nan():
    assert json.loads(livefeed.encoder.encode({"a": math.nan, "b": math.inf})) == {
        "a": None,
        "b": None,
    }


def test_live_rows_show_the_oldest_first_and_stop_at_the_maximum():
    many = [make_request(i, age_s=float(i)) for i in range(livefeed.ROWS_MAX + 1)]
    rows = livefeed.request_rows(make_view(many))
    assert len(rows) == livefeed.ROWS_MAX
    assert rows[0]["request_id"] == f"r{livefeed.ROWS_MAX:04d}"


@pytest.mark.parametrize(
    ("phase", "split", "steps"),
    [
        ("queued", "local", ["now", "", ""]),
        ("decode", "local", ["done", "done", "now"]),
        ("prefill", "handoff", ["done", "now", "", ""]),
        ("transfer", "handoff", ["done", "done", "now", ""]),
        ("orphaned", "local", ["done", "done", "now"]),
    ],
)
def test_the_phase_bar_has_a_step_for_a_transfer_only_when_there_is_one(phase, split, steps):
    (row,) = livefeed.request_rows(make_view([make_request(1, phase, split)]))
    assert row["steps"] == steps


def test_a_request_without_placement_has_no_workers_yet():
    view = domain.RequestView("r1", "acme", "m", "interactive", "queued", 1, 1.0, 1.0, 9, None)
    (row,) = livefeed.request_rows(make_view([view]))
    assert (row["prefill_worker"], row["decode_worker"]) == ("", "")


@pytest.fixture
async def feed():
    current = state_of(MemoryServer(), asyncio.get_running_loop())
    made = await livefeed.feed_of(current)
    yield made
    made.stop()


async def test_one_feed_serves_all_pages_of_a_server(feed):
    assert await livefeed.feed_of(feed.current) is feed
    other = state_of(MemoryServer(), asyncio.get_running_loop())
    replaced = await livefeed.feed_of(other)
    assert replaced is not feed
    replaced.stop()


async def test_a_reader_that_missed_frames_gets_the_newest(feed):
    for _ in range(4):
        feed.sample()
    seq, text = await feed.after(1)
    assert seq == 5 and json.loads(text)["seq"] == 5


async def test_a_reader_waits_for_a_frame_it_has_not_seen(feed):
    waiting = asyncio.ensure_future(feed.after(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    feed.sample()
    assert (await waiting)[0] == 2


async def test_the_history_is_by_column_and_bounded(feed):
    for _ in range(livefeed.HISTORY_POINTS_MAX + 5):
        feed.sample()
    history = await livefeed.history(feed.current)
    assert history["seq"] == feed.newest["seq"]
    assert len(history["t"]) == livefeed.HISTORY_POINTS_MAX
    assert {len(values) for values in history["charts"].values()} == {livefeed.HISTORY_POINTS_MAX}


async def test_a_frame_has_every_class_and_worker_of_the_server(feed):
    frame = await livefeed.newest(feed.current)
    assert [row["name"] for row in frame["classes"]] == ["interactive", "standard", "flex", "batch"]
    assert [row["worker_id"] for row in frame["workers"]] == ["w1"]
    assert frame["charts"]["tokens"] == [0, 0] and frame["alerts"] == []


async def test_a_feed_that_ended_lets_its_readers_go_and_is_replaced(feed):
    waiting = asyncio.ensure_future(feed.after(feed.newest["seq"]))
    await asyncio.sleep(0)
    feed.stop()
    assert await waiting is None and feed.is_over
    again = await livefeed.feed_of(feed.current)
    assert again is not feed and not again.is_over
    again.stop()


async def test_an_error_in_the_feed_is_logged_and_ends_it(feed, caplog, monkeypatch):
    monkeypatch.setattr(livefeed, "FRAME_PERIOD_S", 0.0)
    logging.getLogger("console").addHandler(caplog.handler)
    broken = livefeed.LiveFeed(feed.current)
    feed.current.live = None
    assert await broken.after(broken.newest["seq"]) is None
    logging.getLogger("console").removeHandler(caplog.handler)
    assert "live feed ended" in caplog.text
