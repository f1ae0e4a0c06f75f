"""The paths of `/v1` that name stored things: which method of which path is answered where."""

import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

from console import v1batches, v1files
from console.apierrors import ApiError, insufficient_scope, invalid
from console.exchange import Exchange
from console.snapshot import KeyFacts

QUERY_FIELDS_MAX = 16
Handler = Callable[..., Awaitable[ApiError | None]]


def missing_scope(key: KeyFacts, path: str) -> ApiError | None:
    """The first word of a path is the scope that it needs."""
    scope = path.split("/")[2]
    return None if key.may(scope) else insufficient_scope(scope)


async def _files(exchange: Exchange, services: Any, key: KeyFacts) -> ApiError | None:
    if exchange.scope["method"] == "POST":
        return await v1files.create(exchange, services.writer, key.tenant_id)
    query = read_query(exchange)
    if isinstance(query, ApiError):
        return query
    return await v1files.listing(exchange, key.tenant_id, query)


async def _file(exchange: Exchange, services: Any, key: KeyFacts, file_id: str) -> ApiError | None:
    if exchange.scope["method"] == "DELETE":
        return await v1files.delete(exchange, services.writer, key.tenant_id, file_id)
    return await v1files.retrieve(exchange, key.tenant_id, file_id)


async def _content(
    exchange: Exchange, services: Any, key: KeyFacts, file_id: str
) -> ApiError | None:
    del services
    return await v1files.content(exchange, key.tenant_id, file_id)


async def _batches(exchange: Exchange, services: Any, key: KeyFacts) -> ApiError | None:
    if exchange.scope["method"] == "POST":
        return await v1batches.create(exchange, services.writer, key.tenant_id)
    query = read_query(exchange)
    if isinstance(query, ApiError):
        return query
    return await v1batches.listing(exchange, key.tenant_id, query)


async def _batch(
    exchange: Exchange, services: Any, key: KeyFacts, batch_id: str
) -> ApiError | None:
    del services
    return await v1batches.retrieve(exchange, key.tenant_id, batch_id)


async def _act_on_batch(
    exchange: Exchange, services: Any, key: KeyFacts, batch_id: str, action: str
) -> ApiError | None:
    return await v1batches.act(exchange, services.writer, key.tenant_id, batch_id, action)


_ID = r"([A-Za-z0-9_-]{1,64})"
ROUTES: tuple[tuple[re.Pattern[str], tuple[str, ...], Handler], ...] = (
    (re.compile(r"/v1/files"), ("GET", "POST"), _files),
    (re.compile(rf"/v1/files/{_ID}"), ("GET", "DELETE"), _file),
    (re.compile(rf"/v1/files/{_ID}/content"), ("GET",), _content),
    (re.compile(r"/v1/batches"), ("GET", "POST"), _batches),
    (re.compile(rf"/v1/batches/{_ID}"), ("GET",), _batch),
    *(
        (re.compile(rf"/v1/batches/{_ID}/({action})"), ("POST",), _act_on_batch)
        for action in v1batches.ACTIONS
    ),
)


def match(path: str) -> tuple[tuple[str, ...], Handler, tuple[str, ...]] | None:
    """The methods that a path knows, who answers, and the ids in the path."""
    for pattern, methods, handler in ROUTES:
        if found := pattern.fullmatch(path):
            return methods, handler, found.groups()
    return None


def read_query(exchange: Exchange) -> dict[str, str] | ApiError:
    """The query string, each name once."""
    text = exchange.scope["query_string"].decode("latin1")
    try:
        pairs = parse_qsl(text, True, max_num_fields=QUERY_FIELDS_MAX)
    except ValueError:
        return invalid("The query string cannot be read.")
    if len({name for name, _ in pairs}) < len(pairs):
        return invalid("A query parameter is given twice.")
    return dict(pairs)
