"""Random faults for the worker processes of a server: `kill -9`, and SIGSTOP for a while."""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Literal

from tests.e2e.harness import Server

STOP_SHARE = 0.4  # of the faults; the others kill
STOP_S = (1.0, 6.0)  # a worker is given up after 3 s of silence: some wake up before, some after
POLL_S = 0.1

Kind = Literal["kill", "stop"]


@dataclass(frozen=True)
class Fault:
    kind: Kind
    worker: str
    at_s: float
    seconds: float  # of a stop


@dataclass
class Injector:
    """One fault after the other, each after a pause and once `live_min` workers are live."""

    server: Server
    num_workers: int
    chance: random.Random
    live_min: int
    pause_s: tuple[float, float]
    done: list[Fault] = field(default_factory=list)
    _stopped: dict[int, float] = field(default_factory=dict)  # process id -> when it goes on

    def run(self, count: int, ends_at_s: float) -> None:
        """Returns after `count` faults and the recovery from the last, or when the time is over."""
        try:
            while len(self.done) < count:
                if not self._wait(self.chance.uniform(*self.pause_s), self.live_min, ends_at_s):
                    return
                self._inject()
            self._wait(0.0, self.num_workers, ends_at_s)
        finally:
            self._wake(float("inf"))

    def _inject(self) -> None:
        pids = self.server.worker_pids()
        names = sorted(name for name, pid in pids.items() if pid not in self._stopped)
        if not names:
            return
        worker = self.chance.choice(names)
        is_stop = self.chance.random() < STOP_SHARE
        seconds = self.chance.uniform(*STOP_S) if is_stop else 0.0
        now_s = time.monotonic()
        os.kill(pids[worker], signal.SIGSTOP if is_stop else signal.SIGKILL)
        if is_stop:
            self._stopped[pids[worker]] = now_s + seconds
        self.done.append(Fault("stop" if is_stop else "kill", worker, now_s, seconds))

    def _wait(self, pause_s: float, live_min: int, ends_at_s: float) -> bool:
        """False when the time is over."""
        not_before_s = time.monotonic() + pause_s
        while (now_s := time.monotonic()) < ends_at_s:
            self._wake(now_s)
            if now_s >= not_before_s and self.server.num_live() >= live_min:
                return True
            time.sleep(POLL_S)
        return False

    def _wake(self, now_s: float) -> None:
        for pid, until_s in list(self._stopped.items()):
            if until_s <= now_s:
                del self._stopped[pid]
                os.kill(pid, signal.SIGCONT)
