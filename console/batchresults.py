"""Results of a batch as files, written so that a crash leaves the whole file or none."""

import json
import os
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from django.conf import settings

from console.models import Batch, BatchLine, File

READ_ROWS = 500


def stored_path(tenant_id: str, file_id: str) -> Path:
    """Where a file of a tenant lies; both names are made or checked by the server."""
    return Path(settings.SLACKWATER_VAR) / "files" / tenant_id / f"{file_id}.jsonl"


def write_whole(path: Path, chunks: Iterable[bytes]) -> int:
    """Write a file (mode 0600) under another name, fsync, rename; gives its bytes.

    After a crash `path` is complete or absent, and a leftover has a name nobody looks for."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    num_bytes = 0
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                num_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return num_bytes


def assemble(batch_pk: int, now: datetime) -> Batch | None:
    """Write output and error file of a batch whose lines have all ended, and end the batch.

    Safe to run twice and in two processes: names come from the batch id, content from the rows.
    None when lines are left or another process has ended the batch."""
    batch = Batch.objects.select_related("tenant").get(pk=batch_pk)
    if batch.lines.filter(status__in=("pending", "claimed")).exists():
        return None
    if batch.status == "in_progress":
        Batch.move(batch_pk, ("in_progress",), "finalizing", finalizing_at=now)
    output = _result_file(batch, "output", ("completed",), now)
    errors = _result_file(batch, "errors", ("failed", "cancelled", "expired"), now)
    if batch.status == "cancelling":
        after = "cancelled"
    elif batch.counts()["expired"]:
        after = "expired"
    else:
        after = "completed"
    files = {"output_file": output, "error_file": errors, "ended_at": now}
    if not Batch.move(batch_pk, ("finalizing", "cancelling"), after, **files):
        return None
    batch.refresh_from_db()
    return batch


def _result_file(batch: Batch, kind: str, statuses: tuple[str, ...], now: datetime) -> File | None:
    """The file of those lines, or None when there is no such line."""
    lines = batch.lines.filter(status__in=statuses).order_by("line_index")
    if not lines.exists():
        return None
    file_id = f"file-{batch.batch_id.removeprefix('batch_')}-{kind}"
    path = stored_path(batch.tenant.slug, file_id)
    num_bytes = write_whole(path, (result_line(line) for line in lines.iterator(READ_ROWS)))
    file, _ = File.objects.update_or_create(  # again after a retry of its failed lines
        file_id=file_id,
        defaults={
            "tenant": batch.tenant,
            "filename": f"{batch.batch_id}_{kind}.jsonl",
            "purpose": "batch_output",
            "path": str(path),
            "num_bytes": num_bytes,
            "created_at": now,
            "expires_at": None if batch.output_kept is None else now + batch.output_kept,
        },
    )
    return file


_UNFINISHED = {
    "expired": {"code": "batch_expired", "message": "The batch's window ended before this line."},
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled."},
}


def result_line(line: BatchLine) -> bytes:
    """A line of an output or error file, in OpenAI's shape."""
    row = {
        "id": f"batch_req_{line.pk}",
        "custom_id": line.custom_id,
        "response": line.response,
        "error": _UNFINISHED.get(line.status, line.error),
    }
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
