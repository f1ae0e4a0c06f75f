"""`/v1/batches`: a batch from its file to its states, what it shows, who may see it."""

import json
from datetime import timedelta

import pytest
from channels.db import database_sync_to_async
from django.utils import timezone

from console import batchclaims, batchfiles, tasks
from console.models import Batch, BatchLine, File, Tenant
from tests.console import rows
from tests.console.memoryserver import MODEL_ID, MemoryServer

pytestmark = pytest.mark.django_db(transaction=True)
URL = "/v1/chat/completions"


@pytest.fixture
async def server(writer, settings, tmp_path):
    settings.SLACKWATER_VAR = tmp_path
    await database_sync_to_async(rows.make_tenant)()
    await database_sync_to_async(rows.make_model)(MODEL_ID)
    made = MemoryServer()
    made.services.writer = writer
    return made


def lines(count: int = 3, **changes) -> bytes:
    body = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}]}
    made = (
        {"custom_id": f"c{i}", "method": "POST", "url": URL, "body": body} | changes
        for i in range(count)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in made)


def store(tmp_path, content: bytes, tenant_slug: str = "acme") -> str:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    path.write_bytes(content)
    row = File.objects.create(
        file_id=f"file-{path.stem}",
        tenant=Tenant.objects.get(slug=tenant_slug),
        filename="in.jsonl",
        purpose="batch",
        path=str(path),
        num_bytes=len(content),
        created_at=timezone.now(),
    )
    return row.file_id


async def file_of(tmp_path, content: bytes) -> str:
    return await database_sync_to_async(store)(tmp_path, content)


async def post(server, path="/v1/batches", **body):
    return await server.call("POST", path, json.dumps(body).encode())


async def create(server, file_id, **changes):
    body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"} | changes
    return await post(server, **{k: v for k, v in body.items() if v is not ...})


async def checked(server, batch_id):
    """The batch after the task has read its file."""
    pk = (await database_sync_to_async(Batch.objects.get)(batch_id=batch_id)).pk
    await database_sync_to_async(tasks.validate_batch)(pk)
    return (await server.call("GET", f"/v1/batches/{batch_id}")).json()


async def test_a_batch_is_read_by_a_task_and_starts(server, tmp_path):
    file_id = await file_of(tmp_path, lines())
    made = (await create(server, file_id, metadata={"run": "7"})).json()
    assert made["status"] == "validating" and made["request_counts"]["total"] == 0
    assert made["expires_at"] - made["created_at"] == 86_400
    batch = await checked(server, made["id"])
    assert batch["status"] == "in_progress" and batch["in_progress_at"] >= batch["created_at"]
    assert batch["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert batch["input_file_id"] == file_id and batch["metadata"] == {"run": "7"}
    assert batch["endpoint"] == URL and batch["model"] == MODEL_ID and batch["errors"] is None
    assert await database_sync_to_async(BatchLine.objects.count)() == 3


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"not json\n", "invalid_json", 1),
        (lines(1) + lines(1), "duplicate_custom_id", 2),
        (lines(1, url="/v1/completions"), "mismatched_url", 1),
        (lines(1, body={"model": "nothing"}), "model_not_found", 1),
    ],
)
async def test_a_file_with_mistakes_fails_with_each_of_them(server, tmp_path, content, code, line):
    made = (await create(server, await file_of(tmp_path, content))).json()
    batch = await checked(server, made["id"])
    assert batch["status"] == "failed" and batch["failed_at"] is not None
    error = batch["errors"]["data"][0]
    assert (error["code"], error["line"], error["param"]) == (code, line, None)
    assert await database_sync_to_async(BatchLine.objects.count)() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoint": "/v1/embeddings"},
        {"endpoint": ...},
        {"completion_window": "1y"},
        {"completion_window": 24},
        {"completion_window": ...},
        {"metadata": {"k": 1}},
        {"metadata": {str(i): "v" for i in range(17)}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
        {"output_expires_after": {"anchor": "now", "seconds": 4000}},
        {"output_expires_after": 5},
        {"colour": "red"},
        {"input_file_id": "file-unknown"},
        {"input_file_id": ...},
    ],
)
async def test_bad_bodies_are_refused(server, tmp_path, changes):
    refused = await create(server, await file_of(tmp_path, lines()), **changes)
    assert refused.status == 400, refused.body
    assert await database_sync_to_async(Batch.objects.count)() == 0


async def test_cancel_pause_and_resume_change_the_state_once(server, tmp_path):
    made = (await create(server, await file_of(tmp_path, lines()))).json()
    place = f"/v1/batches/{made['id']}"
    await checked(server, made["id"])
    assert (await post(server, f"{place}/pause")).json()["slackwater"]["is_paused"]
    assert (await post(server, f"{place}/pause")).status == 400
    assert not (await post(server, f"{place}/resume")).json()["slackwater"]["is_paused"]
    assert (await post(server, f"{place}/resume")).status == 400
    cancelled = (await post(server, f"{place}/cancel")).json()
    assert cancelled["status"] == "cancelling" and cancelled["cancelling_at"] is not None
    assert (await post(server, f"{place}/cancel")).json()["status"] == "cancelling"


async def test_a_batch_cancelled_while_it_is_read_never_starts(server, tmp_path):
    made = (await create(server, await file_of(tmp_path, lines()))).json()
    cancelled = (await post(server, f"/v1/batches/{made['id']}/cancel")).json()
    assert cancelled["status"] == "cancelled"
    assert (await checked(server, made["id"]))["status"] == "cancelled"


async def test_failed_lines_run_again_while_the_window_is_open(server, tmp_path):
    made = (await create(server, await file_of(tmp_path, lines()))).json()
    await checked(server, made["id"])

    def fail_one() -> None:
        failed, *rest = BatchLine.objects.all()
        BatchLine.objects.filter(pk=failed.pk).update(status="failed", error={"code": "x"})
        usage = {"prompt_tokens": 5, "completion_tokens": 2}
        usage["prompt_tokens_details"] = {"cached_tokens": 1}
        BatchLine.objects.filter(pk__in=[row.pk for row in rest]).update(
            status="completed", response={"body": {"usage": usage}}
        )
        Batch.objects.update(status="completed", ended_at=timezone.now())

    await database_sync_to_async(fail_one)()
    place = f"/v1/batches/{made['id']}"
    ended = (await server.call("GET", place)).json()
    assert ended["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert ended["usage"]["input_tokens"] == 10 and ended["usage"]["output_tokens"] == 4
    again = (await post(server, f"{place}/retry")).json()
    assert again["status"] == "in_progress" and again["request_counts"]["failed"] == 0
    assert (await post(server, f"{place}/retry")).status == 400
    await database_sync_to_async(Batch.objects.update)(expires_at=timezone.now())
    await database_sync_to_async(BatchLine.objects.update)(status="failed")
    assert await database_sync_to_async(batchclaims.retry_failed)(made["id"], timezone.now()) == 0


async def test_lists_are_paged_newest_first(server, tmp_path):
    file_id = await file_of(tmp_path, lines())
    ids = [(await create(server, file_id)).json()["id"] for _ in range(3)]
    exchange = await server.call("GET", "/v1/batches")
    assert [row["id"] for row in exchange.json()["data"]] == ids[::-1]


async def test_another_tenants_batch_does_not_exist(server, tmp_path):
    def foreign() -> None:
        rows.make_tenant("other")
        file_id = store(tmp_path, lines(), "other")
        row = File.objects.get(file_id=file_id)
        Batch.objects.create(
            batch_id="batch_foreign",
            tenant=row.tenant,
            input_file=row,
            endpoint=URL,
            model_id=MODEL_ID,
            completion_window="24h",
            num_lines=0,
            created_at=timezone.now(),
            expires_at=timezone.now() + timedelta(hours=1),
        )

    await database_sync_to_async(foreign)()
    assert (await server.call("GET", "/v1/batches/batch_foreign")).status == 404
    assert (await post(server, "/v1/batches/batch_foreign/cancel")).status == 404
    assert (await server.call("GET", "/v1/batches")).json()["data"] == []


async def test_a_file_in_use_cannot_be_deleted_and_one_task_reads_it(server, tmp_path):
    file_id = await file_of(tmp_path, lines())
    made = (await create(server, file_id)).json()
    refused = await server.call("DELETE", f"/v1/files/{file_id}")
    assert refused.json()["error"]["code"] == "file_in_use"
    await database_sync_to_async(Batch.objects.update)(checked_by=tasks.INCARNATION)
    assert (await checked(server, made["id"]))["status"] == "validating"  # somebody is at it
    await database_sync_to_async(Batch.objects.update)(checked_by="")
    assert (await checked(server, made["id"]))["status"] == "in_progress"


def test_the_sweep_rings_for_lost_batches_and_removes_expired_files(
    tmp_path, monkeypatch, settings
):
    settings.SLACKWATER_VAR = tmp_path
    tenant = rows.make_tenant()
    past = timezone.now() - timedelta(minutes=1)
    kept, gone = store(tmp_path, b"x"), store(tmp_path, b"y")
    File.objects.filter(file_id=gone).update(expires_at=past)
    made = [
        batchfiles.create(tenant, File.objects.get(file_id=kept), "", "1h", timezone.now())
        for _ in range(2)
    ]
    Batch.objects.filter(pk=made[0].pk).update(checked_by=tasks.INCARNATION)
    rung = []
    monkeypatch.setattr(tasks.validate_batch, "delay", rung.append)
    tasks.sweep()
    assert rung == [made[1].pk]
    assert list(File.objects.values_list("file_id", flat=True)) == [kept]
    assert sorted(path.read_bytes() for path in tmp_path.glob("*.jsonl")) == [b"x"]
