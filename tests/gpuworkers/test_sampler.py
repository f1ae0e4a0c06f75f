"""Draws are keyed by (seed, choice, output index) and nothing else."""

import numpy as np
import torch

from gpuworkers.sampler import edit, sampling_table, uniform
from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.enginekit import EOS, assign


def sequence(outputs: int = 0, request_id: str = "r", **sampling: object) -> Sequence:
    made = from_assign(assign(request_id, 5, 10, **sampling), 0.0)
    made.token_ids += [60] * outputs
    return made


def test_the_draw_of_an_output_index_is_fixed_for_ever():
    """Numbers of Philox4x64: a change would make resumed sequences differ."""
    known = [0.3347236812982095, 0.5920534818812643, 0.08098741258028985]
    assert [uniform(1234, 0, index) for index in range(3)] == known


def test_draws_differ_by_seed_choice_and_index_and_lie_below_one():
    keys = [(s, c, i) for s in (0, 1, 2**63, -1) for c in (0, 1) for i in range(50)]
    draws = [uniform(*key) for key in keys]
    assert len(set(draws)) == len(draws)
    assert all(0.0 <= draw < 1.0 for draw in draws)
    assert 0.4 < np.mean(draws) < 0.6


def test_the_draw_depends_on_the_output_index_not_on_where_ids_came_from():
    whole, resumed = (
        sequence(outputs=3, temperature=1.0, seed=5),
        sequence(outputs=0, request_id="other", temperature=1.0, seed=5, delivered=[60, 61, 62]),
    )
    table = sampling_table([whole, resumed])
    assert table.uniform[0] == table.uniform[1] == uniform(5, 0, 3)


def test_a_table_has_one_row_per_sequence():
    table = sampling_table(
        [
            sequence(),
            sequence(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=1, choice_index=2),
        ]
    )
    assert table.temperature.tolist() == [0.0, 0.5] and table.top_p.tolist() == [1.0, 0.9]
    assert table.top_k.tolist() == [0, 7] and table.min_p.tolist() == [0.0, 0.1]
    assert table.uniform.tolist() == [0.0, uniform(1, 2, 0)]


def test_ends_are_forbidden_until_the_minimum_is_reached():
    rows = [
        sequence(outputs=0, output_tokens_min=2),
        sequence(outputs=1, output_tokens_min=2),
        sequence(outputs=0, output_tokens_min=2, stop_token_ids=[9]),
        sequence(outputs=0, output_tokens_min=2, ignore_eos=True),
        sequence(),
    ]
    logits = torch.zeros(5, 12)
    edited = edit(logits, rows, {EOS})
    forbidden = [torch.isinf(row).nonzero().flatten().tolist() for row in edited]
    assert forbidden == [[EOS], [], [EOS, 9], [], []]
    assert not logits.any()  # what the model gave is what logprobs are taken from
    assert edit(logits, rows[4:], {EOS}) is logits


def test_penalties_count_the_output_and_biases_are_added():
    rows = [
        sequence(outputs=2, presence_penalty=0.5, frequency_penalty=0.25),
        sequence(outputs=0, presence_penalty=0.5, frequency_penalty=0.25),
        sequence(outputs=2, presence_penalty=-1.0, logit_bias={60: 3.0, 7: -100.0}),
    ]
    edited = edit(torch.zeros(3, 64), rows, {EOS})
    expected = torch.zeros(3, 64)
    expected[0, 60] = -(0.5 + 2 * 0.25)
    expected[2, 60] = 3.0 + 1.0
    expected[2, 7] = -100.0
    assert torch.equal(edited, expected)


def test_the_repetition_penalty_scales_every_id_seen_towards_unlikely():
    row = sequence(outputs=1, repetition_penalty=2.0)
    seen = sorted(set(row.token_ids))
    logits = torch.ones(1, 64)
    logits[0, seen[0]] = -1.0
    edited = edit(logits, [row], {EOS})
    expected = logits.clone()
    expected[0, seen] = 0.5
    expected[0, seen[0]] = -2.0
    assert torch.equal(edited, expected)
    assert edit(logits, [sequence(outputs=1)], {EOS}) is logits
