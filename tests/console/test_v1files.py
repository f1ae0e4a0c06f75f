"""`/v1/files`: what a form may hold, what is kept, who sees it, how long."""

import tempfile
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from channels.db import database_sync_to_async
from django.utils import timezone

from console import v1files
from console.models import File
from tests.console import rows
from tests.console.memoryserver import Client, MemoryServer

pytestmark = pytest.mark.django_db(transaction=True)
LINES = b'{"custom_id": "a"}\n'


@pytest.fixture
async def server(writer, settings, tmp_path):
    settings.SLACKWATER_VAR = tmp_path
    await database_sync_to_async(rows.make_tenant)()
    made = MemoryServer()
    made.services.writer = writer
    return made


def form(content: bytes = LINES, filename: str = "in.jsonl", **data) -> httpx.Request:
    fields = {"purpose": "batch"} | data
    fields = {name: value for name, value in fields.items() if value is not ...}
    return httpx.Request(
        "POST", "http://localhost/v1/files", files={"file": (filename, content)}, data=fields
    )


async def upload(server, request: httpx.Request | None = None, **changes):
    request = request or form(**changes)
    headers = {"content-type": request.headers["content-type"]}
    exchange = Client("POST", "/v1/files", b"", headers)
    with tempfile.TemporaryFile() as body:
        body.write(request.read())
        exchange.scope["extensions"] = {"slackwater.upload": body}
        await server.app(exchange.scope, exchange.receive, exchange.send)
    return exchange


async def get(server, path, method="GET", query=""):
    exchange = Client(method, path)
    exchange.scope["query_string"] = query.encode()
    await server.app(exchange.scope, exchange.receive, exchange.send)
    return exchange


async def test_a_file_is_kept_under_a_name_of_ours_and_given_back(server, tmp_path):
    made = (await upload(server, filename="../../etc/passwd")).json()
    assert made["object"] == "file" and made["bytes"] == len(LINES)
    assert made["filename"] == "passwd" and made["purpose"] == "batch"
    assert made["expires_at"] - made["created_at"] == 30 * 86_400
    row = await database_sync_to_async(File.objects.get)()
    assert Path(row.path).is_relative_to(tmp_path / "files") and row.file_id in row.path
    content = await get(server, f"/v1/files/{made['id']}/content")
    assert content.body == LINES and content.headers["content-length"] == str(len(LINES))
    assert (await get(server, f"/v1/files/{made['id']}")).json() == made


async def test_deleting_removes_row_and_bytes(server):
    made = (await upload(server)).json()
    path = Path((await database_sync_to_async(File.objects.get)()).path)
    gone = await get(server, f"/v1/files/{made['id']}", "DELETE")
    assert gone.json() == {"id": made["id"], "object": "file", "deleted": True}
    assert not path.exists()
    for method in ("GET", "DELETE"):
        assert (await get(server, f"/v1/files/{made['id']}", method)).status == 404


async def test_lists_are_paged_newest_first(server):
    ids = [(await upload(server)).json()["id"] for _ in range(5)]
    first = (await get(server, "/v1/files", query="limit=2")).json()
    assert [row["id"] for row in first["data"]] == ids[:2:-1] and first["has_more"]
    rest = (await get(server, "/v1/files", query=f"after={first['last_id']}")).json()
    assert [row["id"] for row in rest["data"]] == ids[2::-1] and not rest["has_more"]
    rising = (await get(server, "/v1/files", query="order=asc&purpose=batch")).json()
    assert [row["id"] for row in rising["data"]] == ids
    none = (await get(server, "/v1/files", query="purpose=batch_output")).json()
    assert none["data"] == [] and none["first_id"] is None


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=x", "limit=10001", "order=up", "after=file-x", "a=b", "limit=1&limit=2"],
)
async def test_bad_queries_are_refused(server, query):
    assert (await get(server, "/v1/files", query=query)).status == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"purpose": "fine-tune"},
        {"purpose": ...},
        {"colour": "red"},
        {"expires_after[anchor]": "created_at"},
        {"expires_after[anchor]": "now", "expires_after[seconds]": "4000"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
        {"expires_after[anchor]": "created_at", "expires_after[seconds]": "-1"},
    ],
)
async def test_bad_forms_are_refused_and_nothing_is_kept(server, changes, tmp_path):
    refused = await upload(server, **changes)
    assert refused.status == 400, refused.body
    assert await database_sync_to_async(File.objects.count)() == 0
    assert not list(tmp_path.rglob("*.jsonl"))


async def test_a_body_that_is_no_form_is_refused(server):
    broken = httpx.Request(
        "POST",
        "http://localhost/v1/files",
        content=b"--x\r\nnonsense",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert (await upload(server, broken)).status == 400
    plain = httpx.Request(
        "POST", "http://localhost", content=b"{}", headers={"content-type": "application/json"}
    )
    assert (await upload(server, plain)).status == 415


async def test_a_file_over_the_limit_is_413(server, monkeypatch):
    monkeypatch.setattr(v1files, "FILE_BYTES_MAX", 10)
    refused = await upload(server, content=b"x" * 11)
    assert refused.status == 413
    assert (await upload(server, content=b"x" * 10)).status == 200


async def test_files_of_a_tenant_are_bounded(server, monkeypatch):
    monkeypatch.setattr(v1files, "FILES_MAX", 1)
    assert (await upload(server)).status == 200
    refused = await upload(server)
    assert refused.json()["error"]["code"] == "too_many_files"


async def test_an_expired_file_is_not_there_any_more(server):
    made = (await upload(server)).json()
    expired = timezone.now() - timedelta(seconds=1)
    await database_sync_to_async(File.objects.update)(expires_at=expired)
    assert (await get(server, f"/v1/files/{made['id']}")).status == 404
    assert (await get(server, "/v1/files")).json()["data"] == []


async def test_another_tenants_file_does_not_exist(server):
    other = await database_sync_to_async(rows.make_tenant)("other")
    create = database_sync_to_async(File.objects.create)
    await create(
        file_id="file-foreign",
        tenant=other,
        filename="x",
        purpose="batch",
        path="/nowhere",
        num_bytes=1,
        created_at=timezone.now(),
    )
    foreign = await get(server, "/v1/files/file-foreign")
    unknown = await get(server, "/v1/files/file-unknown1")
    for exchange in (foreign, unknown):
        assert exchange.status == 404
    assert foreign.body.replace(b"file-foreign", b"") == unknown.body.replace(b"file-unknown1", b"")
    assert (await get(server, "/v1/files/file-foreign", "DELETE")).status == 404
    assert (await get(server, "/v1/files/file-foreign/content")).status == 404
