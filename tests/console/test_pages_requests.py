"""Requests live and ended: filters in the address, cursors, exports, and the reasons of one."""

import asyncio
import csv
import io
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone

from console import state, waterfall
from console.pages import requests
from tests.console.pagecast import DECISION, EXPLAINED, OUTCOME, client_of, make_record
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db
HISTORY = "/requests/history/"


def ids(client, **query):
    rows = client.get(HISTORY, {"format": "json", **query}).json()
    return [row["request_id"] for row in rows]


def test_history_shows_the_newest_first(operator):
    now = timezone.now()
    for index in range(3):
        make_record(f"r{index}", arrived_at=now - timedelta(minutes=index))
    assert ids(operator) == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"status": "failed"}, ["bad"]),
        ({"class": "flex"}, ["slow"]),
        ({"tenant": "umbrella"}, ["other"]),
        ({"split": "local"}, ["near"]),
        ({"worker": "w9"}, ["near"]),
        ({"key": "KEY00009"}, ["keyed"]),
        ({"model": "large"}, ["keyed"]),
        ({"reason": "length"}, ["keyed"]),
        ({"reason": "queue_full"}, ["full"]),
        ({"q": "oth"}, ["other"]),
        ({"q": "ther"}, []),
        ({"range": "15m", "q": "slow"}, []),
        ({"range": "7d", "q": "slow"}, ["slow"]),
        ({"range": "nonsense", "q": "other"}, ["other"]),
        ({"status": "nonsense", "q": "other"}, ["other"]),
        ({"demo": "on", "q": "demo"}, ["demo"]),
        ({"q": "demo"}, []),
    ],
)
def test_a_filter_in_the_address_leaves_only_what_passes(operator, query, found):
    make_record("bad", status="failed")
    make_record("slow", class_name="flex", arrived_at=timezone.now() - timedelta(hours=2))
    make_record("other", tenant_id="umbrella")
    make_record("near", split="local", prefill_worker="w9", decode_worker="w9")
    make_record("demo", is_demo_history=True)
    make_record("keyed", key_id="KEY00009", model_id="large", finish_reason="length")
    make_record("full", status="rejected", error_code="queue_full", finish_reason="length")
    assert ids(operator, **query) == found


def test_errors_are_grouped_by_status_and_reason_and_link_to_their_rows(operator):
    for index in range(3):
        make_record(f"r{index}", status="rejected", error_code="queue_full")
    make_record("late", status="expired", error_code="queue_timeout", tenant_id="umbrella")
    make_record("fine")
    first, second = operator.get(HISTORY, {"range": "1h"}).context["errors"]
    assert (first["error_code"], first["n"], first["tenants"]) == ("queue_full", 3, 1)
    assert (second["status"], second["n"]) == ("expired", 1)
    rows = operator.get(f"{HISTORY}?{second['query']}").context["rows"]
    assert [row.request_id for row in rows] == ["late"]
    assert "range=1h" in second["query"]


def test_queries_of_the_history_do_not_grow_with_rows(operator, django_assert_num_queries):
    for size in (1, 30):
        for index in range(size):
            make_record(f"s{size}-{index}", status="failed", error_code=f"e{index}")
        with django_assert_num_queries(6):  # session, user, classes, count, rows, errors
            operator.get(HISTORY)


def test_filters_keep_their_values_on_the_page(operator):
    make_record()
    text = operator.get(HISTORY, {"status": "failed", "q": "abc"}).content.decode()
    assert '<option value="failed" selected>' in text and 'value="abc"' in text
    assert '<option value="24h" selected>' in text


def test_pages_follow_each_other_without_a_gap_or_a_repetition(operator):
    at = timezone.now() - timedelta(minutes=1)
    names = [f"r{index:03d}" for index in range(2 * requests.PAGE_ROWS + 7)]
    for name in names:  # equal times: the cursor must break ties
        make_record(name, arrived_at=at)
    seen, query = [], "?"
    while query:
        context = operator.get(HISTORY + query).context
        seen += [row.request_id for row in context["rows"]]
        query = f"?{context['older']}" if context["older"] else ""
    assert seen == sorted(names, reverse=True)


@pytest.mark.parametrize("text", ["", "x", "~", "2026-01-01T00:00:00~1", f"~{'9' * 40}", "9~9"])
def test_a_cursor_that_cannot_be_read_is_the_first_page(operator, text):
    make_record()
    assert len(operator.get(HISTORY, {"before": text}).context["rows"]) == 1


def test_htmx_gets_the_results_alone(operator):
    make_record()
    text = operator.get(HISTORY, headers={"hx-request": "true"}).content.decode()
    assert text.strip().startswith('<div id="results">') and "<html" not in text


def test_demo_history_is_marked(operator):
    make_record("demo-1", is_demo_history=True)
    text = operator.get(HISTORY, {"demo": "on"}).content.decode()
    assert 'class="chip demo">demo history<' in text


def test_the_csv_has_a_header_and_cannot_start_a_formula(operator):
    make_record("r1", error_code="=cmd()")
    response = operator.get(HISTORY, {"format": "csv"})
    assert response["content-disposition"] == 'attachment; filename="requests.csv"'
    (row,) = csv.DictReader(io.StringIO(response.content.decode()))
    assert row["request_id"] == "r1" and row["error_code"] == "'=cmd()"


def test_an_empty_result_says_so(operator):
    assert "No request matches" in operator.get(HISTORY).content.decode()


# --- one request ---


def test_the_detail_shows_each_decision_with_its_candidates(operator):
    moved = {**DECISION, "epoch": 2, "reason": "w2 was lost: moved to w3", "candidates": []}
    moved["cause"] = "failover"
    make_record(decision={**EXPLAINED, "records": [DECISION, moved]}, failovers=1)
    text = operator.get("/requests/r1/").content.decode()
    assert DECISION["reason"] in text and DECISION["split_reason"] in text
    assert "w2 was lost: moved to w3" in text and ">its worker was lost<" in text
    assert "the cheapest, and of equals the fullest" in text
    assert text.count('class="chosen"') == 1 and " barred" in text and ">draining<" in text


def test_the_detail_compares_promise_prediction_and_outcome(operator):
    make_record(decision={**EXPLAINED, "outcome": {**OUTCOME, "ttft_s": 0.66}})
    text = operator.get("/requests/r1/").content.decode()
    assert 'class="num over">660 ms' in text and ">500 ms<" in text and ">330 ms<" in text
    assert "TTFT 50 % slower than predicted" in text and "KV transfer" in text


def test_the_detail_says_what_else_could_have_been(operator):
    make_record()
    text = operator.get("/requests/r1/").content.decode()
    assert "What else could have been" in text and "flex: in time" in text


def test_records_that_were_not_kept_are_counted(operator):
    make_record(decision={**EXPLAINED, "records_left_out": 3})
    assert "3 more decisions followed" in operator.get("/requests/r1/").content.decode()


def test_a_batch_class_has_no_latency_target(operator):
    make_record(decision={**EXPLAINED, "ttft_s_target": None, "itl_s_target": None})
    assert operator.get("/requests/r1/").context["target_ms"] is None


def test_a_refused_request_says_that_nothing_was_measured(operator):
    never = dict.fromkeys(("queue_ms", "ttft_ms", "itl_ms_mean", "itl_ms_p99", "handoff_ms"))
    never["finish_reason"] = ""
    make_record(status="rejected", error_code="queue_full", e2e_ms=0.0, decision={}, **never)
    text = operator.get("/requests/r1/").content.decode()
    assert "Nothing was measured" in text and "No decision record" in text and "queue_full" in text


def test_text_of_a_decision_cannot_become_markup(operator):
    bad = {**DECISION, "reason": "<script>alert(1)</script>"}
    make_record(decision={**EXPLAINED, "records": [bad]})
    text = operator.get("/requests/r1/").content.decode()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


# --- waterfall ---


def spans(record, target_ms=None):
    return [(b.name, b.start_percent, b.width_percent) for b in waterfall.bars(record, target_ms)]


def test_the_phases_of_a_handoff_fill_the_whole_request():
    assert spans(make_record()) == [
        ("queue", 0.0, 2.0),
        ("prefill", 2.0, 27.0),
        ("transfer", 29.0, 1.0),
        ("decode", 30.0, 70.0),
    ]


def test_a_transfer_that_began_with_the_prefill_hides_it():
    phases = spans(make_record(handoff_ms=5000.0))
    assert phases[1:3] == [("prefill", 2.0, 0.0), ("transfer", 2.0, 28.0)]


def test_a_local_request_has_no_transfer():
    names = [name for name, *_ in spans(make_record(split="local", handoff_ms=None))]
    assert names == ["queue", "prefill", "decode"]


def test_a_request_that_was_never_placed_only_waited():
    record = make_record(queue_ms=None, ttft_ms=None, status="expired", split="")
    assert spans(record) == [("queue", 0.0, 100.0)]


def test_a_request_cancelled_in_its_prefill_has_no_decode():
    record = make_record(ttft_ms=None, status="cancelled", split="local", e2e_ms=100.0)
    assert spans(record) == [("queue", 0.0, 20.0), ("prefill", 20.0, 80.0), ("decode", 100.0, 0.0)]


@pytest.mark.parametrize(("target_ms", "percent"), [(500.0, 50.0), (1000.0, 100.0), (1001.0, None)])
def test_the_target_stands_where_it_lies_inside_the_request(target_ms, percent):
    bars = waterfall.bars(make_record(), target_ms)
    assert [bar.target_percent for bar in bars] == [percent, percent, percent, None]


# --- live ---


def test_without_a_server_the_live_page_says_so(operator):
    text = operator.get("/requests/").content.decode()
    assert "does not run in this process" in text and "Nothing in flight" in text


def test_the_last_ended_requests_are_ours_and_not_the_demo_history(operator):
    make_record("r1")
    make_record("demo-1", is_demo_history=True)
    text = operator.get("/requests/", {"part": "recent"}).content.decode()
    assert "r1" in text and "demo-1" not in text and "<html" not in text


def test_a_request_in_flight_is_on_the_live_page_and_has_a_page(operator, monkeypatch):
    server = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", server.state)

    async def begin():
        server.memory.worker.gate = asyncio.Event()
        server.running = asyncio.ensure_future(server.memory.chat(max_tokens=4))
        while not server.memory.worker.assigned:
            await asyncio.sleep(0)
        return server.memory.worker.assigned[0].request_id

    async def end():
        server.memory.worker.gate.set()
        await server.running

    request_id = server.do(begin)
    try:
        live = operator.get("/requests/").content.decode()
        one = operator.get(f"/requests/{request_id}/").content.decode()
    finally:
        server.do(end)
        server.close()
    assert f'href="/requests/{request_id}/"' in live and "acme" in live
    assert "In flight" in one and request_id in one
    assert "the only worker that could take it" in one


def test_a_running_request_is_cancelled_and_its_client_told(operator, monkeypatch):
    server = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", server.state)
    server.state.running = server.memory.services.running

    async def begin():
        server.memory.worker.gate = asyncio.Event()
        server.call = asyncio.ensure_future(server.memory.chat(max_tokens=4))
        while not server.memory.worker.assigned:
            await asyncio.sleep(0)
        return server.memory.worker.assigned[0].request_id

    async def end():
        return await server.call

    request_id = server.do(begin)
    try:
        answer = operator.post(f"/requests/{request_id}/cancel/", follow=True).content.decode()
        client = server.do(end)
        again = operator.post(f"/requests/{request_id}/cancel/", follow=True).content.decode()
    finally:
        server.close()
    assert "its client was told" in answer and "does not run here" in again
    assert client.json()["error"]["code"] == "cancelled_by_operator"
    assert server.memory.worker.cancelled == [request_id]
    (fact,) = server.memory.request_facts()
    assert fact.status == "cancelled"
    assert LogEntry.objects.get().change_message == "cancelled"


def test_a_user_who_is_no_operator_cancels_nothing():
    assert client_of("eve", is_staff=False).post("/requests/r1/cancel/").status_code == 403
