"""Keys: the list, a secret that is shown once, rotation with overlap, revocation, and who may."""

import re
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone

from console import auth, keys, limits, state
from console.models import ApiKey
from console.pages.keyforms import OVERLAP_HOURS_MAX
from console.snapshot import Snapshot
from controlplane.domain import Contract
from controlplane.ledger import AccountView
from tests.console.pagecast import make_tenant
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db


@pytest.fixture
def tenant():
    return make_tenant()


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


def shown_ids(text):
    return re.findall(r'<tr id="(\w{8})"', text)


def secret_of(response):
    return re.search(r'<pre id="secret"[^>]*>(.*?)</pre>', response.content.decode(), re.S)[1]


def test_the_list_names_each_key_with_its_rights_and_state(operator, tenant):
    made = keys.create(tenant, name="ci", scopes=["generate"], model_ids=["m"])
    text = operator.get("/keys/").content.decode()
    assert shown_ids(text) == [made.public_id]
    assert "1 key," in text and "ci" in text and ">generate<" in text and ">m<" in text
    assert made.key not in text and made.last4 in text


def test_without_keys_the_one_next_step_is_to_create_one(operator):
    text = operator.get("/keys/").content.decode()
    assert "No key yet" in text and 'href="/keys/create/"' in text


def test_filters_stand_in_the_address_and_a_filtered_list_can_be_empty(operator, tenant):
    now, other = timezone.now(), make_tenant("other")
    ids = {
        "active": keys.create(tenant, name="a").public_id,
        "expiring": keys.create(other, expires_at=now + timedelta(days=1)).public_id,
        "expired": keys.create(tenant, expires_at=now - timedelta(days=1)).public_id,
        "revoked": keys.create(tenant, is_active=False).public_id,
    }
    for name, public_id in ids.items():
        assert shown_ids(operator.get("/keys/", {"state": name}).content.decode()) == [public_id]
    found = operator.get("/keys/", {"tenant": "other"}).content.decode()
    assert shown_ids(found) == [ids["expiring"]]
    assert "No key matches" in operator.get("/keys/", {"q": "nothing"}).content.decode()
    assert len(shown_ids(operator.get("/keys/", {"state": "wrong"}).content.decode())) == 4


def test_queries_stay_the_same_with_more_keys(operator, tenant, django_assert_num_queries):
    keys.create(tenant)
    with django_assert_num_queries(4):  # session, user, count, rows
        operator.get("/keys/")
    for index in range(60):
        keys.create(make_tenant(f"t{index}") if index < 5 else tenant)
    with django_assert_num_queries(4):
        text = operator.get("/keys/").content.decode()
    assert len(shown_ids(text)) == 50 and "page 1 of 2" in text


def test_a_created_key_is_shown_once_with_code_for_this_address(operator, tenant):
    form = {"tenant": "acme", "name": "ci", "days": 2, "scopes": ["generate", "models"]}
    response = operator.post("/keys/create/", form)
    secret, text = secret_of(response), response.content.decode()
    facts = auth.verify(Snapshot.load(), secret)
    assert facts.tenant_id == "acme" and facts.scopes == {"generate", "models"}
    assert facts.expires_at - timezone.now() <= timedelta(days=2)
    assert text.count("http://localhost/v1") >= 3 and "Authorization: Bearer" in text
    assert "no-store" in response["cache-control"]
    assert secret not in operator.get("/keys/").content.decode()
    entry = LogEntry.objects.get()
    assert entry.change_message == "created" and secret not in entry.object_repr


@pytest.mark.parametrize(
    "change", [{"tenant": "nobody"}, {"days": 0}, {"scopes": ["all"]}, {"model_ids": ["unknown"]}]
)
def test_a_wrong_field_makes_no_key(operator, tenant, change):
    assert operator.post("/keys/create/", {"tenant": "acme"} | change).status_code == 200
    assert not ApiKey.objects.exists() and not LogEntry.objects.exists()


def test_a_rotated_key_lives_on_for_the_overlap_and_cannot_be_rotated_again(operator, tenant):
    old = keys.create(tenant, scopes=["generate"])
    where = f"/keys/{old.public_id}/rotate/"
    assert "both keys are good" in operator.get(where).content.decode()
    secret = secret_of(operator.post(where, {"overlap_hours": 2}))
    snapshot, now = Snapshot.load(), timezone.now()
    assert auth.verify(snapshot, secret, now).scopes == {"generate"}
    assert auth.verify(snapshot, old.key, now) is not None
    assert auth.verify(snapshot, old.key, now + timedelta(hours=2)) is None
    assert operator.post(where, {"overlap_hours": 2}).status_code == 302
    assert ApiKey.objects.count() == 2


def test_an_overlap_over_the_limit_is_refused(operator, tenant):
    old = keys.create(tenant)
    operator.post(f"/keys/{old.public_id}/rotate/", {"overlap_hours": OVERLAP_HOURS_MAX + 1})
    assert ApiKey.objects.count() == 1


def test_a_revoked_key_is_refused_by_the_gateway_when_the_answer_is_out(operator, tenant, server):
    key = keys.create(tenant)
    assert auth.verify(server.state.snapshot.refresh(), key.key) is not None
    operator.get(f"/keys/{key.public_id}/revoke/")
    assert auth.verify(server.state.snapshot.current, key.key) is not None  # a look changes nothing
    operator.post(f"/keys/{key.public_id}/revoke/")
    assert auth.verify(server.state.snapshot.current, key.key) is None
    operator.post(f"/keys/{key.public_id}/revoke/")
    assert [entry.change_message for entry in LogEntry.objects.all()] == ["revoked"]


def test_the_limit_that_a_tenant_meets_first_is_named(operator, tenant, server):
    keys.create(tenant)
    text = operator.get("/keys/").content.decode()
    assert "of 64 in flight" in text


def make_account(**values):
    contract = Contract(
        tenant_id="acme",
        model_id="m",
        class_name="interactive",
        requests_per_min=10,
        tokens_per_min=1_000,
        concurrency_max=4,
        attainment=0.99,
        over_limit="reject",
        when_late="reject",
        budget_tokens=100_000,
        budget_usd=None,
        period="2026-01",
        usd_per_million_prompt=0.0,
        usd_per_million_output=0.0,
        itl_s=0.03,
    )
    zeros = dict.fromkeys(
        (
            "num_running",
            "requests_last_min",
            "tokens_last_min",
            "spent_tokens",
            "held_tokens",
            "num_met",
            "num_missed",
            "num_surplus",
        ),
        0,
    )
    more = {"spent_usd": 0.0, "held_usd": 0.0, "error_budget_left": 1.0}
    rates = {"burn_rate_fast": 0.0, "burn_rate_slow": 0.0}
    return AccountView(**{"contract": contract} | zeros | more | rates | values)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ({"num_running": 3, "requests_last_min": 2}, "in flight"),
        ({"requests_last_min": 9, "num_running": 3}, "requests/min"),
        ({"tokens_last_min": 950}, "tokens/min"),
        ({"spent_tokens": 60_000, "held_tokens": 39_000}, "tokens this month"),
    ],
)
def test_the_fullest_limit_binds(use, name):
    assert limits.binding(limits.of_account(make_account(**use))).name == name


def test_no_limit_binds_where_there_is_none():
    assert limits.binding([]) is None
