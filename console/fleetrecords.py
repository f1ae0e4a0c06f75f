"""What is stored and logged about workers: each change of the plan, one row for each worker."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from console.facts import HarvestFact, PlanFact
from console.writer import WorkerFact
from controlplane import domain

REASON_MAX = 500  # characters of a stored plan's reason

logger = logging.getLogger(__name__)


class FleetRecords:
    """Turns plans and views into facts. `put` hands a fact to the writer and never blocks."""

    def __init__(self, put: Callable[[Any], None]) -> None:
        self._put = put
        self._written: dict[str, WorkerFact] = {}  # by worker id; as many as the view has

    def plan(self, plan: domain.PlanChanged) -> None:
        logger.info(
            "plan kind=%s worker=%s role=%s->%s model=%s->%s by=%s shadow=%s reason=%s",
            plan.kind,
            plan.worker_id,
            plan.role_before,
            plan.role_after,
            plan.model_before,
            plan.model_after,
            plan.by,
            plan.is_shadow,
            plan.reason,
        )
        self._put(
            PlanFact(
                at=datetime.now(UTC),
                worker_id=plan.worker_id,
                role_before=plan.role_before,
                role_after=plan.role_after,
                by=plan.by,
                reason=plan.reason[:REASON_MAX],
                kind=plan.kind,
                is_shadow=plan.is_shadow,
                model_before=plan.model_before,
                model_after=plan.model_after,
            )
        )

    def harvest(self, found: domain.Harvested) -> None:
        """History that batch deadlines are promised on."""
        values = {name: getattr(found, name) for name in domain.Harvested.__slots__}
        self._put(HarvestFact(at=datetime.now(UTC), **values))

    def workers(self, workers: tuple[domain.WorkerView, ...]) -> None:
        """Keep the stored row of each worker equal to its role and status."""
        now = datetime.now(UTC)
        before, self._written = self._written, {}
        for worker in workers:
            fact = before.get(worker.worker_id)
            if fact is None or (fact.role, fact.status) != (worker.role, worker.status):
                fact = WorkerFact(
                    name=worker.name,
                    worker_id=worker.worker_id,
                    role=worker.role,
                    engine=worker.engine,
                    device=worker.device.name,
                    status=worker.status,
                    at=now,
                )
                self._put(fact)
            self._written[worker.worker_id] = fact
