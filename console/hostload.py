"""How full this process and its machine are, as shares for the plane's overload ladder."""

import logging
import os
import shutil
from pathlib import Path

LAG_S_MAX = 1.0  # of the event loop, lasting: one late turn says nothing
LAG_WEIGHT = 0.1  # of one turn of the control loop in the mean lag
DISK_FREE_BYTES = 2 << 30  # what is free beyond it is plenty
STATM, MEMINFO = Path("/proc/self/statm"), Path("/proc/meminfo")

logger = logging.getLogger(__name__)


class HostMeter:
    """Touched on the event loop only; reads two small files of /proc and the free disk space."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lag_s = 0.0
        self._memory_bytes = _memory_bytes()

    def observe_lag(self, lag_s: float) -> None:
        """At each turn of the control loop."""
        self._lag_s += LAG_WEIGHT * (lag_s - self._lag_s)

    def signals(self, facts_waiting: int, facts_max: int) -> dict[str, float]:
        """Shares of the limits: event loop, writes that wait for the database, memory, disk."""
        try:
            free_bytes = shutil.disk_usage(self._folder).free
        except OSError as error:
            logger.warning("free space of %s is unknown: %s", self._folder, error)
            free_bytes = DISK_FREE_BYTES
        return {
            "loop": self._lag_s / LAG_S_MAX,
            "database": facts_waiting / facts_max,
            "memory": self._resident_bytes() / self._memory_bytes if self._memory_bytes else 0.0,
            "disk": max(0.0, 1.0 - free_bytes / DISK_FREE_BYTES),
        }

    def _resident_bytes(self) -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory_bytes() -> int:
    """Of the machine; 0 where /proc does not tell."""
    if not MEMINFO.exists():
        return 0
    line = next(row for row in MEMINFO.read_text().splitlines() if row.startswith("MemTotal:"))
    return int(line.split()[1]) << 10
