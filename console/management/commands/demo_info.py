"""Prints where the demo listens and how to log in."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from console.demo import banner
from console.demoseed import read_login


class Command(BaseCommand):
    help = "Addresses, login and key of the demo"
    requires_system_checks: list[str] = []

    def handle(self, *args: Any, **options: Any) -> None:
        login = read_login(settings.SLACKWATER_VAR)
        if login is None:
            raise CommandError("there is no demo yet: run make demo")
        for line in banner(login):
            self.stdout.write(line)
