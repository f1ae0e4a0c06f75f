"""How far predicted TTFTs may be trusted: quantiles of actual / predicted, per kind of prediction.

Requests are calibrated as requests, since step p99s do not add up. Method: split conformal
prediction (Vovk et al. 2005) over a rolling window, its level corrected online (ACI, Gibbs and
Candes 2021, arXiv:2106.00170); algorithms.md 2b.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass, field
from math import ceil, exp, log, sqrt

MISS_RATE = 0.01
SCORES_MAX = 2_000  # of one bucket
SCORES_MIN = 100  # p99 of a sample needs 99
MARGIN_AT_START = 1.3
NORMAL_P99 = 2.326
PRIOR_SCORES = 5  # that the margin at start weighs
PRIOR_SD = log(MARGIN_AT_START) / NORMAL_P99  # of log scores
LEVEL_RATE, LEVEL_MIN, LEVEL_MAX = 0.002, 5e-4, 0.05
SCORE_MIN, SCORE_MAX = 0.01, 10.0  # beyond it something other than the prediction went wrong
# A worker lets short prompts pass long ones: the shorter a prompt beside what waits before it, the
# less of that wait it sees. Median p99/actual on azure2023_conv, 8 modelled H200 at 60 and 160
# requests/s: 1.75 and 1.80 with these buckets, 1.98 and 1.92 by depth of the queue alone.
WAIT_SHARES = (0.25, 1.0, 3.0)  # wait before the prompt over the prompt's own seconds
PROMPTS_S = (0.02, 0.06, 0.2)  # the prompt's own seconds

Bucket = tuple[int, int, bool, bool]  # wait, size, has a cached prefix, is handed off


def bucket_of(queue_s: float, prefill_s: float, cached_tokens: int, is_handoff: bool) -> Bucket:
    """The kind of a prediction, by its wait, its own seconds, and where its KV comes from."""
    wait = bisect_right(WAIT_SHARES, queue_s / max(prefill_s, 1e-6))
    return (wait, bisect_right(PROMPTS_S, prefill_s), cached_tokens > 0, is_handoff)


@dataclass(slots=True)
class _Window:
    """Scores of one kind. With few of them the p99 of a log-normal law, shrunk towards the start:
    the largest of a hundred says little, and kinds that are rare must not inherit the others'."""

    newest: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)
    miss_rate: float = MISS_RATE
    margin: float = MARGIN_AT_START
    sum_log: float = 0.0
    sum_log2: float = 0.0

    def add(self, score: float) -> None:
        self.newest.append(score)
        insort(self.ordered, score)
        count = len(self.ordered)
        if count < SCORES_MIN:
            self.margin = self._shrunk_margin(score, count)
            return
        if count > SCORES_MAX:
            del self.ordered[bisect_left(self.ordered, self.newest.popleft())]
            count -= 1
        level = min(1.0, (1.0 - self.miss_rate) * (1.0 + 1.0 / count))
        self.margin = self.ordered[min(count - 1, ceil(level * count) - 1)]

    def _shrunk_margin(self, score: float, count: int) -> float:
        value = log(max(score, SCORE_MIN))
        self.sum_log += value
        self.sum_log2 += value * value
        total = count + PRIOR_SCORES
        spread = max(0.0, self.sum_log2 - self.sum_log**2 / count)
        variance = (spread + PRIOR_SCORES * PRIOR_SD**2) / total
        return exp(self.sum_log / total + NORMAL_P99 * sqrt(variance))


@dataclass(slots=True)
class TTFTCalibration:
    """What to multiply a mean TTFT by so that 99 of 100 requests come sooner."""

    num_seen: int = 0
    num_missed: int = 0  # later than the p99 that was predicted
    _windows: dict[Bucket, _Window] = field(default_factory=dict)

    def margin(self, bucket: Bucket) -> float:
        window = self._windows.get(bucket)
        return window.margin if window is not None else MARGIN_AT_START

    def observe(self, bucket: Bucket, predicted_s: float, actual_s: float) -> None:
        """A request had its first token `actual_s` after it was placed."""
        score = min(actual_s / max(predicted_s, 1e-6), SCORE_MAX)
        is_missed = score > self.margin(bucket)
        self.num_seen += 1
        self.num_missed += is_missed
        window = self._windows.setdefault(bucket, _Window())
        rate = window.miss_rate + LEVEL_RATE * (MISS_RATE - is_missed)
        window.miss_rate = min(max(rate, LEVEL_MIN), LEVEL_MAX)
        window.add(score)
