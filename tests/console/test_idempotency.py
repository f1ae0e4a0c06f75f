"""Same key and body: run once, answered alike. Another body is an error, a refusal is not kept."""

import asyncio
import hashlib
import json
from datetime import timedelta

import pytest
from channels.db import database_sync_to_async
from django.utils import timezone

from console import idempotency
from console.models import IdempotencyRecord
from tests.console.memoryserver import MemoryServer, chat_body

pytestmark = pytest.mark.django_db(transaction=True)
DEAD = "nowhere:1:1:dead"


@pytest.fixture
async def server(writer):
    made = MemoryServer()
    made.services.writer = writer
    return made


def ask(server, key="k1", **changes):
    body = json.dumps(chat_body(**changes)).encode()
    return server.call(body=body, headers={"idempotency-key": key})


async def test_the_answer_is_given_again_without_running_again(server):
    first, second = await ask(server), await ask(server)
    assert first.status == second.status == 200
    assert second.body == first.body
    assert second.headers["x-slackwater-replayed"] == "true"
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(server.worker.assigned) == 1


async def test_a_stream_is_given_again_whole(server):
    first, second = await ask(server, stream=True), await ask(server, stream=True)
    assert first.body == second.body and first.body.endswith(b"data: [DONE]\n\n")
    assert second.headers["content-type"].startswith("text/event-stream")
    assert len(server.worker.assigned) == 1


async def test_another_body_under_the_key_is_refused_and_not_retried(server):
    await ask(server)
    refused = await ask(server, max_tokens=3)
    assert refused.status == 422 and refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"]["code"] == "idempotency_key_reused"


async def test_the_same_key_of_a_running_request_is_a_conflict_that_passes(server):
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 2
    running = asyncio.ensure_future(ask(server))
    while not server.worker.assigned:
        await asyncio.sleep(0.01)
    conflict = await ask(server)
    assert conflict.status == 409 and "retry-after-ms" in conflict.headers
    server.worker.gate.set()
    assert (await running).status == 200
    assert (await ask(server)).body == (await running).body


async def test_a_refusal_before_it_ran_is_not_kept(server):
    assert (await ask(server, temperature=9)).status == 400
    server.services.draining = True
    assert (await ask(server)).status == 503
    server.services.draining = False
    assert (await ask(server)).status == 200


async def test_a_request_that_died_with_its_process_runs_again(server, monkeypatch):
    monkeypatch.setattr(idempotency, "_INCARNATION", DEAD)
    monkeypatch.setattr(idempotency, "is_dead", lambda incarnation: incarnation == DEAD)
    await server.services.writer.call(idempotency._claim, "acme", "k1", digest_of(chat_body()))
    assert (await ask(server)).status == 200


def digest_of(body) -> str:
    raw = b"/v1/chat/completions\0" + json.dumps(body).encode()
    return hashlib.sha256(raw).hexdigest()


async def test_keys_are_kept_for_a_day(server):
    await ask(server)
    old = timezone.now() - idempotency.KEPT - timedelta(minutes=1)
    await database_sync_to_async(IdempotencyRecord.objects.update)(created_at=old)
    again = await ask(server)
    assert "x-slackwater-replayed" not in again.headers
    assert len(server.worker.assigned) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x7f"])
async def test_bad_keys_are_refused(server, key):
    assert (await ask(server, key=key)).status == 400


async def test_an_answer_too_long_to_keep_is_forgotten(server, monkeypatch):
    monkeypatch.setattr(idempotency, "BODY_BYTES_MAX", 10)
    assert (await ask(server)).status == (await ask(server)).status == 200
    assert len(server.worker.assigned) == 2
