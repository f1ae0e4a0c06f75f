"""Our policy in a comparison: what it sees, and what it does not."""

import random
from dataclasses import dataclass, replace

import pytest

from controlplane.sim import comparison, ours, peertiming
from controlplane.sim.outcomes import Gaps
from controlplane.sim.replay import Replay
from controlplane.sim.traces import HASH_TOKENS, TraceRequest

OUTPUT_MAX = 800
WORKERS = 2
TIMES = peertiming.load()


def drawn(seed: int, count: int = 80) -> list[TraceRequest]:
    chance = random.Random(seed)
    rows: list[TraceRequest] = []
    for index in range(count):
        prompt = int(chance.uniform(200, 6_000))
        ids = tuple(100 * index + i for i in range(-(-prompt // HASH_TOKENS)))
        if rows and chance.random() < 0.4:
            ids = (chance.choice(rows).hash_ids[:1] + ids)[: len(ids)]
        rows.append(TraceRequest(0.8 * (index // 8), prompt, chance.randrange(1, 300), ids))
    return rows


@dataclass(slots=True)
class Watched(Replay):
    """Keeps what the plane ordered, and when."""

    orders: list | None = None

    def _execute(self, command) -> None:
        self.orders = self.orders or []
        self.orders.append((self.events.now_s, repr(command)))
        Replay._execute(self, command)


def played(rows, monkeypatch, seed=1) -> Watched:
    monkeypatch.setattr(ours, "Replay", Watched)
    replay = ours.build(TIMES, WORKERS, OUTPUT_MAX, seed)
    list(ours.play(replay, rows, Gaps()))
    return replay


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_lengths_of_unfinished_requests_decide_nothing(seed, monkeypatch):
    rows, chance = drawn(seed), random.Random(seed)
    truth = played(rows, monkeypatch)
    until_s = 7.0
    ended_at_s = {record.index: record.ended_at_s for record in truth.records}
    finished = [ended_at_s[i + 1] < until_s for i in range(len(rows))]
    assert 10 < sum(finished) < len(rows) - 10
    garbage = [
        row if done else replace(row, output_tokens=row.output_tokens + chance.randrange(1, 900))
        for row, done in zip(rows, finished, strict=True)
    ]
    other = played(garbage, monkeypatch)
    before = [order for order in truth.orders if order[0] < until_s]
    assert len(before) > 50
    assert before == [order for order in other.orders if order[0] < until_s]
    assert truth.orders != other.orders  # afterwards the difference shows


def test_a_request_allows_what_the_comparison_says_and_its_class_is_paced(monkeypatch):
    rows = [TraceRequest(0.0, 700, 5_000)]
    replay = played(rows, monkeypatch)
    [record] = replay.records
    assert record.output_tokens == OUTPUT_MAX and record.is_done
    assert (record.ttft_target_s, record.itl_target_s) == (2.0, 0.05)


def test_every_request_is_answered_and_no_mean_gap_is_above_the_target():
    gaps = Gaps()
    replay = ours.build(TIMES, WORKERS, OUTPUT_MAX, 1)
    rows = drawn(5)
    outcomes = list(ours.play(replay, rows, gaps))
    assert len(outcomes) == len(rows)
    assert gaps.num == sum(outcome.num_gaps for outcome in outcomes)
    assert gaps.num_slow == sum(outcome.num_slow for outcome in outcomes)
    assert all(outcome.decode_s <= 0.05 * outcome.num_gaps + 1e-9 for outcome in outcomes)


def test_it_is_a_policy_of_the_comparison():
    assert comparison.POLICIES["slackwater"] is comparison.slackwater
