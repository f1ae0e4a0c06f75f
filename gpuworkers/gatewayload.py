"""Load for a gateway, and the workers behind it, in one process: what the gateway adds is measured.

The workers are modelled ones (`--profile steady-20ms`) joined over the websocket like any other;
since client and workers share this process's clock, the time that a request spent in its engine is
known exactly. Clients are plain keep-alive HTTP/1.1 connections; every id is checked against what
the modelled engine draws.

python -m gpuworkers.gatewayload --join ws://… --host H --port N PHASE    one JSON object on stdout
The API key comes in SLACKWATER_API_KEY, join tokens in SLACKWATER_JOIN_TOKEN.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from controlplane import protocol
from gpuworkers import driver, fake
from gpuworkers.driver import Turn
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.server import Worker, WorkerFacts

PROFILE = "steady-20ms"
MODEL_ID = "modelled-8b"
STREAM_TOKENS = 128
WORKERS = 4
JOIN_S_MAX = 30.0
TEXT = re.compile(rb'"content":"((?:[^"\\\\]|\\\\.)*)"')
SEED = 20_261  # of arrivals


class EngineTimes:
    """When each request reached its engine and when its first id left it, on this clock."""

    def __init__(self) -> None:
        self.assigned_s: dict[str, float] = {}
        self.first_s: dict[str, float] = {}

    def watch(self, engine: Engine) -> None:
        """Note assignments as the engine takes them."""
        take = engine.assign

        def assign(message: protocol.Assign, now_s: float) -> Any:
            self.assigned_s.setdefault(message.request_id, time.perf_counter())
            return take(message, now_s)

        engine.assign = assign  # type: ignore[method-assign]

    def note(self, turn: Turn) -> None:
        for report in turn.sequences or ():
            if report.token_ids and report.seq == 0:
                self.first_s[report.request_id] = time.perf_counter()

    def engine_s(self, request_id: str) -> float:
        """What the request spent in its engine before the first id left."""
        return self.first_s.pop(request_id) - self.assigned_s.pop(request_id)


@dataclass(slots=True)
class Stats:
    """What the clients saw; times in seconds of time.perf_counter."""

    tokens: int = 0
    events: int = 0
    streams: int = 0
    failed: int = 0
    wrong: int = 0
    gaps_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)


def start_workers(
    options: argparse.Namespace, count: int, times: EngineTimes
) -> tuple[list[Worker], list["asyncio.Task[None]"]]:
    loop = asyncio.get_running_loop()
    tokens = os.environ["SLACKWATER_JOIN_TOKEN"].split(",")
    workers = []
    for index in range(count):
        runner, model, device, step_model = fake.load(PROFILE, MODEL_ID, 0)
        engine = Engine(runner, EngineConfig(), step_model, model, "mixed")
        times.watch(engine)

        def make(engine: Engine, report: Any) -> driver.TaskDriver:
            def told(turn: Turn) -> None:
                times.note(turn)
                report(turn)

            return driver.TaskDriver(engine, loop.time, told)

        facts = WorkerFacts(
            options.join, tokens[index], f"load-{index + 1}", "fake", device, "127.0.0.1"
        )
        workers.append(Worker(facts, engine, make, random.random))
    return workers, [loop.create_task(worker.run()) for worker in workers]


class Connection:
    """One keep-alive connection."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._key = os.environ["SLACKWATER_API_KEY"]

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(
            self._options.host, self._options.port, limit=1 << 20
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def post(self, body: dict[str, Any]) -> tuple[int, dict[bytes, bytes]]:
        """Send a chat; status and headers of the answer, whose body is yet to be read."""
        assert self._reader is not None and self._writer is not None
        raw = json.dumps({"model": MODEL_ID, **body}).encode()
        self._writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Authorization: Bearer " + self._key.encode() + b"\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        pairs = (line.partition(b": ")[::2] for line in lines[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        return int(lines[0].split()[1]), headers

    async def read_whole(self, headers: dict[bytes, bytes]) -> bytes:
        assert self._reader is not None
        if b"content-length" in headers:
            return await self._reader.readexactly(int(headers[b"content-length"]))
        return b"".join([piece async for piece in self.chunks()])

    async def chunks(self) -> Any:
        """Pieces of a chunked body, several at once when they came together."""
        assert self._reader is not None
        pending = b""
        while True:
            while (end := pending.find(b"\r\n")) < 0:
                pending += await self._more()
            size = int(pending[:end], 16)
            while len(pending) < end + size + 4:
                pending += await self._more()
            if size == 0:
                return
            yield pending[end + 2 : end + 2 + size]
            pending = pending[end + size + 4 :]

    async def _more(self) -> bytes:
        assert self._reader is not None
        data = await self._reader.read(1 << 16)
        if not data:
            raise ConnectionError("the gateway closed a connection")
        return data


def chat(text: str, max_tokens: int, stream: bool) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }


async def stream_once(
    connection: Connection, text: str, tokens: int, expected: bytes | None, stats: Stats
) -> bytes:
    """One stream to its end; its text, counted and compared."""
    status, headers = await connection.post(chat(text, tokens, True))
    if status != 200:
        await connection.read_whole(headers)
        stats.failed += 1
        return b""
    said: list[bytes] = []
    last_s = 0.0
    async for piece in connection.chunks():
        now_s = time.perf_counter()
        for event in piece.split(b"\n\n"):
            found = TEXT.search(event)
            if found is None or not found[1]:
                continue
            said.append(found[1])
            stats.events += 1
            if last_s:
                stats.gaps_s.append(now_s - last_s)
            last_s = now_s
    whole = b"".join(said)
    stats.tokens += len(whole)  # the modelled engine's ids are letters and spaces
    stats.streams += 1
    stats.wrong += len(whole) != tokens or (expected is not None and whole != expected)
    return whole


async def open_connections(options: argparse.Namespace, count: int) -> list[Connection]:
    connections = [Connection(options) for _ in range(count)]
    for connection in connections:
        await connection.open()
    return connections


async def run_streams(options: argparse.Namespace, times: EngineTimes) -> dict[str, Any]:
    """256 streams at a time, each of 128 ids, for `--seconds`."""
    del times
    connections = await open_connections(options, options.streams)
    texts = [f"Stream {index} asks about the tide." for index in range(options.streams)]
    warm = Stats()
    expected = await asyncio.gather(
        *(
            stream_once(c, t, STREAM_TOKENS, None, warm)
            for c, t in zip(connections, texts, strict=True)
        )
    )
    say("measure")
    stats, began_s = Stats(), time.perf_counter()

    async def run(index: int) -> None:
        await asyncio.sleep(random.Random(index).uniform(0, 2.5))  # not all at once
        while time.perf_counter() - began_s < options.seconds:
            await stream_once(
                connections[index], texts[index], STREAM_TOKENS, expected[index], stats
            )

    await asyncio.gather(*(run(index) for index in range(options.streams)))
    seconds = time.perf_counter() - began_s
    say("done")
    for connection in connections:
        connection.close()
    gaps_ms = sorted(gap * 1000 for gap in stats.gaps_s)
    return {
        "tokens": stats.tokens,
        "events_per_token": stats.events / max(1, stats.tokens),
        "tokens_per_s": stats.tokens / seconds,
        "itl_ms_p50": quantile(gaps_ms, 0.5),
        "itl_ms_p99": quantile(gaps_ms, 0.99),
        "streams": stats.streams,
        "failed": stats.failed + warm.failed,
        "wrong": stats.wrong + warm.wrong,
        "seconds": seconds,
    }


async def run_requests(options: argparse.Namespace, times: EngineTimes) -> dict[str, Any]:
    """64 keep-alive connections, prompts of 200 characters, answers of one id."""
    del times
    connections = await open_connections(options, options.connections)
    stats = Stats()
    text = ("How high does the water stand at noon? " * 6)[:194]

    async def run(index: int, ends_at_s: float) -> None:
        count = 0
        while time.perf_counter() < ends_at_s:
            count += 1
            sent_s = time.perf_counter()
            status, headers = await connections[index].post(
                chat(f"{index:02d}{count % 10_000:04d}{text}", 1, False)
            )
            await connections[index].read_whole(headers)
            stats.whole_s.append(time.perf_counter() - sent_s)
            stats.streams += 1
            stats.failed += status != 200

    ends_at_s = time.perf_counter() + 2.0
    await asyncio.gather(*(run(index, ends_at_s) for index in range(len(connections))))
    stats.whole_s.clear()
    stats.streams = stats.failed = 0
    say("measure")
    began_s = time.perf_counter()
    ends_at_s = began_s + options.seconds
    await asyncio.gather(*(run(index, ends_at_s) for index in range(len(connections))))
    seconds = time.perf_counter() - began_s
    say("done")
    for connection in connections:
        connection.close()
    whole_ms = sorted(s * 1000 for s in stats.whole_s)
    return {
        "requests": stats.streams,
        "requests_per_s": stats.streams / seconds,
        "failed": stats.failed,
        "whole_ms_p50": quantile(whole_ms, 0.5),
        "whole_ms_p99": quantile(whole_ms, 0.99),
        "steps_of_40_ms": sum(38.0 <= ms <= 45.0 for ms in whole_ms) / max(1, len(whole_ms)),
    }


async def run_ttft(options: argparse.Namespace, times: EngineTimes) -> dict[str, Any]:
    """Open-loop arrivals beside running streams: what the gateway adds to the engine's TTFT,
    counted from the intended moment of sending."""
    background = await open_connections(options, options.background)
    stats = Stats()
    is_over = asyncio.Event()

    async def keep_streaming(index: int) -> None:
        while not is_over.is_set():
            await stream_once(background[index], f"Background {index}.", STREAM_TOKENS, None, stats)

    running = [asyncio.ensure_future(keep_streaming(i)) for i in range(options.background)]
    idle = await open_connections(options, 128)
    draw = random.Random(SEED)
    added_s: list[float] = []
    failed = 0

    async def ask(intended_s: float, number: int) -> None:
        nonlocal failed
        if not idle:
            failed += 1
            return
        connection = idle.pop()
        status, headers = await connection.post(chat(f"Question {number} of the hour.", 4, True))
        if status != 200:
            await connection.read_whole(headers)
            failed += 1
        else:
            first_s = 0.0
            async for piece in connection.chunks():
                if not first_s and (found := TEXT.search(piece)) and found[1]:
                    first_s = time.perf_counter()
            request_id = headers[b"x-request-id"].decode()
            added_s.append(first_s - intended_s - times.engine_s(request_id))
        idle.append(connection)

    await asyncio.sleep(3.0)
    say("measure")
    asked: list[asyncio.Task[None]] = []
    at_s = time.perf_counter()
    ends_at_s = at_s + options.seconds
    while (at_s := at_s + draw.expovariate(options.rate)) < ends_at_s:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        asked.append(asyncio.ensure_future(ask(at_s, len(asked))))
    await asyncio.gather(*asked)
    say("done")
    is_over.set()
    await asyncio.gather(*running)
    for connection in (*background, *idle):
        connection.close()
    added_ms = sorted(s * 1000 for s in added_s)
    return {
        "requests": len(added_ms),
        "failed": failed + stats.failed,
        "wrong": stats.wrong,
        "added_ttft_ms_p50": quantile(added_ms, 0.5),
        "added_ttft_ms_p99": quantile(added_ms, 0.99),
    }


async def run_idle(options: argparse.Namespace, times: EngineTimes) -> dict[str, Any]:
    """Workers that are joined and have nothing to do."""
    del times
    await asyncio.sleep(5.0)
    say("measure")
    await asyncio.sleep(options.seconds)
    say("done")
    return {"workers": options.workers, "seconds": options.seconds}


PHASES = {"streams": run_streams, "requests": run_requests, "ttft": run_ttft, "idle": run_idle}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of a sorted list; 0 of an empty one."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def say(line: str) -> None:
    """For whoever measures the gateway: the load begins, the load has ended."""
    print(line, file=sys.stderr, flush=True)


async def main(options: argparse.Namespace) -> dict[str, Any]:
    times = EngineTimes()
    workers, tasks = start_workers(options, options.workers, times)
    ends_at_s = time.perf_counter() + JOIN_S_MAX
    while not all(worker.is_joined for worker in workers):
        assert time.perf_counter() < ends_at_s, "the workers did not join"
        await asyncio.sleep(0.05)
    answer = await PHASES[options.phase](options, times)
    for worker in workers:
        await worker.stop("the load has ended")
    await asyncio.gather(*tasks, return_exceptions=True)
    return answer


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gpuworkers.gatewayload")
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--join", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--background", type=int, default=64)
    parser.add_argument("--rate", type=float, default=25.0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(parse(sys.argv[1:])))))
