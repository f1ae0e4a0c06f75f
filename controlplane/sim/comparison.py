"""Policies on the same recorded work: one row of figures for each policy and seed.

`peer_round_robin` is the peer's own engine and router. A policy sees prompts and max_tokens of
OUTPUT_FACTOR times the trace's median output; only the engine's model knows when an output ends.
The peer's replays had no such limit: `outputs_cut` requests are longer, and ours ends them there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import median_low

from controlplane.sim import hardware, ours, peertiming, traces
from controlplane.sim.hardware import StepTimes
from controlplane.sim.outcomes import Gaps, Outcome, figures
from controlplane.sim.peer import PeerWorker
from controlplane.sim.traces import TraceRequest

OUTPUT_FACTOR, OUTPUT_TOKENS_MAX = 4, 4_096  # of what a client allows
REQUESTS_MAX = 1_000_000  # of one run: its outcomes are kept
TIMINGS = ("peer", "peer_own", "calibrated")


@dataclass(frozen=True)
class Setting:
    """What all policies of one comparison share. `timing`: `peer`, in which no way to split a
    prompt is cheaper than another; `peer_own`, a chunk by its new tokens alone, as the recorded
    rows were made; `calibrated`, the step table in which context costs."""

    path: Path
    speed: float = 1.0
    workers: int = 8
    timing: str = "peer"

    @cached_property
    def times(self) -> StepTimes:
        if self.timing == "calibrated":
            return hardware.read("").table
        return peertiming.load("tokens" if self.timing == "peer_own" else "position")

    @cached_property
    def rows(self) -> Sequence[TraceRequest]:
        """In order of arrival; equal stamps in the file's order. Raises ValueError."""
        trace = traces.read_file(self.path).hastened(self.speed)
        rows = list(islice(trace.rows(), REQUESTS_MAX + 1))
        if len(rows) > REQUESTS_MAX:
            raise ValueError(f"{self.path} has more than {REQUESTS_MAX} requests")
        return sorted(rows, key=lambda row: row.at_s)

    @property
    def output_tokens_max(self) -> int:
        """What every request allows."""
        middle = median_low([row.output_tokens for row in self.rows])
        return min(OUTPUT_TOKENS_MAX, OUTPUT_FACTOR * middle)


def peer_round_robin(setting: Setting, seed: int, gaps: Gaps) -> Iterator[Outcome]:
    """Equal workers, the next request to the next one; no chance in it."""
    for index in range(setting.workers):
        worker = PeerWorker(setting.times, gaps=gaps)
        yield from worker.run(setting.rows[index :: setting.workers])


def slackwater(setting: Setting, seed: int, gaps: Gaps) -> Iterator[Outcome]:
    """The production control plane and step scheduler."""
    replay = ours.build(setting.times, setting.workers, setting.output_tokens_max, seed)
    yield from ours.play(replay, setting.rows, gaps)


Policy = Callable[[Setting, int, Gaps], Iterator[Outcome]]
POLICIES: dict[str, Policy] = {"slackwater": slackwater, "peer_round_robin": peer_round_robin}


def run(
    setting: Setting, policies: Sequence[str], seeds: int, say: Callable[[str], None]
) -> dict[str, object]:
    """The answer of `manage.py simulate`. A KeyboardInterrupt ends it with the rows so far and
    `partial`. Raises ValueError for what cannot be run."""
    unknown = [name for name in policies if name not in POLICIES]
    if unknown or not policies:
        raise ValueError(
            f"policy {unknown[0] if unknown else ''!r}: expected {', '.join(POLICIES)}"
        )
    if setting.timing not in TIMINGS:
        raise ValueError(f"timing {setting.timing!r}: expected one of {', '.join(TIMINGS)}")
    if setting.workers < 1 or seeds < 1:
        raise ValueError(f"workers={setting.workers}, seeds={seeds}: expected at least 1 of each")
    requests = len(setting.rows)
    found: list[dict[str, object]] = []
    is_partial = False
    try:
        for name in policies:
            for seed in range(1, seeds + 1):
                say(f"{name}, seed {seed}: {requests} requests on {setting.workers} workers")
                gaps = Gaps()
                outcomes = list(POLICIES[name](setting, seed, gaps))
                found.append({"policy": name, "seed": seed} | figures(outcomes, requests, gaps))
    except KeyboardInterrupt:
        is_partial = True
    return {
        "trace": setting.path.stem,
        "speed": setting.speed,
        "workers": setting.workers,
        "timing": setting.timing,
        "output_tokens_max": setting.output_tokens_max,
        "outputs_cut": sum(r.output_tokens > setting.output_tokens_max for r in setting.rows),
        "partial": is_partial,
        "rows": found,
    }
