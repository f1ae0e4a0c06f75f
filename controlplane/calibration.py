"""How far predicted TTFTs may be trusted: quantiles of actual / predicted, per kind of prediction.

Requests are calibrated as requests, since step p99s do not add up. Method: split conformal
prediction (Vovk et al. 2005) over a rolling window, its level corrected online (ACI, Gibbs and
Candes 2021, arXiv:2106.00170); algorithms.md 2b.
"""

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from math import ceil

MISS_RATE = 0.01
SCORES_MAX = 1_000  # of one bucket
SCORES_MIN = 100  # p99 of a sample needs 99
MARGIN_AT_START = 1.3
LEVEL_RATE, LEVEL_MIN, LEVEL_MAX = 0.002, 5e-4, 0.05
SCORE_MAX = 10.0  # beyond it something other than the prediction went wrong
SHORT_QUEUE_S = 0.05
LONG_QUEUE_S = 0.5

Bucket = tuple[int, bool, bool]  # wait, has a cached prefix, is handed off


def bucket_of(queue_s: float, cached_tokens: int, is_handoff: bool) -> Bucket:
    depth = 0 if queue_s < SHORT_QUEUE_S else 1 if queue_s < LONG_QUEUE_S else 2
    return (depth, cached_tokens > 0, is_handoff)


@dataclass(slots=True)
class _Window:
    newest: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)
    miss_rate: float = MISS_RATE
    margin: float = MARGIN_AT_START

    def add(self, score: float) -> None:
        self.newest.append(score)
        insort(self.ordered, score)
        if len(self.newest) > SCORES_MAX:
            del self.ordered[bisect_left(self.ordered, self.newest.popleft())]
        count = len(self.ordered)
        if count >= SCORES_MIN:
            level = min(1.0, (1.0 - self.miss_rate) * (1.0 + 1.0 / count))
            self.margin = self.ordered[min(count - 1, ceil(level * count) - 1)]


@dataclass(slots=True)
class TTFTCalibration:
    """What to multiply a mean TTFT by so that 99 of 100 requests come sooner."""

    num_seen: int = 0
    num_missed: int = 0  # later than the p99 that was predicted
    _windows: dict[Bucket, _Window] = field(default_factory=dict)
    _all: _Window = field(default_factory=_Window)

    def margin(self, bucket: Bucket) -> float:
        window = self._windows.get(bucket)
        if window is None or len(window.ordered) < SCORES_MIN:
            window = self._all
        return window.margin

    def observe(self, bucket: Bucket, predicted_s: float, actual_s: float) -> None:
        """A request had its first token `actual_s` after it was placed."""
        score = min(actual_s / max(predicted_s, 1e-6), SCORE_MAX)
        is_missed = score > self.margin(bucket)
        self.num_seen += 1
        self.num_missed += is_missed
        for window in (self._windows.setdefault(bucket, _Window()), self._all):
            rate = window.miss_rate + LEVEL_RATE * (MISS_RATE - is_missed)
            window.miss_rate = min(max(rate, LEVEL_MIN), LEVEL_MAX)
            window.add(score)
