"""What is asked of one model: arrivals, sizes, burstiness, and how far predictions were off.

Two views: what the last window brought (the fast correction), and a forecast with measured error
bands, which is a floor under it. Source: algorithms.md 2e.
"""

from collections import deque
from dataclasses import dataclass

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest
from controlplane.forecast import Forecast
from controlplane.sizing import Corrections, DecodeLoad, ModelLoad, PromptLoad

SIZES_MAX = 500  # newest prompts and outputs that mean sizes are taken of
ARRIVALS_MAX = 20_000  # of one window; the newest count
COUNT_S = 10.0  # window of the index of dispersion: about the p99 of waiting
COUNTS_MAX = 60
COUNTS_MIN = 6
DISPERSION_MAX = 8.0  # a public conversation trace shows 8 at 300 s; more is a change of level
SAMPLES_MIN = 500  # observations after which a measured correction replaces its prior
SAMPLE_WEIGHT = 0.01
PRIORS = Corrections()
RATIO_RANGE = (0.5, 2.0)  # of a measured correction to 1


class Ratio:
    """EWMA of observed / predicted; a prior until enough was seen."""

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._mean = 1.0
        self.num_samples = 0

    def observe(self, predicted: float, observed: float) -> None:
        if predicted <= 0.0 or observed <= 0.0:
            return
        self.num_samples += 1
        weight = max(SAMPLE_WEIGHT, 1.0 / self.num_samples)
        self._mean += weight * (min(observed / predicted, RATIO_RANGE[1]) - self._mean)

    @property
    def value(self) -> float:
        if self.num_samples <= SAMPLES_MIN:
            return self._prior
        return min(max(self._mean, RATIO_RANGE[0]), RATIO_RANGE[1])


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prefill_s: float  # predicted for the worker that computes it
    is_long: bool  # handing it off would serve
    is_local: bool  # computed where it decodes


@dataclass(frozen=True, slots=True)
class Window:
    """What the last seconds brought."""

    num_requests: int
    num_long: int
    long_s: float  # seconds of prefill that long prompts asked for
    short_s: float
    local_s: float  # of long_s: computed where they decode


class Demand:
    """Of one model. Online requests only: batch takes what they leave."""

    def __init__(self, config: ControlPlaneConfig) -> None:
        bin_s, horizon_s = config.forecast_bin_s, config.forecast_horizon_s
        self._config = config
        self.long = Forecast(bin_s, horizon_s)
        self.all = Forecast(bin_s, horizon_s)
        self.later = Forecast(bin_s, max(bin_s, config.node_horizon_s))  # a cold start from now
        self._arrivals: deque[Arrival] = deque(maxlen=ARRIVALS_MAX)
        self._counts: deque[int] = deque(maxlen=COUNTS_MAX)  # arrivals in closed COUNT_S
        self._count_index: int | None = None
        self._count = 0
        self._services: deque[tuple[float, bool]] = deque(maxlen=SIZES_MAX)
        self._ended: deque[tuple[int, int]] = deque(maxlen=SIZES_MAX)  # prompt, output tokens
        self._asked: deque[tuple[int, int]] = deque(maxlen=SIZES_MAX)  # prompt, most output tokens
        self.ttft_s = self.itl_s = float("inf")  # the strictest targets seen
        self.prefill_ratio = Ratio(1.0 / PRIORS.prefill)
        self.decode_ratio = Ratio(1.0 / PRIORS.decode)
        self.ttft_ratio = Ratio(PRIORS.ttft)

    def admitted(
        self,
        request: GenerateRequest,
        prefill_s: float,
        is_long: bool,
        is_local: bool,
        now_s: float,
    ) -> None:
        """A request was admitted."""
        self.advance(now_s)
        self._count += 1
        self._arrivals.append(Arrival(now_s, prefill_s, is_long, is_local))
        self._services.append((prefill_s, is_long))
        self._asked.append((request.prompt_tokens, request.output_tokens_max))
        self.all.add(1.0, now_s)
        self.later.add(1.0, now_s)
        if is_long:
            self.long.add(1.0, now_s)
        self.ttft_s = min(self.ttft_s, request.slo.ttft_s_p99)
        self.itl_s = min(self.itl_s, request.slo.itl_s_p99)

    def ended(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request has completed: only now is the size of its output known."""
        self._ended.append((prompt_tokens, output_tokens))

    def advance(self, now_s: float) -> None:
        """Close what has ended."""
        for series in (self.all, self.long, self.later):
            series.advance(now_s)
        index = int(now_s / COUNT_S)
        if self._count_index is not None:
            for _ in range(min(index - self._count_index, COUNTS_MAX)):
                self._counts.append(self._count)
                self._count = 0
        self._count_index = max(index, self._count_index or 0)

    @property
    def has_history(self) -> bool:
        """Enough for the forecast to count."""
        return self.all.num_bins * self._config.forecast_bin_s >= self._config.forecast_s_min

    @property
    def has_sizes(self) -> bool:
        return bool(self._ended)

    def window(self, now_s: float) -> Window:
        since_s = now_s - self._config.plan_window_s
        while self._arrivals and self._arrivals[0].at_s <= since_s:
            self._arrivals.popleft()
        long = [item for item in self._arrivals if item.is_long]
        return Window(
            num_requests=len(self._arrivals),
            num_long=len(long),
            long_s=sum(item.prefill_s for item in long),
            short_s=sum(item.prefill_s for item in self._arrivals if not item.is_long),
            local_s=sum(item.prefill_s for item in long if item.is_local),
        )

    def dispersion(self) -> float:
        """Index of dispersion of counts over COUNT_S, at least 1 (Poisson). From differences of
        neighbours, which a slow change of the rate does not raise."""
        counts = list(self._counts)
        mean = sum(counts) / len(counts) if counts else 0.0
        if len(counts) < COUNTS_MIN or mean <= 0.0:
            return 1.0
        steps = [later - earlier for earlier, later in zip(counts, counts[1:], strict=False)]
        variance = sum(step * step for step in steps) / (2.0 * len(steps))
        return min(DISPERSION_MAX, max(1.0, variance / mean))

    def corrections(self) -> Corrections:
        return Corrections(
            prefill=1.0 / self.prefill_ratio.value,
            decode=1.0 / self.decode_ratio.value,
            ttft=self.ttft_ratio.value,
        )

    def prompts(self, per_s: float, is_long: bool) -> PromptLoad:
        """Prompts of one kind at that rate; sizes as measured."""
        services = sorted(seconds for seconds, kind in self._services if kind == is_long)
        if not services:
            return PromptLoad(0.0, 1.0, 1.0, 1.0)
        mean_s = sum(services) / len(services)
        variance = sum((value - mean_s) ** 2 for value in services) / len(services)
        p99_s = services[min(len(services) - 1, int(0.99 * len(services)))]
        cv2 = variance / max(mean_s, 1e-9) ** 2
        return PromptLoad(per_s, mean_s, p99_s, cv2, self.dispersion())

    def outputs(self, per_s: float) -> DecodeLoad:
        """Sequences at that rate; before the first has ended, as long as they may be."""
        sizes = self._ended or self._asked
        count = max(1, len(sizes))
        output = sum(tokens for _, tokens in sizes) / count
        prompt = sum(tokens for tokens, _ in sizes) / count
        return DecodeLoad(per_s, output, prompt + output / 2.0, self.dispersion())

    def load(self, now_s: float, level: float | None = None) -> ModelLoad:
        """The window's load; with a level, at least what the forecast for a cold start from now is
        not exceeded by, with that probability."""
        self.advance(now_s)
        window = self.window(now_s)
        window_s = self._config.plan_window_s
        per_s = window.num_requests / window_s
        long_share = window.num_long / max(1, window.num_requests)
        if level is not None and self.has_history:
            per_s = max(per_s, self.later.upper(level))
        return ModelLoad(
            long=self.prompts(per_s * long_share, True),
            short=self.prompts(per_s * (1.0 - long_share), False),
            outputs=self.outputs(per_s),
            ttft_s=self.ttft_s,
            itl_s=self.itl_s,
            corrections=self.corrections(),
        )
