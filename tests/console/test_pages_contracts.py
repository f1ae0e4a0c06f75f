"""Contracts: use beside limits, a preview, refusal of over-commitment, undo."""

import json
from datetime import UTC, datetime

import pytest

from console import state
from console.contracts import in_force as contracts_in_force
from console.models import AuditEvent, ContractRow, Model, SLOClassRow
from controlplane.domain import ContractsSet
from tests.console.memoryserver import MODEL_ID
from tests.console.pagecast import make_tenant
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db
VALUES = {
    "requests_per_min": 60,
    "tokens_per_min": 600,
    "concurrency_max": 1,
    "attainment": 0.99,
    "over_limit": "surplus",
    "when_late": "surplus",
    "budget_tokens": "",
    "budget_usd": "",
    "usd_per_million_prompt": 0,
    "usd_per_million_output": 0,
}
HUGE = {"tokens_per_min": 2_000_000_000, "requests_per_min": 1_000_000}


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


@pytest.fixture
def row():
    tenant = make_tenant()
    values = {name: value for name, value in VALUES.items() if value != ""}
    return ContractRow.objects.create(
        tenant=tenant,
        model=Model.objects.create(model_id=MODEL_ID, max_model_len=512),
        slo_class=SLOClassRow.objects.get(name="interactive"),
        **values,
    )


def test_without_contracts_the_next_step_is_to_create_one(operator):
    text = operator.get("/contracts/").content.decode()
    assert "No contract yet" in text and 'href="/contracts/create/"' in text


def test_limits_are_shown_also_where_no_control_plane_runs(operator, row):
    text = operator.get("/contracts/").content.decode()
    assert "600 tokens/min" in text and "not in force here" in text
    assert "No contract of beta" in operator.get("/contracts/?tenant=beta").content.decode()


def test_the_limit_that_is_fullest_is_marked(operator, row, server):
    contracts = contracts_in_force(server.state.snapshot.refresh(), datetime.now(UTC))

    async def put_in_force():
        server.state.fleet.handle(ContractsSet(contracts))

    server.do(put_in_force)
    text = operator.get("/contracts/").content.decode()
    assert text.count('<span class="chip">binds</span>') == 1
    assert "not in force here" not in text and "100 %" in text


def test_a_preview_changes_nothing_and_says_what_would_be_committed(operator, row, server):
    response = operator.post(f"/contracts/{row.pk}/", VALUES | {"concurrency_max": 2, "preview": 1})
    text = response.content.decode()
    assert "concurrency_max 1 → 2" in text and "GPU-s/s" in text
    row.refresh_from_db()
    assert row.concurrency_max == 1 and not AuditEvent.objects.exists()


def test_what_would_be_over_committed_is_refused_with_numbers(operator, row, server):
    for button in ("preview", "save"):
        text = operator.post(f"/contracts/{row.pk}/", VALUES | HUGE | {button: 1}).content.decode()
        assert "would need" in text or "would hold" in text
    row.refresh_from_db()
    assert row.tokens_per_min == 600


def test_a_saved_change_is_audited_and_can_be_undone_once(operator, row, server):
    response = operator.post(f"/contracts/{row.pk}/", VALUES | {"concurrency_max": 2, "save": 1})
    assert response["location"] == f"/contracts/?changed={row.pk}"
    event = AuditEvent.objects.get()
    assert event.words == "concurrency_max 1 → 2"
    assert json.loads(event.before)["concurrency_max"] == 1
    (contract,) = server.state.snapshot.current.contracts
    assert contract.concurrency_max == 2
    assert f"/contracts/{row.pk}/undo/" in operator.get(response["location"]).content.decode()
    operator.post(f"/contracts/{row.pk}/undo/")
    row.refresh_from_db()
    assert row.concurrency_max == 1 and AuditEvent.objects.count() == 2


def test_a_change_that_was_overtaken_is_not_undone(operator, row):
    operator.post(f"/contracts/{row.pk}/", VALUES | {"concurrency_max": 2, "save": 1})
    ContractRow.objects.filter(pk=row.pk).update(concurrency_max=7)
    operator.post(f"/contracts/{row.pk}/undo/")
    row.refresh_from_db()
    assert row.concurrency_max == 7


def test_a_contract_is_created_with_its_tenant_model_and_class(operator, row):
    other = make_tenant("beta")
    keys = {"tenant": other.pk, "model": row.model_id, "slo_class": row.slo_class_id}
    assert operator.post("/contracts/create/", VALUES | keys | {"save": 1}).status_code == 302
    assert ContractRow.objects.get(tenant=other).concurrency_max == 1
    again = operator.post("/contracts/create/", VALUES | keys | {"save": 1})
    assert again.status_code == 200 and "already exists" in again.content.decode()


@pytest.mark.parametrize("change", [{"attainment": 1}, {"tokens_per_min": 59}, {"over_limit": "x"}])
def test_wrong_values_are_not_saved(operator, row, change):
    assert operator.post(f"/contracts/{row.pk}/", VALUES | change | {"save": 1}).status_code == 200
    assert not AuditEvent.objects.exists()


def test_queries_stay_the_same_with_more_contracts(operator, row, django_assert_num_queries):
    for index in range(2):
        with django_assert_num_queries(3):  # session, user, rows
            operator.get("/contracts/")
        ContractRow.objects.create(
            tenant=make_tenant(f"t{index}"),
            model=row.model,
            slo_class=row.slo_class,
            requests_per_min=1,
            tokens_per_min=1,
            concurrency_max=1,
            over_limit="reject",
            when_late="reject",
        )
