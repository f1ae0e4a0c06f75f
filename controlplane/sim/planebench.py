"""The figures of the whole control plane in virtual time, part by part.

A part gives a flat dict with `ok`: are its limits kept? An interrupted run keeps the parts that
are done and says that it is partial.
"""

from collections.abc import Callable, Sequence

from controlplane.sim import deadlines, fairness, hardware, ledgercheck, planeload, split, workload
from controlplane.sim.planeload import Bench, Capacity
from controlplane.sim.planepredict import prediction

Say = Callable[[str], None]
Figures = dict[str, object]

LOADED = {"prediction": prediction, "overload": planeload.overload, "burst": planeload.burst}
DEADLINE_SEEDS = 3
NOISE = (
    f"steps {100 * workload.NOISE_SIGMA:.0f} % (sigma), {1e3 * workload.STALL_S:.0f} ms more in"
    f" {100 * workload.STALL_SHARE:.1f} % of them"
)


def _split(bench: Bench, say: Say) -> Figures:
    setting = split.Setting(bench.traces, bench.calibration, split.PHASES, bench.seconds(1_200.0))
    return split.run(setting, bench.processes, say)


def _deadlines(bench: Bench, say: Say) -> Figures:
    return deadlines.run(range(1, DEADLINE_SEEDS + 1), say)


def _fairness(bench: Bench, say: Say) -> Figures:
    return fairness.run(hardware.read(bench.calibration))


def _ledger(bench: Bench, say: Say) -> Figures:
    return ledgercheck.run(calibration=bench.calibration)


ALONE: dict[str, Callable[[Bench, Say], Figures]] = {
    "deadlines": _deadlines,
    "fairness": _fairness,
    "ledger": _ledger,
    "split": _split,
}
PARTS = (*LOADED, *ALONE)


def run(bench: Bench, names: Sequence[str], machine: str, say: Say) -> Figures:
    """The named parts, in the order of PARTS. Raises ValueError for an unknown one."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"part {unknown[0]!r}: expected one of {', '.join(PARTS)}")
    answer: Figures = {
        "machine": machine,
        "device": hardware.read(bench.calibration).table.file.source,
        "workers": bench.num_workers,
        "workload": planeload.WORKLOAD,
        "noise": NOISE,
        "seed": bench.seed,
    }
    done: list[str] = []
    found: Capacity | None = None
    try:
        for name in PARTS:
            if name not in names:
                continue
            say(f"part {name}")
            if name in LOADED:
                found = found or planeload.capacity(bench, say)
                answer["capacity_per_s"], answer["sweep"] = found.per_s, found.rows
                answer[name] = LOADED[name](bench, found, say)
            else:
                answer[name] = ALONE[name](bench, say)
            done.append(name)
    except KeyboardInterrupt:
        say("interrupted: the answer is partial")
    answer["missing"] = [name for name in PARTS if name in names and name not in done]
    answer["is_partial"] = bool(answer["missing"])
    return answer
