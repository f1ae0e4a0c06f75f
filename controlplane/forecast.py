"""How much work will arrive: seasonal naive plus an AR(1) residual, with error bands that are
measured, not assumed.

The base of a bin is what came a day earlier (before a day has passed: the running mean), the
residual fades with its own correlation, and the upper bound adds the 95 % quantile of the errors
that forecasts of the same horizon have made so far (conformal). Source: algorithms.md 2e.
"""

from bisect import bisect_left, insort
from collections import deque
from math import ceil

DAY_S = 86_400.0
DAYS_KEPT = 8
ERRORS_MAX = 500
ERRORS_MIN = 20  # before that the band is a share of the level
BAND_AT_START = 0.5
BAND_LEVEL = 0.95
LEVEL_WEIGHT = 0.2  # of a bin in the running mean
MEMORY = 0.98  # of the residual's correlation, per bin


class Forecast:
    """One series of amounts per second, in bins of `bin_s`, looked at `horizon_s` ahead."""

    def __init__(self, bin_s: float, horizon_s: float) -> None:
        assert bin_s > 0.0 and horizon_s >= bin_s, (bin_s, horizon_s)
        self._bin_s = bin_s
        self._ahead = ceil(horizon_s / bin_s)
        self._per_day = round(DAY_S / bin_s)
        self._bins: deque[float] = deque(maxlen=DAYS_KEPT * self._per_day)  # closed, per second
        self._open_index: int | None = None
        self._open = 0.0
        self._level = 0.0
        self._product = self._square = 0.0
        self._residual = 0.0
        self._made: deque[float] = deque(maxlen=self._ahead)  # forecasts that are not due yet
        self._errors: deque[float] = deque()
        self._ordered: list[float] = []

    @property
    def num_bins(self) -> int:
        return len(self._bins)

    def add(self, amount: float, now_s: float) -> None:
        self.advance(now_s)
        self._open += amount

    def advance(self, now_s: float) -> None:
        """Close the bins that have ended."""
        index = int(now_s / self._bin_s)
        if index == self._open_index:
            return
        if self._open_index is None:
            self._open_index = index
        for _ in range(min(index - self._open_index, self._per_day)):
            self._close(self._open / self._bin_s)
            self._open = 0.0
        self._open_index = max(self._open_index, index)

    def _close(self, value: float) -> None:
        if len(self._made) == self._ahead:
            self._judge(value - self._made[0])
        before = self._residual
        self._residual = value - self._base(0)
        self._product = MEMORY * self._product + before * self._residual
        self._square = MEMORY * self._square + before * before
        self._bins.append(value)
        self._level += LEVEL_WEIGHT * (value - self._level) if len(self._bins) > 1 else value
        self._made.append(self.mean())

    def _judge(self, error: float) -> None:
        self._errors.append(error)
        insort(self._ordered, error)
        if len(self._errors) > ERRORS_MAX:
            del self._ordered[bisect_left(self._ordered, self._errors.popleft())]

    def _base(self, ahead: int) -> float:
        """Of the bin so many after the next one to close: the same time yesterday, smoothed."""
        start = len(self._bins) + ahead - self._per_day
        if start < 1:
            return self._level
        around = [self._bins[i] for i in range(start - 1, min(start + 2, len(self._bins)))]
        return sum(around) / len(around)

    def mean(self) -> float:
        """Per second, at the horizon."""
        share = self._product / self._square if self._square > 0.0 else 0.0
        fading = min(max(share, 0.0), 0.99) ** self._ahead
        return max(0.0, self._base(self._ahead - 1) + fading * self._residual)

    def upper(self, level: float = BAND_LEVEL) -> float:
        """What that share of forecasts like this one were not exceeded by."""
        count = len(self._ordered)
        if count < ERRORS_MIN:
            return (1.0 + BAND_AT_START) * self.mean()
        level = min(1.0, level * (1.0 + 1.0 / count))
        return self.mean() + max(0.0, self._ordered[min(count - 1, ceil(level * count) - 1)])
