"""Alerts: readings, rules, what opens and resolves, and who has seen it."""

import pytest
from asgiref.sync import sync_to_async
from django.contrib.admin.models import LogEntry
from django.utils import timezone

from console import alerting
from console.alerting import Reading, Watch
from console.models import Alert, AlertRule, ensure_default_rules
from console.snapshot import SnapshotKeeper
from controlplane import domain
from tests.console.pagecast import client_of, make_batch
from tests.console.test_fleet import Rig
from tests.console.test_pages_workers import make_view
from tests.console.test_plans import DirectWriter
from tests.console.test_queueview import make_account, queued

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def rules(db):
    """As `serve` makes them at its start."""
    ensure_default_rules()


def make_alert(**changes):
    values = {
        "rule": AlertRule.objects.get(kind="worker_lost"),
        "subject": "w1",
        "text": "w1 is lost: nothing heard from it",
        "value": 9.0,
        "opened_at": timezone.now(),
    }
    return Alert.objects.create(**(values | changes))


def lost(subject="w1", value=9.0):
    return Reading("worker_lost", subject, value, f"{subject} is lost")


# --- readings ---


def test_readings_name_what_burns_waits_is_spent_and_silent():
    limits = {"requests_per_min": 1, "tokens_per_min": 9, "concurrency_max": 1}
    contract = domain.Contract("acme", "m", "interactive", **limits, budget_tokens=100)
    account = make_account(
        contract=contract, burn_rate_fast=20.0, burn_rate_slow=15.0, spent_tokens=80, held_tokens=10
    )
    burn, budget = alerting.of_accounts([account])
    assert (burn.subject, burn.value, budget.value) == ("acme/m/interactive", 15.0, 0.9)
    slo = domain.SLOClass("interactive", 0, 0.5, 0.03, queue_s_max=30.0)
    (wait,) = alerting.of_queues([queued(1, 3.0), queued(2, 15.0)], [slo])
    assert wait.value == 0.5 and "50% of the 30 s" in wait.text
    workers = [make_view(status="live"), make_view(status="lost", worker_id="w2")]
    assert [item.subject for item in alerting.of_workers(workers)] == ["w2"]


def test_a_batch_that_may_be_late_is_read_from_its_last_test():
    batch = make_batch(slack=-0.2)
    make_batch()
    (reading,) = alerting.of_batches()
    assert (reading.subject, reading.value) == (batch.batch_id, 1.25)


# --- judging ---


@pytest.mark.parametrize(("at_s", "fires"), [(0.0, False), (9.9, False), (10.0, True)])
def test_a_reading_fires_after_it_has_stayed_over_its_threshold(at_s, fires):
    rule, watch = AlertRule(kind="worker_lost", threshold=5.0, for_s=10.0), Watch()
    watch.firing([rule], [lost()], 0.0)
    assert bool(watch.firing([rule], [lost()], at_s)) == fires


def test_a_reading_that_was_below_in_between_begins_anew():
    rule, watch = AlertRule(kind="worker_lost", threshold=5.0, for_s=10.0), Watch()
    watch.firing([rule], [lost()], 0.0)
    watch.firing([rule], [lost(value=4.9)], 5.0)
    assert not watch.firing([rule], [lost()], 10.0)


def test_a_rule_that_is_off_never_fires_and_alerts_have_a_limit():
    rule = AlertRule(kind="worker_lost", threshold=5.0, for_s=0.0, is_active=False)
    assert not Watch().firing([rule], [lost()], 0.0)
    rule.is_active = True
    many = [lost(f"w{index}") for index in range(alerting.OPEN_MAX + 1)]
    assert len(Watch().firing([rule], many, 0.0)) == alerting.OPEN_MAX


def test_an_alert_opens_once_and_is_resolved_by_itself():
    rules, now = list(AlertRule.objects.all()), timezone.now()
    firing = {("worker_lost", "w1"): lost()}
    assert alerting.store(rules, firing, now) == 1
    assert alerting.store(rules, firing, now) == 0
    Alert.objects.update(state="acknowledged")
    assert alerting.store(rules, {}, now) == 0
    assert Alert.objects.get().state == "resolved"
    assert alerting.store(rules, firing, now) == 1 and Alert.objects.count() == 2


@pytest.mark.django_db(transaction=True)
async def test_the_desk_sees_a_worker_that_has_gone():
    await sync_to_async(AlertRule.objects.get_or_create)(
        kind="worker_lost", defaults={"threshold": 5.0, "for_s": 0.0}
    )
    rig = Rig()
    rig.join("c1")
    desk = alerting.AlertDesk(rig.fleet, SnapshotKeeper(), DirectWriter())
    await desk.turn()
    assert await Alert.objects.acount() == 0
    rig.fleet.disconnected("c1")
    rig.at_s += 6.0
    await desk.turn()
    alert = await Alert.objects.aget()
    assert (alert.subject, alert.state) == ("w1", "firing")


# --- the page ---


def test_open_and_resolved_alerts_and_rules_are_listed(operator):
    make_alert()
    make_alert(subject="w2", text="w2 was lost", state="resolved", resolved_at=timezone.now())
    text = operator.get("/alerts/").content.decode()
    assert "w1 is lost" in text and "w2 was lost" in text
    assert text.count("Acknowledge</button>") == 1
    assert text.count('name="threshold"') == 5


def test_without_alerts_the_page_says_so(operator):
    text = operator.get("/alerts/", {"part": "rows"}).content.decode()
    assert "Nothing fires" in text and "<html" not in text


def test_an_alert_is_acknowledged_once(operator):
    alert = make_alert()
    operator.post(f"/alerts/{alert.pk}/acknowledge/")
    alert.refresh_from_db()
    assert (alert.state, alert.acknowledged_by) == ("acknowledged", "ada")
    assert LogEntry.objects.get().change_message == "acknowledged"
    answer = operator.post(f"/alerts/{alert.pk}/acknowledge/", follow=True)
    assert "acknowledged or resolved already" in answer.content.decode()


def test_a_rule_is_changed_and_audited(operator):
    rule = AlertRule.objects.get(kind="queue_wait")
    operator.post(f"/alerts/rules/{rule.pk}/", {"threshold": "0.9", "for_s": "0"})
    rule.refresh_from_db()
    assert (rule.threshold, rule.for_s, rule.is_active) == (0.9, 0.0, False)
    assert LogEntry.objects.get().change_message == "threshold 0.9, for 0 s, off"


@pytest.mark.parametrize("threshold", ["", "-1", "nan", "inf", "x", "1000001"])
def test_a_threshold_that_is_none_changes_nothing(operator, threshold):
    rule = AlertRule.objects.get(kind="queue_wait")
    form = {"threshold": threshold, "for_s": "0", "is_active": "on"}
    answer = operator.post(f"/alerts/rules/{rule.pk}/", form, follow=True)
    assert "is unchanged" in answer.content.decode()
    assert AlertRule.objects.get(pk=rule.pk).threshold == rule.threshold


def test_a_user_who_is_no_operator_acknowledges_nothing():
    alert = make_alert()
    stranger = client_of("eve", is_staff=False)
    assert stranger.post(f"/alerts/{alert.pk}/acknowledge/").status_code == 403
    assert stranger.post(f"/alerts/rules/{alert.rule_id}/").status_code == 403
    assert Alert.objects.get().state == "firing"


def test_queries_do_not_grow_with_alerts(operator, django_assert_num_queries):
    for size in (1, 20):
        for index in range(size):
            make_alert(subject=f"s{size}-{index}")
        with django_assert_num_queries(5):  # session, user, open, resolved, rules
            operator.get("/alerts/")
