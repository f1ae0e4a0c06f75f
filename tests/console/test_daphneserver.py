"""BoundedServer in a process of its own: slow readers, big and slow bodies, broken requests."""

import contextlib
import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import daphne.server
import pytest
from daphne.http_protocol import WebRequest
from twisted.internet.abstract import FileDescriptor
from twisted.web.http import HTTPChannel, Request

from console import boundedhttp, daphneserver
from tests.console import rawhttp

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SHORT = {
    "header_s_max": 0.4,
    "body_grace_s": 0.4,
    "stall_s_max": 1.0,
    "linger_s": 1.0,
}


class Served:
    def __init__(self, limits):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.console.daphne_app", json.dumps(limits)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.port = int(self.process.stdout.readline())

    @property
    def counts(self):
        return json.loads(rawhttp.get(self.port, "/counts")[1])

    @property
    def rss_bytes(self):
        return rawhttp.rss_bytes(self.process.pid)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served():
    server = Served({})
    yield server
    server.stop()


@pytest.fixture(scope="module")
def impatient():
    server = Served(SHORT)
    yield server
    server.stop()


def post(path, length_header, body=b""):
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length_header}\r\n\r\n"
    return head.encode() + body


def send_in_pieces(port, head, piece, num_pieces):
    """Push a long body, as far as the server takes it; the answer."""
    with rawhttp.connect(port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(head)
            for _ in range(num_pieces):
                sock.sendall(piece)
        return rawhttp.read_all(sock)


# --- what the subclasses lean on -----------------------------------------------------------------


def test_daphne_builds_our_channels_and_requests():
    assert daphne.server.HTTPFactory is daphneserver.BoundedFactory
    assert "HTTPFactory(self)" in inspect.getsource(daphne.server.Server.run)
    assert daphneserver.BoundedFactory.protocol is boundedhttp.BoundedChannel


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        (HTTPChannel.lineReceived, "self._path = request"),
        (HTTPChannel.lineReceived, "self._respondToBadRequestAndDisconnect()"),
        (HTTPChannel.lineReceived, "self._receivedHeaderSize > self.totalHeadersSize"),
        (HTTPChannel.headerReceived, "self._receivedHeaderCount > self.maxHeaders"),
        (HTTPChannel.allHeadersReceived, "req.gotLength(self.length)"),
        (HTTPChannel.connectionMade, "self.transport.setTcpNoDelay(True)"),
        (HTTPChannel.allContentReceived, "self._handlingRequest = True"),
        (Request.requestReceived, "self._parsePOSTFormSubmission"),
        (Request.write, "self.startedWriting"),
        (Request.connectionLost, "self._disconnected = True"),
        (WebRequest.handle_reply, "self._response_started = True"),
        (FileDescriptor.write, "self._tempDataBuffer.append(data)"),
        (FileDescriptor.write, "self._maybePauseProducer()"),
        (FileDescriptor._isSendBufferFull, "len(self.dataBuffer) + self._tempDataLen"),
    ],
)
def test_private_name_of_the_pinned_packages_still_means_the_same(owner, text):
    assert text in inspect.getsource(owner)


# --- uploads ----------------------------------------------------------------------------------


def test_a_large_upload_stays_on_disk(served):
    size = 150 * MIB
    before = served.rss_bytes
    head = post("/v1/files", f"Content-Length: {size}\r\nConnection: close")
    response = send_in_pieces(served.port, head, bytes(MIB), size // MIB)
    assert rawhttp.parse(response) == (200, str(size).encode())
    assert served.rss_bytes - before < 30 * MIB


def test_uploads_at_a_time_are_bounded_and_room_comes_back(served):
    head = post("/v1/files", "Content-Length: 1000000")
    open_ones = [rawhttp.connect(served.port) for _ in range(boundedhttp.Limits().uploads_max)]
    try:
        for sock in open_ones:
            sock.sendall(head + b"x")
            assert rawhttp.get(served.port, "/counts")[0] == 200  # the head has been read
        refused = rawhttp.exchange(served.port, head)
        assert rawhttp.parse(refused)[0] == 503
    finally:
        for sock in open_ones:
            sock.close()
    head = post("/v1/files", "Content-Length: 5\r\nConnection: close", b"hello")

    def status() -> int:
        return rawhttp.parse(rawhttp.exchange(served.port, head))[0]

    rawhttp.until(lambda: status() == 200, "room for an upload")


# --- answers -------------------------------------------------------------------------------------


def test_pieces_written_through_the_extension_arrive_whole_and_in_order(served):
    expected = b"piece 0;piece 1;piece 2;piece 3;piece 4;end"
    assert rawhttp.get(served.port, "/pieces") == (200, expected)


def test_http_1_0_client_gets_the_pieces_without_chunk_framing(served):
    response = rawhttp.exchange(served.port, b"GET /pieces HTTP/1.0\r\n\r\n")
    assert response.endswith(b"\r\n\r\npiece 0;piece 1;piece 2;piece 3;piece 4;end")


def test_connection_is_kept_for_the_next_request(served):
    request = b"GET /pieces HTTP/1.1\r\nHost: h\r\n\r\n"
    last = b"GET /pieces HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    assert rawhttp.exchange(served.port, request + request + last).count(b"HTTP/1.1 200 OK") == 3


def test_error_of_the_application_is_answered_in_openai_shape(served):
    status, error = rawhttp.error(
        rawhttp.exchange(served.port, b"GET /boom HTTP/1.1\r\nConnection: close\r\n\r\n")
    )
    assert status == 500
    assert error["type"] == "server_error"
    assert "bug" not in error["message"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nBad Name: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: a\x00b\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (post("/v1/size", "Content-Length: -5"), 400),
        (post("/v1/size", "Content-Length: 5\r\nTransfer-Encoding: chunked"), 400),
        (post("/v1/size", "Transfer-Encoding: gzip"), 400),
        (post("/v1/size", "Transfer-Encoding: chunked", b"zz\r\n"), 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: aaaaaaaaaaaaaaaa\r\n" * 1_000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 501 + b"\r\n", 431),
    ],
)
def test_broken_request_is_refused_in_openai_shape(served, request_bytes, status):
    answered, error = rawhttp.error(rawhttp.exchange(served.port, request_bytes))
    assert answered == status
    assert error["type"] == "invalid_request_error"
    assert error["message"]


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 1, 4 * MIB - 1, 4 * MIB])
def test_body_up_to_the_cap_reaches_the_application(served, num_bytes):
    request = post(
        "/v1/size", f"Connection: close\r\nContent-Length: {num_bytes}", b"x" * num_bytes
    )
    assert rawhttp.parse(rawhttp.exchange(served.port, request)) == (200, str(num_bytes).encode())


def test_chunked_body_up_to_the_cap_reaches_the_application(served):
    body = b"%x\r\n" % (4 * MIB) + b"x" * (4 * MIB) + b"\r\n0\r\n\r\n"
    request = post("/v1/size", "Connection: close\r\nTransfer-Encoding: chunked", body)
    assert rawhttp.parse(rawhttp.exchange(served.port, request)) == (200, str(4 * MIB).encode())


def test_body_one_byte_over_the_cap_is_refused(served):
    request = post("/v1/size", f"Content-Length: {4 * MIB + 1}", b"x" * (4 * MIB + 1))
    status, error = rawhttp.error(rawhttp.exchange(served.port, request))
    assert (status, error["code"]) == (413, "request_too_large")


def test_body_of_other_paths_has_the_smaller_cap(served):
    status, error = rawhttp.error(
        rawhttp.exchange(served.port, post("/login", f"Content-Length: {MIB + 1}"))
    )
    assert (status, error["code"]) == (413, "request_too_large")


def test_client_that_waits_for_100_continue_gets_only_the_refusal(served):
    request = post("/v1/size", f"Expect: 100-continue\r\nContent-Length: {300 * MIB}")
    response = rawhttp.exchange(served.port, request)
    assert b"100 Continue" not in response
    assert rawhttp.error(response)[0] == 413


def test_declared_300_mb_body_is_refused_and_costs_no_memory(served):
    before = served.rss_bytes
    head = post("/v1/size", f"Content-Length: {300 * MIB}")
    response = send_in_pieces(served.port, head, b"x" * MIB, 300)
    assert rawhttp.error(response)[0] == 413
    assert served.rss_bytes - before < 20 * MIB


def test_chunked_300_mb_body_is_refused_and_costs_no_memory(served):
    before = served.rss_bytes
    head = post("/v1/size", "Transfer-Encoding: chunked")
    piece = b"%x\r\n" % MIB + b"x" * MIB + b"\r\n"
    response = send_in_pieces(served.port, head, piece, 300)
    assert rawhttp.error(response)[0] == 413
    assert served.rss_bytes - before < 20 * MIB


# --- deadlines -----------------------------------------------------------------------------------


def test_headers_that_never_end_are_cut_although_bytes_keep_coming(impatient):
    with rawhttp.connect(impatient.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        sock.settimeout(0.1)
        response = b""
        for index in range(600):
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.sendall(b"X-%d: y\r\n" % index)
                if piece := sock.recv(65536):
                    response += piece
                    break
    status, error = rawhttp.error(response)
    assert (status, error["code"]) == (408, "request_timeout")


def test_body_that_drips_is_cut(impatient):
    with rawhttp.connect(impatient.port) as sock:
        sock.sendall(post("/v1/size", "Content-Length: 1000"))
        sock.settimeout(0.1)
        response = b""
        for _ in range(600):
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.sendall(b"x")
                if piece := sock.recv(65536):
                    response += piece
                    break
    status, error = rawhttp.error(response)
    assert (status, error["code"]) == (408, "request_timeout")


def test_idle_kept_connection_has_no_header_deadline(impatient):
    with rawhttp.connect(impatient.port) as sock:
        sock.sendall(b"GET /pieces HTTP/1.1\r\nHost: h\r\n\r\n")
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(65536)
        sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            sock.recv(1)


# --- readers that do not read --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flood", "flood-send"])
def test_reader_that_never_reads_stops_its_producer_and_costs_no_memory(served, name):
    before = served.rss_bytes
    with rawhttp.connect(served.port, receive_buffer_bytes=4096) as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        seen = [0, -1]

        def is_still():
            seen.append(served.counts[name])
            return seen[-1] == seen[-2] == seen[-3]

        rawhttp.until(is_still, "the flood to stop")
        assert served.rss_bytes - before < 20 * MIB


@pytest.mark.parametrize("name", ["flood", "flood-send"])
def test_reader_that_starts_again_gets_more(served, name):
    with rawhttp.connect(served.port) as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        num_bytes = 0
        while num_bytes < 20 * MIB:
            num_bytes += len(sock.recv(MIB))


@pytest.mark.parametrize("name", ["flood", "flood-send"])
def test_stalled_reader_is_cut_and_its_application_ends(impatient, name):
    ended = impatient.counts["ended"]
    with rawhttp.connect(impatient.port, receive_buffer_bytes=4096) as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        rawhttp.until(lambda: impatient.counts["ended"] > ended, "the application to end")


def upgrade(path):
    return (
        f"GET {path} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


@pytest.mark.parametrize("code", [1000, 1008, 1012, 1013, 4401])
def test_websocket_is_closed_with_any_standard_code(served, code):
    """A peer that never answers the close is cut off, too."""
    received = rawhttp.exchange(served.port, upgrade(f"/ws/close/{code}"))
    assert received.partition(b"\r\n\r\n")[2] == b"\x88\x02" + code.to_bytes(2, "big")


def test_websocket_that_never_reads_stops_its_producer(served):
    before = served.rss_bytes
    with rawhttp.connect(served.port, receive_buffer_bytes=4096) as sock:
        sock.sendall(upgrade("/ws"))
        seen = [0, -1]

        def is_still():
            seen.append(served.counts["ws"])
            return 0 < seen[-1] == seen[-2] == seen[-3]

        rawhttp.until(is_still, "the websocket flood to stop")
        assert served.rss_bytes - before < 20 * MIB


def test_busy_port_ends_the_server_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code = (
            "from console.daphneserver import BoundedServer\n"
            f"server = BoundedServer(None, '127.0.0.1', {taken.getsockname()[1]}, print)\n"
            "server.run()\nprint(server.listen_error_message)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        )
    assert "in use" in done.stdout
