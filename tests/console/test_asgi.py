"""console.asgi: which path goes where, who may open a websocket, what pages hear at a restart."""

import asyncio
from types import SimpleNamespace

import pytest

from console import asgi, state


def http(path, method="GET"):
    return {
        "type": "http",
        "path": path,
        "raw_path": path.encode(),
        "method": method,
        "headers": [(b"host", b"localhost")],
        "query_string": b"",
        "root_path": "",
        "http_version": "1.1",
        "scheme": "http",
    }


def websocket(path, *headers):
    return {"type": "websocket", "path": path, "headers": list(headers), "query_string": b""}


async def ask(scope, *received):
    """What the application sends, given what it receives."""
    queue = asyncio.Queue()
    for message in received or ({"type": "http.request", "body": b"", "more_body": False},):
        queue.put_nowait(message)
    sent = []

    async def send(message):
        sent.append(message)

    await asgi.application(scope, queue.get, send)
    return sent


async def test_livez_needs_nothing():
    start, body = await ask(http("/livez"))
    assert (start["status"], body["body"]) == (200, b"ok\n")


@pytest.mark.parametrize("path", ["/readyz", "/healthz", "/metrics"])
async def test_without_a_server_nothing_is_ready(path):
    start, body = await ask(http(path))
    assert start["status"] == 503
    assert b"not ready" in body["body"]


async def test_health_is_read_only():
    start, _ = await ask(http("/livez", "POST"))
    assert start["status"] == 405


async def test_unknown_v1_path_has_openais_error_shape():
    start, body = await ask(http("/v1/nothing"))
    assert start["status"] == 404
    assert b'"error"' in body["body"]


async def test_other_protocols_are_refused():
    with pytest.raises(ValueError, match="lifespan"):
        await ask({"type": "lifespan"})


@pytest.mark.parametrize("path", ["/ws/elsewhere", "/ws/console", "/"])
async def test_websocket_to_an_unknown_path_or_without_origin_is_denied(path):
    scope = websocket(path, (b"host", b"127.0.0.1:8000"))
    sent = await ask(scope, {"type": "websocket.connect"})
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_worker_before_the_server_is_ready_is_told_to_come_back():
    sent = await ask(websocket("/ws/worker"), {"type": "websocket.connect"})
    assert sent[-1] == {"type": "websocket.close", "code": 1013}


@pytest.mark.parametrize(
    ("origin", "host", "is_same"),
    [
        (b"http://127.0.0.1:8000", b"127.0.0.1:8000", True),
        (b"http://127.0.0.1:9000", b"127.0.0.1:8000", False),
        (b"http://localhost:8000", b"127.0.0.1:8000", False),
        (b"https://evil.example", b"console.example", False),
        (b"https://console.example", b"console.example", True),
        (b"null", b"127.0.0.1:8000", False),
        (b"", b"", False),
    ],
)
def test_page_socket_needs_the_origin_that_was_asked(origin, host, is_same):
    scope = websocket("/ws/console", (b"origin", origin), (b"host", host))
    assert asgi.is_same_origin(scope) == is_same


async def test_pages_are_closed_with_1012_and_a_deaf_page_is_not_waited_for():
    heard = []

    async def listening(message):
        heard.append(message)

    async def deaf(message):
        await asyncio.Event().wait()

    await asgi.close_page_sockets(SimpleNamespace(page_sockets={listening, deaf}), wait_s=0.01)
    assert heard == [{"type": "websocket.close", "code": 1012}]


def test_there_is_no_state_outside_of_serve():
    assert state.get() is None
