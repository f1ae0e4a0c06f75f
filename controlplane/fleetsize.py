"""How many workers run: between two numbers, started and stopped by a backend.

Up at once when the load that a cold start from now will not exceed (99 %) misses a target on who is
there and who is starting. Down by one when that load, on one worker less, is within .8 of each
target for six plans in a row, and every worker has been heard of: missing telemetry never stops
anybody. Batch is the reserve, so it asks for no worker. Source: algorithms.md 2e.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from controlplane.config import ControlPlaneConfig
from controlplane.domain import FleetOffered
from controlplane.planner import SHORT, SPARE, serving, strain_of
from controlplane.protocol import Role
from controlplane.registry import Worker
from controlplane.sizing import ModelLoad, Strain

DOWN_TICKS = 6
DWELL = 10.0  # a worker runs for at least so many cold starts
GAIN = 0.95  # one more worker must bring the strain below this share of what it is
COLD_START_WEIGHT = 0.3  # of one start in the running mean
NAMES_MAX = 4_096  # workers that may be stopped


@dataclass(frozen=True, slots=True)
class Start:
    name: str
    role: Role
    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    worker: Worker
    reason: str


@dataclass(frozen=True, slots=True)
class _Starting:
    model_id: str
    since_s: float


class FleetSizer:
    """Does nothing until a backend is offered."""

    def __init__(self, config: ControlPlaneConfig) -> None:
        self._config = config
        self._min = self._max = 0
        self._names: dict[str, None] = {}  # workers that may be stopped, oldest first
        self._starting: dict[str, _Starting] = {}
        self._num_started = 0
        self._num_failed = 0  # starts in a row
        self._start_at_s = 0.0  # not before
        self._num_spare: dict[str, int] = {}  # plans in a row with one worker to spare, by model
        self.cold_start_s = config.cold_start_s

    def offer(self, event: FleetOffered) -> None:
        assert 0 <= event.workers_min <= event.workers_max, event
        self._min, self._max = event.workers_min, event.workers_max
        for name in event.names[:NAMES_MAX]:
            self._names[name] = None

    def started(self, start: Start, now_s: float) -> None:
        """The backend was told."""
        self._starting[start.name] = _Starting(start.model_id, now_s)
        self._names[start.name] = None
        self._num_started += 1
        while len(self._names) > NAMES_MAX:
            del self._names[next(iter(self._names))]

    def joined(self, worker: Worker, now_s: float) -> None:
        """One that was starting is there: so long does it take."""
        begun = self._starting.pop(worker.hello.name, None)
        if begun is not None:
            seconds = now_s - begun.since_s
            self.cold_start_s += COLD_START_WEIGHT * (seconds - self.cold_start_s)
            self._num_failed = 0

    def failed(self, name: str, now_s: float) -> None:
        """It will not join: the next start waits, longer each time."""
        self._names.pop(name, None)
        if self._starting.pop(name, None) is not None:
            pause_s = self._config.start_pause_s * 2.0 ** min(self._num_failed, 5)
            self._num_failed += 1
            self._start_at_s = now_s + pause_s

    def draining(self, worker: Worker) -> None:
        """It is being emptied; `to_stop` names it when it is."""
        self._num_spare.clear()
        assert worker.hello.name in self._names, worker.hello.name

    def to_stop(self, workers: Iterable[Worker], now_s: float) -> list[str]:
        """Names to end now: drained ones, and starts that took too long."""
        names = []
        for worker in workers:
            if worker.status == "drained" and worker.hello.name in self._names:
                names.append(worker.hello.name)
                del self._names[worker.hello.name]
        for name, begun in list(self._starting.items()):
            if now_s - begun.since_s > self._config.start_s_max:
                self.failed(name, now_s)
                names.append(name)
        return names

    def plan(
        self, now_s: float, workers: Sequence[Worker], loads: Mapping[str, ModelLoad]
    ) -> list[Start | Drain]:
        """Starts, or one drain, or nothing."""
        if self._max == 0:
            return []
        here = [worker for worker in workers if worker.status in ("live", "loading")]
        missing = self._min - len(here) - len(self._starting)
        if missing > 0:
            why = f"{len(here)} workers run, at least {self._min} shall"
            return list(self._starts(now_s, self._any_model(here, loads), missing, here, why))
        if starts := self._up(now_s, here, loads):
            return list(starts)
        drain = self._down(now_s, workers, here, loads)
        return [drain] if drain else []

    # --- up

    def _up(
        self, now_s: float, here: Sequence[Worker], loads: Mapping[str, ModelLoad]
    ) -> list[Start]:
        for model_id in sorted(loads):
            members = serving(here, model_id)
            if not members:
                continue  # nobody shows what such a worker could do
            coming = sum(item.model_id == model_id for item in self._starting.values())
            coming += sum(item.swap is not None and item.swap.model_id == model_id for item in here)
            # A new worker is taken to be as the mean of those that are there.
            now = self._with_more(loads[model_id], members, coming)
            if now.worst <= SHORT:
                continue
            count, then = 0, now
            while count < self._room(here):
                more = self._with_more(loads[model_id], members, coming + count + 1)
                if more.worst > GAIN * then.worst:
                    break  # one more changes nothing
                count, then = count + 1, more
                if then.worst <= SHORT:
                    break
            why = (
                f"{model_id} would be at {now.worst:.2f} of its limits with {len(members)} workers"
                f" and {coming} coming, for at most {loads[model_id].outputs.per_s:.2f} requests/s;"
                f" at {then.worst:.2f} with {count} more, in about {self.cold_start_s:.0f} s"
            )
            if starts := self._starts(now_s, model_id, count, here, why):
                return starts
        return []

    def _with_more(self, load: ModelLoad, members: Sequence[Worker], count: int) -> Strain:
        more = [members[index % len(members)] for index in range(count)]
        return strain_of(load, [*members, *more], members, self._config.transfer_setup_s)

    def _room(self, here: Sequence[Worker]) -> int:
        """How many more may run, and be starting."""
        room = self._max - len(here) - len(self._starting)
        return max(0, min(room, self._config.starts_max - len(self._starting)))

    def _starts(
        self, now_s: float, model_id: str, count: int, here: Sequence[Worker], why: str
    ) -> list[Start]:
        if now_s < self._start_at_s or not model_id:
            return []
        count = min(count, self._room(here))
        role: Role = "mixed"
        if any(worker.role == "decode" for worker in serving(here, model_id)):
            role = "decode"  # the planner moves it to the other side when that is short
        names = [f"auto-{self._num_started + index + 1}" for index in range(count)]
        return [Start(name, role, model_id, f"{why}: {name} starts") for name in names]

    def _any_model(self, here: Sequence[Worker], loads: Mapping[str, ModelLoad]) -> str:
        """The one with the fewest workers."""
        models = sorted({worker.model_id for worker in here if worker.model_id} | set(loads))
        return min(models, key=lambda name: (len(serving(here, name)), name), default="")

    # --- down

    def _down(
        self,
        now_s: float,
        workers: Sequence[Worker],
        here: Sequence[Worker],
        loads: Mapping[str, ModelLoad],
    ) -> Drain | None:
        if len(here) <= self._min or self._starting or not self._is_all_heard(workers, now_s):
            self._num_spare.clear()
            return None
        found: Drain | None = None
        for model_id in sorted({worker.model_id for worker in here}):
            members = serving(here, model_id)
            worker = self._least(now_s, members)
            load = loads.get(model_id)
            if worker is None or load is None or len(members) < 2:
                self._num_spare.pop(model_id, None)
                continue
            rest = [item for item in members if item is not worker]
            less = strain_of(load, rest, members, self._config.transfer_setup_s)
            if less.worst > SPARE or not _keeps_sides(worker, rest):
                self._num_spare.pop(model_id, None)
                continue
            self._num_spare[model_id] = self._num_spare.get(model_id, 0) + 1
            if self._num_spare[model_id] < DOWN_TICKS or found is not None:
                continue
            found = Drain(
                worker,
                f"{model_id} would be at {less.worst:.2f} of its limits without"
                f" {worker.worker_id}, for {DOWN_TICKS} plans at most {SPARE}, for at most"
                f" {load.outputs.per_s:.2f} requests/s: it drains and stops",
            )
        return found

    def _is_all_heard(self, workers: Sequence[Worker], now_s: float) -> bool:
        """Nobody is silent, lost a moment ago, or without a report."""
        for worker in workers:
            if worker.status == "lost" and now_s - worker.heard_at_s < self._config.plan_window_s:
                return False
            is_here = worker.status in ("live", "loading")
            if is_here and (worker.load is None or worker.is_suspect(now_s, self._config)):
                return False
        return True

    def _least(self, now_s: float, members: Sequence[Worker]) -> Worker | None:
        """The least used that may go: ours, long enough here, fixed by nobody."""
        dwell_s = max(self._config.plan_dwell_s, DWELL * self.cold_start_s)
        able = [
            worker
            for worker in members
            if worker.hello.name in self._names
            and worker.status == "live"
            and now_s - worker.joined_at_s >= dwell_s
            and now_s >= worker.held_until_s
        ]
        return min(
            able,
            key=lambda item: (len(item.reservations), -len(item.worker_id), item.worker_id),
            default=None,
        )

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {
            "starts": (len(self._starting), self._config.starts_max),
            "fleet names": (len(self._names), NAMES_MAX),
        }


def _keeps_sides(worker: Worker, rest: Sequence[Worker]) -> bool:
    """A model with both sides keeps both; the planner may empty one of them first."""
    roles = {item.role for item in rest}
    return worker.role in roles or "mixed" in roles or worker.role == "mixed"
