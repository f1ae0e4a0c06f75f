"""Idempotency-Key: the same key and body are run once and answered alike, for a day.

As Stripe documents it: the same status and body again, another body under the same key is an error,
and nothing is kept of a request that was refused before it ran. The row is claimed before the
request runs and filled before its last byte goes out, so that a crash between the two costs the
client one repetition and never a second answer.
"""

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from django.utils import timezone

from console.apierrors import ApiError, invalid
from console.exchange import Exchange, Send
from console.incarnation import is_dead, new_incarnation
from console.models import IdempotencyRecord
from console.writer import FactWriter

HEADER = b"idempotency-key"
KEY_CHARS_MAX = 255
KEPT = timedelta(hours=24)
BODY_BYTES_MAX = 4 << 20  # of an answer that is kept; a longer one is forgotten
PRUNED_MAX = 100  # old rows deleted with each new one
_NOT_REPLAYED = (  # what every answer gets anew
    b"x-request-id",
    b"openai-processing-ms",
    b"openai-version",
    b"cache-control",
    b"content-length",
)
_BUSY_RETRY_S = 1.0
_INCARNATION = new_incarnation()  # of this process


@dataclass(frozen=True, slots=True)
class Replay:
    """An answer that was given before."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def begin(
    writer: FactWriter, exchange: Exchange, tenant_id: str, raw: bytes
) -> "Recording | Replay | ApiError | None":
    """What to do with a request; None when it carries no key."""
    if not exchange.has_header(HEADER):
        return None
    key = exchange.header(HEADER)
    if key is None or not 1 <= len(key) <= KEY_CHARS_MAX or not key.isprintable():
        message = f"Idempotency-Key must be 1 to {KEY_CHARS_MAX} printable characters."
        return invalid(message, None, "invalid_idempotency_key")
    path = exchange.scope["path"].encode()
    digest = hashlib.sha256(path + b"\0" + raw).hexdigest()
    found = await writer.call(_claim, tenant_id, key, digest)
    if isinstance(found, Replay):
        return found
    if found == "other_body":
        message = "This Idempotency-Key was used with another request."
        return ApiError(422, "idempotency_key_reused", message, should_retry=False)
    if found == "running":
        message = "A request with this Idempotency-Key is running."
        return ApiError(409, "idempotency_key_in_use", message, retry_after_s=_BUSY_RETRY_S)
    return Recording(writer, tenant_id, key, exchange)


class Recording:
    """Keeps what an exchange answers; `end` forgets the key when there is nothing to keep."""

    def __init__(self, writer: FactWriter, tenant_id: str, key: str, exchange: Exchange) -> None:
        self._writer = writer
        self._place = (tenant_id, key)
        self._send: Send = exchange.send
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._is_stored = False
        exchange.record(self.send)

    async def send(self, message: dict[str, Any]) -> None:
        """ASGI send; the last part of a kept answer goes out when the row holds all of it."""
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message["headers"])
        else:
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes <= BODY_BYTES_MAX:
                self._pieces.append(message.get("body", b""))
            if not message.get("more_body") and self._is_kept():
                headers = [
                    [name.decode("latin1"), value.decode("latin1")]
                    for name, value in self._headers
                    if name not in _NOT_REPLAYED
                ]
                body = b"".join(self._pieces)
                await self._writer.call(_keep, *self._place, self._status, headers, body)
                self._is_stored = True
        await self._send(message)

    def _is_kept(self) -> bool:
        """A result is; a refusal that may be different next time is not."""
        return self._status in (200, 500) and self._num_bytes <= BODY_BYTES_MAX

    async def end(self) -> None:
        if not self._is_stored:
            await self._writer.call(_forget, *self._place)


async def replay(exchange: Exchange, answer: Replay) -> None:
    """Give an earlier answer again."""
    exchange.extra_headers += [
        (b"x-slackwater-replayed", b"true"),
        (b"content-length", b"%d" % len(answer.body)),
        *(pair for pair in answer.headers if pair[0] != b"content-type"),
    ]
    kind = dict(answer.headers).get(b"content-type", b"application/json")
    await exchange.start(answer.status, kind)
    await exchange.send({"type": "http.response.body", "body": answer.body})


Claim = Replay | Literal["claimed", "running", "other_body"]


def _claim(tenant_id: str, key: str, digest: str) -> Claim:
    now = timezone.now()
    rows = IdempotencyRecord.objects
    old = rows.filter(created_at__lt=now - KEPT).values_list("pk", flat=True)[:PRUNED_MAX]
    rows.filter(pk__in=list(old)).delete()
    row, is_new = rows.get_or_create(
        tenant_id=tenant_id,
        key=key,
        defaults={"body_sha256": digest, "incarnation": _INCARNATION, "created_at": now},
    )
    if is_new:
        return "claimed"
    if row.body_sha256 != digest:
        return "other_body"
    if row.status is not None:
        headers = [(name.encode("latin1"), value.encode("latin1")) for name, value in row.headers]
        return Replay(row.status, headers, bytes(row.body))
    if not is_dead(row.incarnation):
        return "running"
    claimed = rows.filter(pk=row.pk, status=None, incarnation=row.incarnation)
    return "claimed" if claimed.update(incarnation=_INCARNATION) == 1 else "running"


def _keep(tenant_id: str, key: str, status: int, headers: list[list[str]], body: bytes) -> None:
    rows = IdempotencyRecord.objects.filter(tenant_id=tenant_id, key=key, status=None)
    rows.update(status=status, headers=headers, body=body)


def _forget(tenant_id: str, key: str) -> None:
    IdempotencyRecord.objects.filter(tenant_id=tenant_id, key=key, status=None).delete()
