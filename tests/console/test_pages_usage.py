"""Usage and cost: groups, steps, the period before, both views, exports; two queries in all."""

import csv
import io
import json
import re
from datetime import timedelta
from html import unescape

import pytest
from django.utils import timezone

from console import costreport, usage
from console.costs import CostLine
from console.models import CostMinute, GpuMinute

pytestmark = pytest.mark.django_db
HOUR_USD = 3.6  # a milli-dollar a second


def make_minute(hours_ago, tenants=("acme",), model_id="m", **changes):
    """One minute of a model: 30 s online, 10 s batch of which 2 s fixed, 20 s idle."""
    at = timezone.now() - timedelta(hours=hours_ago)
    minute = at.replace(second=0, microsecond=0)
    run = f"r{CostMinute.objects.count()}"
    GpuMinute.objects.create(
        minute=minute,
        run=run,
        model_id=model_id,
        online_s=30.0,
        batch_s=10.0,
        batch_fixed_s=2.0,
        idle_s=20.0,
        gpu_hour_usd=HOUR_USD,
    )
    values = {"requests": 2, "prompt_tokens": 600, "output_tokens": 400} | changes
    for tenant_id in tenants:
        for class_name, is_batch in (("interactive", False), ("batch", True)):
            CostMinute.objects.create(
                minute=minute,
                run=run,
                tenant_id=tenant_id,
                model_id=model_id,
                class_name=class_name,
                is_batch=is_batch,
                prefill_gpu_s=1.0,
                decode_gpu_s=2.0,
                **values,
            )


def rows_of(operator, **query):
    response = operator.get("/usage/", {**query, "format": "json"})
    return json.loads(response.content)


def test_without_minutes_the_next_step_is_a_request(operator):
    text = operator.get("/usage/").content.decode()
    assert "No GPU time in this period" in text and "/playground/" in text
    assert "data-bars" not in text


def test_groups_add_up_to_what_all_gpus_cost_in_both_views(operator):
    make_minute(1, tenants=("acme", "beta"))
    for by in (["tenant"], ["class"], ["tenant", "model", "class"]):
        rows = rows_of(operator, by=by)
        assert sum(row["usd"] for row in rows) == pytest.approx(0.06)
        assert sum(row["cash_usd"] for row in rows) == pytest.approx(0.06)
    by_class = {row["class"]: row for row in rows_of(operator, by=["class"])}
    assert by_class["batch"]["usd"] == pytest.approx(0.01)
    assert by_class["batch"]["cash_usd"] == pytest.approx(0.002)  # only what a step costs anyway


def test_the_rows_equal_the_report_of_the_command(operator):
    make_minute(1)
    make_minute(5, tenants=("beta",))
    report = costreport.report(24.0, ("tenant",), timezone.now())
    lines = {line["tenant"]: line for line in report["lines"]}
    for row in rows_of(operator):
        known = lines[row["tenant"]]
        assert {name: row[name] for name in known} == known


def test_the_period_before_stands_beside_this_one(operator):
    make_minute(1)
    make_minute(25)
    make_minute(26)
    make_minute(30, tenants=("gone",))
    make_minute(60)  # before the period before: no part of either
    rows = {row["tenant"]: row for row in rows_of(operator)}
    assert rows["acme"]["usd"] == pytest.approx(0.06)
    assert rows["gone"]["usd"] == 0 and rows["gone"]["usd_before"] > 0
    assert rows["acme"]["usd_before"] + rows["gone"]["usd_before"] == pytest.approx(0.18)
    text = operator.get("/usage/").content.decode()
    assert ">gone<" in text and "is-down" in text


@pytest.mark.parametrize("view", ["attributed", "cash"])
def test_the_bars_add_up_to_the_sum_of_the_table(operator, view):
    for hours_ago in (1, 2, 9):
        make_minute(hours_ago, tenants=("acme", "beta"))
    response = operator.get("/usage/", {"view": view, "step": "hour", "by": ["tenant", "class"]})
    text = response.content.decode()
    bars = json.loads(unescape(re.search(r'data-bars="([^"]*)"', text)[1]))
    assert sum(sum(trace["y"]) for trace in bars["traces"]) == pytest.approx(0.18)
    assert len(bars["x"]) in (24, 25) and all(
        len(trace["y"]) == len(bars["x"]) for trace in bars["traces"]
    )


def test_more_groups_than_colours_share_the_last_bar(operator):
    make_minute(1, tenants=[f"t{index}" for index in range(12)])
    text = operator.get("/usage/").content.decode()
    traces = json.loads(unescape(re.search(r'data-bars="([^"]*)"', text)[1]))["traces"]
    assert [trace["colour"] for trace in traces] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert traces[-1]["name"] == "5 more"


def test_queries_stay_the_same_with_more_minutes(operator, django_assert_num_queries):
    make_minute(1)
    with django_assert_num_queries(4):  # session, user, requests' minutes, workers' minutes
        operator.get("/usage/")
    for index in range(30):
        make_minute(index / 2, tenants=("acme", "beta", "gamma"))
    with django_assert_num_queries(4) as captured:
        operator.get("/usage/", {"by": ["tenant", "model", "class"]})
    assert not any("requestrecord" in query["sql"] for query in captured.captured_queries)


def test_a_file_for_a_spreadsheet_has_the_rows_and_no_formula(operator):
    make_minute(1, tenants=("acme", "=cmd"))
    response = operator.get("/usage/", {"format": "csv"})
    assert 'filename="usage.csv"' in response["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(response.content.decode())))
    assert {row["tenant"] for row in rows} == {"acme", "'=cmd"}
    assert float(rows[0]["usd"]) > 0 and "model" not in rows[0]


def test_a_wrong_choice_is_the_default(operator):
    make_minute(1)
    text = operator.get("/usage/", {"range": "1y", "view": "x", "by": "y", "step": "z"})
    assert "Dollars per hour" in text.content.decode()


def test_steps_cover_the_period_without_gaps():
    now = timezone.now().replace(hour=5, minute=30)
    hours = usage.steps_between(now - timedelta(hours=3), now, "hour")
    assert [at.hour for at in hours] == [2, 3, 4, 5] and hours[0].minute == 0
    days = usage.steps_between(now - timedelta(days=2), now, "day")
    assert len(days) == 3 and all(at.hour == 0 for at in days)


def test_no_change_is_named_where_there_was_nothing_before():
    assert usage.change_ratio(3.0, 0.0) is None
    assert usage.change_ratio(3.0, 2.0) == pytest.approx(0.5)
    assert usage.usd_of(CostLine(usd=2.0, cash_usd=1.0), "cash") == 1.0
