"""A whole serving path in memory: real plane, fleet and gateway, a worker that follows a script."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace

from console import auth
from console.fleet import Fleet
from console.gateway import Gateway
from console.live import LiveStats
from console.metrics import Metrics
from console.running import RunningRequests
from console.snapshot import ClassFacts, KeyFacts, ModelFacts, Snapshot, TenantFacts
from console.tokens import Tokenizers
from console.v1 import V1
from controlplane import protocol
from controlplane.config import ControlPlaneConfig
from controlplane.domain import SLOClass
from controlplane.plane import ControlPlane
from tests.factories import make_hello, make_load

MODEL_ID = "modelled-8b"
CONTEXT_TOKENS = 1024
CLASSES = {
    "interactive": ClassFacts(SLOClass("interactive", 0, 0.5, 0.03), "priority", 2.0, ""),
    "standard": ClassFacts(SLOClass("standard", 1, 2.0, 0.1), "default", 1.0, ""),
    "flex": ClassFacts(SLOClass("flex", 2, 10.0, 0.2), "flex", 0.5, ""),
    "batch": ClassFacts(
        SLOClass("batch", 3, 60.0, 10.0, is_batch=True, deadline_s=86_400.0), "batch", 0.5, ""
    ),
}
KEY = auth.mint_key()
REVOKED_KEY = auth.mint_key()
TENANT = TenantFacts("acme", "Acme", "standard", 8, b"salt-of-acme")


def make_snapshot(**changes) -> Snapshot:
    values = {
        "tenants": {"acme": TENANT},
        "keys": {
            key.public_id: KeyFacts(
                key.public_id, "acme", key.secret_hmac, is_active, None, key.last4
            )
            for key, is_active in ((KEY, True), (REVOKED_KEY, False))
        },
        "models": {MODEL_ID: ModelFacts(MODEL_ID, "", CONTEXT_TOKENS, 2.0, True)},
        "classes": CLASSES,
    }
    return Snapshot(**(values | changes))


class FactList(list):
    """Keeps facts where the writer would store them."""

    put = list.append


def say(text: str) -> Callable[[protocol.Assign], list[int]]:
    """A script for the byte-level vocabulary: every request gets this text."""
    return lambda assign: list(text.encode())


class ScriptedWorker:
    """The far end of a link in memory; gives one id a turn of the loop, from what was delivered.

    `script` gives the whole output of a request; at a None in it the worker gives up. With `gate`
    set, ids wait for it after `ids_before_gate`."""

    def __init__(self, fleet: Fleet, script: Callable[[protocol.Assign], list[int]], name: str):
        self.fleet = fleet
        self.script = script
        self.name = name
        self.gate: asyncio.Event | None = None
        self.ids_before_gate = 0
        self.assigned: list[protocol.Assign] = []
        self.cancelled: list[str] = []
        self.given: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task] = {}

    def join(self, role: protocol.Role = "mixed") -> None:
        model = protocol.ModelFacts(MODEL_ID, "b" * 64, 100_000, 32_000, 1_000)
        token = self.fleet.mint_join_token(self.name)
        self.fleet.connected(self.name, self)
        hello = make_hello(role, name=self.name, models=(model,), token=token)
        self.fleet.received(self.name, hello)
        self.fleet.received(self.name, protocol.Heartbeat(make_load(role), 0.0))

    def send(self, message: protocol.ToWorker) -> None:
        if isinstance(message, protocol.Assign):
            self.assigned.append(message)
            task = asyncio.get_running_loop().create_task(self._run(message))
            self._tasks[message.request_id] = task
        elif isinstance(message, protocol.Cancel):
            self.cancelled.append(message.request_id)
            task = self._tasks.pop(message.request_id, None)
            if task is not None:
                task.cancel()

    def close(self, code: int, reason: str) -> None:
        self.die()

    def die(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        self.fleet.disconnected(self.name)

    async def _run(self, assign: protocol.Assign) -> None:
        self.fleet.received(self.name, protocol.Accepted(assign.request_id, assign.epoch))
        limit = assign.sampling.output_tokens_max
        ids = self.script(assign)
        end = min(len(ids), limit)
        for seq in range(len(assign.delivered), max(end, 1)):
            await asyncio.sleep(0)
            if self.gate is not None and seq >= self.ids_before_gate:
                await self.gate.wait()
            if ids[seq : seq + 1] == [None]:
                self.report(assign, seq, [], "error")
                return
            reason = None if seq + 1 < end else ("length" if len(ids) >= limit else "stop")
            self.report(assign, seq, ids[seq : seq + 1], reason)

    def report(self, assign, seq, ids, reason) -> None:
        self.given[assign.request_id] = seq + len(ids)
        report = protocol.SequenceReport(
            request_id=assign.request_id,
            epoch=assign.epoch,
            seq=seq,
            token_ids=ids,
            finish_reason=reason,
            prefill_tokens=0,
            cached_tokens=0,
            context_tokens=len(assign.prompt_ids) + seq + len(ids),
        )
        self.fleet.received(self.name, protocol.StepReport([report], make_load()))


class MemoryServer:
    """`v1` with everything behind it; build it inside a running event loop."""

    def __init__(self, text: str = "Hello, world.", num_workers: int = 1, snapshot=None) -> None:
        self.facts = FactList()
        self.metrics = Metrics()
        plane = ControlPlane(ControlPlaneConfig(), b"secret-of-sixteen")
        self.fleet = Fleet(plane, self.metrics, self.facts)
        slos = [facts.slo for facts in CLASSES.values()]
        self.live = LiveStats(lambda: slos, self.fleet.view, 2.0, self.fleet.now_s)
        self.gateway = Gateway(self.fleet, self.live, self.metrics, self.facts)
        self.workers = [
            ScriptedWorker(self.fleet, say(text), f"c{index}") for index in range(num_workers)
        ]
        for worker in self.workers:
            worker.join()
        self.services = SimpleNamespace(
            gateway=self.gateway,
            snapshot=SimpleNamespace(current=snapshot or make_snapshot()),
            tokenizers=Tokenizers(),
            writer=None,
            running=RunningRequests(),
            draining=False,
        )
        self.app = V1(lambda: self.services)

    @property
    def worker(self) -> ScriptedWorker:
        return self.workers[0]

    def request_facts(self):
        return [fact for fact in self.facts if hasattr(fact, "request_id")]

    async def call(self, method="POST", path="/v1/chat/completions", body=b"", headers=None):
        """One exchange to its end, with a client that stays."""
        exchange = Client(method, path, body, headers)
        await self.app(exchange.scope, exchange.receive, exchange.send)
        return exchange

    async def chat(self, **body):
        return await self.call(body=json.dumps(chat_body(**body)).encode())


def chat_body(**changes):
    body = {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}]}
    return {name: value for name, value in (body | changes).items() if value is not ...}


class Client:
    """The other side of an ASGI application: sends one request, keeps what is answered."""

    def __init__(self, method="POST", path="/v1/chat/completions", body=b"", headers=None) -> None:
        given = {
            "host": "localhost",
            "authorization": f"Bearer {KEY.text}",
            "content-type": "application/json",
        }
        given |= headers or {}
        pairs = [(k.encode(), v) for k, v in given.items() if v is not None]
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(k, v if isinstance(v, bytes) else v.encode("latin1")) for k, v in pairs],
        }
        self.status = None
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []
        self.is_complete = False
        self.gone = asyncio.Event()
        self._messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self):
        if self._messages:
            return self._messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert self.status is None, "started twice"
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            assert len(self.headers) == len(message["headers"]), "a header twice"
        else:
            assert self.status is not None and not self.is_complete
            if message.get("body"):
                self.chunks.append(message["body"])
            self.is_complete = not message.get("more_body", False)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self):
        return json.loads(self.body)

    def events(self):
        """Parsed `data:` events of a stream; `[DONE]` stays text."""
        events = []
        for block in self.body.decode().split("\n\n"):
            for line in block.splitlines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    events.append(data if data == "[DONE]" else json.loads(data))
        return events
