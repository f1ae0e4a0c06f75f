"""Predicted output lengths: a quantile of the longer ones, never beyond the request's limit."""

from gpuworkers.lengths import HISTORY_MIN, OutputLengths


def of(*lengths: int, history_max: int = 256) -> OutputLengths:
    history = OutputLengths(history_max)
    for length in lengths:
        history.add(length)
    return history


def test_without_a_history_the_limit_is_predicted():
    assert of().predict(0, 100) == 100
    assert of(*[5] * (HISTORY_MIN - 1)).predict(0, 100) == 100


def test_the_quantile_of_the_longer_ones_is_predicted():
    history = of(*range(1, 101))
    assert history.predict(0, 1000) == 90
    assert history.predict(50, 1000) == 95
    assert history.predict(50, 80) == 80


def test_a_sequence_longer_than_nearly_all_gets_its_limit():
    assert of(*range(1, 101)).predict(90, 1000) == 1000


def test_the_oldest_lengths_are_forgotten_at_the_maximum():
    history = of(*[500] * 20, *[10] * 20, history_max=20)
    assert history.predict(0, 1000) == 10
    assert history.predict(10, 1000) == 1000
