"""Slow or failing workers get less, then none: outliers against their own pool, for a while.

Slow: its steps, against what they took when it joined, have grown more than others' have. Failing:
so many failures in a row, or logits that were no numbers. At most a share of a pool is out at once.
After its time a worker is on trial: one request at a time, until its newest steps speak for it or
against it. Source: outlier detection of Envoy (consecutive failures, ejection time, at most a
share); reliability.md section 6, row 25 (beyond 3 times the pool's median, 20 samples).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.registry import STEP_RATIOS_KEPT, Worker


@dataclass(slots=True)
class Ejector:
    config: ControlPlaneConfig
    _failures: dict[str, int] = field(default_factory=dict)  # in a row, by worker

    def failed(self, worker: Worker) -> None:
        """A stream stopped, a handoff went wrong, or a sequence ended in an error there."""
        self._failures[worker.worker_id] = self._failures.get(worker.worker_id, 0) + 1

    def succeeded(self, worker: Worker) -> None:
        self._failures.pop(worker.worker_id, None)

    def forget(self, worker_id: str) -> None:
        self._failures.pop(worker_id, None)

    def quarantine(self, worker: Worker, pool: Sequence[Worker], why: str, now_s: float) -> None:
        """Take it out at once, unless more than half of the pool would be out then."""
        live = [item for item in pool if item.status == "live"]
        num_out = sum(item.is_ejected(now_s) for item in live)
        if worker.is_ejected(now_s) or 2 * (num_out + 1) > len(live):
            return
        self._failures.pop(worker.worker_id, None)
        worker.eject(now_s + self.config.ejected_s, why)

    def sweep(self, workers: Sequence[Worker], now_s: float) -> None:
        """Look at the workers of one pool: who is out, who is tried, who is well again."""
        live = [worker for worker in workers if worker.status == "live"]
        for worker in live:
            if worker.eject_reason and not worker.is_on_trial and not worker.is_ejected(now_s):
                worker.set_trial(True)
        if len(live) < 2 or all(worker.is_ejected(now_s) for worker in live):
            for worker in live:  # the last one is better than none
                worker.set_trial(False)
            return
        ratios = sorted(worker.step_ratio for worker in live)
        usual = ratios[(len(ratios) - 1) // 2]
        num_out = sum(worker.is_ejected(now_s) for worker in live)
        allowed = min(max(1, int(self.config.ejected_share_max * len(live))), len(live) - 1)
        for worker in sorted(live, key=lambda item: (-item.step_ratio, item.worker_id)):
            if worker.is_ejected(now_s):
                continue
            why = self._why(worker, usual)
            if why and num_out < allowed:
                self._failures.pop(worker.worker_id, None)
                worker.eject(now_s + self.config.ejected_s, why)
                num_out += 1
            elif worker.is_on_trial and not why and self._is_judged(worker):
                worker.set_trial(False)

    def _is_judged(self, worker: Worker) -> bool:
        """It has made enough steps."""
        return len(worker.step_ratios) >= min(self.config.slow_reports_min, STEP_RATIOS_KEPT)

    def _why(self, worker: Worker, usual: float) -> str:
        failures, ratio = self._failures.get(worker.worker_id, 0), worker.step_ratio
        if failures >= self.config.failures_max:
            return f"{failures} failures in a row"
        if self._is_judged(worker) and ratio > self.config.slow_factor * usual:
            return f"its steps take {ratio:.1f} times what they took, others' {usual:.1f} times"
        return ""
