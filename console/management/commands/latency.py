"""How honest the latency model is: error, coverage and over-prediction per bucket of steps.

Without --saved a simulated worker on a step table is audited, with it what a real worker has kept
of its own steps. --export writes the coefficients, as a step model's fields."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from django.core.management.base import BaseCommand, CommandError, CommandParser

from console.simprocess import SimFailed, simulate
from controlplane.latency import SavedModel, audit_figures, read_saved

FIGURES = ("steps", "mape", "coverage", "over_prediction")


class Command(BaseCommand):
    help = "Error, coverage and over-prediction of the latency model, and its coefficients"
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--saved", type=Path, help="model file of a worker")
        parser.add_argument("--table", default="llama-3.1-8b-bf16-tp1", help="step table")
        parser.add_argument("--seconds", type=float, default=800.0, help="virtual")
        parser.add_argument("--itl", type=float, default=0.05, help="target in seconds")
        parser.add_argument("--export", type=Path, help="write the coefficients here")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["saved"]:
            answer = saved_figures(read(options["saved"]))
        else:
            arguments = ["latency", "--table", options["table"], "--itl", str(options["itl"])]
            try:
                answer = simulate([*arguments, "--seconds", str(options["seconds"])])
            except SimFailed as error:
                self.stdout.write(json.dumps({"error": str(error)}))
                sys.exit(1)
        if options["export"]:
            options["export"].write_text(json.dumps(answer["coefficients"], indent=2) + "\n")
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        self.stdout.write("".join(f"{name:>17}" for name in ("bucket", *FIGURES)))
        for bucket, row in {"all": answer, **answer["buckets"]}.items():
            cells = "".join(f"{row[name]:17.6g}" for name in FIGURES)
            self.stdout.write(f"{bucket:>17}{cells}")
        for name, value in answer["coefficients"].items():
            self.stdout.write(f"{name:28} {value}")


def read(path: Path) -> SavedModel:
    """Raises CommandError with the reason."""
    try:
        return read_saved(path.read_bytes())
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise CommandError(f"{path} is not a saved latency model: {error}") from error


def saved_figures(saved: SavedModel) -> dict[str, Any]:
    """The figures that a worker has gathered about its own predictions."""
    rows = audit_figures(saved.audits)
    steps = max(1, sum(row["steps"] for row in rows.values()))
    total = {
        name: sum(row[name] * row["steps"] for row in rows.values()) / steps for name in FIGURES[1:]
    }
    return {
        "model_id": saved.model_id,
        "device": saved.device,
        "engine_version": saved.engine_version,
        "steps": steps,
        **total,
        "buckets": rows,
        "coefficients": msgspec.to_builtins(saved.coefficients),
    }
