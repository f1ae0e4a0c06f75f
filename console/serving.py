"""One run of the server on its event loop: start, control loop, drain, end.

Built by `manage.py serve`. The control loop ticks the fleet every 100 ms and starts again after an
error. The first SIGINT or SIGTERM drains: `/readyz` turns 503, new requests are refused, running
ones end within `drain_s`; the second signal ends the process at once.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from django.db import DatabaseError

from console import asgi, keys, policies
from console.alerting import AlertDesk
from console.daphneserver import BoundedServer, event_loop
from console.plans import OrderDesk
from console.snapshot import Snapshot
from console.state import ServerState
from controlplane import domain, kappas
from controlplane.errors import SlackwaterError
from controlplane.protocol import Policy

logger = logging.getLogger(__name__)

TICK_S = 0.1
USED_S = 60.0  # how often the last use of keys is stored
RESTART_S_MIN, RESTART_S_MAX = 0.1, 5.0  # pause before the control loop runs again after an error
WORKERS_GRACE_S = 5.0
FLUSH_S_MAX = 5.0
EXIT_FORCED = 130
# Objects of a running server die by reference count; cycles are few. Python's 700, 10, 10 looked
# through all of them for 8 % of the time of a loaded gateway.
GC_THRESHOLDS = (20_000, 20, 20)


def say(line: str) -> None:
    """One line for whoever started the server."""
    print(line, flush=True)


class Serving:
    """Owns the lifetime of the parts in `state`; every coroutine runs on the server's loop."""

    def __init__(
        self,
        state: ServerState,
        drain_s: float,
        started: Callable[[], Awaitable[None]],
    ) -> None:
        """`started` runs once when the server listens: it starts workers and says where we are."""
        self.state = state
        self.drain_s = drain_s
        self.started = started
        self.loop = event_loop()
        self.server: BoundedServer | None = None
        self.is_failed = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._drain: asyncio.Task[None] | None = None
        self._kappas = kappas.load()
        self._policy: Policy | None = None
        self._policy_from: Snapshot | None = None
        self._used_due_at_s = 0.0
        self._classes: tuple[domain.SLOClass, ...] = ()

    def run(self, host: str, port: int) -> str:
        """Serve until drained; the reason when the server could not listen, else empty."""
        self.server = BoundedServer(asgi.application, host, port, self._listening)
        self.server.run()
        return self.server.listen_error_message or ""

    def _listening(self) -> None:
        gc.collect()
        gc.freeze()  # what is loaded by now stays; looking through it costs tens of milliseconds
        gc.set_threshold(*GC_THRESHOLDS)
        assert self.server is not None
        self.state.port = self.server.listening_addresses[0][1]
        self._tasks = [
            self.loop.create_task(self._supervise()),
            self.loop.create_task(self.state.batches.run()),
            self.loop.create_task(self._start()),
            self.loop.create_task(OrderDesk(self.state.fleet, self.state.writer).run()),
            self.loop.create_task(
                AlertDesk(self.state.fleet, self.state.snapshot, self.state.writer).run()
            ),
        ]
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.begin_drain)

    async def _start(self) -> None:
        """A start that fails half-way ends the server, with one line when its cause is known."""
        try:
            await self.started()
        except Exception as error:
            if not isinstance(error, SlackwaterError | OSError):
                logger.exception("start failed")
            say(f"could not start: {error}")
            self.is_failed = True
            self.begin_drain()

    # --- control loop -------------------------------------------------------------------------

    async def _supervise(self) -> None:
        pause_s = RESTART_S_MIN
        while True:
            started_at_s = self.loop.time()
            try:
                await self._control()
            except Exception:
                # A bug in one tick must not end the service; it is logged, counted and retried.
                logger.exception("control loop failed, restart in %.1f s", pause_s)
                self.state.metrics.loop_restarts.inc()
            if self.loop.time() - started_at_s > RESTART_S_MAX:
                pause_s = RESTART_S_MIN
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_S_MAX)

    async def _control(self) -> None:
        state, due_at_s = self.state, self.loop.time()
        while True:
            due_at_s += TICK_S
            await asyncio.sleep(due_at_s - self.loop.time())
            lag_s = max(0.0, self.loop.time() - due_at_s)
            state.metrics.loop_lag_seconds.observe(lag_s)
            state.lag_s = lag_s
            if lag_s > TICK_S:
                due_at_s = self.loop.time()  # skip what was missed
            self._renew_policy()
            state.fleet.tick()
            state.note_tick()
            if due_at_s >= self._used_due_at_s:
                self._used_due_at_s = due_at_s + USED_S
                await self._store_used()

    async def _store_used(self) -> None:
        """When keys were used last; a database that is away loses a minute of it."""
        used = self.state.running.take_used()
        if used:
            try:
                await self.state.writer.call(keys.store_used, used)
            except DatabaseError as error:
                logger.error("use of %d keys not stored: %s", len(used), error)

    def _renew_policy(self) -> None:
        """Tell plane and workers when the SLO classes have changed."""
        snapshot = self.state.snapshot.current
        if snapshot is self._policy_from:
            return
        self._policy_from = snapshot
        classes = tuple(facts.slo for facts in snapshot.classes.values())
        if classes != self._classes:
            self._classes = classes
            self.state.fleet.handle(domain.ClassesSet(classes))
        policy = policies.policy_for(snapshot, self._kappas)
        if policy != self._policy:
            self._policy = policy
            self.state.fleet.handle(domain.PolicyChanged(policy))

    # --- end ----------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """The first call drains, the second ends the process."""
        if self._drain is None:
            self._drain = self.loop.create_task(self.drain())
            self._drain.add_done_callback(self._drained)
        else:
            say("forced: ending at once")
            self.state.workers.kill()
            os._exit(EXIT_FORCED)

    async def drain(self) -> None:
        """Let running requests end, then stop everything in order."""
        state = self.state
        state.draining = True
        state.fleet.handle(domain.ServerDraining())
        supervisor, batches, _, *desks = self._tasks
        for desk in desks:
            desk.cancel()
        batches.cancel()
        await asgi.close_page_sockets(state)
        await asyncio.wait({batches}, timeout=FLUSH_S_MAX)  # its lines are pending again
        await self._requests_end()
        await state.workers.stop(WORKERS_GRACE_S)
        state.fleet.close_links()
        state.tokenizers.grammars.close()
        if state.side_work is not None:
            await asyncio.to_thread(state.side_work.stop)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        state.close_costs()
        try:
            await asyncio.wait_for(state.writer.flush(), FLUSH_S_MAX)
        except (TimeoutError, DatabaseError) as error:
            say(f"the last facts were not stored: {error!r}")

    def _drained(self, task: asyncio.Task[None]) -> None:
        """The server ends, also after a bug in the drain itself."""
        if task.exception() is not None:
            logger.error("drain failed", exc_info=task.exception())
            self.is_failed = True
        say("stopped")
        assert self.server is not None
        self.server.stop()

    async def _requests_end(self) -> None:
        if not self.state.v1_requests:
            say("draining: no request is running")
        ends_at_s = self.loop.time() + self.drain_s
        said_s = -1
        while self.state.v1_requests and (left_s := ends_at_s - self.loop.time()) > 0:
            if int(left_s) != said_s:
                said_s = int(left_s)
                say(f"draining: {self.state.v1_requests} requests running, {said_s + 1} s left")
            await asyncio.sleep(0.05)
        if self.state.v1_requests:
            say(f"draining: {self.state.v1_requests} requests did not end in time and are cut")
