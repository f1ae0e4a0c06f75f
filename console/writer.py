"""The one thread of the serving process that writes to the database.

Facts are gathered and committed together every 50 ms, so that the request path never waits for a
commit. Who must know that a write is durable uses `call` or `flush`, which return after the commit.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction

from console.capacitybins import add_harvest
from console.facts import CostFact, GpuFact, HarvestFact, PlanFact, RequestFact
from console.models import CostMinute, GpuMinute, PlanRecord, RequestRecord, Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")

PERIOD_S = 0.05
FACTS_MAX = 16_384  # facts waiting for a commit; beyond it the oldest is dropped and counted
CALLS_MAX = 1_024  # waited writes in hand; beyond it `call` raises, its callers are bounded
RETRY_S = 0.5  # pause after the database failed


@dataclass(frozen=True, slots=True)
class WorkerFact:
    """A worker joined, changed or left; the row of its name is updated."""

    name: str
    worker_id: str
    role: str
    engine: str
    device: str
    status: str
    at: datetime


Fact = RequestFact | PlanFact | WorkerFact | CostFact | GpuFact | HarvestFact
_ROWS: dict[type[Any], type[Any]] = {
    RequestFact: RequestRecord,
    PlanFact: PlanRecord,
    CostFact: CostMinute,
    GpuFact: GpuMinute,
}
# A commit whose answer was lost is repeated, so a row may be there: writing a part of its key again
# changes nothing. (SQLite's way of ignoring conflicts would also ignore broken rows.)
_CONFLICTS: dict[type[Any], dict[str, Any]] = {
    RequestRecord: {
        "update_conflicts": True,
        "unique_fields": ["request_id"],
        "update_fields": ["request_id"],
    },
    PlanRecord: {},
    CostMinute: {
        "update_conflicts": True,
        "unique_fields": ["minute", "run", "tenant_id", "model_id", "class_name"],
        "update_fields": ["run"],
    },
    GpuMinute: {
        "update_conflicts": True,
        "unique_fields": ["minute", "run", "model_id"],
        "update_fields": ["run"],
    },
}


@dataclass(slots=True)
class _Call:
    function: Callable[[], Any]
    done: "Future[Any]"


class FactWriter:
    """Bounded ring of facts and a thread with a persistent connection that commits them."""

    def __init__(self, period_s: float = PERIOD_S, facts_max: int = FACTS_MAX) -> None:
        self.num_dropped = 0  # facts lost because the ring was full
        self.num_refused = 0  # facts that the database refused, each logged
        self.num_written = 0
        self._period_s = period_s
        self._facts_max = facts_max
        self._facts: deque[Fact] = deque()
        self._calls: deque[_Call] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Commit what is there and end the thread; facts stay lost if the database is away."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def put(self, fact: Fact) -> None:
        """Hand over a fact; never blocks and never fails. Any thread may call it."""
        with self._wake:
            if len(self._facts) >= self._facts_max:
                self._facts.popleft()
                self.num_dropped += 1
            self._facts.append(fact)

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function(*args)` in the writer's transaction; returns after the commit.

        Raises what the function raised, or DatabaseError when the commit failed."""
        done: Future[T] = Future()
        with self._wake:
            if len(self._calls) >= CALLS_MAX:
                raise OperationalError(f"{CALLS_MAX} writes are waiting")
            if self._is_stopping:
                raise OperationalError("the writer has stopped")
            self._calls.append(_Call(lambda: function(*args), done))
            self._wake.notify()
        return await asyncio.wrap_future(done)

    async def flush(self) -> None:
        """Return when everything put before is committed."""
        await self.call(lambda: None)

    @property
    def num_waiting(self) -> int:
        """Facts not yet committed."""
        return len(self._facts)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    if not self._calls and not self._is_stopping:
                        self._wake.wait(self._period_s)
                    is_last = self._is_stopping
                    facts = list(self._facts)
                    calls = list(self._calls)
                    self._facts.clear()
                    self._calls.clear()
                if facts or calls:
                    self._commit(facts, calls)
                if is_last:
                    return
        finally:
            connections.close_all()

    def _commit(self, facts: list[Fact], calls: list[_Call]) -> None:
        """One transaction for all; a failed call spoils neither the others nor the facts."""
        outcomes: list[tuple[_Call, Any, BaseException | None]] = []
        try:
            with transaction.atomic():
                num_refused = self._write(facts)
                for call in calls:
                    if call.done.set_running_or_notify_cancel():  # else nobody waits any more
                        outcomes.append((call, *_outcome(call.function)))
        except DatabaseError as error:
            self._put_back(facts)
            for call in calls:
                if not call.done.cancelled():
                    call.done.set_exception(error)
            logger.error("commit failed facts=%d calls=%d: %s", len(facts), len(calls), error)
            connections.close_all()  # the next commit connects anew
            if not self._is_stopping:
                time.sleep(RETRY_S)
            return
        self.num_refused += num_refused
        self.num_written += len(facts) - num_refused
        for call, result, failure in outcomes:
            if failure is None:
                call.done.set_result(result)
            else:
                call.done.set_exception(failure)

    def _put_back(self, facts: list[Fact]) -> None:
        with self._wake:
            self._facts.extendleft(reversed(facts))
            while len(self._facts) > self._facts_max:
                self._facts.popleft()
                self.num_dropped += 1

    def _write(self, facts: list[Fact]) -> int:
        """Insert the facts; gives how many the database refused. Raises when it is away."""
        num_refused = 0
        for fact_type, row_type in _ROWS.items():
            rows = [_row(row_type, fact) for fact in facts if type(fact) is fact_type]
            if rows:
                num_refused += _insert(row_type, rows)
        for fact in facts:
            if isinstance(fact, WorkerFact):
                _remember_worker(fact)
            elif isinstance(fact, HarvestFact):
                add_harvest(fact)
        return num_refused


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What the call gives or raises; its own writes are undone when it raises."""
    try:
        with transaction.atomic():
            return function(), None
    except (OperationalError, InterfaceError):
        raise  # the connection, not the call, has failed
    except Exception as error:
        return None, error


def _row(row_type: type[Any], fact: Fact) -> Any:
    return row_type(**{field.name: getattr(fact, field.name) for field in fields(fact)})


def _insert(row_type: type[Any], rows: list[Any]) -> int:
    """Insert together, or one by one when a row is refused; a row that is there stays as it is."""
    try:
        with transaction.atomic():
            row_type.objects.bulk_create(rows, batch_size=500, **_CONFLICTS[row_type])
    except (OperationalError, InterfaceError):
        raise
    except DatabaseError:
        return sum(not _insert_one(row_type, row) for row in rows)
    return 0


def _insert_one(row_type: type[Any], row: Any) -> bool:
    """False, with a line in the log, when the database refuses this row."""
    try:
        with transaction.atomic():
            row_type.objects.bulk_create([row], **_CONFLICTS[row_type])
    except (OperationalError, InterfaceError):
        raise
    except DatabaseError as error:
        logger.error("fact refused %s=%s: %s", row_type.__name__, row, error)
        return False
    return True


def _remember_worker(fact: WorkerFact) -> None:
    values = {
        "worker_id": fact.worker_id,
        "role": fact.role,
        "engine": fact.engine,
        "device": fact.device,
        "status": fact.status,
        "heard_at": fact.at,
    }
    Worker.objects.update_or_create(
        name=fact.name, defaults=values, create_defaults={**values, "joined_at": fact.at}
    )
