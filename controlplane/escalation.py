"""How far batch may go to keep its promises: a level that follows the least slack, one step at a
time. Source: algorithms.md 2f.

No level changes a step that has a row of the top interactive class: the levels act through
Policy.loose_kappa, which workers use in the other steps only.
"""

from dataclasses import dataclass
from typing import Literal

Level = Literal[0, 1, 2, 3]
LEVEL_NAMES = ("harvest", "full steps", "longer steps", "short of workers")
# Slack below which a level is wanted; above it by BACK a level is left, so that none flickers.
SLACKS = (0.5, 0.2, 0.0)
BACK = 0.1
DWELL_S = 60.0  # at least between two changes; the certificate is tested once a minute
# Share of the ITL target that batch may fill in steps without a top-class row; 0: as in others. No
# token that is due waits for it, so beyond 1 it tells only where online prompts are alone.
LOOSE_KAPPAS = (0.0, 1.0, 2.0, 2.0)


@dataclass(slots=True)
class Escalation:
    """Of one model."""

    level: Level = 0
    changed_at_s: float = float("-inf")

    def assess(self, slack: float, now_s: float) -> bool:
        """Take the newest slack in; True when the level has changed."""
        wanted = sum(slack < limit for limit in SLACKS)
        if wanted < self.level and slack < SLACKS[self.level - 1] + BACK:
            wanted = self.level
        if wanted == self.level or now_s - self.changed_at_s < DWELL_S:
            return False
        step = 1 if wanted > self.level else -1
        self.level = self.level + step  # type: ignore[assignment]  # wanted is within 0 to 3
        self.changed_at_s = now_s
        return True
