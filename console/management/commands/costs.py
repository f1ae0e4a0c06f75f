"""What work has cost: GPU seconds and dollars by tenant, model and class, in both views.

Read from rows that `serve` writes once a minute; the current minute is not in them yet."""

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from console.costreport import HOURS_MAX, report
from console.costs import DIMENSIONS

COLUMNS = (
    ("requests", "requests"),
    ("prompt_tokens", "prompt"),
    ("output_tokens", "output"),
    ("gpu_s", "GPU s"),
    ("idle_gpu_s", "of it idle"),
    ("usd", "$"),
    ("usd_per_million_tokens", "$/1M"),
    ("cash_usd_per_million_tokens", "$/1M cash"),
)


class Command(BaseCommand):
    help = "GPU seconds and dollars by tenant, model and class"

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--hours", type=float, default=24.0, help="back from now")
        parser.add_argument("--by", action="append", choices=DIMENSIONS, help="default: all three")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        hours = options["hours"]
        if not 0.0 < hours <= HOURS_MAX:
            raise CommandError(f"--hours={hours:g}: expected more than 0, at most {HOURS_MAX}")
        answer = report(hours, options["by"] or DIMENSIONS, timezone.now())
        if options["json"]:
            self.stdout.write(json.dumps(answer))
            return
        names = answer["by"]
        header = "".join(f"{name:24}" for name in names)
        self.stdout.write(header + "".join(f"{title:>13}" for _, title in COLUMNS))
        for row in [*answer["lines"], dict.fromkeys(names, "") | answer["total"]]:
            cells = "".join(f"{row[name]:24}" for name in names)
            self.stdout.write(cells + "".join(f"{shown(row[name]):>13}" for name, _ in COLUMNS))


def shown(value: float | int | None) -> str:
    """A number of the table; empty where there is none."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
