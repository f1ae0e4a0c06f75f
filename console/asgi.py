"""The ASGI application: which path goes where.

http       /v1/...                        raw ASGI (console.v1), outside Django and its middleware
           /livez /readyz /healthz /metrics   raw ASGI
           everything else                Django
websocket  /ws/worker                     workers; browsers are refused there
           /ws/console                    pages, behind session login and an origin check
"""

import asyncio
from typing import Any
from urllib.parse import urlsplit

from channels.auth import AuthMiddlewareStack
from django.conf import settings
from django.core.asgi import get_asgi_application

from console import health, metrics, state, v1
from console.livesocket import LiveSocket
from console.workersocket import WorkerSocket

RAW_PATHS = ("/livez", "/readyz", "/healthz", "/metrics")
CLOSE_RESTARTING = 1012
CLOSE_S_MAX = 1.0

django_application = get_asgi_application()
page_socket = AuthMiddlewareStack(LiveSocket.as_asgi())


def _fleet() -> Any:
    current = state.get()
    return None if current is None or current.draining else current.fleet


worker_socket = WorkerSocket(_fleet)


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Entry of every connection."""
    if scope["type"] == "http":
        await http(scope, receive, send)
    elif scope["type"] == "websocket":
        await websocket(scope, receive, send)
    else:
        raise ValueError(f"no application for {scope['type']!r}")


async def http(scope: dict[str, Any], receive: Any, send: Any) -> None:
    path, current = scope["path"], state.get()
    if path.startswith("/v1/"):
        if current is None:
            await v1.application(scope, receive, send)
            return
        current.v1_requests += 1
        try:
            await v1.application(scope, receive, send)
        finally:
            current.v1_requests -= 1
    elif path not in RAW_PATHS:
        await django_application(scope, receive, send)
    elif scope["method"] not in ("GET", "HEAD"):
        await send({"type": "http.response.start", "status": 405, "headers": [(b"allow", b"GET")]})
        await send({"type": "http.response.body", "body": b""})
    elif path == "/livez":
        await health.livez(send)
    elif path == "/metrics" and current is not None:
        await metrics.answer(current.metrics, send)
    else:
        await health.readyz(current, scope["query_string"], send)


async def websocket(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["path"] == "/ws/worker":
        await worker_socket(scope, receive, send)
    elif scope["path"] == "/ws/console" and is_same_origin(scope):
        current = state.get()
        if current is None:
            await page_socket(scope, receive, send)
            return
        current.page_sockets.add(send)
        try:
            await page_socket(scope, receive, send)
        finally:
            current.page_sockets.discard(send)
    else:
        await receive()
        await send({"type": "websocket.close", "code": 1008})  # before accept: 403


def is_same_origin(scope: dict[str, Any]) -> bool:
    """A page of ours opened this socket: Origin names the host that was asked, port included.

    SameSite cookies do not know ports, so another local server's page could send our session."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin", b"").decode("latin1")
    host = headers.get(b"host", b"").decode("latin1")
    is_ours = urlsplit(origin).netloc == host or origin in settings.CSRF_TRUSTED_ORIGINS
    return bool(origin and host) and is_ours


async def close_page_sockets(current: state.ServerState, wait_s: float = CLOSE_S_MAX) -> None:
    """Tell every page that the server restarts; pages connect again by themselves.

    A page that does not read is not waited for."""
    message = {"type": "websocket.close", "code": CLOSE_RESTARTING}
    closing = [asyncio.ensure_future(send(message)) for send in current.page_sockets]
    if closing:
        await asyncio.wait(closing, timeout=wait_s)
