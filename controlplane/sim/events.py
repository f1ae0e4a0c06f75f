"""Virtual time: a heap of what happens when, and the one seeded source of chance."""

import heapq
import math
import random
from collections.abc import Callable
from itertools import count

Chance = random.Random

EVENTS_MAX = 1_000_000  # waiting at once; more means that something schedules itself for ever


class Events:
    """Runs callbacks in order of time; equal times run in the order in which they were added."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.num_run = 0
        self.random = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        assert at_s >= self.now_s, f"{at_s} lies before {self.now_s}"
        assert len(self._heap) < EVENTS_MAX, f"{EVENTS_MAX} events wait"
        heapq.heappush(self._heap, (at_s, next(self._order), action))

    @property
    def next_at_s(self) -> float:
        """When the next thing happens; infinite when nothing waits."""
        return self._heap[0][0] if self._heap else math.inf

    def run(self, until_s: float) -> None:
        """Everything up to and including until_s."""
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._heap)
            self.num_run += 1
            action()
        self.now_s = until_s
