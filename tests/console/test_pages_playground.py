"""Playground: keys that end by themselves, shown once, known to the gateway at once."""

from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.utils import timezone

from console import auth, state
from console.models import ApiKey, Model
from console.pages import playground
from tests.console.pagecast import client_of, make_tenant
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db
ADDRESS = "/playground/key/"


@pytest.fixture
def operator():
    make_tenant()
    return client_of()


def test_the_page_offers_what_requests_may_name(operator):
    Model.objects.create(model_id="tiny", max_model_len=64)
    Model.objects.create(model_id="retired", max_model_len=64, is_active=False)
    text = operator.get("/playground/").content.decode()
    assert "<option>tiny</option>" in text and "retired" not in text
    assert 'value="priority"' in text and 'value="batch"' not in text
    assert 'data-ttft="0.5" data-itl="0.03"' in text


def test_the_key_field_keeps_nothing_for_the_browser_to_remember(operator):
    text = operator.get("/playground/").content.decode()
    assert '<input id="key" type="password" autocomplete="off"' in text


def test_a_made_key_opens_the_tenant_and_ends_within_the_hour(operator):
    response = operator.post(ADDRESS, {"tenant": "acme"})
    answer = response.json()
    assert response["cache-control"] == "no-store" and answer["tenant"] == "acme"
    row = ApiKey.objects.get()
    assert auth.parse_key(answer["key"]).public_id == row.public_id
    assert timezone.now() < row.expires_at <= timezone.now() + timedelta(hours=1)
    assert answer["key"] not in str(vars(row))


def test_the_gateway_knows_the_key_before_the_page_has_it(operator, monkeypatch):
    server = PageServer()
    monkeypatch.setattr(state, "current", server.state)
    key = operator.post(ADDRESS, {"tenant": "acme"}).json()["key"]
    server.close()
    assert auth.verify(server.state.snapshot.current, key).tenant_id == "acme"


def test_making_a_key_is_audited_without_the_key(operator):
    key = operator.post(ADDRESS, {"tenant": "acme"}).json()["key"]
    entry = LogEntry.objects.get()
    assert entry.change_message == "made for the playground"
    assert key not in entry.object_repr and entry.object_repr.endswith(key[-4:])


def test_one_key_above_the_maximum_ends_the_oldest(operator):
    for _ in range(playground.KEYS_MAX + 1):
        assert operator.post(ADDRESS, {"tenant": "acme"}).status_code == 200
    rows = list(ApiKey.objects.order_by("pk").values_list("is_active", flat=True))
    assert rows == [False] + [True] * playground.KEYS_MAX


@pytest.mark.parametrize("form", [{}, {"tenant": ""}, {"tenant": "nobody"}])
def test_a_key_needs_an_active_tenant(operator, form):
    response = operator.post(ADDRESS, form)
    assert response.status_code == 400 and response.json() == {"error": "Choose a tenant."}


def test_a_key_is_made_by_post_and_by_operators_only(operator):
    assert operator.get(ADDRESS).status_code == 405
    assert client_of("eve", is_staff=False).post(ADDRESS, {"tenant": "acme"}).status_code == 403
    assert not ApiKey.objects.exists()


def test_a_key_needs_the_csrf_token(operator):
    operator.handler.enforce_csrf_checks = True
    assert operator.post(ADDRESS, {"tenant": "acme"}).status_code == 403
