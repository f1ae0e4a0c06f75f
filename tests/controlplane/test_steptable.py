"""The device of the simulator: the table's own points, and what lies between and beyond them."""

import pytest

from controlplane.sim import steptable

TABLE = steptable.load("llama-3.1-8b-bf16-tp1")


@pytest.mark.parametrize("name", steptable.NAMES)
def test_every_table_loads_and_names_its_source(name):
    file = steptable.load(name).file
    assert file.name == name and "AIConfigurator" in file.source


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        steptable.load("../../secrets")


def test_the_points_of_the_tables_are_hit():
    assert TABLE.step_s([], 64, 64 * 4096) == pytest.approx(13.616e-3)
    assert TABLE.step_s([(0, 512)], 32, 32 * 4096) == pytest.approx(16.976e-3)
    assert TABLE.step_s([(0, 1024)], 0, 0) == pytest.approx(21.18e-3)
    assert TABLE.step_s([], 0, 0) == 0.0


def test_between_points_it_is_linear_and_beyond_them_the_last_line_goes_on():
    low, high = TABLE.step_s([], 64, 64 * 1024), TABLE.step_s([], 96, 96 * 1024)
    assert TABLE.step_s([], 80, 80 * 1024) == pytest.approx((low + high) / 2)
    step = TABLE.step_s([], 512, 512 * 1024) - TABLE.step_s([], 448, 448 * 1024)
    assert TABLE.step_s([], 576, 576 * 1024) == pytest.approx(
        TABLE.step_s([], 512, 512 * 1024) + step
    )


def test_two_chunks_cost_what_their_tokens_cost_and_a_context_before_one_costs_more():
    one = TABLE.step_s([(0, 512)], 8, 8 * 1024)
    assert TABLE.step_s([(0, 200), (0, 312)], 8, 8 * 1024) == pytest.approx(one)
    added = TABLE.step_s([(4096, 512)], 8, 8 * 1024) - one
    assert added == pytest.approx((12.979 - 11.482) * 1e-3)
    assert TABLE.step_s([(65_536, 16)], 8, 8192) > TABLE.step_s([(0, 16)], 8, 8192)


def test_the_first_tokens_of_a_chunk_start_from_the_decode_step():
    alone = TABLE.step_s([], 32, 32 * 1024)
    assert TABLE.step_s([(0, 2)], 32, 32 * 1024) == pytest.approx(alone, rel=0.01)
    assert TABLE.step_s([(0, 64)], 32, 32 * 1024) > alone
