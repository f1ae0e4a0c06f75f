"""The step model: features add up, it learns, its quantiles cover, a stall does not bend it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.latency import (
    BUCKETS,
    CONTEXT_TILE,
    HINGE_ROWS,
    MARGIN_AT_START,
    PLAN_MARGIN_MAX,
    SCORES_MAX,
    SCORES_MIN,
    LatencyModel,
    StepFeatures,
    is_sound,
    prompt_context_token_s,
    prompt_token_s,
    read_saved,
    roofline,
    step_s,
)
from controlplane.protocol import StepModel

COEFFICIENTS = StepModel(base_s=0.040, per_token_s=0.003, per_context_token_s=1e-5)
RICH = StepModel(0.005, 6e-6, 3e-8, (1e-5, 4e-6), 3e-6, 1.2e-8)


def observe_many(model: LatencyModel, steps: int, seed: int = 7, factor: float = 1.0) -> list[bool]:
    """Random steps of the model RICH with 2 % noise; for each, whether it exceeded its p99."""
    source, misses = random.Random(seed), []
    for _ in range(steps):
        features = StepFeatures().with_decodes(source.randint(1, 250), source.randint(250, 300_000))
        if source.random() < 0.7:
            features = features.with_tokens(source.randint(0, 3000), source.randint(2, 900))
        measured_s = factor * step_s(RICH, features) * source.gauss(1.0, 0.02)
        misses.append(measured_s > model.p99_s(features))
        model.observe(features, measured_s)
    return misses


def test_a_decode_row_reads_its_context_once_and_a_chunk_once_per_tile():
    assert StepFeatures().with_tokens(100, 1) == StepFeatures(1, 101)
    context = 2 * (100 + CONTEXT_TILE)
    chunk = StepFeatures().with_tokens(100, 2 * CONTEXT_TILE)
    assert chunk == StepFeatures(2 * CONTEXT_TILE, context, 2 * CONTEXT_TILE, context, 1)
    assert StepFeatures(3, 50).with_tokens(10, 1) == StepFeatures(4, 61)
    assert StepFeatures(3, 50).with_decodes(2, 30) == StepFeatures(5, 80)
    assert chunk.with_decodes(5, 100).sequences == 6


def test_the_bucket_is_told_by_the_share_of_prompt_tokens():
    decode = StepFeatures(8, 800)
    assert decode.bucket == "decode"
    assert decode.with_tokens(0, 16).bucket == "mixed"
    assert decode.with_tokens(0, 32).bucket == "prefill"


def test_each_price_is_paid_for_what_it_names():
    none = StepModel(0.01, 0.0, 0.0, per_chunk_context_token_s=0.0)
    features = StepFeatures().with_decodes(100, 5000).with_tokens(0, 500)
    chunk = features.chunk_context_tokens
    for field, price, expected in (
        ("per_token_s", 1.0, 600),
        ("per_context_token_s", 1.0, 5000),
        ("per_chunk_context_token_s", 1.0, chunk),
        ("per_sequence_s", 1.0, 101),
        ("per_token_over_s", (1.0, 0.0), 600 - HINGE_ROWS[0]),
        ("per_token_over_s", (0.0, 1.0), 600 - HINGE_ROWS[1]),
    ):
        values = {name: getattr(none, name) for name in none.__struct_fields__} | {field: price}
        assert step_s(StepModel(**values), features) == pytest.approx(0.01 + expected), field


def test_a_prompt_token_costs_its_price_beyond_all_hinges():
    assert prompt_token_s(RICH) == pytest.approx(20e-6)
    assert prompt_context_token_s(RICH) == 1.2e-8
    assert prompt_context_token_s(COEFFICIENTS) == COEFFICIENTS.per_context_token_s


@pytest.mark.parametrize(
    "bad",
    [
        StepModel(0.0, 1.0, 1.0),
        StepModel(1.0, -1.0, 1.0),
        StepModel(1.0, 1.0, 1.0, (0.0, -1.0)),
        StepModel(1.0, 1.0, 1.0, per_sequence_s=float("nan")),
        StepModel(1.0, 1.0, float("inf")),
    ],
)
def test_impossible_coefficients_are_unsound_and_a_bug_for_a_model(bad):
    assert not is_sound(bad)
    with pytest.raises(AssertionError):
        LatencyModel(bad)


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
    assert step_s(model.coefficients(), features) == pytest.approx(model.predict_s(features))


def test_a_stall_moves_the_mean_by_little():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(4, 400)
    before = model.predict_s(features)
    model.observe(features, 100 * before)
    assert before < model.predict_s(features) < 1.3 * before
    trained = LatencyModel(COEFFICIENTS)
    for _ in range(500):
        trained.observe(features, trained.predict_s(features))
    before = trained.predict_s(features)
    trained.observe(features, 100 * before)
    assert before < trained.predict_s(features) < 1.02 * before


def test_the_margin_covers_close_to_99_of_100_steps():
    model, source = LatencyModel(COEFFICIENTS), random.Random(7)
    features, misses, counted = StepFeatures(4, 400), 0, 0
    for index in range(4000):
        measured_s = step_s(COEFFICIENTS, features) * source.lognormvariate(0.0, 0.1)
        if index >= 400:
            counted += 1
            misses += measured_s > model.p99_s(features)
        model.observe(features, measured_s)
    assert 0.0 < misses / counted < 0.02


def test_until_enough_was_seen_the_margin_is_the_one_at_start():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(1, 10)
    for _ in range(SCORES_MIN):
        model.observe(features, model.predict_s(features))
    assert model.p99_s(features) == pytest.approx(MARGIN_AT_START * model.predict_s(features))
    for _ in range(50):
        model.observe(features, model.predict_s(features))
    assert model.p99_s(features) == pytest.approx(model.predict_s(features))


def test_plans_allow_for_noise_but_not_for_stalls_from_outside():
    model = LatencyModel(COEFFICIENTS)
    features = StepFeatures(1, 10)
    for index in range(600):
        stall = 5.0 if index % 20 == 0 else 1.0
        model.observe(features, stall * step_s(COEFFICIENTS, features))
    assert model.p99_s(features) > 3 * model.predict_s(features)
    assert model.plan_s(features) == pytest.approx(PLAN_MARGIN_MAX * model.predict_s(features))


# --- learning


def test_it_learns_coefficients_that_the_seed_did_not_know():
    model = LatencyModel(roofline(3.9e-3, 1.2e-3, 27e-6, 32e-9))
    observe_many(model, 3000)
    for features in (
        StepFeatures(64, 64_000),
        StepFeatures().with_tokens(500, 600),
        StepFeatures(200, 200_000).with_tokens(0, 300),
    ):
        assert model.predict_s(features) == pytest.approx(step_s(RICH, features), rel=0.02)


def test_p99_covers_99_of_100_steps_and_the_buckets_say_so():
    model = LatencyModel(RICH)
    misses = observe_many(model, 6000)[1000:]
    assert 0.985 <= 1.0 - sum(misses) / len(misses) <= 0.995
    assert sum(audit.steps for audit in model.audits.values()) == 6000
    for bucket in BUCKETS:
        audit = model.audits[bucket]
        assert 0.002 < audit.misses / audit.steps < 0.02
        assert audit.over / audit.steps < 0.08 and audit.error / audit.steps < 0.03


def test_a_step_of_the_clock_raises_an_alarm_and_is_followed():
    model = LatencyModel(RICH)
    observe_many(model, 3000)
    assert model.num_alarms == 0
    misses = observe_many(model, 2000, seed=8, factor=1.08)
    assert model.num_alarms == 1
    assert sum(misses) < 0.05 * len(misses)
    features = StepFeatures(100, 100_000)
    assert model.predict_s(features) == pytest.approx(1.08 * step_s(RICH, features), rel=0.02)


def test_the_windows_are_bounded():
    model = LatencyModel(RICH)
    observe_many(model, SCORES_MAX + 500)
    assert len(model._all.newest) == len(model._all.ordered) == SCORES_MAX
    assert sorted(model._all.newest) == model._all.ordered


def test_host_time_is_learned():
    model = LatencyModel(RICH)
    assert model.host_s == 0.0
    for _ in range(500):
        model.observe_host(0.002)
    assert model.host_s == pytest.approx(0.002, rel=0.01)


seconds = st.floats(0.0, 0.5)
shapes = st.tuples(st.integers(0, 300), st.integers(0, 2000), st.integers(1, 900))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, seconds), max_size=60), shapes)
def test_whatever_it_saw_adding_rows_never_makes_a_step_shorter(observed, shape):
    model = LatencyModel(RICH)
    for (rows, start, count), measured_s in observed:
        model.observe(StepFeatures(rows, rows * 500).with_tokens(start, count), measured_s)
    assert is_sound(model.coefficients())
    rows, start, count = shape
    features = StepFeatures(rows, rows * 500)
    grown = features.with_tokens(start, count)
    assert model.predict_s(features) <= model.predict_s(grown)
    assert model.plan_s(grown) <= model.plan_s(grown.with_tokens(start, 1))


# --- keeping


def test_a_saved_model_goes_on_where_it_stopped():
    model = LatencyModel(RICH)
    observe_many(model, 1000)
    saved = read_saved(model.save("llama", "H200 bf16", "2"))
    assert (saved.model_id, saved.device, saved.engine_version) == ("llama", "H200 bf16", "2")
    again = LatencyModel(COEFFICIENTS)
    again.restore(saved, "2")
    features = StepFeatures(100, 100_000).with_tokens(0, 200)
    assert again.predict_s(features) == pytest.approx(model.predict_s(features))
    assert again.p99_s(features) == pytest.approx(model.p99_s(features), rel=0.02)


def test_another_engine_version_keeps_the_coefficients_only():
    model = LatencyModel(RICH)
    observe_many(model, 1000)
    again = LatencyModel(COEFFICIENTS)
    again.restore(read_saved(model.save("llama", "H200 bf16", "1")), "2")
    features = StepFeatures(100, 100_000)
    assert again.predict_s(features) == pytest.approx(model.predict_s(features))
    assert again.p99_s(features) == pytest.approx(MARGIN_AT_START * again.predict_s(features))
