"""Policies on one recorded trace in virtual time: ours, and a peer's own engine and router.

Progress goes to stderr. Ctrl-C ends it with the rows so far and "partial": true. Exit codes: 0 ok,
1 no answer, 2 usage.
"""

import json
import signal
import sys
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from console.simprocess import run_module

PASSED_ON = ("trace", "speed", "workers", "gpu", "model", "timing", "policy", "seeds")
COLUMNS = ("policy", "seed", "requests", "good_requests", "good_requests_strict")


class Command(BaseCommand):
    help = "Replay a recorded trace on modelled workers under one policy or more"
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--trace", required=True, metavar="PATH", help="a Parquet file")
        parser.add_argument("--speed", default="1", help="recorded stamps are divided by it")
        parser.add_argument("--workers", default="8")
        parser.add_argument("--gpu", default="h200")
        parser.add_argument("--model", default="8b")
        parser.add_argument("--timing", default="calibrated", help="calibrated, peer or peer_own")
        parser.add_argument("--policy", default="slackwater,peer_round_robin", metavar="NAME,NAME")
        parser.add_argument("--seeds", default="1", help="runs of each policy")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        arguments = ["compare"]
        for name in PASSED_ON:
            arguments += [f"--{name}", options[name]]
        before = signal.signal(signal.SIGINT, _wait_on)
        try:
            done = run_module("controlplane.sim", arguments)
        finally:
            signal.signal(signal.SIGINT, before)
        if done.returncode != 0:
            sys.exit(done.returncode if done.returncode == 2 else 1)
        if options["json"]:
            self.stdout.write(done.stdout.strip())
            return
        answer = json.loads(done.stdout)
        self.stdout.write(f"{'  '.join(COLUMNS)}  TTFT mean  p99  ITL p99 (ms)")
        for row in answer["rows"]:
            ttft, itl = row["ttft_ms"], row["itl_ms"]
            cells = [str(row[name]).rjust(len(name)) for name in COLUMNS]
            self.stdout.write(f"{'  '.join(cells)}  {ttft['mean']}  {ttft['p99']}  {itl['p99']}")
        if answer["partial"]:
            self.stdout.write("partial: interrupted")


def _wait_on(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C reaches the simulator too, which ends with what it has: wait for its answer. Not
    SIG_IGN, which the simulator would inherit."""
