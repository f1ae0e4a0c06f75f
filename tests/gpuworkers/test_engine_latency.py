"""The step model: features add up, the margin covers, a stall does not bend the mean."""

import random

import pytest

from controlplane.latency import (
    CONTEXT_TILE,
    MARGIN_AT_START,
    PLAN_MARGIN_MAX,
    SCORES_MAX,
    LatencyModel,
    StepFeatures,
    step_s,
)
from controlplane.protocol import StepModel

COEFFICIENTS = StepModel(base_s=0.040, per_token_s=0.003, per_context_token_s=1e-5)


def test_a_decode_row_reads_its_context_once_and_a_chunk_once_per_tile():
    assert StepFeatures().with_tokens(100, 1) == StepFeatures(1, 101)
    chunk = StepFeatures().with_tokens(100, 2 * CONTEXT_TILE)
    assert chunk == StepFeatures(2 * CONTEXT_TILE, 2 * (100 + CONTEXT_TILE))
    assert StepFeatures(3, 50).with_tokens(10, 1) == StepFeatures(4, 61)


def test_an_empty_step_takes_no_time():
    assert step_s(COEFFICIENTS, StepFeatures()) == 0.0
    assert step_s(COEFFICIENTS, StepFeatures(2, 100)) == pytest.approx(0.047)


def test_more_rows_never_take_less():
    model = LatencyModel(COEFFICIENTS)
    features, before = StepFeatures(), 0.0
    for start in range(0, 400, 7):
        features = features.with_tokens(start, 1 + start % 40)
        assert model.p99_s(features) > before
        before = model.p99_s(features)


def test_the_scale_follows_a_device_that_became_slower():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(4, 400)
    for _ in range(200):
        model.observe(features, 2.0 * step_s(COEFFICIENTS, features))
    assert model.predict_s(features) == pytest.approx(
        2.0 * step_s(COEFFICIENTS, features), rel=0.02
    )
    assert model.coefficients().per_token_s == pytest.approx(0.006, rel=0.02)


def test_a_stall_moves_the_mean_by_little():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(4, 400)
    before = model.predict_s(features)
    model.observe(features, 100 * before)
    assert before < model.predict_s(features) < 1.02 * before


def test_the_margin_covers_close_to_99_of_100_steps():
    model, source = LatencyModel(COEFFICIENTS), random.Random(7)
    features, misses, counted = StepFeatures(4, 400), 0, 0
    for index in range(4000):
        measured_s = step_s(COEFFICIENTS, features) * source.lognormvariate(0.0, 0.1)
        if index >= SCORES_MAX:
            counted += 1
            misses += measured_s > model.p99_s(features)
        model.observe(features, measured_s)
    assert 0.0 < misses / counted < 0.02


def test_until_enough_was_seen_the_margin_is_the_one_at_start():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(1, 10)
    for _ in range(99):
        model.observe(features, model.predict_s(features))
    assert model.p99_s(features) == pytest.approx(MARGIN_AT_START * model.predict_s(features))
    model.observe(features, model.predict_s(features))
    assert model.p99_s(features) == pytest.approx(model.predict_s(features))


def test_plans_allow_for_noise_but_not_for_stalls_from_outside():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(1, 10)
    for index in range(200):
        stall = 5.0 if index % 20 == 0 else 1.0
        model.observe(features, stall * step_s(COEFFICIENTS, features))
    assert model.p99_s(features) > 3 * model.predict_s(features)
    assert model.plan_s(features) == pytest.approx(PLAN_MARGIN_MAX * model.predict_s(features))


@pytest.mark.parametrize("bad", [StepModel(0.0, 1.0, 1.0), StepModel(1.0, -1.0, 1.0)])
def test_impossible_coefficients_are_a_bug(bad):
    with pytest.raises(AssertionError):
        LatencyModel(bad)
