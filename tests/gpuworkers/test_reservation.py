"""Admission by predicted peak: never more than fits, and more than worst cases would admit."""

import random

import pytest

from gpuworkers.fake import FakeKV
from gpuworkers.reservation import Reservations, peak_blocks
from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.enginekit import BATCH, ONLINE, assign


def reservations(num_blocks: int = 16, host_blocks: int = 64) -> Reservations:
    return Reservations(FakeKV(num_blocks, 16), 0.125, host_blocks)


def batch(name: str, prompt: int, output: int, at_s: float = 0.0) -> Sequence:
    return from_assign(assign(name, prompt, output, targets=BATCH, salt=name.encode()), at_s)


def brute_peak(rows: list[tuple[int, int]], size: int) -> int:
    steps = max(steps for _, steps in rows)
    return max(
        sum(-(-(now + step) // size) for now, last in rows if last >= step)
        for step in range(steps + 1)
    )


@pytest.mark.parametrize(
    "rows,peak",
    [([(10, 0)], 1), ([(16, 1)], 2), ([(16, 16), (16, 16)], 4), ([(160, 1), (16, 160)], 13)],
)
def test_the_peak_by_hand(rows, peak):
    assert peak_blocks(rows, 16) == peak


def test_the_peak_is_the_one_of_a_walk_over_all_steps():
    rng = random.Random(1)
    for _ in range(200):
        rows = [(rng.randint(1, 90), rng.randint(0, 90)) for _ in range(rng.randint(1, 8))]
        assert peak_blocks(rows, 16) == brute_peak(rows, 16), rows


def test_without_a_history_batch_is_admitted_by_its_limits():
    kv = reservations()
    rows = [batch(f"b{i}", 30, 51, i) for i in range(4)]  # 5 blocks each at the end, 2 now
    started = []
    for row in rows:
        if kv.has_room(row, started):
            kv.start(row)
            started.append(row)
    assert len(started) == 2  # 10 of 14 blocks; a third could need 15
    assert all(len(row.block_ids) == 2 for row in started)


def test_short_outputs_in_the_history_admit_more():
    kv = reservations()
    for _ in range(20):
        kv.lengths.add(2)
    started = []
    for i in range(8):
        row = batch(f"b{i}", 30, 51, i)
        if kv.has_room(row, started):
            kv.start(row)
            started.append(row)
    assert len(started) == 7  # 2 blocks each, 14 in all


def test_growth_beyond_the_prediction_takes_from_the_latest_arrival():
    kv = reservations(num_blocks=8)
    old, young = batch("old", 60, 60, 0.0), batch("young", 60, 60, 1.0)
    for row in (old, young):
        kv.start(row)
        row.computed_tokens = 60
    old.token_ids += [9] * 6
    kv.grow([young, old])
    assert (len(old.block_ids), young.phase) == (5, "waiting")
    assert kv.counts.preemptions == 1
    kv.check_integrity([old, young])


def test_a_sequence_alone_gives_itself_up_when_online_holds_the_rest():
    kv = reservations(num_blocks=8)
    online = from_assign(assign("o", 60, 5, targets=ONLINE), 0.0)
    row = batch("b", 60, 60)
    kv.start(online)
    kv.start(row)
    row.computed_tokens, row.token_ids = 64, row.token_ids + [9] * 5
    kv.grow([row, online])
    assert row.phase == "waiting" and row.preempted_tokens == 64
    kv.check_integrity([online, row])


def test_a_preempted_sequence_gets_every_token_back_or_counts_it_as_lost():
    for host_blocks, restored in ((64, 70), (0, 0)):
        kv = reservations(host_blocks=host_blocks)
        row = batch("b", 70, 20)
        kv.start(row)
        row.computed_tokens = 70
        row.token_ids.append(9)
        kv.publish(row, 0)
        kv.preempt(row)
        thief = from_assign(assign("o", 250, 6, salt=b"o"), 0.0)  # overwrites every cached block
        kv.start(thief)
        kv.free(thief)
        assert kv.has_room(row, [row])
        kv.start(row)
        assert row.computed_tokens == restored
        assert kv.counts.restored_tokens == restored
        assert kv.counts.recomputed_tokens == 70 - restored
        kv.check_integrity([row])


def test_blocks_of_batch_are_evicted_before_older_ones_of_online():
    kv = reservations(num_blocks=8, host_blocks=0)
    online = from_assign(assign("o", 48, 1), 0.0)
    row = batch("b", 48, 1)
    for sequence in (online, row):  # the online one ends first, so it was unused longest
        kv.start(sequence)
        sequence.computed_tokens = 48
        kv.publish(sequence, 0)
        kv.free(sequence)
    other = from_assign(assign("x", 80, 1, salt=b"x"), 0.0)
    kv.start(other)
    assert kv.pool.cached_blocks(online.hashes) == 3
    assert kv.pool.cached_blocks(row.hashes) == 0
