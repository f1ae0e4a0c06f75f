"""`manage.py explain`, its twin in the API, and what both are made of."""

import io
import json

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from console import explaining, state
from console.explaining import Comparison
from tests.console.pagecast import DECISION, EXPLAINED, client_of, make_record
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db


def explain(*arguments):
    out = io.StringIO()
    call_command("explain", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_prints_every_part_of_the_story():
    moved = {**DECISION, "epoch": 2, "cause": "failover", "reason": "w2 was lost [really]"}
    make_record(decision={**EXPLAINED, "records": [DECISION, moved], "records_left_out": 2})
    text = explain("r1")
    for words in (
        "placed  20 ms after arrival, epoch 1",
        "decided by: all in time with room to spare",
        "its worker was lost",
        "w2 was lost [really]",
        "2 more were not kept",
        "draining",
        "chosen",
        "10 % faster than predicted",
        "completed",
        "flex: in time",
    ):
        assert words in text, (words, text)


def test_json_is_one_object_in_milliseconds():
    make_record()
    shown = json.loads(explain("r1", "--json"))
    assert shown["outcome"]["ttft_ms_predicted"] == 330.0
    assert shown["records"][0]["candidates"][0]["queue_ms"] == 100.0
    assert shown["ttft_ms_target"] == 500.0 and shown["transfers"][0]["took_ms"] == 12.0
    assert explaining.in_seconds(shown) == EXPLAINED


def test_an_unknown_request_is_one_line():
    with pytest.raises(CommandError, match="no decision about request r9 is stored here"):
        explain("r9")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no url"])
def test_a_server_that_does_not_answer_is_one_line(url, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("op-sw-token\n"))
    with pytest.raises(CommandError, match=url):
        explain("r1", "--server", url)


def test_the_api_gives_what_the_command_gives():
    make_record()
    answer = client_of().get("/api/v1/decisions/r1/")
    assert answer.status_code == 200
    assert answer.json() == json.loads(explain("r1", "--json"))


def test_the_api_knows_no_other_request_and_no_stranger():
    assert client_of().get("/api/v1/decisions/r9/").status_code == 404
    assert client_of("eve", is_staff=False).get("/api/v1/decisions/r1/").status_code == 403
    assert client_of("bob").post("/api/v1/decisions/r1/").status_code == 405


def test_the_api_explains_a_request_that_has_not_been_stored(monkeypatch):
    server = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", server.state)
    try:
        server.do(lambda: server.memory.chat(max_tokens=4))
        request_id = server.memory.request_facts()[0].request_id
        shown = client_of().get(f"/api/v1/decisions/{request_id}/").json()
    finally:
        server.close()
    assert shown["records"][0]["outcome"] == "placed"
    assert shown["outcome"]["status"] == "completed"


@pytest.mark.parametrize(
    ("predicted_s", "measured_s", "words"),
    [
        (None, 0.005, ""),
        (0.005, None, ""),
        (0.005, 0.0052, "as predicted"),
        (0.1, 0.2, "50 % slower than predicted"),
        (0.3, 0.2, "50 % faster than predicted"),
        (0.003, 0.0, "as predicted"),
    ],
)
def test_the_error_of_a_prediction_is_said_in_words(predicted_s, measured_s, words):
    assert Comparison("TTFT", 1.0, predicted_s, None, measured_s).error == words


@pytest.mark.django_db(transaction=True)
def test_rows_of_before_keep_their_records():
    old = {name: DECISION[name] for name in DECISION if name not in ("bound", "cause")}
    row = make_record(decision=[old])
    executor = MigrationExecutor(connection)
    try:
        before = executor.migrate([("console", "0002_contracts")]).apps
        assert before.get_model("console", "RequestRecord").objects.get(pk=row.pk)
        executor = MigrationExecutor(connection)
        executor.migrate([("console", "0003_explained_decisions")])
    finally:
        executor = MigrationExecutor(connection)
        executor.migrate(executor.loader.graph.leaf_nodes())
    row.refresh_from_db()
    (record,) = row.decision["records"]
    assert (record["reason"], record["cause"]) == (DECISION["reason"], "submitted")
    assert DECISION["reason"] in explain("r1")
