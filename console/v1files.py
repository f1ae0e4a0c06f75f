"""`/v1/files`: a tenant's files on this server's disk, in OpenAI's shapes.

An upload is spooled by the server, read from there as a multipart form in bounded pieces, and kept
under a name of ours; what the client called it is only data.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

from channels.db import database_sync_to_async
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import StopUpload, TemporaryFileUploadHandler
from django.http.multipartparser import MultiPartParser, MultiPartParserError
from django.http.request import RawPostDataException
from django.utils import timezone

from console.apierrors import ApiError, invalid
from console.batchcheck import FILE_BYTES_MAX
from console.batchresults import stored_path, write_whole
from console.daphneserver import UPLOAD_EXTENSION
from console.exchange import Exchange
from console.models import File, Tenant
from console.writer import FactWriter

FILES_MAX = 1_000  # of one tenant
LIST_DEFAULT, LIST_MAX = 10_000, 10_000
FILENAME_CHARS_MAX = 255
KEPT_DEFAULT = timedelta(days=30)
KEPT_S_MIN, KEPT_S_MAX = 3_600, 2_592_000
READ_BYTES = 64 << 10
_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}


@dataclass(frozen=True, slots=True)
class Upload:
    """A form that was read: its file, which goes when it is closed, and what it says of it."""

    file: UploadedFile
    filename: str
    kept: timedelta


def file_json(row: File) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": row.file_id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": int(row.created_at.timestamp()),
        "expires_at": None if row.expires_at is None else int(row.expires_at.timestamp()),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


async def create(exchange: Exchange, writer: FactWriter, tenant_id: str) -> ApiError | None:
    """POST: keep the form's file. Refused before anything of it is kept for good."""
    spooled = (exchange.scope.get("extensions") or {}).get(UPLOAD_EXTENSION)
    content_type = exchange.header(b"content-type") or ""
    if not content_type.lower().startswith("multipart/form-data"):
        return ApiError(415, "unsupported_media_type", "Send the file as multipart/form-data.")
    if spooled is None:
        spooled = BytesIO()
    upload = await asyncio.to_thread(_read_form, spooled, content_type)
    if isinstance(upload, ApiError):
        return upload
    made = await asyncio.to_thread(_keep, upload, tenant_id)
    row = await writer.call(_insert, made, upload, tenant_id)
    if isinstance(row, ApiError):
        made.unlink(missing_ok=True)
        return row
    await exchange.answer(200, file_json(row))
    return None


class _BoundedHandler(TemporaryFileUploadHandler):
    """Stops at the size limit instead of filling the disk."""

    num_bytes = 0

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes | None:
        self.num_bytes += len(raw_data)
        if self.num_bytes > FILE_BYTES_MAX:
            raise StopUpload(connection_reset=True)
        super().receive_data_chunk(raw_data, start)
        return None


def _read_form(spooled: Any, content_type: str) -> Upload | ApiError:
    spooled.seek(0, 2)
    length = spooled.tell()
    spooled.seek(0)
    meta = {"CONTENT_TYPE": content_type, "CONTENT_LENGTH": length}
    handler = _BoundedHandler()
    try:
        fields, files = MultiPartParser(meta, spooled, [handler], "utf-8").parse()
    except (MultiPartParserError, RawPostDataException, ValueError) as error:
        return invalid(f"The form cannot be read: {str(error)[:200]}")
    if handler.num_bytes > FILE_BYTES_MAX:
        return ApiError(413, "file_too_large", f"A file may have {FILE_BYTES_MAX} bytes.", "file")
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        return invalid(f"Unknown field: {unknown[0][:80]!r}.", unknown[0][:128])
    if list(files) != ["file"] or len(files.getlist("file")) != 1:
        return invalid("Send one file in the field `file`.", "file")
    if fields.get("purpose") != "batch":
        return invalid("purpose must be batch.", "purpose")
    kept = _kept(fields)
    if isinstance(kept, ApiError):
        return kept
    uploaded = files["file"]
    return Upload(uploaded, (uploaded.name or "file")[:FILENAME_CHARS_MAX], kept)


def _kept(fields: Any) -> timedelta | ApiError:
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return KEPT_DEFAULT
    is_number = bool(seconds) and seconds.isascii() and seconds.isdigit() and len(seconds) < 9
    if anchor != "created_at" or not is_number or not KEPT_S_MIN <= int(seconds) <= KEPT_S_MAX:
        message = f"expires_after needs anchor created_at and {KEPT_S_MIN} to {KEPT_S_MAX} seconds."
        return invalid(message, "expires_after")
    return timedelta(seconds=int(seconds))


def _keep(upload: Upload, tenant_id: str) -> Path:
    """Copy the form's file to its place, whole or not at all."""
    made = stored_path(tenant_id, f"file-{secrets.token_hex(12)}")
    with upload.file as source:
        write_whole(made, source.chunks(1 << 20))
    return made


def _insert(made: Path, upload: Upload, tenant_id: str) -> File | ApiError:
    tenant = Tenant.objects.get(slug=tenant_id)
    if tenant.files.count() >= FILES_MAX:
        return ApiError(400, "too_many_files", f"{FILES_MAX} files are kept already; delete some.")
    now = timezone.now()
    return File.objects.create(
        file_id=made.stem,
        tenant=tenant,
        filename=upload.filename,
        purpose="batch",
        path=str(made),
        num_bytes=made.stat().st_size,
        created_at=now,
        expires_at=now + upload.kept,
    )


async def retrieve(exchange: Exchange, tenant_id: str, file_id: str) -> ApiError | None:
    row = await database_sync_to_async(find)(tenant_id, file_id)
    if row is None:
        return not_found(file_id)
    await exchange.answer(200, file_json(row))
    return None


async def delete(
    exchange: Exchange, writer: FactWriter, tenant_id: str, file_id: str
) -> ApiError | None:
    error = await writer.call(_delete, tenant_id, file_id)
    if error is not None:
        return error
    await exchange.answer(200, {"id": file_id, "object": "file", "deleted": True})
    return None


def _delete(tenant_id: str, file_id: str) -> ApiError | None:
    row = find(tenant_id, file_id)
    if row is None:
        return not_found(file_id)
    if row.is_in_use():
        return ApiError(
            400, "file_in_use", "A batch that has not ended reads this file.", "file_id"
        )
    row.forget()
    return None


async def content(exchange: Exchange, tenant_id: str, file_id: str) -> ApiError | None:
    """GET …/content: the bytes, in pieces."""
    row = await database_sync_to_async(find)(tenant_id, file_id)
    if row is None or not Path(row.path).is_file():
        return not_found(file_id)
    exchange.extra_headers.append((b"content-length", b"%d" % row.num_bytes))
    await exchange.start(200, b"application/octet-stream")
    async for piece in _pieces(Path(row.path)):
        await exchange.send({"type": "http.response.body", "body": piece, "more_body": True})
    await exchange.send({"type": "http.response.body", "body": b""})
    return None


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, READ_BYTES):
            yield piece


async def listing(exchange: Exchange, tenant_id: str, query: dict[str, str]) -> ApiError | None:
    page = read_page(query, LIST_DEFAULT, LIST_MAX, {"purpose"})
    if isinstance(page, ApiError):
        return page
    rows = await database_sync_to_async(_list)(tenant_id, page, query.get("purpose"))
    if isinstance(rows, ApiError):
        return rows
    await exchange.answer(200, list_json([file_json(row) for row in rows[0]], rows[1]))
    return None


def _list(tenant_id: str, page: "Page", purpose: str | None) -> tuple[list[File], bool] | ApiError:
    rows = File.objects.filter(tenant__slug=tenant_id).exclude(expires_at__lte=timezone.now())
    if purpose is not None:
        rows = rows.filter(purpose=purpose)
    return page.of(rows, "file_id")


def find(tenant_id: str, file_id: str) -> File | None:
    """A file that has not expired."""
    now: datetime = timezone.now()
    rows = File.objects.filter(tenant__slug=tenant_id, file_id=file_id)
    return rows.exclude(expires_at__lte=now).first()


def not_found(file_id: str) -> ApiError:
    return ApiError(404, "file_not_found", f"No file {file_id[:80]!r} here.", "file_id")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list in OpenAI's words: newest first unless `order` is asc."""

    limit: int
    after: str | None
    is_ascending: bool

    def of(self, rows: Any, id_field: str) -> tuple[list[Any], bool] | ApiError:
        """The page's rows of a queryset, and whether there are more."""
        if self.after is not None:
            last = rows.filter(**{id_field: self.after}).first()
            if last is None:
                return invalid("after names nothing in this list.", "after")
            rows = rows.filter(**{"pk__gt" if self.is_ascending else "pk__lt": last.pk})
        rows = rows.order_by("pk" if self.is_ascending else "-pk")
        found = list(rows[: self.limit + 1])
        return found[: self.limit], len(found) > self.limit


def read_page(
    query: dict[str, str], default: int, highest: int, others: set[str]
) -> Page | ApiError:
    """`limit`, `after` and `order` of a query string; `others` may stand beside."""
    unknown = sorted(set(query) - {"limit", "after", "order"} - others)
    if unknown:
        return invalid(f"Unknown query parameter: {unknown[0][:80]!r}.", unknown[0][:128])
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= highest):
        return invalid(f"limit must be an integer from 1 to {highest}.", "limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        return invalid("order must be asc or desc.", "order")
    return Page(int(text[:9]), query.get("after"), order == "asc")


def list_json(rows: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": rows,
        "first_id": rows[0]["id"] if rows else None,
        "last_id": rows[-1]["id"] if rows else None,
        "has_more": has_more,
    }
