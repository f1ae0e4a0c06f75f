"""Workers per role: every few seconds, does one worker change sides?

Demand is measured: seconds of prefill per second that prompts long enough for a handoff asked for,
and the share of time that decode workers were busy with online rows. One worker moves at a time,
after evidence in a whole window, so that noise in a steady mix moves none. That is the fast
correction; under it lies a floor from a forecast of the load and from queueing theory (forecast.py,
sizing.py), which moves a worker before the load is there. The floor may only add to a side that the
correction does not just take from. Source: algorithms.md 2e.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest
from controlplane.forecast import Forecast
from controlplane.protocol import Role
from controlplane.registry import Worker
from controlplane.sizing import DecodeLoad, PromptLoad, decode_workers, prefill_workers

SIZES_MAX = 500  # newest prompts and outputs that mean sizes are taken of
DECODE_SHARE = 0.6  # of the ITL target that decode steps are planned to fill: batch still fits
FLOOR_TICKS = 2  # plans in a row in which the forecast must ask for the same change
SAMPLES_MAX = 20_000  # requests, and reports, of one window; the newest count
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
class _Arrival:
    at_s: float
    model_id: str
    prefill_s: float  # of a prompt that handing off would serve, else 0


@dataclass(frozen=True, slots=True)
class _Ended:
    """A finished online request, for mean sizes."""

    prompt_tokens: int
    output_tokens: int


class _History:
    """What the floor of one model is computed from."""

    def __init__(self, config: ControlPlaneConfig) -> None:
        bin_s, horizon_s = config.forecast_bin_s, config.forecast_horizon_s
        self.long = Forecast(bin_s, horizon_s)  # prompts that handing off would serve
        self.all = Forecast(bin_s, horizon_s)
        self.services_s: deque[float] = deque(maxlen=SIZES_MAX)  # of long prompts
        self.ended: deque[_Ended] = deque(maxlen=SIZES_MAX)
        self.ttft_s = self.itl_s = float("inf")  # the strictest targets seen
        self.num_ticks_short = 0  # in a row that the floor asked for the same change
        self.wanted: Role | None = None

    def prompt_load(self) -> PromptLoad:
        services = sorted(self.services_s)
        if not services:
            return PromptLoad(0.0, 1.0, 1.0, 1.0)
        mean_s = sum(services) / len(services)
        variance = sum((value - mean_s) ** 2 for value in services) / len(services)
        p99_s = services[min(len(services) - 1, int(0.99 * len(services)))]
        cv2 = variance / max(mean_s, 1e-9) ** 2
        return PromptLoad(self.long.upper(), mean_s, p99_s, cv2)

    def decode_load(self) -> DecodeLoad:
        count = max(1, len(self.ended))
        output = sum(item.output_tokens for item in self.ended) / count
        prompt = sum(item.prompt_tokens for item in self.ended) / count
        return DecodeLoad(self.all.upper(), output, prompt + output / 2.0)


@dataclass(frozen=True, slots=True)
class _Load:
    """One window: demand and busy in seconds per second, workers by side, requests."""

    demand: float
    busy: float
    num_prefill: int
    num_decode: int
    num_requests: int
    num_long: int

    @property
    def can_spare_prefill(self) -> bool:
        """Prefill workers have next to nothing to do, or decode needs one more than they do."""
        if self.num_prefill == 0 or self.num_requests < REQUESTS_MIN:
            return False
        if self.num_decode == 0:
            return True
        is_idle = self.demand / self.num_prefill < PREFILL_NONE
        if is_idle and self.num_long <= LONG_RARE * self.num_requests:
            return True
        if self.num_prefill == 1:
            return False
        is_spare = self.demand / (self.num_prefill - 1) < PREFILL_SPARE
        return is_spare and self.busy / self.num_decode > DECODE_BUSY

    @property
    def is_short_of_prefill(self) -> bool:
        """Long prompts ask for more than prefill workers give, and decode can spare one."""
        if self.num_decode < 2 or self.num_long < LONG_MIN:
            return False
        if self.num_prefill == 0:
            is_common = self.num_long >= LONG_COMMON * self.num_requests
            return is_common or self.demand > PREFILL_START
        is_over = self.demand / self.num_prefill > PREFILL_BUSY
        return is_over and self.busy / (self.num_decode - 1) < DECODE_BUSY


@dataclass(slots=True)
class Planner:
    config: ControlPlaneConfig
    _arrivals: deque[_Arrival] = field(default_factory=lambda: deque(maxlen=SAMPLES_MAX))
    _busy_s: deque[tuple[float, str, float]] = field(
        default_factory=lambda: deque(maxlen=SAMPLES_MAX)
    )
    _planned_at_s: float = 0.0
    _started_at_s: float | None = None
    _histories: dict[str, _History] = field(default_factory=dict)  # as many as models served

    def observe_request(
        self, now_s: float, request: GenerateRequest, prefill_s: float, is_long: bool
    ) -> None:
        """An online request started for the first time."""
        model_id = request.model_id
        self._arrivals.append(_Arrival(now_s, model_id, prefill_s if is_long else 0.0))
        history = self._histories.setdefault(model_id, _History(self.config))
        history.all.add(1.0, now_s)
        history.ttft_s = min(history.ttft_s, request.slo.ttft_s_p99)
        history.itl_s = min(history.itl_s, request.slo.itl_s_p99)
        if is_long:
            history.long.add(1.0, now_s)
            history.services_s.append(prefill_s)

    def observe_end(self, request: GenerateRequest, output_tokens: int) -> None:
        """An online request has completed: only now is the size of its output known."""
        if history := self._histories.get(request.model_id):
            history.ended.append(_Ended(request.prompt_tokens, output_tokens))

    def observe_decode(self, now_s: float, worker_id: str, online_s: float) -> None:
        """A worker that decodes spent `online_s` on online rows since its last report."""
        if online_s > 0.0:
            self._busy_s.append((now_s, worker_id, online_s))

    def plan(self, now_s: float, workers: Sequence[Worker]) -> Flip | None:
        """At most one role change; call at each tick."""
        if self._started_at_s is None:
            self._started_at_s = self._planned_at_s = now_s
        if now_s - self._planned_at_s < self.config.plan_every_s:
            return None
        self._planned_at_s = now_s
        window_s = self.config.plan_window_s
        while self._arrivals and self._arrivals[0].at_s <= now_s - window_s:
            self._arrivals.popleft()
        while self._busy_s and self._busy_s[0][0] <= now_s - window_s:
            self._busy_s.popleft()
        if now_s - self._started_at_s < window_s:
            return None
        live = [worker for worker in workers if worker.status == "live"]
        model_ids = {model.model_id for worker in live for model in worker.hello.models}
        for model_id in sorted(model_ids):
            serving = [worker for worker in live if worker.has_model(model_id)]
            if len(serving) < 2:
                continue
            flip = self._flip(now_s, model_id, serving) or self._floor(now_s, model_id, serving)
            if flip is not None:
                return flip
        for model_id in [name for name in self._histories if name not in model_ids]:
            del self._histories[model_id]
        return None

    def _floor(self, now_s: float, model_id: str, live: Sequence[Worker]) -> Flip | None:
        """One worker towards what the forecast needs, when it has asked for that twice in a row
        and the other side can spare one."""
        history = self._histories.get(model_id)
        if history is None:
            return None
        history.all.advance(now_s)
        history.long.advance(now_s)
        if history.all.num_bins * self.config.forecast_bin_s < self.config.forecast_s_min:
            return None
        if not history.ended:
            return None
        prefillers = [worker for worker in live if worker.role == "prefill"]
        decoders = [worker for worker in live if worker.role != "prefill"]
        sample = live[0]
        prompts, outputs = history.prompt_load(), history.decode_load()
        need_prefill = prefill_workers(prompts, history.ttft_s, self.config.transfer_setup_s)
        need_decode = decode_workers(
            outputs,
            sample.step_model,
            DECODE_SHARE * history.itl_s,
            min(worker.hello.num_blocks * worker.hello.block_tokens for worker in live),
        )
        role: Role | None = None
        if need_prefill > len(prefillers) and len(decoders) > max(1, need_decode):
            role = "prefill"
        elif need_decode > len(decoders) and len(prefillers) > need_prefill:
            role = "decode"
        history.num_ticks_short = history.num_ticks_short + 1 if role == history.wanted else 1
        history.wanted = role
        if role is None or history.num_ticks_short < FLOOR_TICKS:
            return None
        pool = decoders if role == "prefill" else prefillers
        ready = [item for item in pool if role == "decode" or item.hello.handoff_address]
        worker = self._mover(now_s, ready)
        if worker is None:
            return None
        reason = (
            f"forecast for {self.config.forecast_horizon_s:.0f} s from now: at most"
            f" {prompts.per_s:.2f} long prompts/s of {prompts.service_s:.2f} s need {need_prefill}"
            f" prefill workers ({len(prefillers)} now), {outputs.per_s:.2f} requests/s of"
            f" {outputs.output_tokens:.0f} tokens need {need_decode} others ({len(decoders)} now):"
            f" {worker.worker_id} {'prefills' if role == 'prefill' else 'decodes'} from now on"
        )
        return Flip(worker, role, reason)

    def _flip(self, now_s: float, model_id: str, live: Sequence[Worker]) -> Flip | None:
        """For the workers that serve one model."""
        window_s = self.config.plan_window_s
        prefillers = [worker for worker in live if worker.role == "prefill"]
        decoders = [worker for worker in live if worker.role != "prefill"]
        arrivals = [arrival for arrival in self._arrivals if arrival.model_id == model_id]
        num_long = sum(1 for arrival in arrivals if arrival.prefill_s > 0.0)
        demand = sum(arrival.prefill_s for arrival in arrivals) / window_s
        ids = {worker.worker_id for worker in decoders}
        busy = sum(seconds for _, worker_id, seconds in self._busy_s if worker_id in ids) / window_s
        facts = (
            f"in {window_s:.0f} s {num_long} of {len(arrivals)} prompts were long, asking for"
            f" {demand:.2f} s/s of prefill from {len(prefillers)} prefill workers;"
            f" {len(decoders)} others were busy {busy:.2f} s/s"
        )
        load = _Load(demand, busy, len(prefillers), len(decoders), len(arrivals), num_long)
        if load.can_spare_prefill:
            if worker := self._mover(now_s, prefillers):
                return Flip(worker, "decode", f"{facts}: {worker.worker_id} decodes from now on")
        elif load.is_short_of_prefill:
            ready = [worker for worker in decoders if worker.hello.handoff_address is not None]
            if worker := self._mover(now_s, ready):
                return Flip(worker, "prefill", f"{facts}: {worker.worker_id} prefills from now on")
        return None

    def _mover(self, now_s: float, workers: Sequence[Worker]) -> Worker | None:
        """The least used worker that may move: it dwelt long enough and no operator fixed it."""
        free = [
            worker
            for worker in workers
            if now_s - worker.role_since_s >= self.config.plan_dwell_s
            and now_s >= worker.held_until_s
        ]
        return min(
            free,
            key=lambda worker: (len(worker.reservations), len(worker.worker_id), worker.worker_id),
            default=None,
        )
