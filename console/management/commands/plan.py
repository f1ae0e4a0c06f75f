"""The planner from the command line: what it changed and why, and orders to it.

A running `serve` carries orders out; the command waits for the answer. Exit codes: 0 ok, 1 refused,
2 usage, 3 no server took the order.
"""

import getpass
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from console import plans
from console.models import PlanOrder, PlanRecord
from controlplane.protocol import Role

EXIT_REFUSED, EXIT_USAGE, EXIT_LATE = 1, 2, 3
WAIT_S = 5.0  # for the server's answer
POLL_S = 0.1
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")
LISTED_MAX = 500


class Command(BaseCommand):
    help = "Show and change the plan: roles, models and number of workers"

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        status = actions.add_parser("status", help="mode, workers and the newest change")
        history = actions.add_parser("history", help="changes with their reasons, newest first")
        history.add_argument("--limit", type=int, default=20)
        apply = actions.add_parser("apply", help="carry out what shadow mode only recorded")
        apply.add_argument("id", nargs="?", type=int, help="default: the newest recommendation")
        rollback = actions.add_parser("rollback", help="undo the planner's newest change")
        override = actions.add_parser("override", help="order a role or a model; held 10 minutes")
        override.add_argument("worker")
        which = override.add_mutually_exclusive_group(required=True)
        which.add_argument("--role", choices=ROLES)
        which.add_argument("--model", metavar="ID")
        shadow = actions.add_parser("shadow", help="on: record only; off: act")
        shadow.add_argument("switch", choices=("on", "off"))
        for action in (status, history, apply, rollback, override, shadow):
            action.add_argument("--json", action="store_true")
        for action in (apply, rollback, override, shadow):
            action.add_argument("--by", default="", help="name in the record (default: your login)")

    def handle(self, *args: Any, **options: Any) -> None:
        act: Callable[[dict[str, Any]], int] = getattr(self, f"_{options['action']}")
        if code := act(options):
            sys.exit(code)

    def _status(self, options: dict[str, Any]) -> int:
        found = plans.status()
        if options["json"]:
            self.stdout.write(json.dumps(found))
            return 0
        self.stdout.write(f"planner {found['mode']}")
        for worker in found["workers"]:
            self.stdout.write(
                f"{worker['worker_id']:6} {worker['role']:8} {worker['status']:9} {worker['name']}"
            )
        newest = found["newest"]
        self.stdout.write(f"newest: {newest['reason']}" if newest else "no change yet")
        return 0

    def _history(self, options: dict[str, Any]) -> int:
        if not 1 <= options["limit"] <= LISTED_MAX:
            raise CommandError(
                f"--limit={options['limit']}: expected 1 to {LISTED_MAX}", returncode=EXIT_USAGE
            )
        rows = plans.history(options["limit"])
        if options["json"]:
            self.stdout.write(json.dumps([plans.shown(row) for row in rows]))
            return 0
        for row in rows:
            shadow = " (shadow)" if row.is_shadow else ""
            self.stdout.write(f"{row.pk:5} {row.at:%Y-%m-%d %H:%M:%S} {row} by {row.by}{shadow}")
            self.stdout.write(f"      {row.reason}")
        return 0

    def _apply(self, options: dict[str, Any]) -> int:
        rows = PlanRecord.objects.filter(is_demo_history=False)
        wanted = rows.filter(pk=options["id"]) if options["id"] else rows.filter(is_shadow=True)
        record = wanted.first()
        if record is None:
            name = f"plan {options['id']}" if options["id"] else "recommendation"
            raise CommandError(f"there is no {name}", returncode=EXIT_USAGE)
        try:
            action, worker_id, value = plans.order_of(record)
        except ValueError as error:
            raise CommandError(str(error), returncode=EXIT_REFUSED) from None
        return self._order(options, action, worker_id, value)

    def _rollback(self, options: dict[str, Any]) -> int:
        return self._order(options, "rollback")

    def _override(self, options: dict[str, Any]) -> int:
        action = "role" if options["role"] else "model"
        return self._order(options, action, options["worker"], options["role"] or options["model"])

    def _shadow(self, options: dict[str, Any]) -> int:
        return self._order(options, "shadow" if options["switch"] == "on" else "auto")

    def _order(
        self, options: dict[str, Any], action: str, worker_id: str = "", value: str = ""
    ) -> int:
        """Place it, and wait for what came of it."""
        order = plans.place(action, options["by"] or getpass.getuser(), worker_id, value)
        until_s = time.monotonic() + WAIT_S
        while order.state in ("queued", "taken") and time.monotonic() < until_s:
            time.sleep(POLL_S)
            order.refresh_from_db()
        if order.state == "queued":
            plans.withdraw(order)
            order.refresh_from_db()
        if options["json"]:
            self.stdout.write(json.dumps(_shown(order)))
        else:
            self.stdout.write(f"{order.state}: {order.answer}")
        if order.state == "done":
            return 0
        is_late = order.state == "taken" or order.answer == plans.NO_SERVER
        return EXIT_LATE if is_late else EXIT_REFUSED


def _shown(order: PlanOrder) -> dict[str, Any]:
    return {
        "action": order.action,
        "worker_id": order.worker_id,
        "value": order.value,
        "by": order.by,
        "state": order.state,
        "answer": order.answer,
    }
