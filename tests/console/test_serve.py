"""`manage.py serve` as a real process: requests, bad neighbours, drain, impossible settings."""

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.console import rawhttp
from tests.e2e.harness import MODELLED, ROOT, Server, clean_environment, stream_lines, until

pytestmark = pytest.mark.serial
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    served = Server(tmp_path_factory.mktemp("serve"))
    yield served.start()
    served.stop()


@pytest.fixture
def own_server(server, tmp_path):
    """One more server, to be ended by the test; it takes the static files of the first."""
    var = tmp_path / "var"
    var.mkdir()
    (var / "static").symlink_to(server.var / "static")
    served = Server(var)
    yield served.start()
    served.stop()


def chat(text="Tell me about tides.", **options):
    body = {"model": MODELLED, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return {**body, "ignore_eos": True, **options}


def head(server, extra):
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        f"\r\nAuthorization: Bearer {server.api_key}\r\n{extra}\r\n\r\n"
    ).encode()


def facts(server):
    """Rows of finished requests, straight from the file."""
    with contextlib.closing(sqlite3.connect(server.var / "slackwater.sqlite3")) as database:
        database.row_factory = sqlite3.Row
        return database.execute(
            "select * from console_requestrecord where is_demo_history = 0"
        ).fetchall()


# --- serving -------------------------------------------------------------------------------------


def test_chat_streams_through_two_workers(server):
    streamed = stream_lines(server, chat())
    assert streamed.error == ""
    assert len(streamed.token_ids) == 8
    assert streamed.is_contiguous()
    assert (streamed.finish_reasons, streamed.num_done) == (["length"], 1)
    assert streamed.usage["completion_tokens"] == 8


def test_paths_are_answered_by_their_owners(server):
    def answer(method, path):
        return httpx.request(method, server.url + path, trust_env=False)

    assert answer("GET", "/livez").text == "ok\n"
    assert "[+]worker ok" in answer("GET", "/readyz?verbose").text
    assert answer("GET", "/healthz").status_code == 200
    assert answer("POST", "/readyz").status_code == 405
    assert "slackwater_workers" in answer("GET", "/metrics").text
    assert answer("GET", "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    login = httpx.get(server.url + "/", follow_redirects=True, trust_env=False)
    assert login.status_code == 200
    assert "text/html" in login.headers["content-type"]


def test_worker_socket_refuses_browsers_and_page_socket_foreign_pages(server):
    def upgrade(path, origin):
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nOrigin: {origin}\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        with rawhttp.connect(server.port) as sock:
            sock.sendall(request.encode())
            return int(sock.recv(4096).split()[1])

    assert upgrade("/ws/worker", server.url) == 403
    assert upgrade("/ws/console", "http://127.0.0.1:1") == 403
    assert upgrade("/ws/elsewhere", server.url) == 403
    assert upgrade("/ws/console", server.url) == 101


def test_metrics_and_stored_requests_count_the_same(server):
    for index in range(5):
        stream_lines(server, chat(f"Count {index}."))
    refused = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=chat(max_tokens=-1),
        headers={"authorization": f"Bearer {server.api_key}"},
        trust_env=False,
    )
    assert refused.status_code == 400
    until(lambda: len(facts(server)) == server.metric("slackwater_requests_total"), "all facts")
    rows = facts(server)
    tokens = server.metric("slackwater_tokens_total", lane="interactive", kind="output")
    assert tokens == sum(row["output_tokens"] for row in rows)
    for kind in ("local", "handoff"):
        found = server.metric("slackwater_placements_total", kind=kind)
        assert found == sum(row["split"] == kind for row in rows)
    assert server.metric("slackwater_handoff_bytes_total") == sum(
        row["handoff_bytes"] for row in rows
    )


# --- bad neighbours ------------------------------------------------------------------------------


def test_reader_that_never_reads_costs_little_memory_and_no_other_stream(server):
    stream_lines(server, chat())
    before = rawhttp.rss_bytes(server.pid)
    body = json.dumps(chat(max_tokens=4_000, stream=True)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            sock = rawhttp.connect(server.port, receive_buffer_bytes=4096)
            stack.enter_context(contextlib.closing(sock))
            sock.sendall(head(server, f"Content-Length: {len(body)}") + body)
        most = 0
        for _ in range(8):
            assert stream_lines(server, chat()).num_done == 1
            most = max(most, rawhttp.rss_bytes(server.pid) - before)
            time.sleep(0.5)
    assert most < 20 * MIB


@pytest.mark.parametrize("is_chunked", [False, True])
def test_300_mb_body_is_refused_and_costs_little_memory(server, is_chunked):
    before, most = rawhttp.rss_bytes(server.pid), 0
    framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {300 * MIB}"
    piece = b"x" * MIB
    if is_chunked:
        piece = b"%x\r\n" % MIB + piece + b"\r\n"
    with rawhttp.connect(server.port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(head(server, framing))
            for index in range(300):
                sock.sendall(piece)
                if index % 30 == 0:
                    most = max(most, rawhttp.rss_bytes(server.pid) - before)
        response = rawhttp.read_all(sock)
    status, error = rawhttp.error(response)
    assert (status, error["code"]) == (413, "request_too_large")
    assert max(most, rawhttp.rss_bytes(server.pid) - before) < 20 * MIB
    assert stream_lines(server, chat()).num_done == 1


# --- the end -------------------------------------------------------------------------------------


def test_first_signal_drains_without_losing_a_chunk_and_exits_0(own_server):
    workers = worker_pids(own_server)
    assert len(workers) == 2
    running = set()
    with ThreadPoolExecutor(5) as pool:
        body = chat(max_tokens=1_500)
        streams = [
            pool.submit(stream_lines, own_server, body, partial(lambda i, n: running.add(i), index))
            for index in range(5)
        ]
        until(lambda: len(running) == 5, "five running streams")
        own_server.process.send_signal(signal.SIGTERM)
        until(lambda: own_server.status("/readyz") == 503, "readyz to say no")
        assert "shutting down" in stream_lines(own_server, chat()).error
        for stream in streams:
            streamed = stream.result()
            assert len(streamed.token_ids) == 1_500
            assert streamed.is_contiguous()
            assert (streamed.finish_reasons, streamed.num_done) == (["length"], 1)
            assert streamed.usage["completion_tokens"] == 1_500
    assert own_server.process.wait(60) == 0
    log = own_server.log.read_text()
    assert "draining: 5 requests running" in log
    assert log.rstrip().endswith("stopped")
    assert [row["status"] for row in facts(own_server)] == ["completed"] * 5
    with pytest.raises(ConnectionError):
        rawhttp.connect(own_server.port)
    assert not [pid for pid in workers if is_running(pid)]


def test_second_signal_ends_at_once(own_server):
    workers = worker_pids(own_server)
    with ThreadPoolExecutor(1) as pool:
        num_seen = []
        future = pool.submit(stream_lines, own_server, chat(max_tokens=8_000), num_seen.append)
        until(lambda: num_seen, "a running stream")
        own_server.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in own_server.log.read_text(), "the countdown")
        own_server.process.send_signal(signal.SIGINT)
        assert own_server.process.wait(30) == 130
        with contextlib.suppress(httpx.HTTPError):
            future.result()
    assert "forced" in own_server.log.read_text()
    until(lambda: not [pid for pid in workers if is_running(pid)], "the workers to end")


def worker_pids(served):
    """Of the workers that the server says it started."""
    return [int(pid) for pid in re.findall(r"worker started .* pid=(\d+)", served.tail())]


def is_running(pid):
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() not in ("", "Z", "Zs")


# --- settings that cannot work -------------------------------------------------------------------


def refused(var, *arguments):
    """The one line with which serve does not start."""
    done = subprocess.run(
        [sys.executable, "manage.py", "serve", *arguments],
        cwd=ROOT,
        env=clean_environment(var),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_busy_port_is_one_line_and_starts_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is in use" in refused(tmp_path, "--port", port)
    assert not (tmp_path / "slackwater.sqlite3").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--workers", "prefill=1"), "--model=: expected a folder"),
        (("--workers", "prefill=1", "--model", "/nowhere"), "--model=/nowhere: expected a folder"),
        (("--workers", "chef=1", "--engine", "fake"), "--workers=chef=1: expected"),
        (("--fleet", "100000"), "--fleet=100000: expected"),
        (("--bind", "192.0.2.1"), "cannot listen on 192.0.2.1"),
    ],
)
def test_impossible_option_is_one_line_that_names_it(tmp_path, arguments, text):
    assert text in refused(tmp_path, "--port", "0", *arguments)
