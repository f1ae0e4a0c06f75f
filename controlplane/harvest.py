"""What workers' time went into, model by model: the history that batch capacity is forecast from.

A worker of several models counts for the first that it names, so that no second counts twice.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite

from controlplane.domain import Harvested
from controlplane.protocol import WorkerLoad
from controlplane.registry import Worker

HARVEST_S = 60.0  # between two reports


def cost_tokens(prompt_tokens: float, output_tokens: float) -> float:
    """Work of a line in tokens: a decoded one costs about two of a prompt (algorithms.md 2g)."""
    return prompt_tokens + 2.0 * output_tokens


@dataclass(slots=True)
class _Sums:
    worker_s: float = 0.0
    member_s: float = 0.0
    online_s: float = 0.0
    batch_s: float = 0.0
    batch_tokens: float = 0.0
    backlog_s: float = 0.0


@dataclass(slots=True)
class HarvestMeter:
    """Sums since the last report; as many as there are models."""

    _sums: dict[str, _Sums] = field(default_factory=dict)
    _since_s: float | None = None
    _ticked_at_s: float = 0.0

    def load(self, worker: Worker, load: WorkerLoad) -> None:
        """A worker has said how it spent its time since its last report."""
        if not isfinite(load.online_s + load.batch_s) or min(load.online_s, load.batch_s) < 0.0:
            return  # numbers that cannot be
        if not worker.model_id:
            return
        sums = self._of(worker.model_id)
        sums.online_s += load.online_s
        sums.batch_s += load.batch_s

    def ended(self, model_id: str, cost_tokens: float) -> None:
        """A batch line is complete."""
        self._of(model_id).batch_tokens += cost_tokens

    def tick(
        self, workers: Iterable[Worker], backlogged: frozenset[str], now_s: float
    ) -> list[Harvested]:
        """Count the time of all members; `backlogged` are models of which batch lines wait. Gives a
        report for each model when HARVEST_S have passed."""
        if self._since_s is None:
            self._since_s = self._ticked_at_s = now_s
        passed_s, self._ticked_at_s = now_s - self._ticked_at_s, now_s
        for worker in workers:
            if not worker.model_id:
                continue
            sums = self._of(worker.model_id)
            sums.member_s += passed_s
            sums.worker_s += passed_s if worker.status == "live" else 0.0
        for model_id in backlogged:
            self._of(model_id).backlog_s += passed_s
        seconds = now_s - self._since_s
        if seconds < HARVEST_S:
            return []
        found = [
            Harvested(
                model_id, seconds, sums.worker_s, sums.member_s, sums.online_s, sums.batch_s,
                sums.batch_tokens, sums.backlog_s,
            )
            for model_id, sums in sorted(self._sums.items())
        ]  # fmt: skip
        self._sums.clear()
        self._since_s = now_s
        return found

    def _of(self, model_id: str) -> _Sums:
        return self._sums.setdefault(model_id, _Sums())
