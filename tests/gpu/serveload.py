"""The whole product on one machine, under load: `python3 -m tests.gpu.serveload --model DIR`.

Starts `manage.py serve` with one worker that joins over its websocket, sends chats at times that do
not wait for answers, first alone and then beside a batch job, and writes what the client saw and
what the Overview said to a JSON file. Not a test: it needs a GPU, or a small model on a CPU.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from console.democlient import Answer, new_client, stream_chat
from console.demoload import SENTENCES, SYSTEM, chat_body

ROOT = Path(__file__).resolve().parents[2]
READY_S_MAX = 240.0
STOP_S_MAX = 60.0
SEED = 20261129
SIGMA = 0.8  # of the lognormal lengths, as gpuworkers.gpucoserve
WORD_TOKENS = 1.25  # of the sentences above, in SmolLM2's vocabulary
FRAME_S = 5.0  # between two frames of the Overview that are kept
# Run in the server's var folder before it starts: prints the tenant's key and an operator's cookie.
PREPARE = """
import django
django.setup()
from pathlib import Path
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client
from console import demoseed
from console.models import Quota
call_command("migrate", verbosity=0)
login = demoseed.seed(settings.SLACKWATER_VAR, "", Path("."))
Quota.objects.update(concurrency_max=1000)
client = Client()
client.force_login(User.objects.get(username=demoseed.ADMIN))
print(login.api_key, client.cookies[settings.SESSION_COOKIE_NAME].value)
"""


@dataclass(frozen=True, slots=True)
class Load:
    """Chats a second, medians in tokens; lines of the batch job with their prompt and output."""

    rate_per_s: float
    prompt_median: int
    output_median: int
    batch_lines: int
    batch_prompt: int
    batch_output: int


def text_of(num_tokens: int, chance: random.Random) -> str:
    """About so many tokens, no two texts alike."""
    words: list[str] = []
    while len(words) * WORD_TOKENS < num_tokens:
        words += chance.choice(SENTENCES).split()
    return " ".join(words[: max(1, int(num_tokens / WORD_TOKENS))])


def chats(
    load: Load, seconds: float, seed: int, text_seed: int, model_id: str
) -> Iterator[tuple[float, Any]]:
    """(seconds after the start, body) of each chat. Another text_seed has the same times and
    lengths, and no prompt that a prefix cache holds."""
    chance, words, at_s = random.Random(seed), random.Random(text_seed), 0.0
    while (at_s := at_s + chance.expovariate(load.rate_per_s)) < seconds:
        prompt = min(8192, int(load.prompt_median * chance.lognormvariate(0.0, SIGMA)))
        output = min(1024, max(2, int(load.output_median * chance.lognormvariate(0.0, SIGMA))))
        yield at_s, chat_body(model_id, text_of(prompt, words), output, "priority")


def batch_file(load: Load, model_id: str) -> bytes:
    chance = random.Random(SEED)
    lines = []
    for index in range(load.batch_lines):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text_of(load.batch_prompt, chance)},
        ]
        body = {"model": model_id, "messages": messages, "max_tokens": load.batch_output}
        line = {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions"}
        lines.append(json.dumps({**line, "body": body}))
    return "\n".join(lines).encode() + b"\n"


class Server:
    """`manage.py serve` with a var folder of its own."""

    def __init__(self, var: Path, num_workers: int, options: Sequence[str]) -> None:
        self.var = var
        self._environ = {**os.environ, "SLACKWATER_VAR": str(var), "PYTHONUNBUFFERED": "1"}
        var.mkdir(parents=True, exist_ok=True)
        environ = {**self._environ, "DJANGO_SETTINGS_MODULE": "console.settings"}
        done = subprocess.run(
            [sys.executable, "-c", PREPARE], cwd=ROOT, env=environ, stdout=subprocess.PIPE,
            text=True, check=True,
        )  # fmt: skip
        self.api_key, self.cookie = done.stdout.split()[-2:]
        self._log = var / "serve.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "manage.py", "serve", "--port", "0", *options], cwd=ROOT,
                env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{self._until(self._said_port, 'a port')}"
        self._until(lambda: self.page("/readyz").status_code == 200, "a live worker")
        self._until(lambda: self._num_shown() == num_workers, f"{num_workers} workers")

    def _until(self, condition: Any, what: str) -> Any:
        ends_at_s = time.monotonic() + READY_S_MAX
        while time.monotonic() < ends_at_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"serve ended: {self.log()}")
            if value := condition():
                return value
            time.sleep(0.2)
        raise RuntimeError(f"waited {READY_S_MAX:.0f} s for {what}: {self.log()}")

    def _said_port(self) -> str | None:
        match = re.search(r"http://127\.0\.0\.1:(\d+)/", self._log.read_text())
        return match[1] if match else None

    def log(self) -> str:
        """The last of what the server and its worker said."""
        logs = [self._log, *(self.var / "logs").glob("*.log")]
        return "\n".join(path.read_text()[-3000:] for path in logs)

    def page(self, path: str) -> httpx.Response:
        """As the operator, logged in."""
        return httpx.get(
            f"{self.url}{path}", cookies={"sessionid": self.cookie}, timeout=10, trust_env=False
        )

    def overview(self) -> dict[str, str]:
        """The numbers on the Overview now, as it shows them, by their place in the live frame."""
        found = re.findall(r'data-live="([^"]+)"[^>]*>\s*([^<]*?)\s*<', self.page("/").text)
        return {name: text for name, text in found if text}

    def _num_shown(self) -> int:
        return len({name.split("/")[1] for name in self.overview() if name.startswith("workers/")})

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments], cwd=ROOT, env=self._environ,
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S_MAX)
        if self._process.poll() is None:
            self._process.kill()


async def send(server: Server, bodies: Sequence[tuple[float, Any]]) -> list[Answer]:
    """Each at its time, whatever else is running."""
    started_at_s = time.monotonic()
    tasks = []
    async with new_client(server.url, server.api_key) as client:
        for at_s, body in bodies:
            await asyncio.sleep(max(0.0, started_at_s + at_s - time.monotonic()))
            tasks.append(asyncio.create_task(stream_chat(client, body)))
        return list(await asyncio.gather(*tasks))


async def watch(server: Server, frames: list[dict[str, str]]) -> None:
    while True:
        await asyncio.sleep(FRAME_S)
        frames.append(await asyncio.to_thread(server.overview))


async def phase(server: Server, bodies: Sequence[tuple[float, Any]]) -> dict[str, Any]:
    frames: list[dict[str, str]] = []
    watching = asyncio.create_task(watch(server, frames))
    try:
        answers = await send(server, bodies)
    finally:
        watching.cancel()
    return client_figures(answers) | {"overview": frames}


def client_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    ended = [answer for answer in answers if not answer.error]
    ttfts_ms = [1000.0 * answer.ttft_s for answer in ended if answer.ttft_s is not None]
    gaps_ms = [1000.0 * gap for answer in ended for gap in answer.gaps_s]
    return {
        "sent": len(answers),
        "completed": len(ended),
        "errors": [answer.error for answer in answers if answer.error][:5],
        "prompt_tokens": sum(answer.prompt_tokens for answer in ended),
        "output_tokens": sum(answer.output_tokens for answer in ended),
        "ttft_ms": quantiles(ttfts_ms),
        "itl_ms": quantiles(gaps_ms),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in (50, 95, 99)}


def measure(options: argparse.Namespace, load: Load) -> dict[str, Any]:
    model_id = options.model.name
    arguments = ("--workers", options.workers, "--device", options.device)
    arguments += ("--model", str(options.model))
    started_at_s = time.monotonic()
    num_workers = sum(int(part.partition("=")[2]) for part in options.workers.split(","))
    server = Server(options.var, num_workers, arguments)
    print(f"joined after {time.monotonic() - started_at_s:.0f} s", file=sys.stderr, flush=True)
    try:
        asyncio.run(send(server, list(chats(load, options.warm, SEED, 1, model_id))))
        alone, beside = (
            list(chats(load, options.seconds, SEED + 1, text_seed, model_id))
            for text_seed in (2, 3)
        )
        answer = {"alone": asyncio.run(phase(server, alone))}
        path = options.var / "job.jsonl"
        path.write_bytes(batch_file(load, model_id))
        submitted = json.loads(server.command("batch", "submit", str(path), "--json"))
        began_at_s = time.monotonic()
        answer["beside batch"] = asyncio.run(phase(server, beside))
        answer["batch"] = json.loads(
            server.command("batch", "status", submitted["id"], "--json")
        ) | {"seconds": time.monotonic() - began_at_s}
        text = server.page("/metrics").text
        answer["metrics"] = [line for line in text.splitlines() if line.startswith("slackwater_")]
        return answer
    finally:
        server.stop()
        print(server.log(), file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.serveload", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder")
    add("--device", default="cuda:0", help="of the workers in turn")
    add("--workers", default="mixed=1", help="as for manage.py serve")
    add("--var", type=Path, required=True, help="folder for the server's files")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--seconds", type=float, default=60.0, help="of chats alone, and of chats beside batch")
    add("--warm", type=float, default=10.0, help="of chats before anything is counted")
    add("--rate", type=float, default=3.0, help="chats per second")
    add("--tokens", type=int, nargs=2, default=(1020, 129), help="medians: prompt, output")
    add("--batch", type=int, nargs=3, default=(2000, 1000, 250), help="lines, prompt, output")
    options = parser.parse_args(argv)
    answer = measure(options, Load(options.rate, *options.tokens, *options.batch))
    options.out.write_text(json.dumps(answer, indent=1))
    for name in ("alone", "beside batch"):
        row = {key: answer[name][key] for key in ("sent", "completed", "ttft_ms", "itl_ms")}
        print(name, json.dumps(row))
        print("  overview", json.dumps(answer[name]["overview"][-1]))
    print("batch", json.dumps(answer["batch"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
