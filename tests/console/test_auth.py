"""Keys of tenants, tokens of operators, and who may open a page."""

import string
from datetime import timedelta

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.utils import timezone
from django_htmx.middleware import HtmxDetails
from hypothesis import given, settings
from hypothesis import strategies as st

from console.auth import (
    BASE62,
    find_operator_token,
    mint_key,
    operator_required,
    parse_key,
    verify,
)
from console.models import ApiKey, ApiToken, Tenant
from console.snapshot import EMPTY, Snapshot
from tests.console import rows

KEY = "sk-sw-D2zJqaiB-2KNs8yFOH4GmBxdOMj1gLk81dEwX7OEPbdcNg0rVEB50TxdEw"  # made for this test


def test_a_minted_key_has_the_documented_shape() -> None:
    minted = mint_key()
    prefix, service, public_id, rest = minted.text.split("-")
    assert (prefix, service, len(public_id), len(rest)) == ("sk", "sw", 8, 49)
    assert set(public_id + rest) <= set(string.ascii_letters + string.digits)
    assert minted.last4 == minted.text[-4:]
    parsed = parse_key(minted.text)
    assert parsed is not None
    assert (parsed.prefix, parsed.public_id, parsed.secret) == ("sk-sw", public_id, rest[:43])
    assert len(minted.secret_hmac) == 32
    assert parsed.secret.encode() not in minted.secret_hmac


def test_no_two_keys_are_alike() -> None:
    assert len({mint_key().text for _ in range(200)}) == 200
    assert parse_key(KEY) is not None


@settings(max_examples=200, deadline=None)
@given(index=st.integers(0, 63), letter=st.sampled_from(BASE62 + "-_ é"))
def test_any_mistyped_character_is_refused_without_a_lookup(index: int, letter: str) -> None:
    changed = KEY[:index] + letter + KEY[index + 1 :]
    assert (parse_key(changed) is not None) == (changed == KEY)


@pytest.mark.parametrize("text", ["", "sk-sw-", "sk-sw-x-y", "Bearer x", "٣" * 64, "a" * 10_000])
def test_what_is_no_key_is_refused(text: str) -> None:
    assert parse_key(text) is None
    assert verify(EMPTY, text) is None


@pytest.mark.django_db
def test_a_good_key_is_known_and_a_wrong_secret_is_not() -> None:
    minted = rows.make_key(rows.make_tenant())
    snapshot = Snapshot.load()
    facts = verify(snapshot, minted.text)
    assert facts is not None
    assert (facts.tenant_id, facts.last4) == ("acme", minted.last4)
    stranger = mint_key()
    assert verify(snapshot, stranger.text) is None
    ApiKey.objects.update(public_id=stranger.public_id)  # right id, wrong secret
    assert verify(Snapshot.load(), stranger.text) is None


@pytest.mark.django_db
def test_an_operator_token_is_no_tenant_key() -> None:
    minted = mint_key("op-sw")
    ApiKey.objects.create(
        tenant=rows.make_tenant(),
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
    )
    assert verify(Snapshot.load(), minted.text) is None


@pytest.mark.django_db
def test_a_key_ends_with_its_expiry_its_switch_or_its_tenant() -> None:
    tenant = rows.make_tenant()
    now = timezone.now()
    minted = rows.make_key(tenant, expires_at=now + timedelta(minutes=1))
    assert verify(Snapshot.load(), minted.text, now) is not None
    assert verify(Snapshot.load(), minted.text, now + timedelta(minutes=1)) is None
    ApiKey.objects.update(is_active=False)
    assert verify(Snapshot.load(), minted.text, now) is None
    ApiKey.objects.update(is_active=True)
    Tenant.objects.update(is_active=False)
    assert verify(Snapshot.load(), minted.text, now) is None


@pytest.mark.django_db
def test_no_secret_is_stored() -> None:
    minted = rows.make_key(rows.make_tenant())
    row = ApiKey.objects.get()
    stored = f"{row.public_id}{row.last4}{row}{bytes(row.secret_hmac)!r}"
    assert minted.text.split("-")[3][:39] not in stored


@pytest.mark.django_db
def test_operator_tokens_end_with_switch_expiry_or_user() -> None:
    user = rows.make_operator()
    text = rows.make_token(user)
    found = find_operator_token(text)
    assert found is not None
    assert found.user == user
    assert find_operator_token(mint_key("op-sw").text) is None
    assert find_operator_token(mint_key().text) is None
    ApiToken.objects.update(expires_at=timezone.now())
    assert find_operator_token(text) is None
    ApiToken.objects.update(expires_at=None, is_active=False)
    assert find_operator_token(text) is None
    ApiToken.objects.update(is_active=True)
    User.objects.update(is_active=False)
    assert find_operator_token(text) is None


def ask(user: User | AnonymousUser, headers: dict[str, str] | None = None) -> HttpResponse:
    request: HttpRequest = RequestFactory().get("/workers/?role=decode", headers=headers or {})
    request.user = user
    request.htmx = HtmxDetails(request)
    return operator_required(lambda request: HttpResponse("page"))(request)


def test_a_page_sends_a_stranger_to_the_login_and_back() -> None:
    response = ask(AnonymousUser())
    assert response.status_code == 302
    assert response.url == "/admin/login/?next=/workers/%3Frole%3Ddecode"


def test_a_fragment_sends_the_whole_page_to_the_login() -> None:
    response = ask(AnonymousUser(), {"hx-request": "true"})
    assert response.status_code == 200
    assert response.headers["HX-Redirect"].startswith("/admin/login/")


def test_a_page_is_for_staff_only() -> None:
    assert ask(User(username="olga", is_staff=True)).content == b"page"
    with pytest.raises(PermissionDenied):
        ask(User(username="eve"))
