"""Are predictions true, and are refusals right? Requests served at two loads, and a clairvoyant.

The clairvoyant run serves the same arrivals, refuses nobody, and leaves out from the start those
that would be late: it knows them from passes before. What we refused and it serves in time was
refused wrongly.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from controlplane.sim.planeload import (
    MEASURED_S,
    WARM_S,
    Bench,
    Capacity,
    Load,
    play,
    play_all,
    rejected_later,
    within,
)
from controlplane.sim.replay import Record

LOADS = (0.5, 0.95)  # of capacity; the clairvoyant judges the last
PASSES = 3  # of the clairvoyant; what is late in the last one counts as not served


def prediction(bench: Bench, found: Capacity, say: Callable[[str], None]) -> dict[str, object]:
    """coverage: first tokens no later than their calibrated p99, of all that were placed;
    sharpness: median of that p99 over the actual time."""
    warm_s = bench.seconds(WARM_S)
    end_s = warm_s + bench.seconds(MEASURED_S)
    loads = [Load(bench, share * found.per_s, end_s) for share in LOADS]
    runs = list(play_all(loads))
    placed = [record for run in runs for record in within(run, warm_s, end_s)]
    coverage, sharpness = audit(placed)
    say(f"prediction: coverage {coverage:.4f}, sharpness {sharpness:.2f}")
    refused = {record.index for record in within(runs[-1], warm_s, end_s) if record.code}
    served = clairvoyant(loads[-1], refused, say)
    wrong = len(refused & served) / max(1, len(within(runs[-1], warm_s, end_s)))
    later = sum(rejected_later(run) for run in runs)
    return {
        "coverage": coverage,
        "sharpness": sharpness,
        "requests": len(placed),
        "refused": len(refused),
        "wrongly_refused_share": wrong,
        "rejected_after_admission": later,
        "ok": 0.985 <= coverage <= 0.995 and sharpness <= 2.0 and wrong <= 0.01 and later == 0,
    }


def audit(records: Sequence[Record]) -> tuple[float, float]:
    """Coverage and sharpness of the first placement's prediction."""
    covered, ratios = 0, []
    for record in records:
        if record.predicted_s_p99 is None or record.ttft_s is None or record.placed_at_s is None:
            continue
        actual_s = record.ttft_s - (record.placed_at_s - record.at_s)
        covered += actual_s <= record.predicted_s_p99
        ratios.append(record.predicted_s_p99 / actual_s)
    assert ratios, "no request was placed"
    return covered / len(ratios), sorted(ratios)[len(ratios) // 2]


def clairvoyant(load: Load, refused: set[int], say: Callable[[str], None]) -> set[int]:
    """Arrivals that it serves in time. Without refusals to judge there is nothing to run."""
    if not refused:
        return set()
    skipped: frozenset[int] = frozenset()
    good: set[int] = set()
    for number in range(1, PASSES + 1):
        records = play(replace(load, may_refuse=False, skipped=skipped))
        good = {record.index for record in records if record.is_good}
        late = {record.index for record in records} - good
        say(f"clairvoyant pass {number}: {len(late)} of {len(records)} late")
        if not late:
            break
        skipped |= late
    return good
