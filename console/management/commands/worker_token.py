"""Prints a token with which one worker may join this console."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from console import jointokens

MINUTES_MAX = 24 * 60


class Command(BaseCommand):
    help = "A one-use token for `python -m gpuworkers --join … --token …`"
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--name", default="by hand", help="whom the token is for")
        parser.add_argument(
            "--minutes", type=float, default=jointokens.LIFE_S / 60, help="how long it is good"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not 0 < options["minutes"] <= MINUTES_MAX:
            raise CommandError(f"--minutes={options['minutes']}: expected up to {MINUTES_MAX}")
        self.stdout.write(jointokens.mint(options["name"], 60 * options["minutes"]))
