"""How many batch lines a worker has room for: by the KV that they will hold, not by what they hold
now. Source: Past-Future, arXiv:2507.10150, algorithms.md 2a; the worker itself checks by sequence.
"""

from dataclasses import dataclass
from math import sqrt

from controlplane.config import ControlPlaneConfig
from controlplane.registry import Worker

LENGTHS_WEIGHT = 0.02  # of one line in the running mean
LINES_BEFORE = 16  # so many count as seen that used all they might


@dataclass(slots=True)
class Lengths:
    """How much of the tokens that it might need a line really uses, for one model."""

    mean: float = 1.0
    var: float = 0.0
    num_seen: int = 0

    def observe(self, used_share: float) -> None:
        self.num_seen += 1
        weight = max(LENGTHS_WEIGHT, 1.0 / (self.num_seen + LINES_BEFORE))
        off = used_share - self.mean
        self.mean += weight * off
        self.var = (1.0 - weight) * (self.var + weight * off**2)

    def share(self, num_lines: int) -> float:
        """Of the sum over lines: two deviations above the mean, at most all."""
        return min(1.0, self.mean + 2.0 * sqrt(self.var / max(1, num_lines)))


ALL_USED = Lengths()  # while nothing is known


def blocks_left(worker: Worker, lengths: Lengths, config: ControlPlaneConfig) -> float:
    """Blocks for further lines, when those at the worker have grown as much as lines do."""
    peak = lengths.share(worker.num_batch) * worker.batch_blocks
    reserve = int(config.batch_kv_reserve * worker.hello.num_blocks)
    return worker.blocks_free(False) - peak - reserve


def lines_left(worker: Worker, lengths: Lengths, config: ControlPlaneConfig) -> int:
    """Lines that a live worker may take beyond those it has; they are taken to be as long as
    those. One without any is offered one: whether that fits is known when it is there."""
    rows = config.batch_rows_max - worker.num_batch
    left = blocks_left(worker, lengths, config)
    if rows <= 0 or left <= 0.0:
        return 0
    line_blocks = config.batch_line_tokens / worker.hello.block_tokens
    if worker.num_batch:
        line_blocks = lengths.share(worker.num_batch) * worker.batch_blocks / worker.num_batch
    lines = int(left / max(1.0, line_blocks))
    return min(rows, lines if worker.num_batch else max(1, lines))
