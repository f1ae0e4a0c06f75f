"""What the serving process holds, for views and pages that run in other threads.

`serve` sets `current` once, before it listens. A view reads immutable snapshots from it and acts
through `ServerState.call`, which runs a coroutine on the server's loop. Everywhere else (tests of
pages, other commands) `get()` is None and pages show their empty states.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from console.batches import BatchFeeder
from console.contracts import ContractFeed
from console.costbook import CostBook
from console.fleet import Fleet
from console.gateway import Gateway
from console.hostload import HostMeter
from console.live import LiveStats
from console.metrics import Metrics
from console.running import RunningRequests
from console.sidework import SideWork
from console.snapshot import SnapshotKeeper
from console.tokens import Tokenizers
from console.workerprocs import WorkerProcs
from console.writer import FACTS_MAX, FactWriter
from controlplane import domain

T = TypeVar("T")
logger = logging.getLogger(__name__)
HOST_TICKS = 3  # turns between two looks at how full this machine is
COST_TICKS = 10  # control loop turns between two looks at what workers have spent: a second


@dataclass
class ServerState:
    """The parts of one `serve` process; only the server's loop changes them."""

    loop: asyncio.AbstractEventLoop
    fleet: Fleet
    gateway: Gateway
    live: LiveStats
    metrics: Metrics
    snapshot: SnapshotKeeper
    writer: FactWriter
    tokenizers: Tokenizers
    batches: BatchFeeder
    workers: WorkerProcs  # the processes that this server started
    port: int
    profile: str  # local or public
    started_at_s: float  # on the fleet's clock
    costs: CostBook | None = None
    host: HostMeter | None = None
    side_work: SideWork | None = None  # None where Celery runs elsewhere
    lag_s: float = 0.0  # of the control loop's last turn
    contracts: ContractFeed = field(default_factory=ContractFeed)
    running: RunningRequests = field(default_factory=RunningRequests)
    draining: bool = False
    tick_at_s: float | None = None  # last turn of the control loop, on the fleet's clock
    database_failed_at_s: float | None = None  # when the snapshot was last not renewed
    num_database_failures: int = 0
    v1_requests: int = 0  # in flight, until their last byte is handed to the transport
    page_sockets: set[Callable[[Any], Awaitable[None]]] = field(default_factory=set)

    def note_tick(self) -> None:
        """The control loop has turned: contracts that changed are in force; what `/readyz` is told
        of the loop and of the database."""
        if event := self.contracts.next(self.snapshot.current, datetime.now(UTC)):
            self.fleet.handle(event)
        self._count_costs()
        self._tell_host_load()
        if num_ended := self.running.check(self.snapshot.current):
            logger.info("ended %d requests of keys that are switched off", num_ended)
        self.tick_at_s = self.fleet.now_s()
        if self.snapshot.num_failures > self.num_database_failures:
            self.num_database_failures = self.snapshot.num_failures
            self.database_failed_at_s = self.tick_at_s

    def _count_costs(self) -> None:
        if self.costs is None or self.fleet.num_ticks % COST_TICKS:
            return
        workers = self.fleet.gpu_seconds()
        self.metrics.set_gpu(workers)
        if self.costs.tick(datetime.now(UTC), workers):
            self.metrics.set_costs(self.costs.last_hour())

    def _tell_host_load(self) -> None:
        if self.host is None:
            return
        self.host.observe_lag(self.lag_s)
        if self.fleet.num_ticks % HOST_TICKS == 0:
            signals = self.host.signals(self.writer.num_waiting, FACTS_MAX)
            self.fleet.handle(domain.HostLoad(signals))
            self.metrics.set_overload(self.fleet.overload())

    def close_costs(self) -> None:
        """The server ends in the middle of a minute."""
        if self.costs is not None:
            self.costs.close(datetime.now(UTC), self.fleet.gpu_seconds())

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, timeout_s: float = 5.0) -> T:
        """Run `function(*args)` on the server's loop from another thread and give its result."""

        async def run() -> T:
            return await function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)


current: ServerState | None = None


def get() -> ServerState | None:
    """The state of this process when it is `serve`, else None."""
    return current
