"""How long an engine step takes: a linear model of its rows and context, corrected while it runs.

The worker plans with it and sends its coefficients to the console, whose router predicts with the
same formula. Seconds throughout. Source of the form: roofline features of HyGen (arXiv:2501.14808),
quantile by rolling split-conformal scores (Vovk et al. 2005).
"""

from collections import deque
from dataclasses import dataclass

from controlplane.protocol import StepModel

CONTEXT_TILE = 16  # query tokens that share one pass over the context of a chunk
SCORES_MAX = 400  # rolling window of measured / predicted
SCORES_MIN = 100  # a p99 needs at least 99 scores
MARGIN_AT_START = 1.3  # p99 / mean until SCORES_MIN steps were seen
# Stalls from outside the step (other processes on the host) reach far above this and hit small
# steps as hard as large ones: planning smaller steps against them starves batch and helps nobody.
PLAN_MARGIN_MAX = 1.3
MARGIN_REFRESH_STEPS = 20
QUANTILE = 0.99
SCALE_WEIGHT = 0.05  # of one step in the running scale
RESIDUAL_MAX = 0.25  # a stall bends the scale by no more than this share


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What a step computes: token rows, and context tokens read (once per CONTEXT_TILE queries)."""

    rows: int = 0
    context_tokens: int = 0

    def with_tokens(self, start: int, count: int) -> "StepFeatures":
        """The step with tokens [start, start + count) of one sequence added to it."""
        passes = -(-count // CONTEXT_TILE)
        return StepFeatures(
            self.rows + count, self.context_tokens + passes * (start + (count + 1) // 2)
        )


def step_s(model: StepModel, features: StepFeatures) -> float:
    """Mean seconds of a step with these features; 0 for an empty step."""
    if features.rows == 0:
        return 0.0
    return (
        model.base_s
        + model.per_token_s * features.rows
        + model.per_context_token_s * features.context_tokens
    )


class LatencyModel:
    """The step model of one worker: calibrated coefficients, a running scale and a p99 margin."""

    def __init__(self, calibrated: StepModel) -> None:
        assert calibrated.base_s > 0 and calibrated.per_token_s >= 0, calibrated
        assert calibrated.per_context_token_s >= 0, calibrated
        self._calibrated = calibrated
        self._scale = 1.0
        self._margin = MARGIN_AT_START
        self._scores: deque[float] = deque(maxlen=SCORES_MAX)
        self._num_observed = 0

    def predict_s(self, features: StepFeatures) -> float:
        """Mean seconds of the step."""
        return self._scale * step_s(self._calibrated, features)

    def p99_s(self, features: StepFeatures) -> float:
        """Seconds that 99 of 100 such steps do not exceed."""
        return self._margin * self.predict_s(features)

    def plan_s(self, features: StepFeatures) -> float:
        """Seconds to plan the step with: the p99, as far as a smaller step could lower it."""
        return min(self._margin, PLAN_MARGIN_MAX) * self.predict_s(features)

    def observe(self, features: StepFeatures, measured_s: float) -> None:
        """Learn from an executed step."""
        assert features.rows > 0 and measured_s >= 0.0, (features, measured_s)
        score = measured_s / self.predict_s(features)
        self._scores.append(score)
        self._num_observed += 1
        if len(self._scores) >= SCORES_MIN and self._num_observed % MARGIN_REFRESH_STEPS == 0:
            ordered = sorted(self._scores)
            index = min(len(ordered) - 1, int(QUANTILE * (len(ordered) + 1)))
            self._margin = max(1.0, ordered[index])
        residual = min(max(score - 1.0, -RESIDUAL_MAX), RESIDUAL_MAX)
        self._scale *= 1.0 + SCALE_WEIGHT * residual

    def coefficients(self) -> StepModel:
        """The coefficients as they stand now, for reports and for the router."""
        return StepModel(
            self._scale * self._calibrated.base_s,
            self._scale * self._calibrated.per_token_s,
            self._scale * self._calibrated.per_context_token_s,
        )
