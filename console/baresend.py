"""A server whose application does nothing but await Daphne's `send`: the floor of our own writing.

python -m console.baresend    prints its port, answers any GET with EVENTS server-sent events
"""

from typing import Any

from console import daphneserver

EVENTS = 100_000
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    del scope, receive
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def main() -> None:
    def ready() -> None:
        print(server.listening_addresses[0][1], flush=True)

    server = daphneserver.BoundedServer(application, "127.0.0.1", 0, ready)
    server.run()


if __name__ == "__main__":
    main()
