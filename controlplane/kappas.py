"""The table of kappas that ships, looked up by a class's targets.

Rows of a GPU's targets come from a sweep of the simulated worker (`bench coserve --sweep`), their
harvest is beside the reference; that of a CPU from `bench coserve --engine cpu`, 600 s
an arm, its harvest is beside the arm with kappa 1.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

PATH = Path(__file__).parent / "kappa.json"
INFLATION_MAX = 0.75 * 0.05  # of the limits that the bench has to keep
ITL_MISS_MAX = 0.75 * 0.001


class KappaRow(msgspec.Struct, frozen=True):
    """For one pair of targets, with what the sweep measured at this kappa."""

    ttft_s: float
    itl_s: float
    kappa: float
    harvest: float
    ttft_p99_inflation: float
    itl_miss: float


def load(path: Path = PATH) -> list[KappaRow]:
    return msgspec.json.decode(path.read_bytes(), type=list[KappaRow])


def write(rows: list[KappaRow], path: Path = PATH) -> None:
    """Replaces the rows of the same targets, keeps the others."""
    fresh = {(row.ttft_s, row.itl_s) for row in rows}
    kept = [row for row in load(path) if (row.ttft_s, row.itl_s) not in fresh]
    rows = [*rows, *kept]
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")


def choose(rows: list[dict[str, float]]) -> dict[str, float]:
    """The row of a sweep with most harvest within the limits; else the one that inflates least."""
    kept = [
        row
        for row in rows
        if row["ttft_p99_inflation"] <= INFLATION_MAX and row["itl_miss"] <= ITL_MISS_MAX
    ]
    if kept:
        return max(kept, key=lambda row: row["harvest"])
    return min(rows, key=lambda row: row["ttft_p99_inflation"])


def kappa_for(rows: Sequence[KappaRow], ttft_s: float, itl_s: float) -> float:
    """Of the nearest targets, by their ratios."""
    assert rows, "an empty table"

    def distance(row: KappaRow) -> float:
        ratios = (row.ttft_s / ttft_s, row.itl_s / itl_s)
        return sum(max(ratio, 1.0 / ratio) for ratio in ratios)

    return min(rows, key=distance).kappa
