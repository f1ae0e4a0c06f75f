"""Signs of life between step reports.

The link's thread sends them, so they keep coming while a long step runs in the engine's thread.
"""

import asyncio
from collections.abc import Callable

import msgspec

from controlplane import protocol
from gpuworkers.driver import Driver
from gpuworkers.link import Link


class Heart:
    """Sends a Heartbeat when nothing else left for `link.heartbeat_s`, and asks the device for its
    load as often."""

    def __init__(
        self,
        link: Link,
        driver: Driver,
        device_load: Callable[[], protocol.DeviceLoad | None],
    ) -> None:
        self._link = link
        self._driver = driver
        self._device_load = device_load
        self._device: protocol.DeviceLoad | None = None
        self._load: protocol.WorkerLoad | None = None  # of the newest report
        self._idle_s = 0.0  # told in heartbeats so far: reports of turns do not know of it

    def observe(self, load: protocol.WorkerLoad) -> protocol.WorkerLoad:
        """Take the newest load in; returns it with the device's and all idle time."""
        spent = msgspec.structs.replace(load.spent, idle_s=load.spent.idle_s + self._idle_s)
        self._load = msgspec.structs.replace(load, device=self._device, spent=spent)
        return self._load

    async def beat(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._device = self._device_load()
            now_s = loop.time()
            due_s = self._link.sent_at_s + self._link.heartbeat_s
            if now_s >= due_s:
                if self._load is not None and self._link.is_joined:
                    self._link.post(self._heartbeat(self._load, now_s))
                due_s = now_s + self._link.heartbeat_s
            await asyncio.sleep(due_s - now_s)

    def _heartbeat(self, load: protocol.WorkerLoad, now_s: float) -> protocol.Heartbeat:
        """The newest load; of its seconds only the idle ones have grown since."""
        since_s = self._driver.busy_since_s
        idle_s = self._driver.idle.take(now_s)
        self._idle_s += idle_s
        spent = msgspec.structs.replace(load.spent, idle_s=load.spent.idle_s + idle_s)
        load = self._load = msgspec.structs.replace(
            load, online_s=0.0, batch_s=0.0, idle_s=idle_s, device=self._device, spent=spent
        )
        return protocol.Heartbeat(load, 0.0 if since_s is None else max(0.0, now_s - since_s))
