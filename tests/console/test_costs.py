"""Costs: minutes closed into rows, both views add up, and what the command and the API answer."""

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st

from console import costbook, costs
from console.costbook import CostBook
from console.costs import NOBODY, attribute, by
from console.facts import CostFact, GpuFact
from console.metrics import COST_SERIES_MAX, Metrics
from console.models import CostMinute, GpuMinute
from console.writer import FactWriter
from controlplane.gpuledger import GpuView
from controlplane.protocol import GpuSeconds
from tests.console import rows
from tests.console.test_live import fact

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def cost(tenant: str, gpu_s: float, minute: datetime = NOON, is_batch: bool = False, **values):
    name = "batch" if is_batch else "standard"
    facts = {"requests": 1, "prompt_tokens": 600, "output_tokens": 400}
    facts |= {"prefill_gpu_s": 0.25 * gpu_s, "decode_gpu_s": 0.75 * gpu_s, **values}
    return CostFact(minute, "run", tenant, "m", name, is_batch, **facts)


def gpu(online_s, batch_s=0.0, fixed_s=0.0, idle_s=0.0, minute: datetime = NOON):
    return GpuFact(minute, "run", "m", online_s, batch_s, fixed_s, idle_s, 3600.0)  # $1 a second


def worker(name: str, *lanes_s: float) -> GpuView:
    return GpuView(name, "m", GpuSeconds(*lanes_s), 100.0, 100.0)


# --- who pays what -------------------------------------------------------------------------------


def test_requests_pay_their_lane_and_interactive_ones_the_idle_time():
    lines = attribute([cost("a", 6.0), cost("b", 2.0), cost("a", 4.0, is_batch=True)],
                      [gpu(10.0, 5.0, 1.0, 8.0)])  # fmt: skip
    a, b = lines["a", "m", "standard"], lines["b", "m", "standard"]
    batch = lines["a", "m", "batch"]
    assert (a.gpu_s, a.idle_gpu_s) == pytest.approx((7.5 + 6.0, 6.0))
    assert (b.gpu_s, b.idle_gpu_s) == pytest.approx((2.5 + 2.0, 2.0))
    assert (batch.gpu_s, batch.idle_gpu_s, batch.usd) == pytest.approx((5.0, 0.0, 5.0))
    assert a.row()["usd_per_million_tokens"] == pytest.approx(13.5 / 1000 * 1e6)


def test_as_incremental_cash_batch_pays_its_share_of_the_fixed_cost():
    lines = attribute([cost("a", 6.0), cost("c", 4.0, is_batch=True)], [gpu(10.0, 5.0, 1.0, 8.0)])
    assert lines["c", "m", "batch"].cash_usd == pytest.approx(1.0)
    assert lines["a", "m", "standard"].cash_usd == pytest.approx(22.0)
    assert lines["c", "m", "batch"].usd == pytest.approx(5.0)


def test_idle_time_goes_by_the_share_of_the_peak_minute_not_of_the_day():
    """b works all night, a makes the peak."""
    told = [cost("b", 2.0, NOON + MINUTE * n) for n in range(10)]
    told += [cost("a", 6.0, NOON + MINUTE * 3)]
    lines = attribute(told, [gpu(26.0, idle_s=8.0)])
    assert lines["a", "m", "standard"].idle_gpu_s == pytest.approx(6.0)
    assert lines["b", "m", "standard"].idle_gpu_s == pytest.approx(2.0)


def test_time_that_no_request_stands_for_is_shown_as_such():
    lines = attribute([], [gpu(1.0, 2.0, 0.5, 3.0)])
    assert {key[0] for key in lines} == {NOBODY}
    assert sum(line.usd for line in lines.values()) == pytest.approx(6.0)


amounts = st.one_of(st.just(0.0), st.floats(0.001, 100.0))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 3), amounts), max_size=12
    ),
    amounts,
    amounts,
    st.floats(0.0, 1.0),
    amounts,
)
def test_both_views_add_up_to_what_the_gpus_cost(told, online_s, batch_s, fixed_share, idle_s):
    costs_ = [cost(name, s, NOON + MINUTE * n, is_batch) for name, is_batch, n, s in told]
    lines = attribute(costs_, [gpu(online_s, batch_s, fixed_share * batch_s, idle_s)])
    total_s = online_s + batch_s + idle_s
    assert sum(line.gpu_s for line in lines.values()) == pytest.approx(total_s, abs=1e-6)
    assert sum(line.usd for line in lines.values()) == pytest.approx(total_s, abs=1e-6)
    has_payer = any(line.gpu_s for key, line in lines.items() if key[2] == "batch")
    if has_payer or not batch_s:
        cash_usd = sum(line.cash_usd for line in lines.values())
        assert cash_usd == pytest.approx(total_s, abs=1e-6)


def test_sums_by_one_dimension_keep_the_total():
    lines = attribute([cost("a", 6.0), cost("b", 2.0), cost("b", 1.0, is_batch=True)],
                      [gpu(8.0, 1.0)])  # fmt: skip
    tenants = by(lines, ["tenant"])
    assert set(tenants) == {("a", "", ""), ("b", "", "")}
    assert tenants["b", "", ""].usd == pytest.approx(3.0) and tenants["b", "", ""].requests == 2
    assert by(lines, [])["", "", ""].usd == pytest.approx(9.0)


# --- gathering -----------------------------------------------------------------------------------


def ended(**values):
    return fact(**({"gpu_prefill_s": 0.25, "gpu_decode_s": 0.75} | values))


def book(put) -> CostBook:
    return CostBook(put, lambda model_id: 2.5, "run")


def test_a_minute_is_closed_into_one_row_for_each_key_and_model():
    put: list = []
    costs_ = book(put.append)
    assert not costs_.tick(NOON, [worker("w1", 1.0, 1.0, 0.0, 0.0, 0.0, 58.0)])
    for _ in range(500):
        costs_.observe(ended())
    costs_.observe(ended(tenant_id="zeta", is_batch=True, class_name="batch"))
    costs_.observe(ended(gpu_prefill_s=0.0, gpu_decode_s=0.0))  # refused: it costs nothing
    assert not costs_.tick(NOON + MINUTE / 2, []) and put == []
    assert costs_.tick(NOON + MINUTE, [worker("w1", 11.0, 2.0, 3.0, 4.0, 1.0, 99.0)])
    (acme, zeta, gpus) = put
    assert (acme.requests, acme.prefill_gpu_s, acme.decode_gpu_s) == (500, 125.0, 375.0)
    assert (zeta.tenant_id, zeta.is_batch, zeta.minute) == ("zeta", True, NOON)
    assert gpus == GpuFact(NOON, "run", "m", 11.0, 7.0, 1.0, 41.0, 2.5)
    assert costs_.last_hour()["zeta", "m", "batch"].gpu_s == pytest.approx(7.0)


def test_workers_that_come_and_go_are_counted_from_when_they_were_seen():
    put: list = []
    costs_ = book(put.append)
    costs_.tick(NOON, [worker("w1", 5.0), worker("w2", 7.0)])
    costs_.tick(NOON + MINUTE, [worker("w1", 6.0), worker("w3", 100.0)])
    costs_.close(NOON + MINUTE * 1.5, [worker("w3", 103.0)])
    assert [row.online_s for row in put] == [1.0, 3.0]


def test_keys_of_one_minute_are_bounded():
    put: list = []
    costs_ = book(put.append)
    costs_.tick(NOON, [])
    for index in range(costbook.KEYS_MAX + 3):
        costs_.observe(ended(tenant_id=f"t{index}"))
    costs_.tick(NOON + MINUTE, [])
    assert len(put) == costbook.KEYS_MAX + 1
    assert put[-1].tenant_id == costbook.OVER and put[-1].requests == 3


def test_metrics_show_gpu_time_losses_and_costs_and_are_bounded():
    metrics = Metrics()
    metrics.set_gpu([worker("w1", 1.0, 2.0, 3.0, 4.0, 0.5, 88.0)])
    lines = attribute([cost("a", 6.0)], [gpu(10.0)])
    metrics.set_costs(lines)
    text = metrics.render().decode()
    assert 'slackwater_gpu_seconds{kind="idle",model="m",worker="w1"} 88.0' in text
    assert 'slackwater_gpu_unaccounted_ratio{worker="w1"} 0.0' in text
    assert (
        'slackwater_cost_usd_last_hour{model="m",slo_class="standard",tenant="a",view="attributed"}'
        " 10.0"
    ) in text
    assert 'cost_usd_per_million_tokens{model="m",slo_class="standard",tenant="a"' in text
    many = attribute([cost(f"t{n}", 1.0) for n in range(COST_SERIES_MAX + 9)], [gpu(500.0)])
    metrics.set_costs(many)
    assert metrics.render().decode().count("cost_usd_last_hour{") == 2 * COST_SERIES_MAX


# --- stored --------------------------------------------------------------------------------------


@pytest.fixture
def writer(transactional_db) -> Iterator[FactWriter]:
    writer = FactWriter(period_s=0.01)
    writer.start()
    yield writer
    writer.stop()


async def test_rows_are_stored_once_though_their_commit_is_repeated(writer):
    told = [cost("a", 6.0), cost("b", 2.0), gpu(10.0)]
    for item in (*told, *told):
        writer.put(item)
    await writer.flush()
    assert writer.num_refused == 0
    assert await CostMinute.objects.acount() == 2 and await GpuMinute.objects.acount() == 1


def stored(minutes: int = 3) -> None:
    now = timezone.now().replace(second=0, microsecond=0)
    for index in range(minutes):
        minute = now - MINUTE * index
        for item in (cost("a", 6.0, minute), cost("b", 3.0, minute, is_batch=True)):
            CostMinute.objects.create(**{n: getattr(item, n) for n in item.__slots__})
        item = gpu(8.0, 4.0, 1.0, 8.0, minute)
        GpuMinute.objects.create(**{n: getattr(item, n) for n in item.__slots__})


def run_command(*arguments: str) -> str:
    out = io.StringIO()
    call_command("costs", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_command_prints_costs_by_what_it_is_asked():
    stored()
    answer = json.loads(run_command("--json", "--by", "tenant"))
    assert [row["tenant"] for row in answer["lines"]] == ["a", "b"]
    assert answer["lines"][0]["usd"] == pytest.approx(48.0)
    assert answer["lines"][1]["cash_usd"] == pytest.approx(3.0)
    assert answer["total"]["usd"] == pytest.approx(60.0) == answer["total"]["cash_usd"]
    assert all(set(row) >= {"tenant", "usd_per_million_tokens"} for row in answer["lines"])
    assert "model" not in answer["lines"][0]
    table = run_command().splitlines()
    assert len(table) == 4 and table[0].split()[:3] == ["tenant", "model", "class"]
    assert all(len(a) == len(b) for a, b in pairwise(table))
    with pytest.raises(CommandError, match="--hours=0: expected more than 0"):
        run_command("--hours", "0")


@pytest.mark.django_db
def test_command_without_any_rows_has_a_total_of_nothing():
    answer = json.loads(run_command("--json"))
    assert answer["lines"] == [] and answer["total"]["usd_per_million_tokens"] is None


@pytest.mark.django_db
def test_api_answers_operators_and_nobody_else():
    stored()
    token = rows.make_token(rows.make_operator())
    client = Client(headers={"host": "localhost", "authorization": f"Bearer {token}"})
    body = client.get("/api/v1/costs/?by=class&hours=1").json()
    assert body["by"] == ["class"]
    assert {row["class"] for row in body["lines"]} == {"standard", "batch"}
    assert client.get("/api/v1/costs/?by=colour").status_code == 400
    assert client.get("/api/v1/costs/?hours=0").status_code == 400
    assert client.post("/api/v1/costs/").status_code == 405
    assert Client(headers={"host": "localhost"}).get("/api/v1/costs/").status_code == 401
    assert costs.usd_per_million(3600.0, 3.0, 1_000_000) == 3.0
