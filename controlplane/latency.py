"""How long an engine step takes: a linear model learned while it runs, with calibrated quantiles.

The worker plans with it and sends its coefficients to the console, whose router predicts with the
same formula. Seconds throughout. Method: algorithms.md 2b: recursive least squares with forgetting
and clipped residuals over roofline features (HyGen, arXiv:2501.14808), a running scale per worker,
quantiles of measured / predicted over a rolling window (split conformal, Vovk et al. 2005) whose
level is corrected online (ACI, arXiv:2106.00170), and Page's test (1954) for drift.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, isfinite, log
from operator import mul
from typing import Literal

import msgspec

from controlplane.protocol import StepModel

CONTEXT_TILE = 16  # query tokens that share one pass over the context of a chunk
# Token rows from which each further row costs more: below the first the read of the weights hides
# the arithmetic (n* of algorithms.md 2a), beyond the second the arithmetic is all there is. Least
# squares over the step table of Llama-3.1-8B on H200: mean error 1.0 %, with one hinge 1.8 %.
HINGE_ROWS = (128, 512)

Bucket = Literal["decode", "mixed", "prefill"]
BUCKETS: tuple[Bucket, ...] = ("decode", "mixed", "prefill")
TOKEN_S_MIN = 1e-9  # a prompt token on any device
PREFILL_HEAVY = 0.8  # of a step's rows are prompt tokens

MISS_RATE = 0.01  # p99
PLAN_MISS_RATE = 5e-4  # design.md section 11
SCORES_MAX = 2000  # rolling window of measured / predicted
SCORES_MIN = 200  # before that the margin is the one at start
BUCKET_SCORES_MIN = 300  # before that a bucket uses the scores of all
SCORES_AFTER_DRIFT = 500
MARGIN_AT_START = 1.3
# Stalls from outside the step (other processes on the host) reach far above this and hit small
# steps as hard as large ones: planning smaller steps against them starves batch and helps nobody.
PLAN_MARGIN_MAX = 1.3
LEVEL_RATE, LEVEL_MIN, LEVEL_MAX = 0.002, 5e-4, 0.05  # ACI

RESIDUAL_MAX = 0.25  # a stall bends the model by no more than this share
FORGET = 0.9995  # a memory of 2,000 steps
GROWTH = 1.0 / FORGET
NOISE = 0.03  # assumed relative noise of one step
PRIOR = 0.3  # relative trust in the calibrated coefficients
SCALE_WEIGHT = 0.05  # of one step in the running scale
SCALE_WEIGHT_DRIFT = 0.2

DRIFT_SLACK, DRIFT_ALARM = 1.0, 25.0  # in mean deviations
DRIFT_CAUTION_STEPS = 200  # with twice the margin
SCORES_HELD = 16  # newest scores, dropped on an alarm: they belong to neither speed
HOST_WEIGHT = 0.02


class StepFeatures(msgspec.Struct, frozen=True):
    """What a step computes. `context_tokens`: KV tokens read, once per decode row, once per
    CONTEXT_TILE tokens of a chunk. A chunk has two or more tokens of one sequence."""

    rows: int = 0
    context_tokens: int = 0
    chunk_tokens: int = 0  # of the rows
    chunk_context_tokens: int = 0  # of context_tokens
    num_chunks: int = 0

    def with_tokens(self, start: int, count: int) -> "StepFeatures":
        """The step with tokens [start, start + count) of one sequence added to it."""
        context = -(-count // CONTEXT_TILE) * (start + (count + 1) // 2)
        if count == 1:
            return self.with_decodes(1, context)
        return StepFeatures(
            self.rows + count,
            self.context_tokens + context,
            self.chunk_tokens + count,
            self.chunk_context_tokens + context,
            self.num_chunks + 1,
        )

    def with_decodes(self, count: int, context_tokens: int) -> "StepFeatures":
        """The step with decode rows added that read so many context tokens together."""
        return StepFeatures(
            self.rows + count,
            self.context_tokens + context_tokens,
            self.chunk_tokens,
            self.chunk_context_tokens,
            self.num_chunks,
        )

    @property
    def sequences(self) -> int:
        return self.rows - self.chunk_tokens + self.num_chunks

    @property
    def bucket(self) -> Bucket:
        if not self.chunk_tokens:
            return "decode"
        return "prefill" if self.chunk_tokens >= PREFILL_HEAVY * self.rows else "mixed"

    def vector(self) -> tuple[float, ...]:
        """In the order of `_coefficients`."""
        rows = self.rows
        return (
            1.0,
            rows,
            max(0, rows - HINGE_ROWS[0]),
            max(0, rows - HINGE_ROWS[1]),
            self.context_tokens - self.chunk_context_tokens,
            self.chunk_context_tokens,
            self.sequences,
        )


def _coefficients(model: StepModel) -> list[float]:
    return [
        model.base_s,
        model.per_token_s,
        *model.per_token_over_s,
        model.per_context_token_s,
        prompt_context_token_s(model),
        model.per_sequence_s,
    ]


def step_s(model: StepModel, features: StepFeatures) -> float:
    """Mean seconds of a step with these features; 0 for an empty step."""
    if features.rows == 0:
        return 0.0
    rows, (over_s, over_more_s) = features.rows, model.per_token_over_s
    return (
        model.base_s
        + model.per_token_s * rows
        + over_s * max(0, rows - HINGE_ROWS[0])
        + over_more_s * max(0, rows - HINGE_ROWS[1])
        + model.per_context_token_s * (features.context_tokens - features.chunk_context_tokens)
        + prompt_context_token_s(model) * features.chunk_context_tokens
        + model.per_sequence_s * features.sequences
    )


def decode_step_s(model: StepModel, rows: int, context_tokens: int) -> float:
    """As step_s, of decode rows only."""
    if rows == 0:
        return 0.0
    over_s, over_more_s = model.per_token_over_s
    return (
        model.base_s
        + model.per_token_s * rows
        + over_s * max(0, rows - HINGE_ROWS[0])
        + over_more_s * max(0, rows - HINGE_ROWS[1])
        + model.per_context_token_s * context_tokens
        + model.per_sequence_s * rows
    )


def prompt_token_s(model: StepModel) -> float:
    """Seconds that one more prompt token adds to a large step, without its attention. Never 0, for
    speeds are quotients of it; a learned coefficient may be."""
    return max(TOKEN_S_MIN, model.per_token_s + sum(model.per_token_over_s))


def prompt_context_token_s(model: StepModel) -> float:
    """Seconds for each context token that a tile of prompt tokens reads."""
    chunk = model.per_chunk_context_token_s
    return model.per_context_token_s if chunk is None else chunk


def is_sound(model: StepModel) -> bool:
    """A step takes time, and more work never takes less."""
    coefficients = _coefficients(model)
    return isfinite(sum(coefficients)) and coefficients[0] > 0.0 and min(coefficients) >= 0.0


def roofline(
    weights_read_s: float, launch_s: float, gemm_token_s: float, context_token_s: float
) -> StepModel:
    """Seed of the model from a device's roofline, for when nothing was measured (W, L0, g, b of
    algorithms.md): up to HINGE_ROWS[0] rows the read of the weights hides three quarters of g."""
    hidden_s = 0.25 * gemm_token_s
    return StepModel(
        launch_s + weights_read_s,
        hidden_s,
        context_token_s,
        (gemm_token_s - hidden_s, 0.0),
        per_chunk_context_token_s=0.5 * context_token_s,
    )


class _Scores:
    """A rolling window of scores and its quantiles."""

    def __init__(self) -> None:
        self.newest: deque[float] = deque()
        self.ordered: list[float] = []

    def add(self, score: float) -> None:
        self.newest.append(score)
        insort(self.ordered, score)
        self.shorten(SCORES_MAX)

    def shorten(self, scores_max: int) -> None:
        while len(self.newest) > scores_max:
            del self.ordered[bisect_left(self.ordered, self.newest.popleft())]

    def quantile(self, miss_rate: float) -> float:
        """Of the next score: level (1 - miss_rate)(1 + 1/n)."""
        count = len(self.ordered)
        level = min(1.0, (1.0 - miss_rate) * (1.0 + 1.0 / count))
        return self.ordered[min(count - 1, max(0, ceil(level * count) - 1))]

    def tail_quantile(self, miss_rate: float) -> float:
        """Far out, where the window holds too few scores: an exponential tail beyond p99."""
        p99 = self.quantile(MISS_RATE)
        beyond = self.ordered[bisect_left(self.ordered, p99) :]
        mean_excess = sum(score - p99 for score in beyond) / len(beyond)
        return p99 + mean_excess * log(MISS_RATE / miss_rate)


class Audit(msgspec.Struct):
    """How the predictions of one bucket turned out, since the model was made or loaded."""

    steps: int = 0
    misses: int = 0  # measured above the p99 that was predicted
    error: float = 0.0  # sum of |measured / mean prediction - 1|
    over: float = 0.0  # sum of p99 / measured - 1


def audit_figures(audits: Mapping[Bucket, Audit]) -> dict[str, dict[str, float]]:
    """By bucket that has steps: their number, mean error, share within the predicted p99, and mean
    over-prediction of that p99."""
    return {
        bucket: {
            "steps": audit.steps,
            "mape": audit.error / audit.steps,
            "coverage": 1.0 - audit.misses / audit.steps,
            "over_prediction": audit.over / audit.steps,
        }
        for bucket, audit in audits.items()
        if audit.steps
    }


class SavedModel(msgspec.Struct):
    """A model as it is kept on disk, for one (model, device, engine version)."""

    model_id: str
    device: str
    engine_version: str
    coefficients: StepModel
    covariance: list[list[float]]
    scores: list[float]
    audits: dict[Bucket, Audit]


@dataclass(slots=True)
class _Level:
    """Scores of one bucket, and the miss rate to ask of them so that MISS_RATE comes out."""

    scores: _Scores = field(default_factory=_Scores)
    miss_rate: float = MISS_RATE


class LatencyModel:
    """The step model of one worker: learned coefficients, a running scale, and its quantiles."""

    def __init__(self, calibrated: StepModel) -> None:
        assert is_sound(calibrated), calibrated
        self._beta = _coefficients(calibrated)
        # A coefficient whose seed is 0 can still be learned: its unit is a share of others'.
        token_s = max(calibrated.per_token_s + sum(calibrated.per_token_over_s), 1e-9)
        context_s = max(calibrated.per_context_token_s, 1e-4 * token_s)
        floors = [0.0, 0.1 * token_s, 0.3 * token_s, 0.1 * token_s]
        floors += [0.1 * context_s, 0.1 * context_s, 0.1 * token_s]
        units = [max(b, f) for b, f in zip(self._beta, floors, strict=True)]
        self._prior = [(PRIOR * unit) ** 2 / NOISE**2 for unit in units]
        size = len(units)
        self._covariance = [[0.0] * size for _ in range(size)]
        for index, value in enumerate(self._prior):
            self._covariance[index][index] = value
        self._scale = 1.0
        self._all = _Scores()
        self._levels = {bucket: _Level() for bucket in BUCKETS}
        self._held: deque[tuple[Bucket, float]] = deque()
        self._deviation, self._above, self._below = NOISE, 0.0, 0.0
        self._caution_steps = 0
        self._plan_margin = MARGIN_AT_START
        self._num_observed = 0
        self.num_alarms = 0
        self.host_s = 0.0  # between two steps, not overlapped with the device
        self.audits: dict[Bucket, Audit] = {bucket: Audit() for bucket in BUCKETS}

    # --- predictions

    def predict_s(self, features: StepFeatures) -> float:
        """Mean seconds of the step; never less when something is added to it."""
        if features.rows == 0:
            return 0.0
        unscaled_s: float = sum(map(mul, self._beta, features.vector()))
        return self._scale * unscaled_s

    def p99_s(self, features: StepFeatures) -> float:
        """Seconds that 99 of 100 such steps do not exceed."""
        return self._margin(features.bucket) * self.predict_s(features)

    def _margin(self, bucket: Bucket) -> float:
        level = self._levels[bucket]
        scores = level.scores if len(level.scores.ordered) >= BUCKET_SCORES_MIN else self._all
        if len(scores.ordered) < SCORES_MIN:
            return MARGIN_AT_START
        margin = max(1.0, scores.quantile(level.miss_rate))
        return 2.0 * margin - 1.0 if self._caution_steps else margin

    @property
    def plan_margin(self) -> float:
        """What plans multiply the mean by. One for all buckets, so that a plan's time never falls
        when something is added."""
        return self._plan_margin

    def plan_s(self, features: StepFeatures) -> float:
        """Seconds to plan the step with: only PLAN_MISS_RATE of such steps take longer, as far as
        smaller steps can help that."""
        return self._plan_margin * self.predict_s(features)

    def coefficients(self) -> StepModel:
        """The coefficients as they stand now, for reports and for the router."""
        base, token, over, over_more, context, chunk, sequence = (
            self._scale * beta for beta in self._beta
        )
        return StepModel(base, token, context, (over, over_more), sequence, chunk)

    # --- learning

    def observe(self, features: StepFeatures, measured_s: float) -> None:
        """Learn from an executed step."""
        assert features.rows > 0 and measured_s >= 0.0, (features, measured_s)
        predicted_s = self.predict_s(features)
        score = measured_s / predicted_s
        self._judge(features.bucket, score)
        residual = min(max(score - 1.0, -RESIDUAL_MAX), RESIDUAL_MAX)
        self._watch_drift(residual)
        self._update(features.vector(), predicted_s / self._scale, residual)
        is_new_speed = self._caution_steps > DRIFT_CAUTION_STEPS - SCORES_HELD
        weight = SCALE_WEIGHT_DRIFT if is_new_speed else SCALE_WEIGHT
        self._scale *= 1.0 + weight * residual
        self._caution_steps = max(0, self._caution_steps - 1)
        self._num_observed += 1
        if len(self._all.ordered) >= SCORES_MIN and self._num_observed % 50 == 0:
            margin = self._all.tail_quantile(PLAN_MISS_RATE)
            self._plan_margin = min(max(1.0, margin), PLAN_MARGIN_MAX)

    def observe_host(self, seconds: float) -> None:
        """Learn how long the host works between steps while the device waits."""
        self.host_s += HOST_WEIGHT * (seconds - self.host_s)

    def _judge(self, bucket: Bucket, score: float) -> None:
        """Count a score against the margin that stood, and keep it."""
        margin, level, audit = self._margin(bucket), self._levels[bucket], self.audits[bucket]
        is_miss = score > margin
        audit.steps += 1
        audit.misses += is_miss
        audit.error += abs(score - 1.0)
        audit.over += margin / max(score, 1e-9) - 1.0
        if len(self._all.ordered) >= SCORES_MIN:
            rate = level.miss_rate + LEVEL_RATE * (MISS_RATE - is_miss)
            level.miss_rate = min(max(rate, LEVEL_MIN), LEVEL_MAX)
        self._held.append((bucket, score))
        if len(self._held) > SCORES_HELD:
            kept, settled = self._held.popleft()
            self._all.add(settled)
            self._levels[kept].scores.add(settled)

    def _watch_drift(self, residual: float) -> None:
        """Page's test in both directions, in units of the usual deviation."""
        deviations = min(max(residual / max(self._deviation, 1e-4), -5.0), 5.0)
        self._deviation += 0.01 * (min(abs(residual), 5.0 * self._deviation) - self._deviation)
        self._above = max(0.0, self._above + deviations - DRIFT_SLACK)
        self._below = max(0.0, self._below - deviations - DRIFT_SLACK)
        if max(self._above, self._below) > DRIFT_ALARM:
            self._above = self._below = 0.0
            self.num_alarms += 1
            self._caution_steps = DRIFT_CAUTION_STEPS
            self._held.clear()
            for scores in (self._all, *(level.scores for level in self._levels.values())):
                scores.shorten(SCORES_AFTER_DRIFT)

    def _update(self, vector: tuple[float, ...], predicted_s: float, residual: float) -> None:
        """One step of recursive least squares on the relative error. Coefficients stay >= 0."""
        inputs = [value / predicted_s for value in vector]
        gains = [sum(map(mul, row, inputs)) for row in self._covariance]
        news = sum(map(mul, gains, inputs))
        if news < 1e-3:  # inputs that say nothing new would only inflate the covariance
            return
        total = FORGET + news
        for index, gain in enumerate(gains):
            beta = self._beta[index] + gain / total * residual
            self._beta[index] = beta if beta > 0.0 else 0.0
        self._beta[0] = max(self._beta[0], 1e-6)
        for gain, row in zip(gains, self._covariance, strict=True):
            share = gain / (total * FORGET)
            row[:] = [GROWTH * p - share * other for p, other in zip(row, gains, strict=True)]
        excess = max(self._covariance[i][i] / limit for i, limit in enumerate(self._prior))
        if excess > 1.0:
            for row in self._covariance:
                row[:] = [value / excess for value in row]

    # --- keeping

    def save(self, model_id: str, device: str, engine_version: str) -> bytes:
        """Everything worth keeping over a restart."""
        saved = SavedModel(
            model_id,
            device,
            engine_version,
            self.coefficients(),
            self._covariance,
            list(self._all.newest),
            self.audits,
        )
        return msgspec.json.encode(saved)

    def restore(self, saved: SavedModel, engine_version: str) -> None:
        """Go on from a saved model of the same model and device. Another engine version keeps the
        coefficients only, with little trust in them."""
        self._beta = _coefficients(saved.coefficients)
        self._scale = 1.0
        if saved.engine_version != engine_version:
            return
        self._covariance = [list(row) for row in saved.covariance]
        for score in saved.scores[-SCORES_MAX:]:
            self._all.add(score)


def read_saved(data: bytes) -> SavedModel:
    """Raises msgspec.MsgspecError for anything that is not a saved model."""
    return msgspec.json.decode(data, type=SavedModel)
