"""What batch will get: a forecast of harvested capacity with a low estimate of its integral.

The online load of a day is a weekly profile times a factor of that day, which past days have shown;
batch gets what it leaves below a ceiling. Errors within a day are one factor's, so they add; those
of different days are independent, so that their squares add. Source: algorithms.md 2f ("quantile of
the integral"); the factor's quantiles are conformal, Vovk et al. 2005.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

from controlplane.certificate import Forecast, Z

DAY_S = 86_400.0
DAYS_MAX = 28  # of history
WEEK_DAYS = 7
LEVEL = 0.95  # of the low and of the high estimate, each
PHI = 0.9  # share of the capacity that batch turns into work, until it has been measured
FACTOR_SD_UNKNOWN = 0.3  # of a day's factor while fewer than three days are known


@dataclass(frozen=True, slots=True)
class Day:
    """Online work of one past day, as a share of the workers' time in each bin; None: not seen."""

    weekday: int  # 0 is Monday
    online: tuple[float | None, ...]

    def __post_init__(self) -> None:
        assert 0 <= self.weekday < WEEK_DAYS and self.online, self


@dataclass(frozen=True, slots=True)
class Supply:
    """The cluster now. `ceiling` is the share of a worker's time that online and batch rows may
    fill together, 1 - t0 / (kappa·tau)."""

    num_workers: float
    ceiling: float
    phi: float = PHI  # measured harvest over this bound
    failed: float = 0.0  # share of worker time lost to failures


@dataclass(frozen=True, slots=True)
class Profile:
    """What the past days say; made by `fit`."""

    bin_s: float
    week: tuple[tuple[float, ...], ...]  # online share by weekday and bin
    factor_low: float  # of a day's load over the profile
    factor_mean: float
    factor_high: float
    factor_sd: float
    noise: float  # of one bin's share around both, relative to the mean share

    def factor_today(self, weekday: int, seen: Sequence[float | None]) -> tuple[float, float]:
        """(factor, share of the day-to-day error that is left) after the first bins of a day.

        The mean of two normal estimates, weighted by their precision: past days, and today."""
        expected = sum(self.week[weekday][i] for i, share in enumerate(seen) if share is not None)
        if expected <= 0.0 or self.factor_sd <= 0.0:
            return self.factor_mean, 1.0
        shares = [share for share in seen if share is not None]
        found = sum(shares) / expected
        mean_share = expected / len(shares)
        error = self.noise * self._share_mean() / (mean_share * sqrt(len(shares)))
        weight = self.factor_sd**2 / (self.factor_sd**2 + error**2)
        return weight * found + (1.0 - weight) * self.factor_mean, sqrt(1.0 - weight)

    def _share_mean(self) -> float:
        bins = [share for day in self.week for share in day]
        return sum(bins) / len(bins)

    def forecast(
        self,
        weekday: int,
        day_at_s: float,
        seen: Sequence[float | None],
        supply: Supply,
        horizon_s: float,
    ) -> Forecast:
        """From `day_at_s` seconds into a day of which `seen` has the bins so far."""
        num_bins = int(horizon_s / self.bin_s)
        factor, left = self.factor_today(weekday, seen)
        mean_s, low_s, high_s = [0.0], [0.0], [0.0]
        sum_s = low2 = high2 = noise2 = 0.0  # squares of the days that are over
        day_low = day_high = 0.0  # what a bad and a good day take and give, so far today
        bins_of_day = len(self.week[0])
        start = int(day_at_s / self.bin_s)
        scale = supply.num_workers * self.bin_s * supply.phi * (1.0 - supply.failed)
        spread = self.noise * self._share_mean()
        for index in range(num_bins):
            place = start + index
            if place and place % bins_of_day == 0 and index:
                low2, high2 = low2 + day_low**2, high2 + day_high**2
                day_low = day_high = 0.0
                factor, left = self.factor_mean, 1.0
            online = self.week[(weekday + place // bins_of_day) % WEEK_DAYS][place % bins_of_day]
            high = factor + left * (self.factor_high - self.factor_mean)
            low = max(0.0, factor + left * (self.factor_low - self.factor_mean))
            usual_s = scale * max(0.0, supply.ceiling - online * factor)
            day_low += usual_s - scale * max(0.0, supply.ceiling - online * high)
            day_high += scale * max(0.0, supply.ceiling - online * low) - usual_s
            noise2 += (Z * scale * spread) ** 2 if usual_s > 0.0 else 0.0
            sum_s += usual_s
            mean_s.append(sum_s)
            low_s.append(max(low_s[-1], sum_s - sqrt(low2 + day_low**2 + noise2)))
            high_s.append(max(high_s[-1], sum_s + sqrt(high2 + day_high**2 + noise2)))
        return Forecast(self.bin_s, tuple(mean_s), tuple(low_s), tuple(high_s))


def fit(days: Sequence[Day], bin_s: float) -> Profile | None:
    """The newest DAYS_MAX days; None when nothing was ever seen.

    A weekday's profile is the mean of its days; with less than a week, of all days. A day's factor
    is judged against the profile of the others, or it would look closer to it than a new day is."""
    days = [day for day in days if any(share is not None for share in day.online)][-DAYS_MAX:]
    if not days:
        return None
    is_weekly = len({day.weekday for day in days}) == WEEK_DAYS
    week = tuple(_profile(days, weekday if is_weekly else None) for weekday in range(WEEK_DAYS))
    factors, residuals = [], []
    for index, day in enumerate(days):
        others = [*days[:index], *days[index + 1 :]]
        has_peer = any(other.weekday == day.weekday for other in others)
        base = _profile(others, day.weekday if is_weekly and has_peer else None) if others else ()
        known = [
            (share, base[i]) for i, share in enumerate(day.online) if share is not None and base
        ]
        expected = sum(share for _, share in known)
        if expected <= 0.0:
            continue
        factor = sum(share for share, _ in known) / expected
        factors.append(factor)
        residuals += [share - factor * usual for share, usual in known]
    mean_share = sum(sum(day) for day in week) / sum(len(day) for day in week)
    noise = 0.0
    if residuals and mean_share > 0.0:
        noise = sqrt(sum(error**2 for error in residuals) / len(residuals)) / mean_share
    if len(factors) < 3:
        low, high = 1.0 - Z * FACTOR_SD_UNKNOWN, 1.0 + Z * FACTOR_SD_UNKNOWN
        return Profile(bin_s, week, low, 1.0, high, FACTOR_SD_UNKNOWN, noise)
    mean = sum(factors) / len(factors)
    sd = sqrt(sum((factor - mean) ** 2 for factor in factors) / (len(factors) - 1))
    low, high = _quantiles(sorted(factors), mean, sd)
    return Profile(bin_s, week, low, mean, high, sd, noise)


def _quantiles(ordered: Sequence[float], mean: float, sd: float) -> tuple[float, float]:
    """Conformal: of n past days rank ceil((n + 1)·level); too few of them give Z deviations, which
    is wider than their extremes."""
    rank = ceil((len(ordered) + 1) * LEVEL)
    if rank > len(ordered):
        return min(ordered[0], mean - Z * sd), max(ordered[-1], mean + Z * sd)
    return ordered[floor((len(ordered) + 1) * (1.0 - LEVEL)) - 1], ordered[rank - 1]


def _profile(days: Sequence[Day], weekday: int | None) -> tuple[float, ...]:
    """Mean share of each bin over the days of a weekday, or over all; a bin that none of them has
    seen gets the mean of the others."""
    chosen = [day for day in days if weekday is None or day.weekday == weekday]
    found: list[float | None] = []
    for bins in zip(*(day.online for day in chosen), strict=True):
        known = [share for share in bins if share is not None]
        found.append(sum(known) / len(known) if known else None)
    seen = [share for share in found if share is not None]
    usual = sum(seen) / len(seen) if seen else 0.0
    return tuple(usual if share is None else share for share in found)
