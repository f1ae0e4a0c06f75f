"""Queues & SLO: the page's first paint, its filter, and what the live socket replaces."""

import pytest
from django.db import connection
from django.template.loader import render_to_string
from django.test.utils import CaptureQueriesContext

from console import livesocket, queueview, state
from controlplane import domain
from tests.console.memoryserver import MODEL_ID
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db
LIMITS = {"requests_per_min": 60, "tokens_per_min": 1000, "concurrency_max": 4}


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", made.state)

    async def contract():
        contracts = [
            domain.Contract(tenant_id, MODEL_ID, "interactive", **LIMITS)
            for tenant_id in ("acme", "umbrella")
        ]
        made.state.fleet.handle(domain.ContractsSet(tuple(contracts)))

    made.do(contract)
    yield made
    made.close()


def test_classes_contracts_and_ladder_are_there(operator, server):
    response = operator.get("/queues/")
    text = response.content.decode()
    assert [row["name"] for row in response.context["classes"]][:2] == ["interactive", "standard"]
    assert "rung 0 of 4: everything is served" in text and "Nobody waits" in text
    tenants = [row["contract"].tenant_id for row in response.context["contracts"]]
    assert tenants == ["acme", "umbrella"]


def test_a_tenant_in_the_address_filters_the_rows_and_the_live_ones(operator, server):
    response = operator.get("/queues/", {"tenant": "acme"})
    assert [row["contract"].tenant_id for row in response.context["contracts"]] == ["acme"]
    assert "topics=overview,queues&amp;tenant=acme" in response.content.decode()

    async def read():
        return queueview.part(server.state, {"tenant": "umbrella"})

    _, context = server.do(read)
    assert [row["contract"].tenant_id for row in context["contracts"]] == ["umbrella"]


def test_what_the_socket_sends_needs_no_query(operator, server):
    async def read():
        return livesocket.PARTS["queues"](server.state, {})

    with CaptureQueriesContext(
        connection,
    ) as caught:
        template, context = server.do(read)
        html = render_to_string(template, context)
    assert len(caught) == 0
    assert html.strip().startswith('<div id="queue-rows" hx-swap-oob="innerHTML">')


def test_without_a_server_the_page_says_so(operator):
    text = operator.get("/queues/").content.decode()
    assert "does not run in this process" in text
    assert "No contract" in text and "No SLO class" in text


def test_queries_do_not_grow_with_contracts(operator, server, django_assert_num_queries):
    with django_assert_num_queries(2):  # session, user
        operator.get("/queues/")
