"""The co-serving bench: the same arrivals for every arm, every token counted once."""

import pytest

from controlplane import protocol
from gpuworkers import benchcoserve, runner
from gpuworkers.benchcoserve import (
    SMALL,
    Arm,
    Arrival,
    make_arrivals,
    quantile_with_interval,
)
from tests.gpuworkers import tinyllama

TARGETS = protocol.ClassTargets("bench", 0, ttft_s_left=30.0, itl_s=10.0)


def test_arrivals_are_the_same_for_the_same_seed_and_keep_their_bounds():
    first, again, other = (make_arrivals(SMALL, 300.0, 512, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert 120 < len(first) < 240  # 0.6 each second
    assert all(8 <= len(a.prompt_ids) <= 256 and 4 <= a.output_tokens <= 64 for a in first)
    assert [a.at_s for a in first] == sorted(a.at_s for a in first)


@pytest.mark.parametrize("has_batch", [False, True])
def test_an_arm_counts_every_online_token_once_and_batch_until_its_end(tmp_path, has_batch):
    loaded, facts, _, model = runner.load(
        tinyllama.write_tiny(tmp_path), benchcoserve.MODEL_ID, "fp32", "exact", 2048
    )
    policy = protocol.Policy.for_targets(30.0, 10.0, 0.8)
    arm = Arm(loaded, facts, model.coefficients(), TARGETS, policy, SMALL, has_batch)
    arrivals = [Arrival(0.0, list(range(100, 140)), 5), Arrival(0.1, list(range(100, 120)), 3)]
    figures = arm.run(arrivals, seconds=0.5)
    assert (len(figures.ttfts_s), len(figures.gaps_s)) == (2, 4 + 2)
    assert (figures.batch_output_tokens > 0) == has_batch
    assert (figures.batch_tokens > figures.batch_output_tokens) == has_batch


def test_an_interval_holds_its_estimate():
    estimate, low, high = quantile_with_interval([float(i) for i in range(1000)], 0.9)
    assert low < estimate < high and estimate == pytest.approx(899.1)
