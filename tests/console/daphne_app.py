"""A small ASGI application behind BoundedServer, run as a process of its own by the tests.

Prints its port, then serves: /v1/size (bytes of the body), /flood (endless response through the
write extension), /flood-send (the same through `send`), /pieces (a few pieces through the
extension), /counts (pieces written by the floods so far), /boom (raises), /ws (floods a websocket),
/ws/close/CODE (closes one).
"""

import asyncio
import json
import sys

from console import boundedhttp, daphneserver

PIECE = b"x" * 4096
counts = {"flood": 0, "flood-send": 0, "ws": 0, "ended": 0}


async def application(scope, receive, send):
    if scope["type"] == "websocket":
        await websocket(scope["path"], receive, send)
        return
    path = scope["path"]
    headers = [(b"content-type", b"text/plain")]
    if path == "/boom":
        raise RuntimeError("a bug in the application")
    if path == "/v1/size":
        num_bytes, more = 0, True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            num_bytes += len(event["body"])
            more = event["more_body"]
        answer = str(num_bytes).encode()
    elif path == "/v1/files":
        event = await receive()
        upload = scope["extensions"][daphneserver.UPLOAD_EXTENSION]
        assert event["body"] == b"" and not event["more_body"], event
        answer = str(upload.seek(0, 2)).encode()
    elif path == "/counts":
        answer = json.dumps(counts).encode()
    else:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await stream(scope, path, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


async def stream(scope, path, send):
    write = scope["extensions"][daphneserver.WRITE_EXTENSION]
    try:
        while path == "/flood":
            await write(PIECE)
            counts["flood"] += 1
            await asyncio.sleep(0)
        while path == "/flood-send":
            await send({"type": "http.response.body", "body": PIECE, "more_body": True})
            counts["flood-send"] += 1
            await asyncio.sleep(0)
        for index in range(5):
            await write(b"piece %d;" % index)
        await send({"type": "http.response.body", "body": b"end", "more_body": False})
    finally:
        counts["ended"] += 1


async def websocket(path, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    if path.startswith("/ws/close/"):
        await send({"type": "websocket.close", "code": int(path.rpartition("/")[2])})
        await receive()
        return
    while True:
        await send({"type": "websocket.send", "bytes": PIECE})
        counts["ws"] += 1
        await asyncio.sleep(0)


def main():
    limits = boundedhttp.Limits(**json.loads(sys.argv[1]))

    def ready():
        print(server.listening_addresses[0][1], flush=True)

    server = daphneserver.BoundedServer(application, "127.0.0.1", 0, ready, limits)
    server.run()


if __name__ == "__main__":
    main()
