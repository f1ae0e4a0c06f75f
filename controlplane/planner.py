"""Workers per role: every few seconds, does one worker change sides?

Demand is measured: seconds of prefill per second that prompts long enough for a handoff asked for,
and the share of time that decode workers were busy with online rows. One worker moves at a time,
after evidence in a whole window, so that noise in a steady mix moves none. That is the fast
correction; under it lies a floor from a forecast of the load and from queueing theory (forecast.py,
sizing.py), which moves a worker before the load is there. The floor may only add to a side that the
correction does not just take from. Source: algorithms.md 2e.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil

from controlplane.config import ControlPlaneConfig
from controlplane.demand import Demand, Window
from controlplane.domain import GenerateRequest
from controlplane.latency import prompt_token_s
from controlplane.protocol import Role, WorkerLoad
from controlplane.registry import Worker
from controlplane.sizing import (
    BUSY_MAX,
    DECODE_SHARE,
    DecodeLoad,
    ModelLoad,
    PromptLoad,
    Station,
    Strain,
    decode_workers,
    prefill_workers,
    strain,
)

NODE_LEVEL = 0.99  # of the forecast that decides how many workers run
SAMPLES_MAX = 20_000  # reports of one window; the newest count
FLOOR_TICKS = 2  # plans in a row in which the forecast must ask for the same change,
FLOOR_TICKS_SHORT = 1  # or one, when a target is predicted to be missed
MOVED_SHARE_MAX = 0.1  # of a model's workers that one plan moves, at least one
SHIFT_DWELL = 10.0  # a worker stays with a model for so many times what changing it takes
SHORT = 1.0  # strain of a model above which it wants a worker of another
SPARE = 0.8  # and below which, with one less, it can give one
SWAP_WEIGHT = 0.3  # of one measured change of model in the running mean
PREFILL_BUSY = 0.85  # plan with a prefill pool no busier than this (algorithms.md 2e)
PREFILL_SPARE = 0.5  # the pool must stay below this with one worker less
PREFILL_NONE = 0.05  # seconds of prefill per second that do not earn a worker of their own
LONG_RARE = 0.05  # share of prompts that may be long when a prefill worker is taken away
PREFILL_START = 0.1  # demand that earns the first prefill worker
LONG_COMMON = 0.2  # share of long prompts that earns it on a device too fast for a demand
DECODE_BUSY = 0.7
REQUESTS_MIN = 5  # online requests in the window, else there is no mix to speak of
LONG_MIN = 3  # long prompts in the window before one makes room for them


@dataclass(frozen=True, slots=True)
class Flip:
    worker: Worker
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Shift:
    """A worker serves another model."""

    worker: Worker
    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Needs:
    """Workers that the forecast asks for, and the load that it expects."""

    prefill: int
    others: int
    prompts: PromptLoad  # long ones
    outputs: DecodeLoad


@dataclass(frozen=True, slots=True)
class SplitView:
    """How the live workers of one model are divided, and how the forecast would divide them."""

    model_id: str
    num_prefill: int
    num_others: int  # decode and mixed
    needs: Needs | None  # None: too little seen for a forecast
    horizon_s: float  # of the forecast


@dataclass(slots=True)
class _Wish:
    """Of the forecast's floor: the same side, so many plans in a row."""

    role: Role | None = None
    num_ticks: int = 0


@dataclass(frozen=True, slots=True)
class _Load:
    """One window: demand and busy in seconds per second, workers by side, requests."""

    demand: float
    busy: float  # of those that decode,
    local: float  # and what of it long prompts asked for that were computed there
    prefill_speed: float  # of the prefill workers, in workers of the mean speed
    num_prefill: int
    num_decode: int
    num_requests: int
    num_long: int
    need_decode: int  # workers for the sequences alone; as many as decode when nothing is known

    @property
    def can_spare_prefill(self) -> bool:
        """Prefill workers have next to nothing to do, or decode needs one more than they do."""
        if self.num_prefill == 0 or self.num_requests < REQUESTS_MIN:
            return False
        if self.num_decode == 0:
            return True
        is_idle = self.demand / self.prefill_speed < PREFILL_NONE
        if is_idle and self.num_long <= LONG_RARE * self.num_requests:
            return True
        if self.num_prefill == 1:
            return False
        with_one_less = self.prefill_speed * (1.0 - 1.0 / self.num_prefill)
        if self.need_decode > self.num_decode and self.demand / with_one_less < PREFILL_BUSY:
            return True
        is_spare = self.demand / with_one_less < PREFILL_SPARE
        return is_spare and self.busy / self.num_decode > DECODE_BUSY

    @property
    def is_short_of_prefill(self) -> bool:
        """Long prompts ask for more than prefill workers give, and decode can spare one."""
        if self.num_decode < 2 or self.num_long < LONG_MIN:
            return False
        if self.num_prefill == 0:
            is_common = self.num_long >= LONG_COMMON * self.num_requests
            return is_common or self.demand > PREFILL_START
        if self.demand / self.prefill_speed <= PREFILL_BUSY:
            return False
        if self.busy / (self.num_decode - 1) < DECODE_BUSY:
            return True
        # Prompts that spill over keep decode workers busy too, and would go with the worker.
        own = (self.busy - self.local) / (self.num_decode - 1)
        return own < DECODE_BUSY and self.need_decode < self.num_decode


@dataclass(slots=True)
class Planner:
    config: ControlPlaneConfig
    _demands: dict[str, Demand] = field(default_factory=dict)  # as many as models served
    _wishes: dict[str, _Wish] = field(default_factory=dict)
    _busy_s: deque[tuple[float, str, float]] = field(
        default_factory=lambda: deque(maxlen=SAMPLES_MAX)
    )
    _planned_at_s: float = 0.0
    _started_at_s: float | None = None
    _swap_s: float = 0.0  # measured; 0: not yet

    def observe_request(
        self,
        now_s: float,
        request: GenerateRequest,
        prefill_s: float,
        is_long: bool,
        is_local: bool,
    ) -> None:
        """An online request was admitted; `is_local`: all of it on one worker."""
        demand = self._demands.get(request.model_id)
        if demand is None:
            demand = self._demands[request.model_id] = Demand(self.config)
        demand.admitted(request, prefill_s, is_long, is_local, now_s)

    def observe_ttft(self, model_id: str, predicted_s: float, actual_s: float) -> None:
        """The first token of a request is out."""
        if demand := self._demands.get(model_id):
            demand.ttft_ratio.observe(predicted_s, actual_s)

    def observe_end(self, request: GenerateRequest, output_tokens: int) -> None:
        """An online request has completed: only now is the size of its output known."""
        if demand := self._demands.get(request.model_id):
            demand.ended(request.prompt_tokens, output_tokens)

    def observe_load(self, now_s: float, worker: Worker, load: WorkerLoad) -> None:
        """A worker reports: what it spent on online rows, and how its last step was predicted."""
        if worker.role != "prefill" and load.online_s > 0.0:
            self._busy_s.append((now_s, worker.worker_id, load.online_s))
        demand = self._demands.get(worker.model_id)
        if demand is not None:
            ratio = demand.prefill_ratio if worker.role == "prefill" else demand.decode_ratio
            ratio.observe(load.predicted_s, load.measured_s)

    def observe_swap(self, seconds: float) -> None:
        """A worker has changed its model."""
        weight = SWAP_WEIGHT if self._swap_s else 1.0
        self._swap_s += weight * (seconds - self._swap_s)

    @property
    def swap_s(self) -> float:
        return self._swap_s or self.config.swap_s

    def is_due(self, now_s: float) -> bool:
        """Is it time for a plan, with a whole window seen? Ask at each tick."""
        if self._started_at_s is None:
            self._started_at_s = self._planned_at_s = now_s
        if now_s - self._planned_at_s < self.config.plan_every_s:
            return False
        self._planned_at_s = now_s
        return now_s - self._started_at_s >= self.config.plan_window_s

    def plan(self, now_s: float, workers: Sequence[Worker]) -> list[Flip | Shift]:
        """What shall change now: roles within one model, or one worker's model."""
        while self._busy_s and self._busy_s[0][0] <= now_s - self.config.plan_window_s:
            self._busy_s.popleft()
        live = [worker for worker in workers if worker.status == "live"]
        model_ids = {model.model_id for worker in live for model in worker.hello.models}
        for model_id in sorted(model_ids):
            serving = [worker for worker in live if worker.has_model(model_id)]
            if len(serving) < 2 or any(item.is_suspect(now_s, self.config) for item in serving):
                continue  # alone, or not heard of: the plan stays
            flips = self._flips(now_s, model_id, serving) or self._floor(now_s, model_id, serving)
            if flips:
                return list(flips)
        for model_id in [name for name in self._demands if name not in model_ids]:
            if not any(worker.swap and worker.swap.model_id == model_id for worker in workers):
                del self._demands[model_id]
                self._wishes.pop(model_id, None)
        shift = self._shift(now_s, workers)
        return [shift] if shift else []

    def loads(self, now_s: float) -> dict[str, ModelLoad]:
        """What each served model is asked for, or will be by the time that a new worker helps."""
        return {name: demand.load(now_s, NODE_LEVEL) for name, demand in self._demands.items()}

    def splits(self, now_s: float, workers: Iterable[Worker]) -> tuple[SplitView, ...]:
        """Of each model that a live worker serves."""
        live = [worker for worker in workers if worker.status == "live"]
        views = []
        for model_id in sorted({model.model_id for item in live for model in item.hello.models}):
            members = serving(live, model_id)
            num_prefill = sum(worker.role == "prefill" for worker in members)
            views.append(
                SplitView(
                    model_id,
                    num_prefill,
                    len(members) - num_prefill,
                    self._needs(now_s, model_id, members),
                    self.config.forecast_horizon_s,
                )
            )
        return tuple(views)

    # --- roles: the forecast's floor

    def _floor(self, now_s: float, model_id: str, live: Sequence[Worker]) -> list[Flip]:
        """Workers towards what the forecast needs, when it has asked for that long enough and the
        other side can spare them."""
        needs = self._needs(now_s, model_id, live)
        if needs is None:
            return []
        prefillers = [worker for worker in live if worker.role == "prefill"]
        decoders = [worker for worker in live if worker.role != "prefill"]
        need_prefill, need_decode = needs.prefill, needs.others
        prompts, outputs = needs.prompts, needs.outputs
        role: Role | None = None
        if need_prefill > len(prefillers) and len(decoders) > max(1, need_decode):
            role, missing = "prefill", need_prefill - len(prefillers)
            spare = len(decoders) - max(1, need_decode)
            busy = prompts.per_s * prompts.service_s
            is_short = busy > BUSY_MAX * len(prefillers)
        elif need_decode > len(decoders) and len(prefillers) > need_prefill:
            role, missing = "decode", need_decode - len(decoders)
            spare = len(prefillers) - need_prefill
            is_short = True
        wish = self._wishes.setdefault(model_id, _Wish())
        wish.num_ticks = wish.num_ticks + 1 if role == wish.role else 1
        wish.role = role
        if role is None or wish.num_ticks < (FLOOR_TICKS_SHORT if is_short else FLOOR_TICKS):
            return []
        reason = (
            f"forecast for {self.config.forecast_horizon_s:.0f} s from now: at most"
            f" {prompts.per_s:.2f} long prompts/s of {prompts.service_s:.2f} s need {need_prefill}"
            f" prefill workers ({len(prefillers)} now), {outputs.per_s:.2f} requests/s of"
            f" {outputs.output_tokens:.0f} tokens need {need_decode} others ({len(decoders)} now)"
        )
        pool = decoders if role == "prefill" else prefillers
        return self._movers(now_s, pool, role, min(missing, spare), len(live), reason)

    def _needs(self, now_s: float, model_id: str, live: Sequence[Worker]) -> Needs | None:
        """What the forecast asks of the workers that serve the model."""
        demand = self._demands.get(model_id)
        if demand is None:
            return None
        demand.advance(now_s)
        if not demand.has_history or not demand.has_sizes:
            return None
        prompts = demand.prompts(demand.long.upper(), True)
        outputs = demand.outputs(demand.all.upper())
        corrections = demand.corrections()
        model = next((item for item in live if item.role != "prefill"), live[0])
        return Needs(
            prefill=prefill_workers(
                prompts, demand.ttft_s, self.config.transfer_setup_s, corrections
            ),
            others=decode_workers(
                outputs,
                model.step_model,
                DECODE_SHARE * demand.itl_s,
                model.kv_tokens,
                corrections,
            ),
            prompts=prompts,
            outputs=outputs,
        )

    # --- roles: the fast correction

    def _flips(self, now_s: float, model_id: str, live: Sequence[Worker]) -> list[Flip]:
        """For the workers that serve one model."""
        window_s = self.config.plan_window_s
        prefillers = [worker for worker in live if worker.role == "prefill"]
        decoders = [worker for worker in live if worker.role != "prefill"]
        known = self._demands.get(model_id)
        window = known.window(now_s) if known else Window(0, 0, 0.0, 0.0, 0.0)
        demand = window.long_s / window_s
        ids = {worker.worker_id for worker in decoders}
        busy = sum(seconds for _, worker_id, seconds in self._busy_s if worker_id in ids) / window_s
        need = self._need_decode(known, window, decoders) if known else len(decoders)
        facts = (
            f"in {window_s:.0f} s {window.num_long} of {window.num_requests} prompts were long,"
            f" asking for {demand:.2f} s/s of prefill from {len(prefillers)} prefill workers;"
            f" {len(decoders)} others were busy {busy:.2f} s/s, sequences need {need}"
        )
        load = _Load(
            demand=demand,
            busy=busy,
            local=window.local_s / window_s,
            prefill_speed=_speed(prefillers, live),
            num_prefill=len(prefillers),
            num_decode=len(decoders),
            num_requests=window.num_requests,
            num_long=window.num_long,
            need_decode=need,
        )
        if load.can_spare_prefill:
            return self._movers(now_s, prefillers, "decode", 1, len(live), facts)
        if load.is_short_of_prefill:
            missing = ceil(demand / PREFILL_BUSY - load.prefill_speed)
            missing = min(max(1, missing), len(decoders) - 1)
            return self._movers(now_s, decoders, "prefill", missing, len(live), facts)
        return []

    def _need_decode(self, demand: Demand, window: Window, decoders: Sequence[Worker]) -> int:
        """Workers for the window's sequences; as many as there are when their sizes or their
        device are unknown."""
        if not demand.has_sizes or not decoders:
            return len(decoders)
        return decode_workers(
            demand.outputs(window.num_requests / self.config.plan_window_s),
            decoders[0].step_model,
            DECODE_SHARE * demand.itl_s,
            decoders[0].kv_tokens,
            demand.corrections(),
        )

    def _movers(
        self, now_s: float, pool: Sequence[Worker], role: Role, count: int, size: int, facts: str
    ) -> list[Flip]:
        """So many of the pool's workers, least used first, within what one plan may move. Prompts
        go to fast workers, sequences to those with much KV."""
        able = [item for item in pool if role == "decode" or item.hello.handoff_address is not None]
        free = self._free(now_s, able, self.config.plan_dwell_s)
        free.sort(key=lambda item: (len(item.reservations), _worth(item, role), *_age(item)))
        count = min(count, max(1, int(MOVED_SHARE_MAX * size)))
        does = "prefills" if role == "prefill" else "decodes"
        return [
            Flip(worker, role, f"{facts}: {worker.worker_id} {does} from now on")
            for worker in free[:count]
        ]

    def _free(self, now_s: float, workers: Sequence[Worker], dwell_s: float) -> list[Worker]:
        """Those that dwelt long enough and that no operator fixed."""
        return [
            worker
            for worker in workers
            if now_s - worker.role_since_s >= dwell_s and now_s >= worker.held_until_s
        ]

    # --- models

    def _shift(self, now_s: float, workers: Sequence[Worker]) -> Shift | None:
        """One worker to the model that is predicted to miss a target, from one that can spare it.
        The last worker of a model stays."""
        if any(worker.swap is not None for worker in workers):
            return None  # its effect is not there yet
        live = [worker for worker in workers if worker.status == "live"]
        strains: dict[str, Strain] = {}
        for model_id in sorted(self._demands):
            members = serving(live, model_id)
            strains[model_id] = self._strain(now_s, model_id, members, members)
        for model_id in sorted(strains, key=lambda name: (-strains[name].worst, name)):
            now = strains[model_id]
            if now.worst <= SHORT:
                return None
            able = [worker for worker in live if worker.can_load(model_id)]
            free = self._free(now_s, able, SHIFT_DWELL * self.swap_s)
            free.sort(key=lambda worker: (len(worker.reservations), *_age(worker)))
            for worker in free:
                members = serving(live, worker.model_id)
                others = [item for item in members if item is not worker]
                if not others or any(item.is_suspect(now_s, self.config) for item in others):
                    continue
                rest = self._strain(now_s, worker.model_id, others, members)
                if rest.worst > SPARE:
                    continue
                short = serving(live, model_id)
                gained = self._strain(now_s, model_id, [*short, worker], short or [worker])
                if gained.worst >= now.worst:
                    continue  # no worker mends it
                return Shift(
                    worker,
                    model_id,
                    f"{model_id} is at {now.worst:.2f} of its limits with"
                    f" {len(short)} workers and would be at {gained.worst:.2f},"
                    f" {worker.model_id} at {rest.worst:.2f} with {len(others)}:"
                    f" {worker.worker_id} changes over, in about {self.swap_s:.0f} s",
                )
        return None

    def _strain(
        self, now_s: float, model_id: str, workers: Sequence[Worker], among: Sequence[Worker]
    ) -> Strain:
        demand = self._demands.get(model_id)
        if demand is None:
            return Strain(0.0, 0.0, 0.0, 0)
        return strain_of(demand.load(now_s), workers, among, self.config.transfer_setup_s)


def serving(workers: Sequence[Worker], model_id: str) -> list[Worker]:
    return [worker for worker in workers if worker.has_model(model_id)]


def strain_of(
    load: ModelLoad, workers: Sequence[Worker], among: Sequence[Worker], transfer_s: float
) -> Strain:
    """How near these workers would be to the model's limits; sizes were measured on `among`."""
    stations = [
        Station(prompt_token_s(worker.step_model), worker.step_model, worker.kv_tokens)
        for worker in workers
    ]
    token_s = sum(prompt_token_s(worker.step_model) for worker in among) / max(1, len(among))
    return strain(load, stations, token_s, transfer_s)


def _speed(workers: Sequence[Worker], among: Sequence[Worker]) -> float:
    """In workers of the mean speed: one that is twice as fast counts as two."""
    mean_s = sum(prompt_token_s(worker.step_model) for worker in among) / len(among)
    return sum(mean_s / prompt_token_s(worker.step_model) for worker in workers)


def _worth(worker: Worker, role: Role) -> float:
    """The least is best for the role: seconds per prompt token, or less KV than others."""
    return prompt_token_s(worker.step_model) if role == "prefill" else -float(worker.kv_tokens)


def _age(worker: Worker) -> tuple[int, str]:
    """Oldest first: ids count up."""
    return (len(worker.worker_id), worker.worker_id)
