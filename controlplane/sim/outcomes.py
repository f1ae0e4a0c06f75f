"""What became of the requests of a comparison, and the figures that are reported of them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

TTFT_S, ITL_S = 2.0, 0.05  # of a good request: the rule of the peer's recorded replays
STRICT_SHARE = 0.99  # of a request's gaps that the strict rule wants in time
GAP_STEP_S = 0.0001  # resolution of the gaps that are counted


class Outcome(NamedTuple):
    """One answered request. Seconds; gaps are those between two of its tokens."""

    ttft_s: float
    decode_s: float  # from the first token to the last
    num_gaps: int
    num_slow: int  # gaps longer than ITL_S

    @property
    def is_good(self) -> bool:
        """The first token and the mean gap in time; stalls may hide in the mean."""
        return self.ttft_s <= TTFT_S and self.decode_s <= ITL_S * self.num_gaps

    @property
    def is_strictly_good(self) -> bool:
        """The first token and the 99th percentile of the gaps in time."""
        return self.ttft_s <= TTFT_S and self.num_slow <= (1.0 - STRICT_SHARE) * self.num_gaps


class Gaps:
    """Gaps between tokens of all requests, counted by GAP_STEP_S."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.num_slow = 0

    def add(self, seconds: float, num: int = 1) -> None:
        if num:
            self.counts[ceil(seconds / GAP_STEP_S - 1e-9)] += num
            self.num_slow += num * (seconds > ITL_S)

    @property
    def num(self) -> int:
        return self.counts.total()

    def percentile_s(self, share: float) -> float:
        """Nearest rank; 0 without gaps."""
        left = ceil(share * self.num)
        for step in sorted(self.counts):
            left -= self.counts[step]
            if left <= 0:
                return step * GAP_STEP_S
        return 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank of sorted values; 0 without values."""
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


def figures(outcomes: Sequence[Outcome], requests: int, gaps: Gaps) -> dict[str, object]:
    """One row; times in ms, rounded to 0.1. A request without an outcome is not good."""
    ttfts_s = sorted(outcome.ttft_s for outcome in outcomes)
    in_time = bisect_right(ttfts_s, TTFT_S)
    mean_s = sum(ttfts_s) / len(ttfts_s) if ttfts_s else 0.0
    ttft = {f"p{p}": round(1e3 * percentile(ttfts_s, p / 100), 1) for p in (50, 90, 99)}
    return {
        "requests": requests,
        "answered": len(outcomes),
        "good_requests": sum(outcome.is_good for outcome in outcomes),
        "good_requests_strict": sum(outcome.is_strictly_good for outcome in outcomes),
        "ttft_in_time": in_time,
        "ttft_ms": {"mean": round(1e3 * mean_s, 1), **ttft},
        "itl_ms": {"p99": round(1e3 * gaps.percentile_s(0.99), 1)},
        "itl_miss": round(gaps.num_slow / gaps.num, 6) if gaps.num else 0.0,
    }
