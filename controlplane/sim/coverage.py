"""How honest the latency model is: every step of a simulated worker, predicted before it ran.

The steps are those of the production planner on a table of step times (never the model's own form),
with noise, stalls and a clock step of 8 % every 10,000 steps.
"""

from collections.abc import Sequence
from functools import partial

import msgspec

from controlplane.latency import BUCKETS, LatencyModel
from controlplane.sim.coserve import ROOFLINE_8B, Scene
from controlplane.sim.station import SeenStep
from controlplane.sim.workload import Noise
from gpuworkers import scheduler

WARM_STEPS = 1_000  # learning from the roofline seed; a worker goes on from a saved model
WINDOW_STEPS = 2_000


def audit(scene: Scene, kappa: float, seed: int) -> dict[str, object]:
    """Error, coverage and over-prediction of a run, in all and per bucket; and the coefficients."""
    model = LatencyModel(ROOFLINE_8B)
    planner = partial(scheduler.plan, model=model, policy=scene.policy(kappa))
    noise = Noise(seed, has_clock_steps=True)
    station = scene.run(seed, planner, model, observe=True, noise=noise)
    seen = station.seen[WARM_STEPS:]
    return {
        "table": scene.table.file.name,
        **figures(seen),
        "worst_window_coverage": worst_window(seen),
        "buckets": {
            bucket: figures([step for step in seen if step.bucket == bucket])
            for bucket in BUCKETS
            if any(step.bucket == bucket for step in seen)
        },
        "drift_alarms": model.num_alarms,
        "coefficients": msgspec.to_builtins(model.coefficients()),
    }


def figures(seen: Sequence[SeenStep]) -> dict[str, float]:
    """mape: mean |measured / mean - 1|; coverage: share within the p99; over_prediction: mean of
    p99 / measured - 1."""
    count = len(seen)
    return {
        "steps": count,
        "mape": sum(abs(s.measured_s / s.mean_s - 1.0) for s in seen) / count,
        "coverage": sum(s.measured_s <= s.p99_s for s in seen) / count,
        "over_prediction": sum(s.p99_s / s.measured_s - 1.0 for s in seen) / count,
    }


def worst_window(seen: Sequence[SeenStep]) -> float:
    """The lowest coverage of WINDOW_STEPS steps in a row."""
    assert len(seen) >= WINDOW_STEPS, len(seen)
    misses = [step.measured_s > step.p99_s for step in seen]
    in_window = most = sum(misses[:WINDOW_STEPS])
    for newest, oldest in zip(misses[WINDOW_STEPS:], misses, strict=False):
        in_window += newest - oldest
        most = max(most, in_window)
    return 1.0 - most / WINDOW_STEPS
