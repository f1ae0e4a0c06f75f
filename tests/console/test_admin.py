"""Django's admin: what operators edit, what they only read, and secrets shown once."""

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from console.auth import parse_key, verify
from console.models import ApiKey, ApiToken, Quota, RequestRecord, SLOClassRow, Tenant, Worker
from console.snapshot import Snapshot
from tests.console import rows

pytestmark = pytest.mark.django_db


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(rows.make_operator())
    client.defaults["HTTP_HOST"] = "localhost"
    return client


def url(model: type, action: str, *args: object) -> str:
    return reverse(f"admin:console_{model._meta.model_name}_{action}", args=args)


def test_every_table_has_its_pages(operator: Client) -> None:
    now = timezone.now()
    tenant = rows.make_tenant()
    rows.make_key(tenant)
    rows.make_model()
    RequestRecord.objects.create(request_id="r1", tenant_id="acme", arrived_at=now)
    Worker.objects.create(
        name="<img src=x>", worker_id="w1", role="mixed", heard_at=now, joined_at=now
    )
    models = [model for model in admin.site._registry if model._meta.app_label == "console"]
    assert len(models) == 12
    for model in models:
        listed = operator.get(url(model, "changelist"))
        assert listed.status_code == 200
        assert b"<img src=x>" not in listed.content
        for row in model.objects.all()[:1]:
            assert operator.get(url(model, "change", row.pk)).status_code == 200


def test_a_tenant_is_made_with_its_quota(operator: Client) -> None:
    rows.ensure_default_classes()
    response = operator.post(
        url(Tenant, "add"),
        {
            "slug": "beta",
            "name": "Beta",
            "default_class": SLOClassRow.objects.get(name="standard").pk,
            "is_active": "on",
            "weight": 2.5,
            "quota-TOTAL_FORMS": 1,
            "quota-INITIAL_FORMS": 0,
            "quota-0-concurrency_max": 5,
        },
    )
    assert response.status_code == 302
    assert Quota.objects.get(tenant__slug="beta").concurrency_max == 5


def test_an_impossible_class_is_named_in_the_form(operator: Client) -> None:
    rows.ensure_default_classes()
    row = SLOClassRow.objects.get(name="interactive")
    response = operator.post(
        url(SLOClassRow, "change", row.pk),
        {
            "rank": 0,
            "service_tier": "priority",
            "ttft_s_p99": 0.5,
            "itl_s_p99": 0.03,
            "deadline_s": 60,
            "queue_s_max": 30,
            "price_factor": 2,
        },
    )
    assert response.status_code == 200
    assert b"A deadline is for batch classes" in response.content
    row.refresh_from_db()
    assert row.deadline_s is None


def test_a_key_is_shown_once_and_works(operator: Client) -> None:
    tenant = rows.make_tenant()
    form = {"tenant": tenant.pk, "name": "ci", "is_active": "on"}
    response = operator.post(url(ApiKey, "add"), form, follow=True)
    shown = [str(message) for message in response.context["messages"]]
    [text] = [message.rsplit(" ", 1)[-1] for message in shown if "only this once" in message]
    assert parse_key(text) is not None
    facts = verify(Snapshot.load(), text)
    assert facts is not None
    assert facts.tenant_id == "acme"
    secret = text.split("-")[3]
    for page in (url(ApiKey, "changelist"), url(ApiKey, "change", ApiKey.objects.get().pk)):
        assert secret not in operator.get(page).content.decode()


def test_a_key_is_switched_off_but_keeps_its_tenant_and_secret(operator: Client) -> None:
    tenant, other = rows.make_tenant(), rows.make_tenant("other")
    minted = rows.make_key(tenant)
    key = ApiKey.objects.get()
    operator.post(url(ApiKey, "change", key.pk), {"tenant": other.pk, "name": "x"})
    key.refresh_from_db()
    assert (key.tenant, key.name, key.is_active) == (tenant, "x", False)
    assert bytes(key.secret_hmac) == minted.secret_hmac
    assert operator.post(url(ApiKey, "delete", key.pk), {"post": "yes"}).status_code == 403


def test_an_operator_token_is_made_in_the_admin(operator: Client) -> None:
    user = User.objects.get()
    response = operator.post(
        url(ApiToken, "add"), {"user": user.pk, "is_active": "on"}, follow=True
    )
    assert "op-sw-" in str(next(iter(response.context["messages"])))


def test_facts_cannot_be_changed(operator: Client) -> None:
    row = RequestRecord.objects.create(request_id="r1", tenant_id="a", arrived_at=timezone.now())
    assert operator.get(url(RequestRecord, "add")).status_code == 403
    assert operator.post(url(RequestRecord, "change", row.pk), {}).status_code == 403
    assert operator.post(url(RequestRecord, "delete", row.pk), {}).status_code == 403


def test_the_id_of_a_tenant_stays(operator: Client) -> None:
    tenant = rows.make_tenant()
    page = operator.get(url(Tenant, "change", tenant.pk)).content.decode()
    assert 'name="slug"' not in page
    assert 'name="name"' in page


def test_a_stranger_and_a_plain_user_are_kept_out(client: Client) -> None:
    client.defaults["HTTP_HOST"] = "localhost"
    assert client.get(url(Tenant, "changelist")).status_code == 302
    user = User.objects.create_user("eve")
    client.force_login(user)
    assert client.get(url(Tenant, "changelist")).status_code == 302


def test_staff_sees_only_what_it_may(client: Client) -> None:
    client.defaults["HTTP_HOST"] = "localhost"
    user = User.objects.create_user("sam", is_staff=True)
    user.user_permissions.add(Permission.objects.get(codename="view_tenant"))
    client.force_login(user)
    assert client.get(url(Tenant, "changelist")).status_code == 200
    assert client.get(url(ApiKey, "changelist")).status_code == 403
