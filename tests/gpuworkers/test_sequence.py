"""A sequence's counts, its deadlines and its end."""

import pytest

from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.enginekit import EOS, assign


def sequence(prompt: int = 20, output: int = 4, **kwargs: object) -> Sequence:
    return from_assign(assign("r", prompt, output, **kwargs), now_s=10.0)


def test_a_fresh_sequence_has_its_prompt_to_compute():
    fresh = sequence()
    assert fresh.key == ("r", 1) and fresh.phase == "waiting"
    assert (fresh.pending_tokens, fresh.output_tokens, fresh.is_decoding) == (20, 0, False)


def test_delivered_ids_are_output_already_and_their_kv_is_to_be_computed():
    resumed = sequence(delivered=[60, 61])
    assert resumed.output_ids == [60, 61] and resumed.output_tokens == 2
    assert resumed.pending_tokens == 22 and resumed.handoff_tokens == 22


def test_decoding_is_one_missing_token_behind_an_output_id():
    going = sequence()
    going.computed_tokens = 19
    assert going.pending_tokens == 1 and not going.is_decoding  # its last prompt token
    going.computed_tokens = 20
    going.token_ids.append(60)
    assert going.is_decoding


@pytest.mark.parametrize(
    "stage,delivered,expected",
    [
        ("full", [], 23),
        ("decode", [], 23),
        ("prefill", [], 20),
        ("prefill", [60, 61], 22),
        ("full", [60, 61], 23),
    ],
)
def test_kv_is_needed_for_all_but_the_last_output_id(stage, delivered, expected):
    assert sequence(stage=stage, delivered=delivered).tokens_max == expected


def test_deadlines_run_from_arrival_and_then_from_the_token_before():
    going = sequence()
    assert going.first_token_due_at_s == going.next_token_due_at_s() == 11.0
    going.last_token_at_s = 12.0
    assert going.next_token_due_at_s() == pytest.approx(12.1)


def ending(ids: list[int], **sampling: object) -> str | None:
    going = sequence(output=4, **sampling)
    going.token_ids += ids
    return going.finish_reason({EOS})


def test_the_end_is_eos_a_stop_id_or_the_limit():
    assert ending([]) is None
    assert ending([60]) is None
    assert ending([60, EOS]) == "stop"
    assert ending([60, 99], stop_token_ids=[99]) == "stop"
    assert ending([60, 61, 62, 63]) == "length"
    assert ending([60, 61, 62, EOS]) == "stop"


def test_eos_can_be_ignored_and_counts_only_from_the_minimum_on():
    assert ending([60, EOS], ignore_eos=True) is None
    assert ending([60, 99], ignore_eos=True, stop_token_ids=[99]) == "stop"
    assert ending([60, EOS], output_tokens_min=3) is None
    assert ending([60, 61, EOS], output_tokens_min=3) == "stop"
