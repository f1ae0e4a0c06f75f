"""`manage.py serve --demo`: a small real model on two CPU workers, under a modest load.

`prepare` checks the machine and converts the model, `Demo.seed` makes rows once the database is
there, `Demo.launch` starts a task beside the server: it waits for the workers, streams the first
answer, prints how to log in, measures what this device can promise and keeps the load going.
`Demo.finish` counts. The demo lives in its own var folder and never touches a database of the
shell.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
from channels.db import database_sync_to_async
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from console import demochecks, demoload, demomeasure, demoreport, demoseed
from console.democlient import new_client, stream_chat
from console.demoload import Prompts, chat_body
from console.demoseed import Login
from console.demostart import (
    SECONDS_MAX,
    DemoOptions,
    PhaseTimer,
    move_into_own_folder,
    process_age_s,
    read_options,
)
from console.state import ServerState
from console.tokens import FolderTokenizer
from controlplane.domain import PlanChanged

WORKERS = "prefill=1,decode=1"
NUM_WORKERS = 2
LOAD_NICE = 5
QUESTION = "What is the capital of France?"
WORKERS_WAIT_S_MAX = 120.0
STATUS_S = 10.0
WATCH_S = 0.2
LOAD_END_S_MAX = 60.0
PARENT_POLL_S = 1.0


def say(line: str) -> None:
    """One plain line, seen at once."""
    print(line, flush=True)


def prepare(options: dict[str, Any]) -> "Demo":
    """Everything before the database: own folder, checks, model. Fills in `serve`'s options.

    Raises CommandError, whose one line says what to do."""
    move_into_own_folder()
    wanted = read_options(os.environ)
    timer = PhaseTimer(process_age_s())
    timer.end_phase("python")
    demochecks.check_disk(settings.SLACKWATER_VAR)
    demochecks.check_memory(demochecks.available_memory_bytes())
    port = demochecks.choose_port(options["port"], options["bind"])
    timer.end_phase("checks")
    say(f"demo: files in {settings.SLACKWATER_VAR}, port {port}")
    folder = demochecks.convert_model(lambda line: say(f"demo: {line}"), settings.BASE_DIR)
    timer.end_phase("model")
    say(f"demo: model in {folder}")
    options |= {
        "port": port,
        "workers": WORKERS,
        "engine": "native",
        "model": str(folder),
        "model_id": demoseed.MODEL_ID,
        "fleet": options["fleet"] or wanted.num_modelled,
    }
    return Demo(wanted, folder, timer)


def banner(login: Login) -> list[str]:
    """Where the demo is and how to get in."""
    messages = [{"role": "user", "content": QUESTION}]
    question = json.dumps({"model": demoseed.MODEL_ID, "messages": messages})
    return [
        "",
        f"  Console   {login.url}/   log in as {login.admin} with {login.password}",
        f"  API       {login.url}/v1   key {login.api_key}",
        f"  Try       curl {login.url}/v1/chat/completions -H 'Content-Type: application/json'"
        f" -H 'Authorization: Bearer {login.api_key}' -d '{question}'",
        "",
    ]


class Demo:
    """One demo from its rows to its report. `failure` is set when it cannot go on."""

    def __init__(self, options: DemoOptions, model_folder: Path, timer: PhaseTimer) -> None:
        self.options = options
        self.model_folder = model_folder
        self.failure = ""
        self._timer = timer
        self._login: Login | None = None
        self._since = timezone.now()
        self._first_token_s: float | None = None
        self._load: subprocess.Popen[str] | None = None
        self._num_client_errors = 0
        self._task: asyncio.Task[None] | None = None
        self._load_began: datetime | None = None
        self._plan: PlanChanged | None = None  # the newest that was said

    def seed(self, port: int) -> None:
        """Rows and history; the database is migrated and `serve` has made the model's row."""
        self._login = demoseed.seed(
            settings.SLACKWATER_VAR, f"http://127.0.0.1:{port}", self.model_folder
        )
        call_command("seed_demo", verbosity=0)
        self._timer.end_phase("database")
        self._since = timezone.now()

    def launch(self, state: ServerState, stop: Callable[[], None]) -> None:
        """The server listens: run beside it. `stop` is called when the demo ends by itself."""
        state.batches.hold()  # a job left by the last demo would make the measurement untrue
        self._task = asyncio.get_running_loop().create_task(self._run(state))
        self._task.add_done_callback(lambda task: self._ended(task, state, stop))

    def _ended(
        self, task: asyncio.Task[None], state: ServerState, stop: Callable[[], None]
    ) -> None:
        if task.cancelled():
            return
        if task.exception() is not None:
            self.failure = f"the demo broke ({task.exception()!r}): please report this line"
        if not state.draining:  # a second call of `stop` would force
            stop()

    async def _run(self, state: ServerState) -> None:
        assert self._login is not None, "run before seed"
        if os.environ.get("MAKELEVEL"):
            threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
        async with new_client(self._login.url, self._login.api_key) as client:
            if not await self._first_answer(state, client):
                return
            for line in (*banner(self._login), self._timer.line()):
                say(line)
            measured = await self._scale_classes(state, client)
        state.batches.release()
        if self.options.has_load:
            self._start_load(demomeasure.load_rate(measured))
        say("demo: running; Ctrl-C ends it")
        await self._watch(state)
        await asyncio.to_thread(self._end_load)

    # --- start --------------------------------------------------------------------------------

    async def _first_answer(self, state: ServerState, client: httpx.AsyncClient) -> bool:
        if not await self._workers_are_up(state):
            return False
        self._timer.end_phase("workers")
        body = chat_body(demoseed.MODEL_ID, QUESTION, 24, "priority")
        # As a client would ask, without the load's system message: that one confuses the model.
        body |= {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = await stream_chat(client, body)
        self._timer.end_phase("answer", answer.ttft_s)
        if answer.error:
            self.failure = f"the first answer failed ({answer.error}): look into {logs()}"
            return False
        self._first_token_s = self._timer.total_s()
        say(f"demo: {QUESTION} {answer.text.strip()}")
        return True

    async def _workers_are_up(self, state: ServerState) -> bool:
        started_at_s = said_at_s = time.monotonic()
        while (num_up := num_live(state)) < NUM_WORKERS:
            ended = [proc for proc in state.workers.views() if proc.state == "ended"]
            if ended:
                last = " ".join(ended[0].last_lines[-1:])
                self.failure = f"worker {ended[0].name} ended ({last}): look into {logs()}"
                return False
            now_s = time.monotonic()
            if now_s - started_at_s > WORKERS_WAIT_S_MAX:
                self.failure = f"{num_up} of {NUM_WORKERS} workers came up: look into {logs()}"
                return False
            if now_s - said_at_s > STATUS_S:
                said_at_s = now_s
                say(f"demo: {num_up} of {NUM_WORKERS} workers are up")
            await asyncio.sleep(0.1)
        return True

    async def _scale_classes(
        self, state: ServerState, client: httpx.AsyncClient
    ) -> demomeasure.Measured | None:
        say(f"demo: measuring for {demomeasure.CALIBRATION_S:.0f} s what this device can promise")
        tokenizer = FolderTokenizer(self.model_folder)
        measured = await demomeasure.measure(client, Prompts(tokenizer))
        if measured is None:
            say("demo: nothing could be measured; the shipped classes stay")
            return None
        scale = database_sync_to_async(demoseed.scale_classes)
        await scale(measured.ttft_s, measured.itl_s)
        await asyncio.to_thread(state.snapshot.refresh)
        say(
            f"demo: {measured}; targets scaled for this device:"
            f" TTFT {1000 * measured.ttft_s:.0f} ms, ITL {1000 * measured.itl_s:.0f} ms"
        )
        return measured

    def _start_load(self, rate_per_s: float) -> None:
        say(f"demo: load of {rate_per_s:.2f} chats/s and a batch job")
        self._load_began = timezone.now()
        log = logs() / "load.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as errors:
            self._load = subprocess.Popen(
                [
                    *(sys.executable, "-u", str(settings.BASE_DIR / "manage.py"), "demo_load"),
                    *("--rate", f"{rate_per_s:.3f}", "--nice", str(LOAD_NICE)),
                    *("--exit-with-parent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    # --- while it runs ------------------------------------------------------------------------

    async def _watch(self, state: ServerState) -> None:
        """Until the time is over, the load ends by itself, or the server drains."""
        started_at_s = said_at_s = time.monotonic()
        while not state.draining:
            now_s = time.monotonic()
            if now_s - started_at_s >= (self.options.seconds or SECONDS_MAX):
                return
            if self._load is not None and self._load.poll() is not None:
                self.failure = f"the load ended by itself: look into {logs()}/load.log"
                return
            if now_s - said_at_s >= STATUS_S:
                said_at_s = now_s
                say(status_line(state, now_s - started_at_s))
            self._say_plan(state, now_s - started_at_s)
            await asyncio.sleep(WATCH_S)

    def _say_plan(self, state: ServerState, passed_s: float) -> None:
        """A line when a worker's role changes, with the reason."""
        plans = state.fleet.view().plans
        if plans and plans[0] is not self._plan:
            self._plan = plan = plans[0]
            change = f"{plan.worker_id} {plan.role_before} -> {plan.role_after}"
            say(f"demo: {passed_s:4.0f} s  plan {change} by {plan.by}: {plan.reason}")

    def _mix_shift_s(self) -> float | None:
        """When the load's mix of prompts shifted, after the start of what the report counts."""
        if self._load_began is None:
            return None
        shift_s = (timezone.now() - self._load_began).total_seconds() - demoload.SHIFT_AFTER_S
        began_s = (self._load_began - self._since).total_seconds()
        return None if shift_s < 0.0 else began_s + demoload.SHIFT_AFTER_S

    def _end_load(self) -> None:
        """Tells the load to send nothing more and waits for the answers that are still running."""
        if self._load is None:
            return
        load, self._load = self._load, None
        load.send_signal(signal.SIGTERM)
        try:
            output, _ = load.communicate(timeout=LOAD_END_S_MAX)
        except subprocess.TimeoutExpired:
            load.kill()
            load.communicate()
            self.failure = (
                f"answers still ran {LOAD_END_S_MAX:.0f} s after the load had stopped: this machine"
                " has other work; try again when it is idle"
            )
            return
        if load.returncode == -signal.SIGTERM:
            return  # it was told before it had begun
        if load.returncode != 0 or not output.strip():
            self.failure = self.failure or f"the load failed: look into {logs()}/load.log"
            return
        totals = json.loads(output.splitlines()[-1])
        self._num_client_errors = totals["failed"] + totals["skipped"]
        for error in totals["errors"] or []:
            say(f"demo: the load saw {error}")

    # --- end ----------------------------------------------------------------------------------

    def finish(self, state: ServerState) -> None:
        """Counts and writes DEMO_JSON, after the server has stopped. Raises CommandError."""
        self._end_load()
        report = demoreport.count(
            self._since, self._first_token_s, self._num_client_errors, self._mix_shift_s()
        )
        for line in report.lines():
            say(f"demo: {line}")
        found = demoreport.differences(report, metric_reader(state))
        for line in found:
            say(f"demo: {line}")
        if not found:
            say("demo: request table and /metrics count the same")
        if self.options.json_path is not None:
            demoreport.write_json(self.options.json_path, report)
        if self.failure:
            raise CommandError(self.failure)


def logs() -> Path:
    path: Path = settings.SLACKWATER_VAR / "logs"
    return path


def num_live(state: ServerState) -> int:
    """Workers that serve the demo's model now."""
    return sum(
        worker.status == "live" and any(m.model_id == demoseed.MODEL_ID for m in worker.models)
        for worker in state.fleet.view().workers
    )


def status_line(state: ServerState, passed_s: float) -> str:
    """One line of progress from the same figures as the Overview's."""
    frame = state.live.frame(state.fleet.now_s())
    counters, rates = frame["counters"], frame["tokens_per_s"]
    missed = [row["name"] for row in frame["classes"] if row["status"] == "missed"]
    roles = Counter(worker["role"] for worker in frame["workers"] if worker["status"] == "live")
    return (
        f"demo: {passed_s:4.0f} s  interactive {rates['interactive']:.0f} and batch"
        f" {rates['batch']:.0f} tokens/s  handoff {counters['placements_handoff']} local"
        f" {counters['placements_local']} lines {counters['batch_lines']} failed"
        f" {counters['failed']}  workers"
        f" {', '.join(f'{count} {role}' for role, count in sorted(roles.items()))}  "
        + (f"missed: {', '.join(missed)}" if missed else "all targets met")
    )


def metric_reader(state: ServerState) -> demoreport.ReadMetric:
    """Samples of the registry behind /metrics."""
    samples = [sample for family in state.metrics.registry.collect() for sample in family.samples]

    def read(name: str, labels: dict[str, str]) -> float:
        return sum(
            sample.value
            for sample in samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    return read


def end_with_parent(parent_pid: int) -> None:
    """`make` was killed: nobody can stop us any more, so end at once, as by two Ctrl-C."""
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
