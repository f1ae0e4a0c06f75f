"""Slow or failing workers get less, then none: outliers against their own pool, for a while.

Slow: a worker's step model, against the one it joined with, has grown more than others' have.
Failing: so many failures in a row. At most a share of a pool is out at once, and after its time a
worker is tried again. Source: outlier detection of Envoy (consecutive failures, ejection time,
at most a share); reliability.md section 6, row 25 (latency outlier beyond 3 times the median).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.latency import StepFeatures, step_s
from controlplane.registry import Worker

PROBE = StepFeatures().with_decodes(8, 8_192).with_tokens(0, 256)  # a step to compare models by


def slowdown(worker: Worker) -> float:
    """Its steps now over its steps when it joined."""
    return step_s(worker.step_model, PROBE) / step_s(worker.hello.step_model, PROBE)


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

    def sweep(self, workers: Sequence[Worker], now_s: float) -> list[tuple[Worker, str]]:
        """Workers of one pool to take out now, with the reason; sets their ejected_until_s."""
        live = [worker for worker in workers if worker.status == "live"]
        num_out = sum(worker.is_ejected(now_s) for worker in live)
        allowed = max(1, int(self.config.ejected_share_max * len(live)))
        if len(live) < 2:
            return []  # the last one is better than none
        factors = sorted(slowdown(worker) for worker in live)
        usual = factors[(len(factors) - 1) // 2]
        chosen = []
        for worker in sorted(live, key=lambda item: (-slowdown(item), item.worker_id)):
            if num_out >= min(allowed, len(live) - 1):
                break
            if worker.is_ejected(now_s):
                continue
            failures = self._failures.get(worker.worker_id, 0)
            factor = slowdown(worker)
            if failures >= self.config.failures_max:
                why = f"{failures} failures in a row"
            elif worker.num_reports >= self.config.slow_reports_min and (
                factor > self.config.slow_factor * usual
            ):
                why = f"its steps take {factor:.1f} times what they took, others' {usual:.1f} times"
            else:
                continue
            self._failures.pop(worker.worker_id, None)
            worker.num_reports = 0
            worker.ejected_until_s = now_s + self.config.ejected_s
            worker.eject_reason = why
            chosen.append((worker, why))
            num_out += 1
        return chosen
