"""Raw sockets and process figures for tests that misbehave on purpose."""

import contextlib
import json
import socket
import subprocess
import time

HANG_S = 60.0  # a guard against hanging, not a claim


def connect(port, receive_buffer_bytes=None):
    sock = socket.socket()
    sock.settimeout(HANG_S)
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    try:
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    return sock


def read_all(sock):
    """Everything until the peer closes or resets."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            received += piece
    return received


def exchange(port, request):
    """Send bytes, read until the server closes."""
    with connect(port) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        return read_all(sock)


def get(port, path):
    """Status and body of a simple GET."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    return parse(exchange(port, request))


def parse(response):
    """Status, body; chunked bodies joined."""
    head, _, body = response.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"transfer-encoding: chunked" in head.lower():
        joined = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            joined, body = joined + body[: int(size, 16)], body[int(size, 16) + 2 :]
        body = joined
    return status, body


def error(response):
    """Status and the `error` object of a refusal in OpenAI's shape."""
    status, body = parse(response)
    return status, json.loads(body)["error"]


def rss_bytes(pid):
    """Resident memory of a process."""
    out = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(out.stdout) * 1024


def until(condition, what):
    """Poll until `condition()` is true; its value."""
    deadline_s = time.monotonic() + HANG_S
    while time.monotonic() < deadline_s:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {HANG_S} s for {what}")
