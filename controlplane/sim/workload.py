"""Work for a simulated worker: interactive arrivals in bursts, and step noise with stalls."""

import math
from dataclasses import dataclass

from controlplane.sim.events import Events

PROMPT_MEDIAN, OUTPUT_MEDIAN = 1020, 129  # Azure LLM 2023, conversation
LENGTH_SIGMA = 0.8  # of log lengths; start value
PROMPT_RANGE, OUTPUT_RANGE = (16, 16_384), (2, 2_048)
PHASE_S, BURST_SHARE, BURST_FACTOR = 20.0, 0.25, 1.8  # algorithms.md 2a, evidence

NOISE_SIGMA = 0.02
STALL_SHARE, STALL_S = 0.002, 0.004  # algorithms.md 2a, what its simulation adds
CLOCK_STEPS, CLOCK_FACTOR = 10_000, 1.08  # a clock step of 8 %, there and back


@dataclass(frozen=True, slots=True)
class Arrival:
    """An interactive request."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def arrivals(seed: int, rate_per_s: float, seconds: float) -> list[Arrival]:
    """Poisson within phases; a quarter of the phases at 1.8 times the rate, the mean kept."""
    source = Events(seed).random
    calm_factor = (1.0 - BURST_SHARE * BURST_FACTOR) / (1.0 - BURST_SHARE)
    made, phase_at_s = [], 0.0
    while phase_at_s < seconds:
        factor = BURST_FACTOR if source.random() < BURST_SHARE else calm_factor
        phase_end_s = min(phase_at_s + PHASE_S, seconds)
        at_s = phase_at_s + source.expovariate(rate_per_s * factor)
        while at_s < phase_end_s:
            prompt = source.lognormvariate(math.log(PROMPT_MEDIAN), LENGTH_SIGMA)
            output = source.lognormvariate(math.log(OUTPUT_MEDIAN), LENGTH_SIGMA)
            made.append(Arrival(at_s, _within(prompt, PROMPT_RANGE), _within(output, OUTPUT_RANGE)))
            at_s += source.expovariate(rate_per_s * factor)
        phase_at_s += PHASE_S
    return made


def _within(value: float, limits: tuple[int, int]) -> int:
    return min(max(round(value), limits[0]), limits[1])


class Noise:
    """Turns exact step seconds into measured ones; the nth step has the same noise in every run
    of a seed."""

    def __init__(self, seed: int, has_clock_steps: bool = False) -> None:
        self._random = Events(1_000_003 * (seed + 1)).random
        self._has_clock_steps = has_clock_steps
        self._num_steps = 0

    def measured_s(self, exact_s: float) -> float:
        source = self._random
        seconds = exact_s * (1.0 + NOISE_SIGMA * source.gauss(0.0, 1.0))
        if source.random() < STALL_SHARE:
            seconds += STALL_S
        if self._has_clock_steps and self._num_steps // CLOCK_STEPS % 2:
            seconds *= CLOCK_FACTOR
        self._num_steps += 1
        return seconds
