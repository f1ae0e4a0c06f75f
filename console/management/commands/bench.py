"""Benchmarks. With --json exactly one JSON object on stdout; everything else goes to stderr."""

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from console.simprocess import SimFailed, run_module, simulate

TOP = (
    "harvest",
    "ttft_p99_inflation",
    "itl_miss",
    "batch_vs_tuned_chunk",
    "miss_ratio_at_equal_batch",
)


class Command(BaseCommand):
    help = "Measure: `coserve`, interactive and batch work on one worker; `kernels`, those of a GPU"
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
        kernels = kinds.add_parser("kernels", help="the CUDA kernels against the GPU's ceilings")
        kernels.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["kind"] == "kernels":
            self.kernels(options["json"])
        else:
            self.coserve(options)

    def kernels(self, is_json: bool) -> None:
        """What kernels.bench prints; without a GPU that is one line."""
        done = run_module("kernels.bench", ["--json"] if is_json else [])
        if done.stdout:
            self.stdout.write(done.stdout.rstrip("\n"))
        elif is_json:
            reason = f"kernels.bench ended with {done.returncode} and no answer"
            self.stdout.write(json.dumps({"error": reason}))
        if done.returncode != 0:
            sys.exit(1)

    def coserve(self, options: dict[str, Any]) -> None:
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
