"""Benchmarks. With --json exactly one JSON object on stdout; everything else goes to stderr."""

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from console.simprocess import SimFailed, simulate

TOP = (
    "harvest",
    "ttft_p99_inflation",
    "itl_miss",
    "batch_vs_tuned_chunk",
    "miss_ratio_at_equal_batch",
)


class Command(BaseCommand):
    help = (
        "Measure: `coserve` runs interactive and batch work on one worker, `router` times"
        " placement decisions"
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        kinds = parser.add_subparsers(dest="kind", required=True)
        coserve = kinds.add_parser("coserve", help="interactive and batch work on one worker")
        coserve.add_argument(
            "--engine", choices=("fake",), default="fake", help="fake: a step table, virtual time"
        )
        coserve.add_argument("--json", action="store_true")
        coserve.add_argument("--sweep", action="store_true", help="write the table of kappas")
        coserve.add_argument("--seeds", type=int, default=8)
        coserve.add_argument("--seconds", type=float, default=500.0, help="virtual, of each seed")
        coserve.add_argument("--rate", type=float, default=3.0, help="interactive requests per s")

        router = kinds.add_parser("router", help="cost of a placement decision")
        router.add_argument("--json", action="store_true")
        router.add_argument("--blocks", type=int, default=1_000_000, help="in the prefix index")
        router.add_argument("--repeats", type=int, default=5)

    def handle(self, *args: Any, **options: Any) -> None:
        if options["kind"] == "router":
            self._router(options)
            return
        arguments = ["coserve"]
        for name in ("seeds", "seconds", "rate"):
            arguments += [f"--{name}", str(options[name])]
        if options["sweep"]:
            arguments.append("--sweep")
        try:
            answer = simulate(arguments)
        except SimFailed as error:
            self.stdout.write(json.dumps({"error": str(error)}))
            sys.exit(1)
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        for name in TOP:
            if name in answer:
                self.stdout.write(f"{name:28} {answer[name]:.4f}")
        for target in answer.get("targets", ()):
            self.stdout.write(f"\nITL target {target['itl_target_ms']:.0f} ms")
            for arm, row in target["arms"].items():
                figures = "  ".join(f"{key} {value}" for key, value in row.items())
                self.stdout.write(f"  {arm:18} {figures}")
        for target_ms, rows in answer.get("sweep", {}).items():
            self.stdout.write(f"\nITL target {target_ms} ms")
            for row in rows:
                self.stdout.write("  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))

    def _router(self, options: dict[str, Any]) -> None:
        arguments = ["router"]
        for name in ("blocks", "repeats"):
            arguments += [f"--{name}", str(options[name])]
        self._show(arguments, options["json"])

    def _show(self, arguments: list[str], is_json: bool) -> None:
        """The simulator's flat answer, as it is or as a table."""
        try:
            answer = simulate(arguments)
        except SimFailed as error:
            self.stdout.write(json.dumps({"error": str(error)}))
            sys.exit(1)
        if is_json:
            self.stdout.write(json.dumps(answer))
            return
        for name, value in answer.items():
            self.stdout.write(f"{name:28} {value}")
