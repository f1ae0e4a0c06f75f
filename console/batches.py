"""The batch lane of a serving process: runs the lines of open batches in what others leave.

A line is claimed by a conditional update in the name of this run of the process, executed by the
same code as an HTTP request, and ended by a second conditional update that is waited for. After a
crash the claims of the dead run are released, so a line is repeated only if its result was not
stored: every custom_id ends exactly once.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Protocol

from channels.db import database_sync_to_async
from django.db import DatabaseError
from django.utils import timezone

from console import batchclaims, batchlines, batchresults, quotes
from console.apierrors import ApiError
from console.batchclaims import ATTEMPTS_MAX, LEASE, ClaimedLine
from console.batchlines import Answer, NotNow
from console.gateway import Gateway
from console.incarnation import new_incarnation
from console.models import BatchLine
from console.snapshot import SnapshotKeeper
from console.tokens import Tokenizers
from console.writer import FactWriter
from controlplane.backfill import Allotment, OpenBatch

logger = logging.getLogger(__name__)

LINES_MAX = 2_048  # lines in flight, whatever the plane would take
POLL_S = 1.0  # how soon a batch that another process submitted is noticed
ROUND_S_MIN = 0.25  # between rounds, however many lines end; see controlplane.backfill.REFILL_S
RENEW_S = LEASE.total_seconds() / 3
ASSESS_S = 60.0  # between two tests of all promises
PAUSE_S_MIN = 0.5  # a model that cannot take lines now is asked again after this, then twice it
PAUSE_S_MAX = 10.0
WRITE_RETRY_S = 0.5


class PlaneFleet(Protocol):
    """What the feeder asks of the fleet; `console.fleet.Fleet`."""

    def lines_wanted(self, batches: Sequence[OpenBatch]) -> list[Allotment]:
        """Which lines the plane wants now."""

    def assessed(self, model_id: str, slack: float) -> int:
        """The least slack of a model's promises; gives how far batch goes for them."""


class BatchFeeder:
    """Submits the lines that the plane wants, at most `lines_max` at once; keeps nothing else."""

    def __init__(
        self,
        gateway: Gateway,
        fleet: PlaneFleet,
        writer: FactWriter,
        snapshot: SnapshotKeeper,
        tokenizers: Tokenizers,
        lines_max: int = LINES_MAX,
        poll_s: float = POLL_S,
    ) -> None:
        self.incarnation = new_incarnation()
        self.num_failed_runs = 0  # lines whose run ended in a bug of ours
        self._gateway = gateway
        self._fleet = fleet
        self._writer = writer
        self._snapshot = snapshot
        self._tokenizers = tokenizers
        self._lines_max = lines_max
        self._poll_s = poll_s
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by line, at most lines_max
        self._lines: dict[int, ClaimedLine] = {}
        self._pause_s: dict[str, float] = {}  # by model; bounded by the models of open batches
        self._paused_until_s: dict[str, float] = {}
        self._renew_at_s = 0.0
        self._assess_at_s = 0.0
        self._escalated: set[str] = set()  # models whose batches go beyond harvest
        self._wake = asyncio.Event()
        self._cancelling: frozenset[int] = frozenset()
        self._is_held = False

    @property
    def num_in_flight(self) -> int:
        """Lines that run or wait in the gateway now."""
        return len(self._tasks)

    def wake(self) -> None:
        """Look for work at once; for callers on the loop that have just submitted a batch."""
        self._wake.set()

    def hold(self) -> None:
        """Take no further line until `release`; what is in flight goes on."""
        self._is_held = True

    def release(self) -> None:
        """Take lines again."""
        self._is_held = False
        self.wake()

    async def run(self) -> None:
        """Feed until cancelled; then give unfinished lines back."""
        try:
            while True:
                self._wake.clear()
                try:
                    await self._round()
                except DatabaseError as error:
                    logger.error("batch round failed: %s", error)
                await asyncio.sleep(min(ROUND_S_MIN, self._poll_s))
                # Not wait_for, which on Python 3.11 swallows a cancellation that meets the wake-up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._wake.wait()
        finally:
            await self._give_back()

    async def _round(self) -> None:
        now, now_s = timezone.now(), time.monotonic()
        if now_s >= self._renew_at_s:
            await self._writer.call(batchclaims.renew, self.incarnation, now)
            released = await self._writer.call(batchclaims.release_dead, self.incarnation, now)
            if released:
                logger.info("released lines=%d of ended runs", released)
            self._renew_at_s = now_s + RENEW_S
        if now_s >= self._assess_at_s:
            self._assess_at_s = now_s + ASSESS_S
            await self._assess(now)
        in_flight = Counter(line.batch_pk for line in self._lines.values())
        found = await self._writer.call(batchclaims.look, in_flight, self._lines_max, now)
        for line in await self._claim(found.open, now, now_s):
            self._lines[line.line_pk] = line
            self._tasks[line.line_pk] = asyncio.create_task(self._run_line(line))
        self._cancelling = found.cancelling
        for line in list(self._lines.values()):
            if line.batch_pk in found.cancelling:
                self._tasks[line.line_pk].cancel()
        for batch_pk in found.ended:
            await self._assemble(batch_pk)

    async def _assess(self, now: datetime) -> None:
        """Test all promises; a model without any has all the slack."""
        least = await self._writer.call(quotes.assess, now)
        for model_id in sorted({*least, *self._escalated}):
            level = self._fleet.assessed(model_id, least.get(model_id, math.inf))
            await self._writer.call(quotes.store_level, model_id, level)
            self._escalated.discard(model_id)
            if level:
                self._escalated.add(model_id)

    async def _claim(
        self, batches: Sequence[OpenBatch], now: datetime, now_s: float
    ) -> Sequence[ClaimedLine]:
        """What the plane wants of them; a model that has just refused a line is left alone."""
        room = 0 if self._is_held else self._lines_max - len(self._lines)
        able = [b for b in batches if self._paused_until_s.get(b.model_id, 0.0) <= now_s]
        if room <= 0 or not able:
            return ()
        allotments = []
        for wanted in self._fleet.lines_wanted(able):
            lines = min(wanted.lines, room)
            room -= lines
            if lines:
                allotments.append(Allotment(wanted.batch_id, lines))
        if not allotments:
            return ()
        return await self._writer.call(batchclaims.claim, allotments, self.incarnation, now)

    async def _assemble(self, batch_pk: int) -> None:
        """Write the files of an ended batch in a thread; what fails is tried in the next round."""
        try:
            ended = await database_sync_to_async(batchresults.assemble)(batch_pk, timezone.now())
        except (OSError, DatabaseError) as error:
            logger.error("batch not assembled batch=%d: %s", batch_pk, error)
            return
        if ended is not None:
            logger.info("batch ended batch=%s status=%s", ended.batch_id, ended.status)

    async def _run_line(self, line: ClaimedLine) -> None:
        try:
            try:
                answer = await self._answer(line)
            except asyncio.CancelledError:
                if line.batch_pk not in self._cancelling:
                    raise  # the server stops: _give_back releases the line
                answer = Answer("cancelled", "", None, None)
            except Exception:
                # A bug in one line's path must stop neither the lane nor the other lines.
                logger.exception("line failed batch=%s line=%d", line.batch_id, line.line_pk)
                self.num_failed_runs += 1
                answer = self._after_bug(line)
            await self._settle(line, answer)
        finally:
            self._tasks.pop(line.line_pk, None)
            self._lines.pop(line.line_pk, None)
            self._wake.set()

    def _after_bug(self, line: ClaimedLine) -> Answer | NotNow:
        if line.attempts < ATTEMPTS_MAX:
            return NotNow("internal_error")
        message = f"The server failed {ATTEMPTS_MAX} times on this line."
        return Answer("failed", "", None, {"code": "internal_error", "message": message})

    async def _settle(self, line: ClaimedLine, answer: Answer | NotNow) -> None:
        """Store the outcome, however long the database is away; the lease goes on meanwhile."""
        if isinstance(answer, NotNow):
            self._pause(line.model_id)
            is_own_doing = answer.reason == "internal_error"
            attempts = line.attempts if is_own_doing else line.attempts - 1
            write = partial(batchclaims.release, line.line_pk, self.incarnation, attempts)
        else:
            self._pause_s.pop(line.model_id, None)
            write = partial(
                BatchLine.finish,
                line.line_pk,
                self.incarnation,
                answer.status,
                request_id=answer.request_id,
                response=answer.response,
                error=answer.error,
                cost_tokens=answer.cost_tokens,
                ended_at=timezone.now(),
            )
        while True:
            try:
                is_ours = await self._writer.call(write)
                break
            except DatabaseError as error:
                logger.error("line not stored line=%d: %s", line.line_pk, error)
                await asyncio.sleep(WRITE_RETRY_S)
        if not is_ours:
            logger.warning("line was taken over batch=%s line=%d", line.batch_id, line.line_pk)

    def _pause(self, model_id: str) -> None:
        pause_s = self._pause_s.get(model_id, PAUSE_S_MIN)
        self._pause_s[model_id] = min(2 * pause_s, PAUSE_S_MAX)
        self._paused_until_s[model_id] = time.monotonic() + pause_s

    async def _answer(self, line: ClaimedLine) -> Answer | NotNow:
        spec = await asyncio.to_thread(
            batchlines.spec_of_line, line, self._snapshot.current, self._tokenizers
        )
        if isinstance(spec, ApiError):
            return batchlines.of_error(spec)
        return batchlines.of_outcome(line, spec.shape, await self._gateway.collect(spec))

    async def _give_back(self) -> None:
        """Stop what runs and release it; a kill instead of a stop leaves this to the next run."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._writer.call(batchclaims.release_all, self.incarnation)
        except DatabaseError as error:
            logger.error("lines not released: %s", error)
