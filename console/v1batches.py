"""`/v1/batches`: OpenAI's batch objects over the rows of the batch lane."""

from datetime import datetime, timedelta
from typing import Any

from channels.db import database_sync_to_async
from django.db.models import BigIntegerField, Sum
from django.db.models.fields.json import KT
from django.db.models.functions import Cast
from django.utils import timezone

from console import batchclaims, batchfiles, tasks, v1files
from console.apierrors import ApiError, invalid
from console.batchcheck import ENDPOINTS
from console.caps import load_json
from console.exchange import Exchange, read_body
from console.fields import Fields, Refused, refuse
from console.models import Batch, Tenant
from console.parameters import BATCHES
from console.v1files import KEPT_S_MAX, KEPT_S_MIN, list_json, read_page
from console.writer import FactWriter

LIST_DEFAULT, LIST_MAX = 20, 100
_ENDED_AT = {
    "failed": "failed_at",
    "completed": "completed_at",
    "expired": "expired_at",
    "cancelled": "cancelled_at",
}


def batch_json(batch: Batch, counts: dict[str, int], usage: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's batch object; what is ours stands under `slackwater`."""
    ended = dict.fromkeys(_ENDED_AT.values())
    if batch.status in _ENDED_AT:
        ended[_ENDED_AT[batch.status]] = _unix(batch.ended_at)
    errors = None
    if batch.errors:
        errors = {"object": "list", "data": [{**row, "param": None} for row in batch.errors]}
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model_id or None,
        "errors": errors,
        "input_file_id": "" if batch.input_file is None else batch.input_file.file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": None if batch.output_file is None else batch.output_file.file_id,
        "error_file_id": None if batch.error_file is None else batch.error_file.file_id,
        "created_at": _unix(batch.created_at),
        "in_progress_at": _unix(batch.in_progress_at),
        "expires_at": _unix(batch.expires_at),
        "finalizing_at": _unix(batch.finalizing_at),
        "cancelling_at": _unix(batch.cancelling_at),
        **ended,
        "request_counts": {
            "total": batch.num_lines,
            "completed": counts["completed"],
            "failed": counts["failed"] + counts["expired"] + counts["cancelled"],
        },
        "usage": usage,
        "metadata": batch.metadata or None,
        "slackwater": {
            "is_paused": batch.is_paused,
            "finish_from": _unix(batch.finish_from),
            "finish_by": _unix(batch.finish_by),
            "eta": _unix(batch.eta),
            "slack": batch.slack,
        },
    }


def _unix(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


def _shown(batch: Batch) -> dict[str, Any]:
    return batch_json(batch, batch.counts(), _usage(batch))


def _usage(batch: Batch) -> dict[str, Any]:
    """Tokens of the lines that have ended, added up by the database: answers can be long."""
    done = batch.lines.filter(status="completed")
    sums = done.aggregate(**{name: _sum_of(name) for name in _USAGE})
    prompt_tokens, output_tokens, cached_tokens = (sums[name] or 0 for name in _USAGE)
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + output_tokens,
    }


_USAGE = ("prompt_tokens", "completion_tokens", "prompt_tokens_details__cached_tokens")


def _sum_of(name: str) -> Sum:
    """Of one count of the stored answers."""
    return Sum(Cast(KT(f"response__body__usage__{name}"), BigIntegerField()))


async def create(exchange: Exchange, writer: FactWriter, tenant_id: str) -> ApiError | None:
    """POST: a batch in state `validating`; a task reads its file."""
    raw = await read_body(exchange.receive)
    if isinstance(raw, ApiError):
        return raw
    body = load_json(raw)
    if isinstance(body, ApiError):
        return body
    try:
        asked = _read(body)
    except Refused as refused:
        return refused.error
    made = await writer.call(_create, tenant_id, asked)
    if isinstance(made, ApiError):
        return made
    await database_sync_to_async(tasks.validate_batch.delay)(made[0])
    await exchange.answer(200, made[1])
    return None


def _read(body: dict[str, Any]) -> dict[str, Any]:
    fields = Fields(body, BATCHES)
    file_id, endpoint = fields.take("input_file_id"), fields.take("endpoint")
    window, metadata = fields.take("completion_window"), fields.take("metadata")
    kept = fields.take("output_expires_after")
    if type(file_id) is not str or not file_id:
        refuse("input_file_id must name a file.", "input_file_id")
    if endpoint not in ENDPOINTS:
        refuse(f"endpoint must be one of {', '.join(ENDPOINTS)}.", "endpoint")
    if type(window) is not str or batchfiles.window_of(window) is None:
        refuse(
            "completion_window must be 1h, 4h, 24h, 7d or another of a minute to 7 days.",
            "completion_window",
        )
    fields.check_metadata(metadata)
    output_kept = None
    if kept is not None:
        seconds = kept.get("seconds") if type(kept) is dict else None
        is_whole = type(kept) is dict and set(kept) == {"anchor", "seconds"}
        if not is_whole or kept["anchor"] != "created_at" or type(seconds) is not int:
            refuse(
                "output_expires_after needs anchor created_at and seconds.", "output_expires_after"
            )
        if not KEPT_S_MIN <= seconds <= KEPT_S_MAX:
            refuse(
                f"output_expires_after.seconds must be {KEPT_S_MIN} to {KEPT_S_MAX}.",
                "output_expires_after",
            )
        output_kept = timedelta(seconds=seconds)
    return {
        "file_id": file_id,
        "endpoint": endpoint,
        "window": window,
        "metadata": metadata,
        "output_kept": output_kept,
    }


def _create(tenant_id: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]] | ApiError:
    tenant = Tenant.objects.get(slug=tenant_id)
    file = v1files.find(tenant_id, asked.pop("file_id"))
    if file is None or file.purpose != "batch":
        return invalid("input_file_id names no batch file.", "input_file_id", "file_not_found")
    error = batchfiles.too_many(tenant)
    if error is not None:
        return ApiError(429, "too_many_batches", f"{error.message}.")
    batch = batchfiles.create(tenant, file, now=timezone.now(), **asked)
    return batch.pk, _shown(batch)


async def listing(exchange: Exchange, tenant_id: str, query: dict[str, str]) -> ApiError | None:
    page = read_page(query, LIST_DEFAULT, LIST_MAX, set())
    if isinstance(page, ApiError):
        return page

    def found() -> tuple[list[dict[str, Any]], bool] | ApiError:
        rows = page.of(_of_tenant(tenant_id), "batch_id")
        return rows if isinstance(rows, ApiError) else ([_shown(row) for row in rows[0]], rows[1])

    answer = await database_sync_to_async(found)()
    if isinstance(answer, ApiError):
        return answer
    await exchange.answer(200, list_json(*answer))
    return None


async def retrieve(exchange: Exchange, tenant_id: str, batch_id: str) -> ApiError | None:
    def found() -> dict[str, Any] | None:
        batch = _of_tenant(tenant_id).filter(batch_id=batch_id).first()
        return None if batch is None else _shown(batch)

    answer = await database_sync_to_async(found)()
    if answer is None:
        return not_found(batch_id)
    await exchange.answer(200, answer)
    return None


async def act(
    exchange: Exchange, writer: FactWriter, tenant_id: str, batch_id: str, action: str
) -> ApiError | None:
    """POST …/cancel, and ours: …/pause, …/resume, …/retry."""
    error = await writer.call(_act, tenant_id, batch_id, action)
    return error or await retrieve(exchange, tenant_id, batch_id)


def _act(tenant_id: str, batch_id: str, action: str) -> ApiError | None:
    rows = _of_tenant(tenant_id).filter(batch_id=batch_id)
    if not rows.exists():
        return not_found(batch_id)
    now = timezone.now()
    done = {
        "cancel": lambda: batchclaims.cancel(batch_id, now),
        "pause": lambda: batchclaims.pause(batch_id),
        "resume": lambda: batchclaims.resume(batch_id),
        "retry": lambda: batchclaims.retry_failed(batch_id, now) > 0,
    }[action]()
    batch = rows.get()
    if not done and not (action == "cancel" and batch.status == "cancelling"):
        message = f"A batch that is {batch.status} cannot be {_DONE[action]}."
        return invalid(message, None, "invalid_batch_state")
    return None


_DONE = {"cancel": "cancelled", "pause": "paused", "resume": "resumed", "retry": "retried"}
ACTIONS = tuple(_DONE)


def _of_tenant(tenant_id: str) -> Any:
    return Batch.objects.filter(tenant__slug=tenant_id, is_demo_history=False).select_related(
        "input_file", "output_file", "error_file"
    )


def not_found(batch_id: str) -> ApiError:
    return ApiError(404, "batch_not_found", f"No batch {batch_id[:80]!r} here.", "batch_id")
