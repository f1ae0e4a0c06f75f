"""Batches from their file: kept, checked apart, promised, and their lines stored.

A batch is made with status `validating` and filled afterwards: at once by a command, by a task for
`POST /v1/batches`. Filling is safe to repeat: a repetition first removes what an earlier one left.
"""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from console.batchcheck import (
    CPU_S_MAX,
    FILE_BYTES_MAX,
    Invalid,
    LineError,
    Summary,
    prefix_key,
    valid_lines,
)
from console.batchresults import stored_path, write_whole
from console.models import Batch, BatchLine, File, Tenant
from console.models.files import BATCH_ENDED
from console.quotes import SLACK_MAX, Quote, Work, work_of
from console.quotes import quote as quote_work
from controlplane.certificate import Admitted, Refused

OPEN_BATCHES_MAX = 64  # of one tenant; together they bound the rows that wait
INSERT_ROWS = 500
CHECK_S_MAX = 2.0 * CPU_S_MAX  # wall time of a check on a busy machine
WINDOW_MIN, WINDOW_MAX = timedelta(minutes=1), timedelta(days=7)
_WINDOW = re.compile(r"^([1-9][0-9]{0,5})([smhd])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A valid file whose window cannot be promised."""

    quote: Quote

    def __str__(self) -> str:
        refused = self.quote.outcome
        assert isinstance(refused, Refused), refused
        why = (
            f"needs {refused.need_s:.0f} GPU-seconds by then, batches before it included;"
            f" {refused.low_s:.0f} are certain"
        )
        if refused.earliest_s is None:
            return f"{why}; no deadline within 7 days is possible"
        return f"{why}; the earliest possible deadline is {in_words(refused.earliest_s)} from now"


def window_of(text: str) -> timedelta | None:
    """`90m`, `4h`, `7d`: between a minute and 7 days, else None."""
    match = _WINDOW.match(text)
    if match is None:
        return None
    window = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return window if WINDOW_MIN <= window <= WINDOW_MAX else None


def in_words(seconds: float) -> str:
    """`45m`, `3h20m`, `2d4h`: as `window_of` could have been given, rounded up to minutes."""
    minutes = -int(-seconds // 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "m")]
    return "".join(f"{n}{unit}" for n, unit in parts if n) or "0m"


def submit(
    tenant: Tenant, path: Path, window: str, now: datetime, model_ids: Iterable[str]
) -> Batch | Invalid | Infeasible:
    """Keep a copy of a file on this machine, make its batch and fill it; what is not accepted
    leaves nothing behind. While nothing has been measured a batch is taken without a promise."""
    if (error := too_many(tenant)) is not None:
        return Invalid((error,))
    file = _keep_copy(tenant, path, now)
    if isinstance(file, LineError):
        return Invalid((file,))
    batch = create(tenant, file, "", window, now)
    outcome = fill(batch, now, model_ids)
    if not isinstance(outcome, Batch):
        batch.delete()
        file.forget()
    return outcome


def too_many(tenant: Tenant) -> LineError | None:
    if tenant.batches.exclude(status__in=BATCH_ENDED).count() < OPEN_BATCHES_MAX:
        return None
    message = f"{tenant.slug} has {OPEN_BATCHES_MAX} open batches already"
    return LineError("too_many_batches", message)


def _keep_copy(tenant: Tenant, path: Path, now: datetime) -> File | LineError:
    stored = stored_path(tenant.slug, f"file-{secrets.token_hex(12)}")
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return LineError("file_too_large", f"more than {FILE_BYTES_MAX} bytes")
        with path.open("rb") as source:
            num_bytes = write_whole(stored, iter(lambda: source.read(1 << 20), b""))
    except OSError as error:
        return LineError("file_unreadable", f"{path}: {error.strerror}")
    return File.objects.create(
        file_id=stored.stem,
        tenant=tenant,
        filename=path.name[:255],
        purpose="batch",
        path=str(stored),
        num_bytes=num_bytes,
        created_at=now,
    )


def create(
    tenant: Tenant,
    file: File,
    endpoint: str,
    window: str,
    now: datetime,
    metadata: dict[str, str] | None = None,
    output_kept: timedelta | None = None,
) -> Batch:
    """A batch whose lines are yet to be read; an empty endpoint takes that of the first line."""
    length = window_of(window)
    assert length is not None, window
    return Batch.objects.create(
        batch_id=f"batch_{secrets.token_hex(12)}",
        tenant=tenant,
        input_file=file,
        endpoint=endpoint,
        model_id="",
        completion_window=window,
        status="validating",
        num_lines=0,
        metadata=metadata or {},
        output_kept=output_kept,
        created_at=now,
        expires_at=now + length,
    )


def fill(batch: Batch, now: datetime, model_ids: Iterable[str]) -> Batch | Invalid | Infeasible:
    """Check the file, store its lines, promise the window, and start. `now` is the time of the
    promise. The caller ends a batch that is not accepted (see `refuse`)."""
    assert batch.status == "validating" and batch.input_file is not None, batch
    path, known = Path(batch.input_file.path), frozenset(model_ids)
    summary = check_apart(path, known)
    if isinstance(summary, Summary) and batch.endpoint not in ("", summary.url):
        message = f"the lines' url is {summary.url}, the batch's endpoint {batch.endpoint}"
        summary = Invalid((LineError("mismatched_url", message, 1),))
    if isinstance(summary, Invalid):
        return summary
    _store_lines(batch, path, known)
    with transaction.atomic():  # one at a time: two files may not be promised the same capacity
        work = work_of(summary.sizes, summary.model_id)
        left_s = (batch.expires_at - now).total_seconds()
        quoted = quote_work(summary.model_id, work, left_s, now)
        if quoted is not None and isinstance(quoted.outcome, Refused):
            batch.lines.all().delete()
            return Infeasible(quoted)
        started = Batch.move(
            batch.pk,
            ("validating",),
            "in_progress",
            endpoint=summary.url,
            model_id=summary.model_id,
            num_lines=summary.num_lines,
            in_progress_at=now,
            **_quoted(work, quoted, now),
        )
    if not started:  # cancelled meanwhile
        batch.lines.all().delete()
    batch.refresh_from_db()
    return batch


def refuse(batch: Batch, outcome: Invalid | Infeasible, now: datetime) -> None:
    """End a batch that was not accepted, with the mistakes of its file."""
    if isinstance(outcome, Infeasible):
        errors = [LineError("window_infeasible", f"{batch.completion_window}: it {outcome}")]
    else:
        errors = list(outcome.errors)
    rows = [asdict(error) for error in errors]
    Batch.move(batch.pk, ("validating",), "failed", errors=rows, ended_at=now)


def _store_lines(batch: Batch, path: Path, known: frozenset[str]) -> None:
    """In pieces, so that nobody who writes waits for all of them."""
    batch.lines.all().delete()
    rows = (
        BatchLine(
            batch=batch,
            line_index=index,
            custom_id=line.custom_id,
            model_id=line.model_id,
            body=line.body,
            prefix_key=prefix_key(line.body),
        )
        for index, line in enumerate(valid_lines(path, known))
    )
    while part := list(islice(rows, INSERT_ROWS)):
        BatchLine.objects.bulk_create(part)


def check_apart(path: Path, model_ids: Iterable[str]) -> Summary | Invalid:
    """`batchcheck.validate` in a process with limits: a hostile file costs that process only."""
    if not path.is_file():
        return Invalid((LineError("file_unreadable", f"{path.name} is not there"),))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "console.batchcheck", str(path)],
            cwd=settings.BASE_DIR,
            input=json.dumps(sorted(model_ids)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=CHECK_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Invalid((LineError("file_too_complex", "checking it took too long"),))
    if done.returncode != 0:
        return Invalid((LineError("file_too_complex", "checking it took too much memory or time"),))
    found = json.loads(done.stdout)
    if "errors" in found:
        return Invalid(tuple(LineError(**error) for error in found["errors"]))
    sizes = tuple((size, limit) for size, limit in found.pop("sizes"))
    return Summary(**found, sizes=sizes)


def quote_file(
    path: Path, window: str, now: datetime, model_ids: Iterable[str]
) -> Quote | Invalid | None:
    """What `submit` would promise; nothing is kept. None while nothing has been measured."""
    length = window_of(window)
    assert length is not None, window
    summary = check_apart(path, model_ids)
    if isinstance(summary, Invalid):
        return summary
    work = work_of(summary.sizes, summary.model_id)
    return quote_work(summary.model_id, work, length.total_seconds(), now)


def _quoted(work: Work, quoted: Quote | None, now: datetime) -> dict[str, Any]:
    """The columns of a new batch's quote."""
    values: dict[str, Any] = {
        "line_tokens": work.line_tokens,
        "line_tokens_max": work.line_tokens_max,
    }
    if quoted is not None and isinstance(quoted.outcome, Admitted):
        slack = min(quoted.outcome.slack, SLACK_MAX)
        values |= {
            "expected_s": quoted.finish.expected_s,
            "finish_from": now + timedelta(seconds=quoted.finish.from_s),
            "finish_by": now + timedelta(seconds=quoted.finish.by_s),
            "eta": now + timedelta(seconds=quoted.finish.expected_s),
            "quoted_slack": slack,
            "slack": slack,
        }
    return values
