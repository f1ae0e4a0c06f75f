"""Which batch lines to bring to the workers next: enough that no step starves, never more than KV.

Lines stay in the database until a worker is about to have room for them. Deadlines are kept by EDF;
while every promise has plenty of slack, tenants share by weight instead. Source: algorithms.md 2f.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from controlplane.batchroom import ALL_USED, Lengths, lines_left
from controlplane.config import ControlPlaneConfig
from controlplane.escalation import LOOSE_KAPPAS, Escalation, Level
from controlplane.fairqueue import WEIGHT_MIN
from controlplane.registry import Worker

GROUP_LINES = 8  # of one batch in a row: neighbours share a prefix
REFILL_S = 1.0  # a line is with a worker so long after another has ended
AHEAD_MIN, AHEAD_MAX = 4, 256  # lines that wait in the plane
ENDED_WINDOW_S = 10.0
ENDED_MAX = 4_096


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch with lines left to start; `pending` may be cut off at what could be used now."""

    batch_id: int
    tenant_id: str
    weight: float  # of its tenant
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

    def lengths(self, model_id: str) -> Lengths:
        return self._lengths.get(model_id, ALL_USED)

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
        lengths = self.lengths(model_id)
        able = [w for w in workers if w.has_model(model_id) and w.is_accepting(now_s, self.config)]
        room = sum(lines_left(worker, lengths, self.config) for worker in able)
        ended = self._ended_at_s.get(model_id, deque())
        while ended and ended[0] < now_s - ENDED_WINDOW_S:
            ended.popleft()
        ahead = int(REFILL_S * len(ended) / ENDED_WINDOW_S)
        ahead = min(AHEAD_MAX, max(AHEAD_MIN, ahead))
        return max(0, room + ahead - num_waiting)


def allot(batches: Sequence[OpenBatch], lines: int, is_tight: bool) -> list[Allotment]:
    """Split `lines` over batches of one model.

    Tight: earliest deadline first, which keeps every promise that can be kept. Else tenants take
    turns, least in flight over weight first, each with its earliest deadline; a turn is
    GROUP_LINES."""
    given: dict[int, int] = {}
    queue = sorted(batches, key=lambda batch: (batch.deadline_s, batch.batch_id))
    in_flight: dict[str, int] = {}
    for batch in queue:
        in_flight[batch.tenant_id] = in_flight.get(batch.tenant_id, 0) + batch.in_flight
    while lines > 0 and queue:
        turn = queue[0]
        if not is_tight:
            turn = min(queue, key=lambda b: in_flight[b.tenant_id] / max(b.weight, WEIGHT_MIN))
        left = turn.pending - given.get(turn.batch_id, 0)
        count = min(left, lines if is_tight else GROUP_LINES, lines)
        if count > 0:
            given[turn.batch_id] = given.get(turn.batch_id, 0) + count
            in_flight[turn.tenant_id] += count
            lines -= count
        if count >= left:
            queue.remove(turn)
    return [Allotment(batch_id, count) for batch_id, count in given.items()]
