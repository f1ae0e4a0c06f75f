"""Which batch lines to bring to the workers next: enough that no step starves, never more than KV.

Lines stay in the database until a worker is about to have room for them. Deadlines are kept by EDF;
while every promise has plenty of slack, tenants share evenly instead. Source: algorithms.md 2f and
2a (Past-Future, arXiv:2507.10150: admit by what rows will hold, not by what they hold now).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from controlplane.config import ControlPlaneConfig
from controlplane.escalation import LOOSE_KAPPAS, Escalation, Level
from controlplane.registry import Worker

GROUP_LINES = 8  # of one batch in a row: neighbours share a prefix
REFILL_S = 1.0  # a line is with a worker so long after another has ended
AHEAD_MIN, AHEAD_MAX = 4, 256  # lines that wait in the plane
LENGTHS_WEIGHT = 0.02  # of one line in the running mean
ENDED_WINDOW_S = 10.0
ENDED_MAX = 4_096


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch with lines left to start; `pending` may be cut off at what could be used now."""

    batch_id: int
    tenant_id: str
    model_id: str
    deadline_s: float  # from now
    pending: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Allotment:
    """So many lines of the batch are wanted now."""

    batch_id: int
    lines: int


@dataclass(slots=True)
class Lengths:
    """How much of the tokens that it might need a line really uses, for one model."""

    mean: float = 1.0
    var: float = 0.0
    num_seen: int = 0

    def observe(self, used_share: float) -> None:
        self.num_seen += 1
        weight = max(LENGTHS_WEIGHT, 1.0 / self.num_seen)
        off = used_share - self.mean
        self.mean += weight * off
        self.var = (1.0 - weight) * (self.var + weight * off**2)

    def share(self, num_rows: int) -> float:
        """Of the sum over rows: two deviations above the mean, at most all."""
        return min(1.0, self.mean + 2.0 * sqrt(self.var / max(1, num_rows)))


def room_of(worker: Worker, lengths: Lengths, config: ControlPlaneConfig) -> int:
    """Lines that a live worker may take beyond those it has."""
    rows = config.batch_rows_max - worker.num_batch
    if rows <= 0:
        return 0
    held = [item for item in worker.reservations.values() if item.is_batch]
    share = lengths.share(len(held))
    peak = share * sum(item.blocks for item in held)
    line_blocks = max(1.0, peak / len(held) if held else config.batch_line_tokens / _size(worker))
    reserve = config.batch_kv_reserve * worker.hello.num_blocks
    left = _blocks_without_batch(worker) - peak - reserve
    return max(0, min(rows, int(left / line_blocks)))


def _size(worker: Worker) -> int:
    return worker.hello.block_tokens


def _blocks_without_batch(worker: Worker) -> int:
    """Blocks that online sequences leave; those that batch holds now are part of its peak."""
    return worker.blocks_free(False)


@dataclass(slots=True)
class Backfill:
    """What feeding learns, for each model that has had batch lines; models bound it."""

    config: ControlPlaneConfig
    _lengths: dict[str, Lengths] = field(default_factory=dict)
    _ended_at_s: dict[str, deque[float]] = field(default_factory=dict)
    _escalations: dict[str, Escalation] = field(default_factory=dict)

    def ended(self, model_id: str, used_tokens: int, tokens_max: int, now_s: float) -> None:
        """A line is complete; tokens of prompt and output."""
        self._lengths.setdefault(model_id, Lengths()).observe(used_tokens / tokens_max)
        self._ended_at_s.setdefault(model_id, deque(maxlen=ENDED_MAX)).append(now_s)

    def level(self, model_id: str) -> Level:
        found = self._escalations.get(model_id)
        return 0 if found is None else found.level

    def assess(self, model_id: str, slack: float, now_s: float) -> bool:
        """The least slack of the model's promises; True when its level has changed."""
        return self._escalations.setdefault(model_id, Escalation()).assess(slack, now_s)

    def loose_kappa(self, model_id: str) -> float:
        return LOOSE_KAPPAS[self.level(model_id)]

    def lines_wanted(
        self, model_id: str, workers: Iterable[Worker], num_waiting: int, now_s: float
    ) -> int:
        """For all rooms at workers, and as many waiting in the plane as end while more are
        fetched."""
        lengths = self._lengths.get(model_id, Lengths())
        able = [w for w in workers if w.has_model(model_id) and w.is_accepting(now_s, self.config)]
        room = sum(room_of(worker, lengths, self.config) for worker in able)
        ended = self._ended_at_s.get(model_id, deque())
        while ended and ended[0] < now_s - ENDED_WINDOW_S:
            ended.popleft()
        ahead = int(REFILL_S * len(ended) / ENDED_WINDOW_S)
        ahead = min(AHEAD_MAX, max(AHEAD_MIN, ahead))
        return max(0, room + ahead - num_waiting)


def allot(batches: Sequence[OpenBatch], lines: int, is_tight: bool) -> list[Allotment]:
    """Split `lines` over batches of one model.

    Tight: earliest deadline first, which keeps every promise that can be kept. Else tenants take
    turns, least in flight first, each with its earliest deadline; a turn is GROUP_LINES."""
    given: dict[int, int] = {}
    queue = sorted(batches, key=lambda batch: (batch.deadline_s, batch.batch_id))
    in_flight: dict[str, int] = {}
    for batch in queue:
        in_flight[batch.tenant_id] = in_flight.get(batch.tenant_id, 0) + batch.in_flight
    while lines > 0 and queue:
        turn = queue[0]
        if not is_tight:
            order = {batch.batch_id: index for index, batch in enumerate(queue)}
            turn = min(queue, key=lambda b: (in_flight[b.tenant_id], order[b.batch_id]))
        left = turn.pending - given.get(turn.batch_id, 0)
        count = min(left, lines if is_tight else GROUP_LINES, lines)
        if count > 0:
            given[turn.batch_id] = given.get(turn.batch_id, 0) + count
            in_flight[turn.tenant_id] += count
            lines -= count
        if count >= left:
            queue.remove(turn)
    return [Allotment(batch_id, count) for batch_id, count in given.items()]
