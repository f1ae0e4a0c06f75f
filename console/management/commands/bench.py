"""Benchmarks. With --json exactly one JSON object on stdout; everything else goes to stderr."""

import json
import sys
from typing import Any, NoReturn

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from console import benchgateway
from console.simprocess import SimFailed, run_module, simulate

TOP = (
    "harvest",
    "ttft_p99_inflation",
    "itl_miss",
    "batch_vs_tuned_chunk",
    "miss_ratio_at_equal_batch",
)
FAKE_SECONDS = 500.0
MODEL_HELP = "folder of the model; without it the packaged one"


class Command(BaseCommand):
    help = (
        "Measure: `engine` beside transformers; `coserve`, interactive and batch work on one"
        " worker; `kernels`, those of a GPU; `router`, placement decisions; `plane`, all promises"
        " of the control plane on traces"
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        kinds = parser.add_subparsers(dest="kind", required=True)
        coserve = kinds.add_parser("coserve", help="interactive and batch work on one worker")
        coserve.add_argument(
            "--engine",
            choices=("fake", "cpu"),
            default="fake",
            help="fake: a step table, virtual time; cpu: a real engine, no gateway, real time",
        )
        coserve.add_argument("--json", action="store_true")
        coserve.add_argument("--sweep", action="store_true", help="write the table of kappas")
        coserve.add_argument("--seeds", type=int, default=8)
        coserve.add_argument(
            "--seconds",
            type=float,
            help="fake: virtual, of each seed (500); cpu: of each of three arms (600)",
        )
        coserve.add_argument("--rate", type=float, default=3.0, help="interactive requests per s")
        coserve.add_argument("--model", default="", help=f"cpu: {MODEL_HELP}")
        engine = kinds.add_parser("engine", help="our engine beside transformers, on this CPU")
        engine.add_argument("--json", action="store_true")
        engine.add_argument("--model", default="", help=MODEL_HELP)
        kernels = kinds.add_parser("kernels", help="the CUDA kernels against the GPU's ceilings")
        kernels.add_argument("--json", action="store_true")

        gateway = kinds.add_parser("gateway", help="what the gateway costs and adds")
        gateway.add_argument("--json", action="store_true")
        gateway.add_argument("--seconds", type=float, default=60.0, help="of streaming")
        plane = kinds.add_parser("plane", help="the whole control plane on traces, virtual time")
        plane.add_argument("--json", action="store_true")
        plane.add_argument("--part", action="append", default=[], help="only this; repeatable")
        plane.add_argument("--traces", default=settings.SLACKWATER_TRACES, help="folder of them")
        plane.add_argument("--calibration", default=settings.SLACKWATER_CALIBRATION)
        plane.add_argument("--processes", type=int, default=2)
        router = kinds.add_parser("router", help="cost of a placement decision")
        router.add_argument("--json", action="store_true")
        router.add_argument("--blocks", type=int, default=1_000_000, help="in the prefix index")
        router.add_argument("--repeats", type=int, default=5)

    def handle(self, *args: Any, **options: Any) -> None:
        if options["kind"] == "kernels":
            self.kernels(options["json"])
        elif options["kind"] == "router":
            self.router(options)
        elif options["kind"] == "plane":
            self.plane(options)
        elif options["kind"] == "gateway":
            self.gateway(options)
        elif options["kind"] == "engine":
            self.on_model("gpuworkers.bench", [], options)
        elif options["engine"] == "cpu":
            seconds = [] if options["seconds"] is None else ["--seconds", str(options["seconds"])]
            self.on_model("gpuworkers.benchcoserve", seconds, options)
        else:
            self.coserve(options)

    def on_model(self, module: str, arguments: list[str], options: dict[str, Any]) -> None:
        """A benchmark on a model folder, in a process of its own; its answer is one JSON object."""
        folder = options["model"]
        if not folder:
            converted = run_module("gpuworkers.convert", [])
            if converted.returncode != 0:
                self.fail("the packaged model could not be converted")
            folder = converted.stdout.splitlines()[-1]
        done = run_module(module, ["--model", folder, *arguments])
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            self.fail(f"{module} ended with {done.returncode} and no answer")
        if "error" in answer:
            self.fail(answer["error"])
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        for name, value in answer.items():
            if isinstance(value, dict):
                self.stdout.write(name)
                for key, row in value.items():
                    self.stdout.write(f"  {key:18} {_figures(row)}")
            else:
                self.stdout.write(f"{name:28} {_figures(value)}")

    def fail(self, reason: str) -> NoReturn:
        """The answer of a benchmark that has none."""
        self.stdout.write(json.dumps({"error": reason}))
        sys.exit(1)

    def kernels(self, is_json: bool) -> None:
        """What kernels.bench prints; without a GPU that is one line."""
        done = run_module("kernels.bench", ["--json"] if is_json else [])
        if done.stdout:
            self.stdout.write(done.stdout.rstrip("\n"))
        elif is_json:
            self.fail(f"kernels.bench ended with {done.returncode} and no answer")
        if done.returncode != 0:
            sys.exit(1)

    def gateway(self, options: dict[str, Any]) -> None:
        """A server of its own under load of modelled workers and checked clients."""
        try:
            answer = benchgateway.run(options["seconds"], self.stderr.write)
        except benchgateway.BenchFailed as error:
            self.fail(str(error))
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        for name, value in answer.items():
            self.stdout.write(f"{name:28} {_figures(value)}")

    def coserve(self, options: dict[str, Any]) -> None:
        arguments = ["coserve"]
        for name, value in (
            ("seeds", options["seeds"]),
            ("seconds", options["seconds"] or FAKE_SECONDS),
            ("rate", options["rate"]),
        ):
            arguments += [f"--{name}", str(value)]
        if options["sweep"]:
            arguments.append("--sweep")
        answer = self.simulated(arguments, options["json"])
        if answer is None:
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

    def router(self, options: dict[str, Any]) -> None:
        """The simulator's flat answer, as it is or as a table."""
        arguments = ["router"]
        for name in ("blocks", "repeats"):
            arguments += [f"--{name}", str(options[name])]
        for name, value in (self.simulated(arguments, options["json"]) or {}).items():
            self.stdout.write(f"{name:28} {value}")

    def plane(self, options: dict[str, Any]) -> None:
        """Each part with its figures; a run cut short says what is missing."""
        arguments = ["plane", "--processes", str(options["processes"])]
        for name in options["part"]:
            arguments += ["--part", name]
        for name in ("traces", "calibration"):
            if options[name]:
                arguments += [f"--{name}", options[name]]
        answer = self.simulated(arguments, options["json"])
        if answer is None:
            return
        if "error" in answer:
            self.fail(answer["error"])
        for name, value in answer.items():
            if isinstance(value, dict):
                self.stdout.write(name)
                for key, row in value.items():
                    self.stdout.write(f"  {key:28} {_figures(row)}")
            else:
                self.stdout.write(f"{name:28} {_figures(value)}")

    def simulated(self, arguments: list[str], is_json: bool) -> dict[str, Any] | None:
        """The simulator's answer; None after it was printed as JSON."""
        try:
            answer = simulate(arguments)
        except SimFailed as error:
            self.fail(str(error))
        if not is_json:
            return answer
        self.stdout.write(json.dumps(answer))
        return None


def _figures(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{key} {_figures(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "/".join(_figures(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
