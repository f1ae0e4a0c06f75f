"""Malformed requests at a real server: refused in OpenAI's shape; others stream undisturbed."""

import json
import socket
import threading

import openai
import pytest

from tests.console.test_v1_malformed import CASES
from tests.e2e.harness import HANG_S, MODELLED, rss_bytes, stream_lines, until

MEMORY_GROWTH_BYTES_MAX = 20_000_000
MODEL_LEN = 1024  # what the corpus takes for granted
BROKEN_HTTP = {
    "no_host": b"POST /v1/chat/completions HTTP/1.1\r\nConnection: close\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    "negative_length": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: -1\r\n\r\n",
    "text_length": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: many\r\n\r\n",
    "two_lengths": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: 2\r\nContent-Length: 20\r\n\r\n{}",
    "length_and_chunks": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad_chunk": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
    "bare_line": b"GET\r\n\r\n",
    "bytes": bytes(range(256)) * 8 + b"\r\n\r\n",
    "many_headers": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"x-%d: y\r\n" % index for index in range(10_000))
    + b"\r\n",
    "long_header": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nx: "
    + b"y" * 100_000
    + b"\r\n\r\n",
}

pytestmark = pytest.mark.serial


def raw_request(api_key: str, path: str, body: bytes, changed: dict) -> bytes:
    """One HTTP/1.1 request; a header that is None is left out."""
    headers: dict[str, bytes | str | None] = {
        "host": "localhost",
        "authorization": f"Bearer {api_key}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    } | changed
    lines = [f"POST {path} HTTP/1.1".encode()]
    for name, value in headers.items():
        if value is not None:
            lines.append(
                name.encode() + b": " + (value if isinstance(value, bytes) else value.encode())
            )
    return b"\r\n".join([*lines, b"", body])


def exchange(port: int, request: bytes) -> bytes:
    """Everything that the server answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as sock:
        received = b""
        try:
            sock.sendall(request)
            while piece := sock.recv(65536):
                received += piece
        except ConnectionError:
            return received  # refused in the middle of the body
    return received


@pytest.fixture(scope="module")
def short_server(server):
    """The model's context is that of the corpus."""
    change = f"from console.models import Model; Model.objects.update(max_model_len={MODEL_LEN})"
    assert server.manage("shell", "-v", "0", "-c", change).returncode == 0
    models = server.client().models
    until(lambda: models.retrieve(MODELLED).model_extra["max_model_len"] == MODEL_LEN, "the row")
    return server


class Neighbour:
    """Another client's streams, one after the other, while the test misbehaves."""

    def __init__(self, server):
        self.server = server
        self.streams = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        body = {
            "model": MODELLED,
            "messages": [{"role": "user", "content": "count"}],
            "max_tokens": 100,
            "temperature": 0,
        }
        while not self.stop.is_set():
            self.streams.append(stream_lines(self.server, body))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def test_the_whole_corpus_raw_is_refused_and_disturbs_nobody(short_server):
    refused = 0
    for case in CASES[::10]:  # warm up what is loaded and cached once
        path, body, headers = case.values
        exchange(short_server.port, raw_request(short_server.api_key, path, body, headers))
    memory_before = rss_bytes(short_server.pid)
    with Neighbour(short_server) as neighbour:
        for case in CASES:
            path, body, headers = case.values
            request = raw_request(short_server.api_key, path, body, headers)
            answer = exchange(short_server.port, request)
            head, _, payload = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 4"), (case.id, answer[:200])
            error = json.loads(payload)["error"]
            assert set(error) == {"message", "type", "param", "code"}, case.id
            refused += 1
    assert refused >= 25 * 8
    assert neighbour.streams
    assert {stream.error for stream in neighbour.streams} == {""}
    assert len({stream.text for stream in neighbour.streams}) == 1
    assert rss_bytes(short_server.pid) - memory_before < MEMORY_GROWTH_BYTES_MAX
    assert "Traceback" not in short_server.log.read_text()


@pytest.mark.parametrize("name", BROKEN_HTTP)
def test_broken_http_is_refused_and_the_server_goes_on(short_server, name):
    answer = exchange(short_server.port, BROKEN_HTTP[name])
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:200]
    assert b"Traceback" not in answer
    assert short_server.status("/livez") == 200
    assert "Traceback" not in short_server.log.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 3},
        {"max_tokens": -1},
        {"n": 99},
        {"model": "nothing"},
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"stop": ["a"] * 5},
        {"top_p": 0},
        {"logit_bias": {"5": 101}},
        {"extra_body": {"unknown_field": 1}},
        {"response_format": {"type": "json_object"}},
        {"service_tier": "gold"},
    ],
)
def test_openai_client_gets_its_own_error_types(short_server, changes):
    body = {"model": MODELLED, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    with short_server.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**body, **changes})
    assert isinstance(caught.value, openai.BadRequestError | openai.NotFoundError)
    assert caught.value.code
    assert caught.value.request_id


@pytest.mark.parametrize(
    "key", ["", "sk-sw-nothing", "Bearer", "sk-sw-AAAAAAAA-" + "B" * 49, "x" * 4000]
)
def test_a_wrong_key_is_401_without_saying_what_is_wrong(short_server, key):
    request = raw_request(
        short_server.api_key, "/v1/chat/completions", b"{}", {"authorization": f"Bearer {key}"}
    )
    head, _, payload = exchange(short_server.port, request).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401")
    assert json.loads(payload)["error"]["code"] == "invalid_api_key"
