"""A failing scenario made smaller: faults and arrivals are dropped while the same law is broken.

Method: delta debugging, Zeller and Hildebrandt 2002, with halves, then quarters and so on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from controlplane.sim.scenario import Arrival, Fault, Scenario
from controlplane.sim.swarm import run

T = TypeVar("T")
RUNS_MAX = 200


def shrink(scenario: Scenario, law: str) -> tuple[Scenario, int]:
    """The smaller scenario and how many runs it took, at most RUNS_MAX."""
    num_runs = 0

    def fails(smaller: Scenario) -> bool:
        nonlocal num_runs
        if num_runs >= RUNS_MAX:
            return False
        num_runs += 1
        return run(smaller).law == law

    def with_faults(part: tuple[Fault, ...]) -> Scenario:
        return replace(scenario, faults=part)

    scenario = replace(scenario, faults=_fewest(scenario.faults, with_faults, fails))

    def with_arrivals(part: tuple[Arrival, ...]) -> Scenario:
        return replace(scenario, arrivals=part)

    scenario = replace(scenario, arrivals=_fewest(scenario.arrivals, with_arrivals, fails))
    return scenario, num_runs


def _fewest(
    items: tuple[T, ...],
    put: Callable[[tuple[T, ...]], Scenario],
    fails: Callable[[Scenario], bool],
) -> tuple[T, ...]:
    parts = 2
    while len(items) >= 1:
        size = max(1, len(items) // parts)
        for start in range(0, len(items), size):
            rest = items[:start] + items[start + size :]
            if fails(put(rest)):
                items, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts *= 2
    return items
