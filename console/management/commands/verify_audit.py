"""Checks the audit chain from its first event to its last."""

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from console import audit
from console.models import AuditEvent

EXIT_BROKEN = 3


class Command(BaseCommand):
    help = (
        "Check the audit chain; names the first broken link (exit code 3). Events cut off at the"
        " end leave a shorter chain that holds: keep the printed digest elsewhere and give it back"
        " as --digest"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--digest", default="", help="of an event that has to be in the chain")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        audit.feed_all()
        checked, event, why = audit.first_broken()
        wanted = options["digest"]
        if not why and wanted and not AuditEvent.objects.filter(digest=wanted).exists():
            why = f"no event has the digest {wanted}: events were cut off at the end"
        last = AuditEvent.objects.first()
        digest = "" if last is None else last.digest
        if options["json"]:
            sequence = None if event is None else event.sequence
            answer = {"checked": checked, "broken": sequence, "why": why, "digest": digest}
            self.stdout.write(json.dumps(answer))
        elif why:
            link = "" if event is None else f"event {event.sequence}: "
            self.stdout.write(f"broken after {checked} events: {link}{why}")
        else:
            self.stdout.write(f"{checked} events hold; newest digest {digest or 'none'}")
        if why:
            sys.exit(EXIT_BROKEN)
