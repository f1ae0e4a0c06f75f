"""Plan records and orders: `manage.py plan`, and the desk that carries orders out."""

import json
from datetime import timedelta
from io import StringIO

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from console import plans
from console.fleetrecords import FleetRecords
from console.management.commands import plan as command
from console.models import PlanOrder
from controlplane import domain
from tests.console.pagecast import make_plan
from tests.console.test_fleet import Rig

pytestmark = pytest.mark.django_db


class DirectWriter:
    """A FactWriter whose calls run at once, in this thread's transaction."""

    async def call(self, function, *args):
        return await sync_to_async(function)(*args)


def run(*words: str) -> tuple[int, str]:
    out = StringIO()
    try:
        call_command("plan", *words, stdout=out)
    except SystemExit as ended:
        return int(ended.code), out.getvalue()
    return 0, out.getvalue()


# --- records -------------------------------------------------------------------------------------


def test_every_kind_of_change_is_stored_with_all_that_it_says():
    facts = []
    FleetRecords(facts.append).plan(
        domain.PlanChanged(
            "w2", "mixed", "mixed", "planner", "why", True, "model", "small-1b", "large-8b"
        )
    )
    (fact,) = facts
    assert (fact.kind, fact.is_shadow) == ("model", True)
    assert (fact.model_before, fact.model_after, fact.reason) == ("small-1b", "large-8b", "why")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "w1 prefill -> decode"),
        ({"kind": "model", "model_before": "a", "model_after": "b"}, "w1 a -> b"),
        ({"kind": "model", "model_before": "a"}, "w1 a -> no model"),
        (
            {"kind": "start", "worker_id": "auto-1", "model_after": "b"},
            "start auto-1 (decode, b)",
        ),
    ],
)
def test_records_read_as_what_they_changed(values, text):
    assert str(make_plan(**values)) == text


def test_history_lists_the_newest_first_without_demo_history():
    make_plan(reason="older")
    make_plan(reason="invented", is_demo_history=True)
    newest = make_plan(reason="newer", is_shadow=True)
    code, out = run("history", "--json", "--limit", "5")
    rows = json.loads(out)
    assert code == 0 and [row["reason"] for row in rows] == ["newer", "older"]
    assert rows[0]["id"] == newest.pk and rows[0]["shadow"] is True
    _, text = run("history")
    assert "w1 prefill -> decode by planner (shadow)" in text and "newer" in text


def test_history_over_its_limit_is_refused():
    with pytest.raises(CommandError, match="--limit=501: expected 1 to 500"):
        call_command("plan", "history", "--limit", "501")


def test_status_tells_mode_workers_and_newest_change():
    make_plan(reason="carried out")
    make_plan(reason="only advice", is_shadow=True)
    plans.note_mode("shadow", "ann")
    code, out = run("status", "--json")
    found = json.loads(out)
    assert code == 0 and found["mode"] == "shadow"
    assert found["newest"]["reason"] == "carried out" and found["workers"] == []


# --- orders --------------------------------------------------------------------------------------


def test_order_that_no_server_takes_is_withdrawn(monkeypatch):
    monkeypatch.setattr(command, "WAIT_S", 0.0)
    code, out = run("shadow", "on", "--json", "--by", "ann")
    assert code == command.EXIT_LATE
    assert json.loads(out) == {
        "action": "shadow",
        "worker_id": "",
        "value": "",
        "by": "ann",
        "state": "refused",
        "answer": plans.NO_SERVER,
    }
    assert plans.mode() == "auto"


def test_apply_names_what_cannot_be_applied():
    with pytest.raises(CommandError, match="there is no recommendation"):
        call_command("plan", "apply")
    done = make_plan()
    with pytest.raises(CommandError, match="was carried out"):
        call_command("plan", "apply", str(done.pk))
    old = make_plan(is_shadow=True, at=timezone.now() - timedelta(hours=2))
    with pytest.raises(CommandError, match="too old to apply"):
        call_command("plan", "apply", str(old.pk))
    start = make_plan(is_shadow=True, kind="start")
    with pytest.raises(CommandError, match="switch shadow mode off"):
        call_command("plan", "apply", str(start.pk))


def test_recommendation_becomes_the_order_that_carries_it_out():
    role = make_plan(is_shadow=True)
    model = make_plan(is_shadow=True, kind="model", model_after="b")
    drain = make_plan(is_shadow=True, kind="drain")
    assert plans.order_of(role) == ("role", "w1", "decode")
    assert plans.order_of(model) == ("model", "w1", "b")
    assert plans.order_of(drain) == ("drain", "w1", "")


class Desk:
    """An OrderDesk over a fleet with one worker."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.worker_id = self.rig.join("c1", role="prefill").sent[0].worker_id
        self.desk = plans.OrderDesk(self.rig.fleet, DirectWriter())

    async def turn(self) -> None:
        await self.desk.turn()

    def role(self) -> str:
        return self.rig.fleet.view().workers[0].role


@pytest.mark.django_db(transaction=True)
async def test_orders_are_carried_out_once_in_order_and_answered():
    desk = Desk()
    place = sync_to_async(plans.place)
    role = await place("role", "ann", desk.worker_id, "decode")
    again = await place("role", "ann", desk.worker_id, "decode")
    unknown = await place("role", "ann", "w99", "decode")
    shadow = await place("shadow", "ann")
    nothing = await place("rollback", "ann")
    await desk.turn()
    found = {
        order.pk: (order.state, order.answer)
        for order in await sync_to_async(lambda: list(PlanOrder.objects.all()))()
    }
    assert found[role.pk] == ("done", "ordered by ann")
    assert found[again.pk] == ("refused", f"{desk.worker_id} has the role decode already")
    assert found[unknown.pk] == ("refused", "no worker w99")
    assert found[shadow.pk] == ("done", "the planner's mode is shadow")
    assert found[nothing.pk][0] == "refused" and "could be undone" in found[nothing.pk][1]
    assert desk.role() == "decode"
    desk.rig.fleet.handle(domain.RoleOrdered(desk.worker_id, "prefill", "bob"))
    await desk.turn()
    assert desk.role() == "prefill", "an order is carried out once"


@pytest.mark.django_db(transaction=True)
async def test_mode_of_the_last_server_holds_after_a_restart():
    await sync_to_async(plans.note_mode)("shadow", "ann")
    desk = Desk()
    await desk.turn()
    assert desk.rig.fleet.view().planner_mode == "shadow"


@pytest.mark.django_db(transaction=True)
async def test_order_that_waited_too_long_is_refused():
    desk = Desk()
    order = await sync_to_async(plans.place)("role", "ann", desk.worker_id, "decode")
    late = timezone.now() - timedelta(seconds=plans.ORDER_S_MAX + 1.0)
    await sync_to_async(PlanOrder.objects.filter(pk=order.pk).update)(at=late)
    await desk.turn()
    await order.arefresh_from_db()
    assert order.state == "refused" and order.answer.startswith("older than 30 s")
    assert desk.role() == "prefill"
