"""Batch jobs from the command line: quote, submit, status, fetch, pause, resume, cancel.

The command talks to the database; a running `serve` does the work. Exit codes: 0 ok, 1 failed or
a deadline that cannot be promised, 2 usage, 3 the window ended first.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from console import batchclaims, batchfiles, batchresults
from console.batchtexts import (
    NOTHING_MEASURED,
    promise,
    quote_words,
    quoted,
    shown,
    status_line,
)
from console.models import Batch, Model, Tenant
from console.models.files import BATCH_ENDED
from controlplane.certificate import Refused

EXIT_FAILED, EXIT_USAGE, EXIT_LATE = 1, 2, 3
EXIT_OF_STATUS = {"completed": 0, "expired": EXIT_LATE, "cancelled": EXIT_FAILED}
WATCH_S = 0.5
LISTED_MAX = 50  # batches that `status` lists


class Command(BaseCommand):
    help = "Quote, submit, watch, fetch, pause, resume and cancel batch jobs"

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        submit = actions.add_parser("submit", help="check a JSONL file and queue its lines")
        submit.add_argument("--tenant", default="demo")
        submit.add_argument("--wait", action="store_true", help="stay until the batch has ended")
        quote = actions.add_parser("quote", help="when a file would end, submitting nothing")
        for action in (submit, quote):
            action.add_argument("file", type=Path)
            action.add_argument(
                "--deadline",
                "--window",
                dest="window",
                default="24h",
                type=_window,
                help="from now: 90m, 4h, 7d (default 24h)",
            )
        status = actions.add_parser("status", help="one batch, or the latest ones")
        status.add_argument("id", nargs="?")
        fetch = actions.add_parser("fetch", help="copy the output of a batch")
        fetch.add_argument("id")
        fetch.add_argument("-o", "--output", type=Path, required=True)
        fetch.add_argument("--errors", type=Path, help="also copy the lines that failed")
        cancel = actions.add_parser("cancel", help="stop a batch; finished lines stay")
        cancel.add_argument("id")
        pause = actions.add_parser("pause", help="start no further line; the deadline stays")
        pause.add_argument("id")
        resume = actions.add_parser("resume", help="go on with a paused batch")
        resume.add_argument("id")
        for action in (submit, quote, status, fetch, cancel, pause, resume):
            action.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        act: Callable[[dict[str, Any]], int] = getattr(self, f"_{options['action']}")
        code = act(options)
        if code:
            sys.exit(code)

    def _submit(self, options: dict[str, Any]) -> int:
        tenant = Tenant.objects.filter(slug=options["tenant"], is_active=True).first()
        if tenant is None:
            raise CommandError(f"no active tenant {options['tenant']!r}", returncode=EXIT_USAGE)
        models = Model.objects.filter(is_active=True).values_list("model_id", flat=True)
        path, window = options["file"], options["window"]
        outcome = batchfiles.submit(tenant, path, window, timezone.now(), models)
        if isinstance(outcome, batchfiles.Invalid):
            return self._invalid(outcome, path, options["json"])
        if isinstance(outcome, batchfiles.Infeasible):
            return self._infeasible(outcome, path, options)
        if not options["wait"]:
            self._show(outcome, options["json"])
        elif not options["json"]:
            self.stdout.write(f"{outcome.batch_id}  {outcome.num_lines} lines")
        if not options["json"]:
            self.stdout.write(promise(outcome, timezone.now()))
        if not options["wait"]:
            return 0
        self._watch(outcome, is_quiet=options["json"])
        outcome.refresh_from_db()
        self._show(outcome, options["json"])
        return _exit_code(outcome)

    def _invalid(self, outcome: batchfiles.Invalid, path: Path, is_json: bool) -> int:
        if is_json:
            errors = [
                {"code": error.code, "message": error.message, "line": error.line}
                for error in outcome.errors
            ]
            self.stdout.write(json.dumps({"errors": errors}))
        for error in outcome.errors:
            self.stderr.write(f"{path.name}: {error}")
        return EXIT_USAGE

    def _infeasible(
        self, outcome: batchfiles.Infeasible, path: Path, options: dict[str, Any]
    ) -> int:
        """A deadline that cannot be promised; the file was not taken."""
        if options["json"]:
            self.stdout.write(json.dumps(quoted(outcome.quote)))
        window = options["window"]
        self.stderr.write(f"{path.name}: {window} cannot be promised: it {outcome}")
        return EXIT_FAILED

    def _quote(self, options: dict[str, Any]) -> int:
        models = Model.objects.filter(is_active=True).values_list("model_id", flat=True)
        path, window = options["file"], options["window"]
        now = timezone.now()
        outcome = batchfiles.quote_file(path, window, now, models)
        if isinstance(outcome, batchfiles.Invalid):
            return self._invalid(outcome, path, options["json"])
        if outcome is None:
            if options["json"]:
                self.stdout.write(json.dumps({"is_measured": False}))
            else:
                self.stdout.write(NOTHING_MEASURED)
            return 0
        if isinstance(outcome.outcome, Refused):
            return self._infeasible(batchfiles.Infeasible(outcome), path, options)
        if options["json"]:
            self.stdout.write(json.dumps(quoted(outcome)))
        else:
            ends, slack = outcome.finish, outcome.outcome.slack
            self.stdout.write(quote_words(ends.expected_s, ends.from_s, ends.by_s, slack))
        return 0

    def _status(self, options: dict[str, Any]) -> int:
        if options["id"]:
            batch = _find(options["id"])
            self._show(batch, options["json"])
            return _exit_code(batch) if batch.status in BATCH_ENDED else 0
        batches = Batch.objects.select_related("tenant", "output_file", "error_file")[:LISTED_MAX]
        if options["json"]:
            self.stdout.write(json.dumps([shown(batch) for batch in batches]))
        elif self._is_terminal():
            self._table(list(batches))
        else:
            for batch in batches:
                self.stdout.write(status_line(batch))
        return 0

    def _fetch(self, options: dict[str, Any]) -> int:
        batch = _find(options["id"])
        if batch.status not in BATCH_ENDED:
            raise CommandError(
                f"{batch.batch_id} is {batch.status}: wait until it has ended",
                returncode=EXIT_FAILED,
            )
        written: dict[str, str] = {}
        wanted = (("output", batch.output_file), ("errors", batch.error_file))
        for name, file in wanted:
            target = options[name]
            if target is None:
                continue
            _copy(Path(file.path) if file else None, target)
            written[name] = str(target)
        if options["json"]:
            self.stdout.write(json.dumps({**shown(batch), "written": written}))
        else:
            for name, target in written.items():
                self.stdout.write(f"{name} written to {target}")
        return _exit_code(batch)

    def _pause(self, options: dict[str, Any]) -> int:
        return self._change(options, batchclaims.pause, "paused or ended")

    def _resume(self, options: dict[str, Any]) -> int:
        return self._change(options, batchclaims.resume, "not paused")

    def _change(self, options: dict[str, Any], act: Callable[[str], bool], unless: str) -> int:
        batch = _find(options["id"])
        if not act(batch.batch_id):
            raise CommandError(f"{batch.batch_id} is {unless}", returncode=EXIT_FAILED)
        batch.refresh_from_db()
        self._show(batch, options["json"])
        return 0

    def _cancel(self, options: dict[str, Any]) -> int:
        batch = _find(options["id"])
        if not batchclaims.cancel(batch.batch_id, timezone.now()):
            batch.refresh_from_db()
            raise CommandError(
                f"{batch.batch_id} is {batch.status} already", returncode=EXIT_FAILED
            )
        batchresults.assemble(batch.pk, timezone.now())  # ends it when no line is in hand
        batch.refresh_from_db()
        self._show(batch, options["json"])
        return 0

    def _watch(self, batch: Batch, is_quiet: bool) -> None:
        """Stay until the batch has ended: a bar on a terminal, else a line whenever it moves."""
        is_terminal = self._is_terminal() and not is_quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        last = -1
        with Progress(*columns, TimeElapsedColumn(), disable=not is_terminal) as progress:
            bar = progress.add_task("lines", total=batch.num_lines)
            while True:
                batch.refresh_from_db(fields=["status"])
                counts = batch.counts()
                ended = batch.num_lines - counts["pending"] - counts["claimed"]
                progress.update(bar, completed=ended, description=batch.status)
                if not is_terminal and not is_quiet and ended != last:
                    self.stdout.write(status_line(batch))
                    self.stdout.flush()
                last = ended
                if batch.status in BATCH_ENDED:
                    return
                time.sleep(WATCH_S)

    def _show(self, batch: Batch, is_json: bool) -> None:
        if is_json:
            self.stdout.write(json.dumps(shown(batch)))
        elif self._is_terminal():
            self._table([batch])
        else:
            self.stdout.write(status_line(batch))

    def _table(self, batches: list[Batch]) -> None:
        table = Table()
        names = ("batch", "tenant", "model", "status", "done", "failed", "lines", "slack", "ETA")
        for name in (*names, "expires"):
            table.add_column(name, no_wrap=name in ("batch", "status"))
        for batch in batches:
            row = shown(batch)
            table.add_row(
                row["id"],
                row["tenant"],
                row["model"],
                "paused" if batch.is_paused else row["status"],
                str(row["completed"]),
                str(row["failed"]),
                str(row["total"]),
                "" if batch.slack is None else f"{batch.slack:.2f}",
                f"{batch.eta:%m-%d %H:%M}" if batch.eta else "",
                f"{batch.expires_at:%Y-%m-%d %H:%M} UTC",
            )
        Console(file=self.stdout._out).print(table)

    def _is_terminal(self) -> bool:
        return self.stdout.isatty()


def _window(text: str) -> str:
    """A `--deadline` that can be one."""
    if batchfiles.window_of(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 1m to 7d, such as 90m, 4h or 2d")
    return text


def _exit_code(batch: Batch) -> int:
    """0 only for a batch that ended in time with every line answered."""
    code = EXIT_OF_STATUS.get(batch.status, EXIT_FAILED)
    return EXIT_FAILED if code == 0 and batch.counts()["failed"] else code


def _find(batch_id: str) -> Batch:
    batch = (
        Batch.objects.select_related("tenant", "output_file", "error_file")
        .filter(batch_id=batch_id)
        .first()
    )
    if batch is None:
        raise CommandError(f"no batch {batch_id!r}", returncode=EXIT_USAGE)
    return batch


def _copy(source: Path | None, target: Path) -> None:
    """Whole or not at all; a batch without such lines gives an empty file."""
    partial = target.with_name(f".{target.name}.part")
    try:
        if source is None:
            partial.write_bytes(b"")
        else:
            shutil.copyfile(source, partial)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CommandError(f"{target}: {error.strerror}", returncode=EXIT_FAILED) from None
