"""`/livez` and `/readyz` as raw ASGI: they answer while the database or a worker is away.

livez: the event loop turns. readyz: the control loop is young, the database answers, a live worker
serves a model, and the server is not draining. `?verbose` adds a line for each check.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from console.state import ServerState

TICK_AGE_S_MAX = 0.3  # three periods of the control loop
DATABASE_QUIET_S = 3.0  # without a failure of the poll that runs each second

Send = Callable[[dict[str, Any]], Awaitable[None]]


def checks(state: ServerState) -> list[tuple[str, bool]]:
    """Name and result of each condition for taking requests."""
    now_s = state.fleet.now_s()
    workers = state.fleet.view().workers
    failed_at_s = state.database_failed_at_s
    return [
        ("database", failed_at_s is None or now_s - failed_at_s > DATABASE_QUIET_S),
        ("control_loop", state.tick_at_s is not None and now_s - state.tick_at_s < TICK_AGE_S_MAX),
        ("worker", any(worker.status == "live" and worker.models for worker in workers)),
        ("accepting", not state.draining),
    ]


async def livez(send: Send) -> None:
    await _answer(send, 200, "ok\n")


async def readyz(state: ServerState | None, query: bytes, send: Send) -> None:
    """200 when every check holds, else 503."""
    results = [("server", False)] if state is None else checks(state)
    is_ready = all(is_ok for _, is_ok in results)
    text = "".join(
        f"[+]{name} ok\n" if is_ok else f"[-]{name} failed\n"
        for name, is_ok in results
        if b"verbose" in query or not is_ok
    )
    await _answer(send, 200 if is_ready else 503, text + ("ok\n" if is_ready else "not ready\n"))


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
