"""`/v1`: the OpenAI-compatible endpoints, as plain ASGI in front of Django.

Nothing of Django's middleware runs here, so host check, request id, authentication, caps and
error shape are steps of `V1`. No step asks the database. A task on `receive()` notices a client
that has gone, because Daphne's `send` stays silent for it.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.http.request import split_domain_port, validate_host

from console import auth, idempotency, state, v1resources
from console.answering import Encoders, answer_stream, answer_whole, end_late
from console.apierrors import ApiError, insufficient_scope, invalid, model_not_found
from console.caps import load_json, quote
from console.choices import choices_of
from console.exchange import (
    ClientGone,
    Exchange,
    Receive,
    Scope,
    Send,
    read_body,
)
from console.gateway import Gateway
from console.grammars import grammar_refused
from console.options import ParsedRequest
from console.requests import parse_chat, parse_completion, spec_of
from console.responses import ResponseEncoder, parse_response
from console.running import Stop
from console.snapshot import KeyFacts, Snapshot, TenantFacts
from console.sse import (
    ChunkEncoder,
    Envelope,
    GenerateEndpoint,
    error_event,
)
from console.tokens import Tokenizers
from controlplane.errors import ConfigError

logger = logging.getLogger(__name__)

PING_S = 10.0  # silence after which a stream says that it is alive
THREAD_BODY_BYTES = 4 << 10  # larger bodies are parsed and tokenised beside the event loop
PARSERS_MAX = 2  # of those at a time
PARSING_MAX = 32  # of those at a time or waiting: 4 MiB each at most
SCHEMA_PATH = "/v1/openapi.json"
SCHEMA = Path(__file__).with_name("openapi_v1.json")
DEADLINE_MS_MAX = 3_600_000
STARTED_AT = int(time.time())  # `created` of models
_ENDPOINTS: dict[str, tuple[GenerateEndpoint, Any]] = {
    "/v1/chat/completions": ("chat", parse_chat),
    "/v1/completions": ("completions", parse_completion),
    "/v1/responses": ("responses", parse_response),
}
_NOT_SERVED = ("/v1/embeddings",)


class V1:
    """The application. `services` gives the serving state, or None while there is none."""

    def __init__(self, services: Callable[[], Any], ping_s: float = PING_S) -> None:
        self._services = services
        self._ping_s = ping_s
        self._parsers = asyncio.Semaphore(PARSERS_MAX)
        self._num_parsing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services()
        request_id = services.gateway.new_request_id() if services else secrets.token_hex(10)
        exchange = Exchange(scope, receive, send, request_id, time.perf_counter())
        try:
            error = await self._route(exchange, services)
            if error is not None:
                await exchange.refuse(error)
        except ClientGone:
            return
        except Exception:
            logger.exception("request failed request=%s path=%s", request_id, quote(scope["path"]))
            error = ApiError(500, "internal_error", "The server failed on this request.")
            if exchange.is_started:
                await send({"type": "http.response.body", "body": error_event(error)})
            else:
                await exchange.refuse(error)

    async def _route(self, exchange: Exchange, services: Any) -> ApiError | None:
        """Answers, or gives the error to answer with. Cheap checks first."""
        host = exchange.header(b"host")
        domain, _ = split_domain_port(host or "")
        if not domain or not validate_host(domain, settings.ALLOWED_HOSTS):
            return invalid("The Host header names no host of this server.", None, "invalid_host")
        path, method = exchange.scope["path"], exchange.scope["method"]
        is_models = path == "/v1/models" or path.startswith("/v1/models/")
        resource = v1resources.match(path)
        is_schema = path == SCHEMA_PATH
        allowed: tuple[str, ...] = ("GET",) if is_models or is_schema else ("POST",)
        if resource is not None:
            allowed = resource[0]
        elif not (is_models or is_schema or path in _ENDPOINTS or path in _NOT_SERVED):
            return ApiError(404, "unknown_url", f"Unknown request URL: {method} {quote(path)}.")
        if method not in allowed:
            exchange.extra_headers.append((b"allow", ", ".join(allowed).encode()))
            words = " or ".join(allowed)
            return ApiError(405, "method_not_allowed", f"Use {words} for {quote(path)}.")
        if is_schema:  # no secret: what every tenant may send
            await exchange.answer(200, json.loads(SCHEMA.read_bytes()))
            return None
        if services is None:
            return ApiError(503, "starting", "The server is starting.", retry_after_s=1.0)
        snapshot: Snapshot = services.snapshot.current
        key = _key(exchange, snapshot)
        if isinstance(key, ApiError):
            return key
        if is_models:
            return await self._models(exchange, snapshot, key, path)
        if resource is not None:
            _, handler, ids = resource
            missing = v1resources.missing_scope(key, path)
            return missing or await handler(exchange, services, key, *ids)
        if path in _NOT_SERVED:
            return ApiError(404, "model_not_found", "No model here makes embeddings.", "model")
        if services.draining:
            return ApiError(503, "draining", "The server is shutting down.", retry_after_s=5.0)
        return await self._generate(exchange, services, snapshot, key, *_ENDPOINTS[path])

    async def _models(
        self, exchange: Exchange, snapshot: Snapshot, key: KeyFacts, path: str
    ) -> ApiError | None:
        if not key.may("models"):
            return insufficient_scope("models")
        rows = {
            model.model_id: {
                "id": model.model_id,
                "object": "model",
                "created": STARTED_AT,
                "owned_by": "slackwater",
                "max_model_len": model.max_model_len,
                "slo_classes": sorted(snapshot.classes),
            }
            for model in snapshot.models.values()
            if model.is_active and key.may_name(model.model_id)
        }
        if path == "/v1/models":
            await exchange.answer(200, {"object": "list", "data": list(rows.values())})
            return None
        model_id = path.removeprefix("/v1/models/")
        if model_id not in rows:
            return model_not_found(model_id)
        await exchange.answer(200, rows[model_id])
        return None

    async def _generate(
        self,
        exchange: Exchange,
        services: Any,
        snapshot: Snapshot,
        key: KeyFacts,
        endpoint: GenerateEndpoint,
        parse: Callable[..., ParsedRequest | ApiError],
    ) -> ApiError | None:
        error = _content_error(exchange)
        if error is not None:
            return error
        raw = await read_body(exchange.receive)
        if isinstance(raw, ApiError):
            return raw
        if not key.may("generate"):
            return insufficient_scope("generate")
        begun = await idempotency.begin(services.writer, exchange, key.tenant_id, raw)
        if isinstance(begun, ApiError):
            return begun
        if isinstance(begun, idempotency.Replay):
            await idempotency.replay(exchange, begun)
            return None
        try:
            with services.running.running(key.public_id, exchange.request_id) as stop:
                return await self._run(
                    exchange, services, snapshot, key, raw, endpoint, parse, stop
                )
        finally:
            if begun is not None:
                await begun.end()

    async def _run(
        self,
        exchange: Exchange,
        services: Any,
        snapshot: Snapshot,
        key: KeyFacts,
        raw: bytes,
        endpoint: GenerateEndpoint,
        parse: Callable[..., ParsedRequest | ApiError],
        stop: Stop,
    ) -> ApiError | None:
        gateway: Gateway = services.gateway
        arrived_at_s = gateway.now_s()
        tenant = snapshot.tenants[key.tenant_id]
        deadline_s = _deadline_s(exchange)
        if isinstance(deadline_s, ApiError):
            return deadline_s
        if deadline_s is not None:
            asyncio.get_running_loop().call_later(deadline_s, end_late, stop)
        parsed = await self._parse(raw, parse, snapshot, services.tokenizers, tenant)
        if isinstance(parsed, ApiError):
            return parsed
        if not key.may_name(parsed.model.model_id):
            return model_not_found(parsed.model.model_id)
        parsed = _in_class(exchange, parsed, snapshot)
        if isinstance(parsed, ApiError):
            return parsed
        specs = choices_of(
            spec_of(
                parsed,
                tenant,
                key.public_id,
                endpoint,
                request_id=exchange.request_id,
                arrived_at_s=arrived_at_s,
            ),
            parsed.num_choices,
        )
        envelope = Envelope(
            endpoint, exchange.request_id, specs[0].model_id, parsed.service_tier, int(time.time())
        )
        with_ids = exchange.header(b"x-slackwater-debug") == "ids"
        if parsed.stream:
            encoders: Encoders
            if endpoint == "responses":
                encoders = [ResponseEncoder(envelope, with_ids, specs[0].shape)]
            else:
                encoders = [
                    ChunkEncoder(envelope, parsed.include_usage, with_ids, spec.shape, index)
                    for index, spec in enumerate(specs)
                ]
            return await answer_stream(exchange, gateway, specs, encoders, self._ping_s, stop)
        return await answer_whole(exchange, gateway, specs, envelope, with_ids, stop)

    async def _parse(
        self,
        raw: bytes,
        parse: Callable[..., ParsedRequest | ApiError],
        snapshot: Snapshot,
        tokenizers: Tokenizers,
        tenant: TenantFacts,
    ) -> ParsedRequest | ApiError:
        """Small bodies at once; large ones, or any while a tokenizer must load, in a thread."""
        is_warm = all(tokenizers.has(m.model_id, m.folder) for m in snapshot.models.values())
        if len(raw) <= THREAD_BODY_BYTES and is_warm:
            parsed = _parse(raw, parse, snapshot, tokenizers, tenant)
            if isinstance(parsed, ApiError) or tokenizers.grammars.is_known(
                parsed.sampling.grammar
            ):
                return _checked(parsed, tokenizers)
        if self._num_parsing >= PARSING_MAX:
            return ApiError(503, "overloaded", "Too many large requests.", retry_after_s=1.0)
        self._num_parsing += 1
        try:
            async with self._parsers:
                return await asyncio.to_thread(
                    lambda: _checked(_parse(raw, parse, snapshot, tokenizers, tenant), tokenizers)
                )
        finally:
            self._num_parsing -= 1


application = V1(state.get)


def _key(exchange: Exchange, snapshot: Snapshot) -> KeyFacts | ApiError:
    """The key of the Authorization header; every bad one gets the same answer."""
    scheme, _, text = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        exchange.extra_headers.append((b"www-authenticate", b"Bearer"))
        message = "Send your API key as `Authorization: Bearer sk-sw-…`."
        return ApiError(401, "invalid_api_key", message)
    key = auth.verify(snapshot, text.strip())
    if key is None:
        exchange.extra_headers.append((b"www-authenticate", b"Bearer"))
        return ApiError(401, "invalid_api_key", "The API key is not valid.")
    return key


def _deadline_s(exchange: Exchange) -> float | None | ApiError:
    """`x-deadline-ms`: the whole answer within so many milliseconds, or an error instead."""
    if not exchange.has_header(b"x-deadline-ms"):
        return None
    text = exchange.header(b"x-deadline-ms") or ""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= DEADLINE_MS_MAX):
        message = f"x-deadline-ms must be an integer from 1 to {DEADLINE_MS_MAX}."
        return invalid(message, None, "invalid_deadline")
    return int(text[:9]) / 1000


def _in_class(
    exchange: Exchange, parsed: ParsedRequest, snapshot: Snapshot
) -> ParsedRequest | ApiError:
    """`x-slo-class` names the class outright, instead of a tier."""
    if not exchange.has_header(b"x-slo-class"):
        return parsed
    facts = snapshot.classes.get(exchange.header(b"x-slo-class") or "")
    if facts is None or facts.slo.is_batch:
        names = sorted(n for n, other in snapshot.classes.items() if not other.slo.is_batch)
        message = f"x-slo-class must be one of {', '.join(names)}."
        return invalid(message, None, "invalid_slo_class")
    return replace(parsed, slo=facts.slo, service_tier=facts.service_tier)


def _content_error(exchange: Exchange) -> ApiError | None:
    """Only plain JSON is read: no other type, no other charset, no compression."""
    media_type, _, options = (exchange.header(b"content-type") or "").partition(";")
    charset = options.strip().lower().replace('"', "").removeprefix("charset=")
    if media_type.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        message = "Send the body as content-type application/json in UTF-8."
        return ApiError(415, "unsupported_media_type", message)
    has_encoding = exchange.has_header(b"content-encoding")
    if has_encoding and exchange.header(b"content-encoding") != "identity":
        return ApiError(415, "unsupported_media_type", "Send the body without compression.")
    return None


def _parse(
    raw: bytes, parse: Any, snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """Pure; runs in a thread for large bodies."""
    body = load_json(raw)
    if isinstance(body, ApiError):
        return body
    try:
        parsed: ParsedRequest | ApiError = parse(body, snapshot, tokenizers, tenant)
    except ConfigError as error:
        logger.error("model not usable: %s", error)
        return ApiError(503, "model_unavailable", "This model cannot be used at the moment.")
    return parsed


def _is_checked(parsed: ParsedRequest, tokenizers: Tokenizers) -> bool:
    return tokenizers.grammars.is_known(parsed.sampling.grammar)


def _checked(parsed: ParsedRequest | ApiError, tokenizers: Tokenizers) -> ParsedRequest | ApiError:
    """The request, when its grammar compiles; asks a child process unless that is known."""
    if isinstance(parsed, ApiError):
        return parsed
    problem = tokenizers.grammars.check(parsed.sampling.grammar)
    return grammar_refused(problem) if problem else parsed
