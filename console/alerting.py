"""Watches the running system by rules: alerts open, and are resolved by themselves.

Every few seconds readings are taken from the control plane, on its loop, and judged in the
writer's thread, which owns the rows.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from django.db import DatabaseError
from django.utils import timezone

from console.fleet import Fleet
from console.models import Alert, AlertRule, Batch
from console.snapshot import SnapshotKeeper
from console.writer import FactWriter
from controlplane import domain
from controlplane.ledger import AccountView

PERIOD_S = 5.0
OPEN_MAX = 200  # alerts at one time; more of the same say nothing new
SHARE_MIN = 0.01  # of capacity over need: less is as late

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """One number about one subject, in the unit of its kind, and a sentence that has it."""

    kind: str
    subject: str
    value: float
    text: str


def of_accounts(accounts: Iterable[AccountView]) -> list[Reading]:
    """How fast error budgets burn, and how much of the month's budgets is used."""
    readings = []
    for account in accounts:
        contract = account.contract
        subject = "/".join(contract.key)
        burn = min(account.burn_rate_fast, account.burn_rate_slow)
        text = f"{subject}: its error budget burns {burn:.1f} times as fast as it may"
        readings.append(Reading("burn_rate", subject, burn, text))
        used = [
            part / whole
            for part, whole in (
                (account.spent_tokens + account.held_tokens, contract.budget_tokens),
                (account.spent_usd + account.held_usd, contract.budget_usd),
            )
            if whole
        ]
        if used:
            text = f"{subject}: {max(used):.0%} of the month's budget is used"
            readings.append(Reading("budget", subject, max(used), text))
    return readings


def of_workers(workers: Iterable[domain.WorkerView]) -> list[Reading]:
    """Silent workers."""
    return [
        Reading(
            "worker_lost",
            worker.worker_id,
            worker.heard_ago_s,
            f"{worker.worker_id} ({worker.name}) is {worker.status}: nothing heard from it",
        )
        for worker in workers
        if worker.status in ("suspect", "lost")
    ]


def of_queues(
    requests: Iterable[domain.RequestView], classes: Iterable[domain.SLOClass]
) -> list[Reading]:
    """The longest wait of each class, as a share of the longest that it allows."""
    oldest_s: dict[str, float] = defaultdict(float)
    for request in requests:
        if request.phase == "queued":
            oldest_s[request.class_name] = max(oldest_s[request.class_name], request.phase_s)
    return [
        Reading(
            "queue_wait",
            slo.name,
            oldest_s[slo.name] / slo.queue_s_max,
            f"{slo.name}: a request has waited {oldest_s[slo.name] / slo.queue_s_max:.0%} of the"
            f" {slo.queue_s_max:.0f} s that the class allows",
        )
        for slo in classes
        if slo.name in oldest_s
    ]


def of_batches() -> list[Reading]:
    """Running batches, by the slack of their last test; reads the database."""
    running = Batch.objects.filter(ended_at=None, is_demo_history=False, slack__isnull=False)
    readings = []
    for batch_id, slack in running.values_list("batch_id", "slack"):
        share = 1.0 / max(1.0 + slack, SHARE_MIN)  # slack is capacity / need - 1
        text = f"{batch_id}: its lines need {share:.0%} of the capacity before its deadline"
        readings.append(Reading("batch_slack", batch_id, share, text))
    return readings


class Watch:
    """Since when which subject has been over its threshold."""

    def __init__(self) -> None:
        self._since_s: dict[tuple[str, str], float] = {}  # by kind and subject; of one turn

    def firing(
        self, rules: Iterable[AlertRule], readings: Iterable[Reading], now_s: float
    ) -> dict[tuple[str, str], Reading]:
        """What has been over its threshold for long enough, at most OPEN_MAX, the first first."""
        limits = {rule.kind: rule for rule in rules if rule.is_active}
        before, self._since_s = self._since_s, {}
        found: dict[tuple[str, str], Reading] = {}
        for reading in readings:
            rule = limits.get(reading.kind)
            if rule is None or reading.value < rule.threshold:
                continue
            key = (reading.kind, reading.subject)
            since_s = self._since_s[key] = before.get(key, now_s)
            if now_s - since_s >= rule.for_s and len(found) < OPEN_MAX:
                found[key] = reading
        return found


def store(rules: Iterable[AlertRule], firing: dict[tuple[str, str], Reading], now: datetime) -> int:
    """Open what fires and is not open; resolve what is open and fires no more. Gives how many were
    opened."""
    by_kind = {rule.kind: rule for rule in rules}
    opened = Alert.objects.filter(resolved_at=None).values_list("pk", "rule__kind", "subject")
    known = {(kind, subject): pk for pk, kind, subject in opened}
    over = [pk for key, pk in known.items() if key not in firing]
    if over:
        Alert.objects.filter(pk__in=over).update(state="resolved", resolved_at=now)
    fresh = [
        Alert(
            rule=by_kind[kind],
            subject=subject,
            text=reading.text[:500],
            value=reading.value,
            opened_at=now,
        )
        for (kind, subject), reading in firing.items()
        if (kind, subject) not in known
    ]
    Alert.objects.bulk_create(fresh)
    for alert in fresh:
        logger.warning("alert kind=%s subject=%s %s", alert.rule.kind, alert.subject, alert.text)
    return len(fresh)


class AlertDesk:
    """Takes readings in the serving process and has them judged."""

    def __init__(self, fleet: Fleet, snapshot: SnapshotKeeper, writer: FactWriter) -> None:
        self._fleet = fleet
        self._snapshot = snapshot
        self._writer = writer
        self._watch = Watch()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.turn()
            except DatabaseError as error:
                logger.warning("alerts not judged: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def turn(self) -> None:
        view = self._fleet.view()
        classes = [facts.slo for facts in self._snapshot.current.classes.values()]
        readings = [
            *of_workers(view.workers),
            *of_queues(view.requests, classes),
            *of_accounts(self._fleet.accounts()),
        ]
        await self._writer.call(self._judge, readings, self._fleet.now_s())

    def _judge(self, readings: list[Reading], now_s: float) -> None:
        """Runs in the writer's transaction."""
        rules = list(AlertRule.objects.all())
        found = [*readings, *of_batches()]
        store(rules, self._watch.firing(rules, found, now_s), timezone.now())
