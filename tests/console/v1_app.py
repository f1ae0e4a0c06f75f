"""The real HTTP server around `/v1` with scripted workers, as a process of its own for tests.

Prints its port and an API key. Prompts that contain `fail` lose their worker after three ids;
others are answered with TEXT.
"""

import asyncio

import django

django.setup()

from console import state  # noqa: E402
from console.asgi import application  # noqa: E402
from console.daphneserver import BoundedServer, Limits  # noqa: E402
from tests.console.memoryserver import KEY, MemoryServer  # noqa: E402

TEXT = "Slack water: 静かな海 🌊, calm between two tides."


def script(assign):
    ids = list(TEXT.encode())
    if b"fail" in bytes(token_id for token_id in assign.prompt_ids if token_id < 256):
        ids[3] = None
    return ids


async def tick(fleet):
    """As the serving process does: what waits is tried again."""
    while True:
        await asyncio.sleep(0.05)
        fleet.tick()


def main():
    def ready():
        server = MemoryServer()
        server.worker.script = script
        server.services.v1_requests = 0
        state.current = server.services
        server.ticking = asyncio.ensure_future(tick(server.fleet))
        print(daphne.listening_addresses[0][1], KEY.text, flush=True)

    daphne = BoundedServer(application, "127.0.0.1", 0, ready, Limits())
    daphne.run()


if __name__ == "__main__":
    main()
