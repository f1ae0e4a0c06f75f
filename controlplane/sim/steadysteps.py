"""A run of steps whose times have equal second differences, added up in closed form."""

from collections.abc import Sequence
from typing import NamedTuple


class SteadySteps(NamedTuple):
    """Step i, from 0 on, takes first_s + i·growth_s + i·(i-1)/2·bend_s."""

    first_s: float
    growth_s: float
    bend_s: float

    @classmethod
    def through(cls, shown_s: Sequence[float]) -> "SteadySteps":
        """The run that begins with these steps, of which the first three matter."""
        first_s = shown_s[0]
        growth_s = shown_s[1] - first_s if len(shown_s) > 1 else 0.0
        bend_s = shown_s[2] - 2.0 * shown_s[1] + first_s if len(shown_s) > 2 else 0.0
        return cls(first_s, growth_s, bend_s)

    def step_s(self, index: int) -> float:
        return self.first_s + index * (self.growth_s + (index - 1) / 2 * self.bend_s)

    def total_s(self, count: int) -> float:
        """Of the first steps."""
        pairs = count * (count - 1) / 2
        return count * self.first_s + pairs * (self.growth_s + (count - 2) / 3 * self.bend_s)

    def until(self, left_s: float, most: int) -> int:
        """The fewest steps that take at least left_s; at least 1, at most `most`."""
        if self.total_s(most) < left_s:
            return most
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            if self.total_s(middle) < left_s:
                low = middle + 1
            else:
                high = middle
        return low

    def num_slower(self, limit_s: float, count: int) -> int:
        """How many of the first steps take longer than limit_s."""
        edges_s = (self.first_s, self.step_s(count - 1))
        if self.bend_s == 0.0 or (self.growth_s > 0.0) == (self.bend_s > 0.0):  # monotone
            if max(edges_s) <= limit_s:
                return 0
            if min(edges_s) > limit_s:
                return count
        return sum([self.step_s(index) > limit_s for index in range(count)])
