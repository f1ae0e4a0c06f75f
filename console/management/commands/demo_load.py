"""Sends the demo's load to a running console until it is told to stop, then prints what it saw."""

import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from argparse import ArgumentParser
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError
from django.utils import timezone

from console import batchfiles, demoload
from console.democlient import new_client, stream_chat
from console.demoload import Arrival, Prompts
from console.demoseed import MODEL_ID, Login, read_login
from console.models import Batch, Tenant
from console.models.files import BATCH_ENDED
from console.tokens import FolderTokenizer

IN_FLIGHT_MAX = 64  # beyond it an arrival is skipped and counted
BATCH_POLL_S = 2.0
PARENT_POLL_S = 0.5


@dataclass
class Totals:
    """What the load sent and how it ended; `errors` holds the first few messages."""

    sent: int = 0
    completed: int = 0
    failed: int = 0
    skipped: int = 0
    batches: int = 0
    errors: list[str] | None = None

    def ended(self, error: str) -> None:
        if not error:
            self.completed += 1
            return
        self.failed += 1
        self.errors = [*(self.errors or []), error][:5]


class Command(BaseCommand):
    help = "Open-loop chats and a batch job, as `make demo` runs them; ends on SIGTERM or SIGINT"

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--rate", type=float, default=0.9, help="chats per second, at most 1")
        parser.add_argument("--seconds", type=float, default=None, help="stop by itself")
        parser.add_argument("--seed", type=int, default=7)
        parser.add_argument("--no-batch", action="store_true", help="chats only")
        parser.add_argument("--nice", type=int, default=0, help="lower the priority by this much")
        parser.add_argument("--exit-with-parent", type=int, metavar="PID", default=None)

    def handle(self, *args: Any, **options: Any) -> None:
        login = read_login(settings.SLACKWATER_VAR)
        if login is None:
            raise CommandError("there is no demo to send load to: run make demo")
        if not 0 < options["rate"] <= demoload.RATE_PER_S_MAX:
            raise CommandError(f"--rate={options['rate']}: expected more than 0 and at most 1")
        os.nice(max(0, options["nice"]))
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        prompts = Prompts(FolderTokenizer(Path(login.model_folder)))
        totals = Totals()
        batch = threading.Thread(
            target=keep_a_batch_open, args=(prompts, options["seed"], totals, stop), daemon=True
        )
        if not options["no_batch"]:
            batch.start()
        asyncio.run(send(login, prompts, options, totals, stop))
        self.stdout.write(json.dumps(asdict(totals)))


async def send(
    login: Login, prompts: Prompts, options: dict[str, Any], totals: Totals, stop: threading.Event
) -> None:
    """Sends each chat at its time until stopped, then waits for the answers still running."""
    started_at_s = time.monotonic()
    tasks: set[asyncio.Task[None]] = set()
    async with new_client(login.url, login.api_key) as client:
        for arrival in demoload.arrivals(prompts, options["rate"], options["seed"]):
            is_last = options["seconds"] is not None and arrival.at_s >= options["seconds"]
            if is_last or not await wait_until(
                started_at_s + arrival.at_s, stop, options["exit_with_parent"]
            ):
                break
            if len(tasks) >= IN_FLIGHT_MAX:
                totals.skipped += 1
                continue
            totals.sent += 1
            task = asyncio.create_task(send_one(client, arrival, totals))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


async def send_one(client: httpx.AsyncClient, arrival: Arrival, totals: Totals) -> None:
    answer = await stream_chat(client, arrival.body(MODEL_ID))
    totals.ended(answer.error)


async def wait_until(at_s: float, stop: threading.Event, parent_pid: int | None) -> bool:
    """False as soon as the load shall end: told to, or its parent is gone."""
    while not stop.is_set():
        if parent_pid is not None and os.getppid() != parent_pid:
            os._exit(0)  # nobody reads the answers any more
        left_s = at_s - time.monotonic()
        if left_s <= 0:
            return True
        await asyncio.sleep(min(left_s, PARENT_POLL_S))
    return False


def keep_a_batch_open(prompts: Prompts, seed: int, totals: Totals, stop: threading.Event) -> None:
    """Submits a batch job whenever the tenant has none that runs; in a thread of its own."""
    while not stop.is_set():
        try:
            tenant = Tenant.objects.get(slug="demo")
            if not Batch.objects.filter(tenant=tenant).exclude(status__in=BATCH_ENDED).exists():
                submit_batch(tenant, prompts, seed + totals.batches)
                totals.batches += 1
        except DatabaseError as error:
            totals.ended(f"batch not submitted: {error}")
        stop.wait(BATCH_POLL_S)


def submit_batch(tenant: Tenant, prompts: Prompts, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.jsonl"
        path.write_bytes(demoload.batch_lines(prompts, MODEL_ID, seed))
        outcome = batchfiles.submit(tenant, path, "24h", timezone.now(), [MODEL_ID])
    assert isinstance(outcome, Batch), f"the demo's own batch file is invalid: {outcome}"
