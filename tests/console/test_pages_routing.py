"""Routing: shares of classes by worker, cached prompts, handoffs, and what decided."""

from datetime import timedelta

import pytest
from django.utils import timezone

from console.pages import routing
from tests.console.pagecast import DECISION, EXPLAINED, make_record

pytestmark = pytest.mark.django_db
LOCAL = {"split": "local", "handoff_ms": None, "handoff_bytes": 0}


def on(worker_id):
    return {**LOCAL, "prefill_worker": worker_id, "decode_worker": worker_id}


def context(client, **query):
    return client.get("/routing/", query).context


def test_each_class_has_its_shares_by_worker(operator):
    make_record("a", **on("w1"), cached_tokens=100)
    make_record("b", **on("w1"))
    make_record("c")  # handed off from w1 to w2
    make_record("d", class_name="flex", **on("w10"), failovers=2, ttft_ms=None)
    found = context(operator)
    assert found["workers"] == ["w1", "w2", "w10"] and found["num_placed"] == 4
    flex, interactive = found["classes"]
    assert [cell["n"] for cell in interactive["cells"]] == [2, 1, 0]
    assert interactive["cells"][0]["share"] == pytest.approx(2 / 3)
    assert interactive["hit_ratio"] == pytest.approx(100 / 1200)
    assert interactive["handoff_ratio"] == pytest.approx(1 / 3)
    assert interactive["ttft_ms"] == pytest.approx(300.0)
    assert (flex["moves"], flex["ttft_ms"], flex["others"]) == (2, None, 0)


def test_a_number_links_to_its_rows(operator):
    make_record("a", **on("w1"))
    make_record("b", **on("w2"))
    (row,) = context(operator, range="6h", tenant="acme")["classes"]
    rows = operator.get(f"/requests/history/?{row['cells'][0]['query']}").context["rows"]
    assert [found.request_id for found in rows] == ["a"]
    assert "range=6h" in row["query"] and "tenant=acme" in row["query"]


@pytest.mark.parametrize(
    ("query", "num"),
    [
        ({}, 1),
        ({"range": "24h"}, 2),
        ({"range": "nonsense"}, 1),
        ({"tenant": "umbrella"}, 0),
        ({"model": "m"}, 1),
        ({"model": "other"}, 0),
        ({"demo": "on"}, 2),
    ],
)
def test_filters_in_the_address(operator, query, num):
    make_record("a")
    make_record("old", arrived_at=timezone.now() - timedelta(hours=2))
    make_record("demo", is_demo_history=True)
    make_record("refused", split="", status="rejected")
    assert context(operator, **query)["num_placed"] == num


def test_handoffs_are_counted_by_pair(operator):
    make_record("a", handoff_ms=10.0)
    make_record("b", handoff_ms=20.0, class_name="flex")
    make_record("c", **on("w1"))
    (pair,) = context(operator)["pairs"]
    assert (pair["prefill"], pair["decode"], pair["n"]) == ("w1", "w2", 2)
    assert (pair["num_bytes"], pair["handoff_ms"]) == (10 << 20, 15.0)


def test_reasons_say_in_words_what_decided(operator):
    make_record("a")
    make_record("b")
    moved = {**DECISION, "bound": "only_one", "cause": "replaced"}
    make_record("c", decision={**EXPLAINED, "records": [moved]})
    make_record("d", decision={})
    reasons = context(operator)["reasons"]
    assert (reasons[0]["n"], reasons[0]["share"]) == (2, 0.5)
    assert "the cheapest" in reasons[0]["words"]
    others = {(row["words"], row["cause"]) for row in reasons[1:]}
    assert others == {
        ("the only worker that could take it", "moved before its start"),
        ("its decision was not kept", ""),
    }


def test_only_the_newest_rows_are_counted(operator, monkeypatch):
    monkeypatch.setattr(routing, "ROWS_MAX", 2)
    for index in range(3):
        make_record(f"r{index}")
    assert context(operator)["num_placed"] == 2


def test_the_busiest_workers_have_columns_and_the_rest_is_counted(operator):
    for index in range(routing.WORKERS_SHOWN + 1):
        make_record(f"r{index}", **on(f"w{index + 10}"))
    found = context(operator)
    assert len(found["workers"]) == routing.WORKERS_SHOWN
    assert found["classes"][0]["others"] == 1


def test_an_empty_time_says_what_to_do(operator):
    text = operator.get("/routing/").content.decode()
    assert "Nothing was placed" in text and "Playground" in text and "No handoff" in text


def test_queries_do_not_grow_with_rows(operator, django_assert_num_queries):
    for size in (1, 30):
        for index in range(size):
            make_record(f"s{size}-{index}", class_name=f"c{index}", **on(f"w{index}"))
        with django_assert_num_queries(4):  # session, user, flows, reasons
            operator.get("/routing/")
