"""Split: the division with its forecast, the plan's history, and orders to the planner."""

import pytest
from django.contrib.admin.models import LogEntry

from console import plans, state
from console.models import PlanOrder, PlanRecord
from console.pages import split
from controlplane import protocol
from tests.console.pagecast import client_of, make_plan
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("prefill", "decode"))
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


def reasons(client, **query):
    return [row["plan"].reason for row in client.get("/split/", query).context["rows"]]


def roles(server):
    async def read():
        return {worker.worker_id: worker.role for worker in server.state.fleet.view().workers}

    return server.do(read)


def mode(server):
    async def read():
        return server.state.fleet.view().planner_mode

    return server.do(read)


def test_each_model_has_its_workers_by_side(operator, server):
    text = operator.get("/split/").content.decode()
    (row,) = operator.get("/split/").context["splits"]
    assert (row["num_prefill"], row["num_others"], row["need_prefill"]) == (1, 1, None)
    assert "No forecast yet" in text and "the planner acts" in text


def test_the_live_part_is_one_element_that_replaces_itself(operator, server):
    text = operator.get("/split/", {"part": "now"}).content.decode().strip()
    assert text.startswith('<div id="split-now"') and text.endswith("</div>")
    assert "<html" not in text and "Override" in text


def test_without_a_server_the_page_says_so(operator):
    text = operator.get("/split/").content.decode()
    assert "does not run in this process" in text and "No live worker" in text
    assert "No such change" in text


@pytest.mark.parametrize(
    ("needs", "text"),
    [
        ((1, 1), "as it is"),
        ((2, 1), "needs 1 more than the 2 here"),
        ((0, 2), "1 more to decode"),
        ((2, 0), "1 more to prefill"),
    ],
)
def test_the_proposal_is_a_sentence(needs, text):
    row = {"num_prefill": 1, "num_others": 1, "need_prefill": needs[0], "need_others": needs[1]}
    assert split._with_step(row)["advice"] == text


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, ["by ada", "advice", "moved"]),
        ({"by": "planner"}, ["advice", "moved"]),
        ({"by": "operators"}, ["by ada"]),
        ({"carried": "yes"}, ["by ada", "moved"]),
        ({"carried": "shadow only"}, ["advice"]),
        ({"kind": "drain"}, ["by ada"]),
        ({"kind": "nonsense"}, ["by ada", "advice", "moved"]),
        ({"worker": "w9"}, ["moved"]),
        ({"before": "nonsense"}, ["by ada", "advice", "moved"]),
    ],
)
def test_a_filter_in_the_address_leaves_only_what_passes(operator, query, found):
    make_plan(reason="moved", worker_id="w9")
    make_plan(reason="advice", is_shadow=True)
    make_plan(reason="by ada", by="ada", kind="drain")
    make_plan(reason="invented", is_demo_history=True)
    assert reasons(operator, **query) == found


def test_pages_of_the_history_follow_each_other(operator):
    for index in range(split.PAGE_ROWS + 2):
        make_plan(reason=f"n{index}")
    context = operator.get("/split/").context
    rest = operator.get(f"/split/?{context['older']}").context
    assert [row["plan"].reason for row in rest["rows"]] == ["n1", "n0"]
    assert rest["older"] == "" and not rest["is_first"]


def test_queries_do_not_grow_with_rows(operator, server, django_assert_num_queries):
    operator.get("/split/")
    for size in (1, 20):
        for _ in range(size):
            make_plan()
        with django_assert_num_queries(4):  # session, user, changes, orders
            operator.get("/split/")


# --- orders ---


def test_shadow_mode_is_previewed_then_set_and_holds_after_a_restart(operator, server):
    assert "only records" in operator.get("/split/shadow/").content.decode()
    assert mode(server) == "auto"
    assert operator.post("/split/shadow/").status_code == 302
    assert mode(server) == "shadow" and plans.mode() == "shadow"
    assert "the planner's mode is shadow" in LogEntry.objects.get().change_message
    operator.post("/split/auto/")
    assert mode(server) == "auto" and plans.mode() == "auto"


def test_a_recommendation_is_applied(operator, server):
    record = make_plan(is_shadow=True)
    text = operator.get(f"/split/apply/?plan={record.pk}").content.decode()
    assert record.reason in text and f'name="plan" value="{record.pk}"' in text
    assert f"/split/apply/?plan={record.pk}" in operator.get("/split/").content.decode()
    operator.post("/split/apply/", {"plan": record.pk})
    assert roles(server)["w1"] == "decode"
    order = PlanOrder.objects.get()
    assert (order.state, order.action, order.by) == ("done", "role", "ada")


def test_what_was_carried_out_cannot_be_applied(operator, server):
    record = make_plan()
    answer = operator.post("/split/apply/", {"plan": record.pk}, follow=True)
    assert "was carried out when it was made" in answer.content.decode()
    assert roles(server)["w1"] == "prefill" and not PlanOrder.objects.exists()


def test_an_override_reaches_the_worker(operator, server):
    worker = server.memory.workers[1]
    sent = []
    worker.send = sent.append
    text = operator.get("/split/role/?worker=w2").content.decode()
    assert "What this will do" in text and sent == []
    operator.post("/split/role/", {"worker": "w2", "role": "mixed"})
    assert sent == [protocol.SetRole("mixed")]


def test_a_role_that_does_not_exist_is_refused(operator, server):
    response = operator.post("/split/role/", {"worker": "w2", "role": "boss"})
    assert response.status_code == 200 and "Select a valid choice" in response.content.decode()
    assert not PlanOrder.objects.exists()


def test_nothing_to_roll_back_is_said(operator, server):
    answer = operator.post("/split/rollback/", follow=True).content.decode()
    assert "nothing of the planner&#x27;s stands that could be undone" in answer


def test_an_order_without_a_server_changes_nothing(operator):
    answer = operator.post("/split/shadow/", follow=True).content.decode()
    assert "no server took it" in answer and plans.mode() == "auto"
    assert PlanOrder.objects.get().state == "refused" and not LogEntry.objects.exists()


@pytest.mark.parametrize(
    "address", ["/split/boss/", "/split/role/?worker=w9", "/split/apply/?plan=x", "/split/apply/"]
)
def test_an_unknown_order_worker_or_plan_is_not_found(operator, server, address):
    assert operator.get(address).status_code == 404


def test_a_user_who_is_no_operator_orders_nothing(server):
    assert client_of("eve", is_staff=False).post("/split/shadow/").status_code == 403
    assert mode(server) == "auto" and not PlanRecord.objects.exists()
