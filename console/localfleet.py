"""The `local` fleet backend: workers of this machine, started and stopped as the plan asks.

A backend has three calls: `start` a worker of a role and model under a name, `drain` (it ends when
it is empty and is not started again), `stop`. What a start takes is measured by the plan, from the
call to the worker's Hello.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from console.workerprocs import WORKERS_MAX, WorkerProcs, WorkerSpec
from controlplane.domain import FleetOffered
from controlplane.errors import ConfigError
from controlplane.protocol import Role

STOP_GRACE_S = 5.0


def read_limits(workers_min: int, workers_max: int, num_now: int) -> tuple[int, int] | None:
    """The two numbers, or None for a fleet of fixed size. Raises ConfigError."""
    if workers_max == 0:
        if workers_min:
            raise ConfigError(f"--workers-min={workers_min}: needs --workers-max")
        return None
    if not 1 <= workers_max <= WORKERS_MAX:
        raise ConfigError(f"--workers-max={workers_max}: expected 1 to {WORKERS_MAX}")
    workers_min = workers_min or 1
    if not 1 <= workers_min <= workers_max:
        raise ConfigError(f"--workers-min={workers_min}: expected 1 to --workers-max")
    if not 1 <= num_now <= workers_max:
        raise ConfigError(f"--workers-max={workers_max}: {num_now} workers are to be started")
    return workers_min, workers_max


class LocalFleet:
    """Event loop's thread only."""

    def __init__(
        self,
        procs: WorkerProcs,
        templates: Mapping[str, WorkerSpec],
        devices: Sequence[str],
        limits: tuple[int, int],
    ) -> None:
        """`templates`: how a worker of each model is started; they take the devices in turn."""
        self._procs = procs
        self._templates = templates
        self._devices = devices
        self._device_of: dict[str, str] = {}
        self.limits = limits

    def offer(self) -> FleetOffered:
        """What the plan may do; call it when the first processes were started."""
        names = [view.name for view in self._procs.views()]
        for index, name in enumerate(names):
            self._device_of[name] = self._devices[index % len(self._devices)]
        return FleetOffered(*self.limits, tuple(names))

    def start(self, name: str, role: Role, model_id: str) -> None:
        """Raises ConfigError when it cannot be."""
        template = self._templates.get(model_id)
        if template is None:
            raise ConfigError(f"no worker of this machine can serve {model_id}")
        running = {view.name for view in self._procs.views()}
        used = Counter(device for name, device in self._device_of.items() if name in running)
        device = min(self._devices, key=lambda item: (used[item], self._devices.index(item)))
        self._procs.add(replace(template, role=role, device=device), name)
        self._device_of = {key: value for key, value in self._device_of.items() if key in running}
        self._device_of[name] = device

    def drain(self, name: str) -> None:
        """The worker was told to finish what it has."""
        self._procs.leave(name)

    def stop(self, name: str) -> None:
        self._procs.remove(name, STOP_GRACE_S)
