"""Journal: each output id once and in order, whatever arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.journal import PENDING_TOKENS_MAX, Journal
from controlplane.protocol import TokenLogprobs


def test_ids_in_order_pass_through():
    journal = Journal(8, epoch=1)
    assert journal.accept(1, 0, [10, 11], 0.0) == [10, 11]
    assert journal.accept(1, 2, [12], 0.0) == [12]
    assert journal.ids == [10, 11, 12] and journal.next_seq == 3
    assert journal.missing_since_s is None and journal.finish_reason is None


def test_duplicates_are_dropped_and_an_overlap_adds_only_its_end():
    journal = Journal(8, epoch=1)
    journal.accept(1, 0, [10, 11], 0.0)
    assert journal.accept(1, 0, [10, 11], 0.0) == []
    assert journal.accept(1, 1, [99, 12], 0.0) == [12]
    assert journal.ids == [10, 11, 12]
    assert journal.dropped_reports == 2


def test_ids_ahead_of_a_gap_wait_and_the_gap_is_dated():
    journal = Journal(8, epoch=1)
    assert journal.accept(1, 2, [12], 5.0) == []
    assert journal.missing_since_s == 5.0 and journal.next_seq == 0
    assert journal.accept(1, 4, [14], 6.0) == []
    assert journal.missing_since_s == 5.0
    assert journal.accept(1, 0, [10, 11], 7.0) == [10, 11, 12]
    assert journal.missing_since_s == 7.0, "a new gap before 14 opened when the old one closed"
    assert journal.accept(1, 3, [13], 8.0) == [13, 14]
    assert journal.missing_since_s is None


def test_finish_waits_for_the_ids_before_it():
    journal = Journal(8, epoch=1)
    assert journal.accept(1, 1, [11], 0.0, "stop") == []
    assert journal.finish_reason is None
    assert journal.accept(1, 0, [10], 0.0) == [10, 11]
    assert journal.finish_reason == "stop"


def test_finish_without_ids_behind_a_gap_counts_as_missing():
    journal = Journal(8, epoch=1)
    journal.accept(1, 2, [], 3.0, "stop")
    assert journal.finish_reason is None and journal.missing_since_s == 3.0


@pytest.mark.parametrize("reason", ["handed_off", "error", "cancelled"])
def test_end_of_what_one_worker_does_is_no_finish(reason):
    journal = Journal(8, epoch=1)
    assert journal.accept(1, 0, [10], 0.0, reason) == [10]
    assert journal.finish_reason is None
    assert journal.accept(1, 1, [11], 0.0, "length") == [11]
    assert journal.finish_reason == "length"


def test_reports_after_the_end_change_nothing():
    journal = Journal(8, epoch=1)
    journal.accept(1, 0, [10], 0.0, "stop")
    assert journal.accept(1, 1, [11], 0.0, "length") == []
    assert journal.ids == [10] and journal.finish_reason == "stop"


def test_other_epochs_change_nothing():
    journal = Journal(8, epoch=2)
    assert journal.accept(1, 0, [1], 0.0) == []
    assert journal.accept(3, 0, [3], 0.0, "stop") == []
    assert journal.ids == [] and journal.finish_reason is None
    assert journal.dropped_reports == 2


def test_a_move_forgets_what_was_ahead_and_keeps_what_was_delivered():
    journal = Journal(8, epoch=1)
    journal.accept(1, 0, [10], 0.0)
    journal.accept(1, 3, [13], 1.0, "stop")
    journal.move(2)
    assert journal.ids == [10] and journal.missing_since_s is None
    assert journal.accept(2, 1, [21, 22, 23], 2.0) == [21, 22, 23]
    assert journal.finish_reason is None


def test_logprobs_of_ids_that_a_move_forgets_are_forgotten_too():
    journal = Journal(8, epoch=1)
    first, ahead, again = (TokenLogprobs(-value, [], []) for value in (1.0, 2.0, 3.0))
    journal.accept(1, 0, [10], 0.0, logprobs=[first])
    journal.accept(1, 2, [12], 0.0, logprobs=[ahead])
    journal.move(2)
    journal.accept(2, 1, [21, 22], 1.0, logprobs=[again, again])
    assert journal.logprobs == {0: first, 1: again, 2: again}


def test_output_is_capped_at_its_limit():
    journal = Journal(3, epoch=1)
    assert journal.accept(1, 0, list(range(10)), 0.0, "length") == [0, 1, 2]
    assert journal.finish_reason == "length"


def test_ids_far_ahead_are_bounded():
    journal = Journal(10 * PENDING_TOKENS_MAX, epoch=1)
    journal.accept(1, 1, list(range(1, 2 * PENDING_TOKENS_MAX)), 0.0)
    assert journal.accept(1, 0, [0], 0.0) == list(range(PENDING_TOKENS_MAX + 1))
    assert journal.dropped_reports == 1


@given(st.data())
def test_any_order_and_repetition_of_reports_gives_the_output_once(data):
    output = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=20))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(output)), max_size=6)) | {0, len(output)})
    pieces = [(low, output[low:high]) for low, high in zip(cuts, cuts[1:], strict=False)]
    reports = data.draw(st.permutations(pieces + data.draw(st.lists(st.sampled_from(pieces)))))
    journal = Journal(len(output), epoch=1)
    delivered = []
    for seq, ids in reports:
        is_last = seq + len(ids) == len(output)
        delivered += journal.accept(1, seq, ids, 0.0, "length" if is_last else None)
    assert delivered == output
    assert journal.finish_reason == "length" and journal.missing_since_s is None
