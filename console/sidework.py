"""Celery inside of `serve`, for an installation without Redis: one thread runs tasks, one sweeps.

Tasks of a process that ends are found again by the next sweep, so the threads are not waited for
longer than STOP_S_MAX.
"""

import threading

from celery.worker import state as worker_state
from django.db import connections

from console import tasks
from console.celery import app

STOP_S_MAX = 2.0


class SideWork:
    """The embedded consumer; `start` once."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="tasks", daemon=True),
            threading.Thread(target=self._sweep, name="sweep", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """After the task in hand, or STOP_S_MAX."""
        self._stopping.set()
        worker_state.should_stop = 0
        for thread in self._threads:
            thread.join(STOP_S_MAX)

    def _work(self) -> None:
        worker = app.WorkController(
            pool_cls="solo",
            concurrency=1,
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        worker.start()

    def _sweep(self) -> None:
        while True:
            tasks.sweep.delay()
            if self._stopping.wait(tasks.SWEEP_S):
                connections.close_all()
                return
