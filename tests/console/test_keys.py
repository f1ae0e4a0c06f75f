"""Keys: what they may do, rotation with overlap, and streams that end with their key."""

import asyncio
import io
import json
from dataclasses import replace
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from console import keys
from console.models import ApiKey
from console.snapshot import Snapshot
from tests.console import rows
from tests.console.memoryserver import KEY, MODEL_ID, MemoryServer, chat_body, make_snapshot


def limited(**changes) -> Snapshot:
    known = make_snapshot().keys[KEY.public_id]
    return make_snapshot(keys={KEY.public_id: replace(known, **changes)})


async def answer(server: MemoryServer, method: str, path: str):
    body = json.dumps(chat_body()).encode() if method == "POST" else b""
    return await server.call(method, path, body)


PATHS = {
    "generate": ("POST", "/v1/chat/completions"),
    "models": ("GET", "/v1/models"),
    "files": ("GET", "/v1/files/file-x/content"),
}


@pytest.mark.parametrize("scope", PATHS)
async def test_a_key_without_the_scope_is_refused_by_name(scope):
    others = frozenset(PATHS) - {scope}
    server = MemoryServer(snapshot=limited(scopes=others))
    refused = await answer(server, *PATHS[scope])
    assert refused.status == 403
    assert refused.json()["error"]["code"] == "insufficient_scope"
    assert f"`{scope}`" in refused.json()["error"]["message"]


async def test_a_key_sees_only_the_models_it_may_name():
    server = MemoryServer(snapshot=limited(model_ids=frozenset({"another"})))
    assert (await server.call("GET", "/v1/models")).json()["data"] == []
    refused = await server.chat()
    assert refused.status == 404 and refused.json()["error"]["code"] == "model_not_found"
    server = MemoryServer(snapshot=limited(model_ids=frozenset({MODEL_ID})))
    assert (await server.chat()).status == 200


@pytest.mark.parametrize("change", [{"is_active": False}, {"expires_at": timezone.now()}])
async def test_a_running_stream_ends_with_its_key(change):
    server = MemoryServer()
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 3
    running = asyncio.ensure_future(server.chat(stream=True))
    async with asyncio.timeout(20):
        while server.worker.given.get(next(iter(server.worker.given), ""), 0) < 3:
            await asyncio.sleep(0)
        assert server.services.running.check(make_snapshot()) == 0
        assert server.services.running.check(limited(**change)) == 1
        exchange = await running
    last = exchange.events()[-1]
    assert last["error"]["code"] == "invalid_api_key"
    assert server.worker.cancelled
    assert server.request_facts()[-1].status == "cancelled"


async def test_a_whole_answer_ends_with_its_key():
    server = MemoryServer()
    server.worker.gate = asyncio.Event()
    running = asyncio.ensure_future(server.chat())
    async with asyncio.timeout(20):
        while not server.worker.assigned:
            await asyncio.sleep(0)
        server.services.running.check(limited(is_active=False))
        exchange = await running
    assert exchange.status == 401 and exchange.headers["x-should-retry"] == "false"


async def test_the_last_use_of_keys_is_remembered_once():
    server = MemoryServer()
    await server.chat()
    assert list(server.services.running.take_used()) == [KEY.public_id]
    assert server.services.running.take_used() == {}


@pytest.mark.django_db
def test_rotation_keeps_the_rights_and_lets_the_old_key_overlap():
    old = keys.create(rows.make_tenant(), name="ci", scopes=["generate"], model_ids=["m"])
    new = keys.rotate(old, timedelta(hours=2))
    old.refresh_from_db()
    assert (new.name, new.scopes, new.model_ids) == ("ci", ["generate"], ["m"])
    assert timedelta(hours=1) < old.expires_at - timezone.now() <= timedelta(hours=2)
    assert old.is_active and old.replaced_by == new and new.expires_at is None


@pytest.mark.django_db
def test_rotation_never_lengthens_a_life():
    ends_at = timezone.now() + timedelta(minutes=5)
    old = keys.create(rows.make_tenant(), expires_at=ends_at)
    keys.rotate(old, timedelta(hours=24))
    old.refresh_from_db()
    assert old.expires_at == ends_at


@pytest.mark.django_db
def test_storing_the_last_use_is_no_change_of_the_key():
    row = keys.create(rows.make_tenant())
    before, now = ApiKey.objects.get().updated_at, timezone.now()
    keys.store_used({row.public_id: now, "unknown1": now})
    after = ApiKey.objects.get()
    assert (after.last_used_at, after.updated_at) == (now, before)


def command(*arguments: str) -> str:
    out = io.StringIO()
    call_command("apikey", *arguments, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_command_from_creation_to_revocation():
    assert "No keys" in command("list")
    rows.make_tenant()
    made = json.loads(command("create", "acme", "--scope", "files", "--days", "3", "--json"))
    assert made["key"].startswith("sk-sw-") and made["scopes"] == ["files"]
    assert made["public_id"] in command("list", "acme")
    assert made["key"] not in command("list")
    rotated = json.loads(command("rotate", made["public_id"], "--json"))
    assert rotated["key"] != made["key"] and rotated["scopes"] == ["files"]
    with pytest.raises(CommandError, match="rotated before"):
        command("rotate", made["public_id"])
    assert "revoked" in command("revoke", rotated["public_id"])
    assert not ApiKey.objects.get(public_id=rotated["public_id"]).is_active


@pytest.mark.django_db
def test_command_names_what_is_wrong():
    with pytest.raises(CommandError, match="no tenant nobody") as refused:
        command("create", "nobody")
    assert refused.value.returncode == 2
    with pytest.raises(CommandError, match="no key"):
        command("revoke", "xxxxxxxx")
