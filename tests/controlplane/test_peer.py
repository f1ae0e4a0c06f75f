"""A peer's engine in virtual time: its step rule, its blocks, its order, and runs added up."""

import random
from dataclasses import replace

import pytest

from controlplane.sim import peertiming, steptable
from controlplane.sim.outcomes import Gaps, Outcome, figures
from controlplane.sim.peer import SEQUENCES_MAX, STEP_TOKENS_MAX, PeerWorker
from controlplane.sim.peerblocks import PeerBlocks
from controlplane.sim.peertiming import PeerTiming
from controlplane.sim.steadysteps import SteadySteps
from controlplane.sim.traces import TraceRequest

TIMING = peertiming.load()
OWN = peertiming.load("tokens")


class OneByOne(PeerTiming):
    """Without runs of steps."""

    def steps_in_cell(self, rows, context_tokens):
        return 1


def one_by_one() -> PeerTiming:
    return OneByOne(TIMING.file)


def drawn(seed: int, count: int = 60) -> list[TraceRequest]:
    chance = random.Random(seed)
    at_s, rows, next_id = 0.0, [], 0
    for _ in range(count):
        at_s += chance.choice((0.0, chance.expovariate(chance.choice((1.0, 20.0)))))
        prompt = int(chance.choice((1, 100, 511, 512, 513, 3_000, chance.uniform(1, 40_000))))
        fresh = -(-prompt // 512)
        prefix = chance.choice(rows).hash_ids[:1] if rows and chance.random() < 0.3 else ()
        hash_ids = (*prefix, *range(next_id, next_id + fresh))[:fresh]
        next_id += fresh
        output = int(chance.choice((1, 2, 700, chance.uniform(1, 400))))
        rows.append(TraceRequest(at_s, prompt, output, hash_ids))
    return rows


def played(rows, timing=TIMING, **settings) -> tuple[PeerWorker, list[Outcome]]:
    worker = PeerWorker(timing, **settings)
    return worker, list(worker.run(rows))


@pytest.mark.parametrize("tokens", [1, 16, 700, 8_192, 8_193, 20_000])
def test_no_way_to_split_a_prompt_is_cheaper_than_another(tokens):
    chance = random.Random(tokens)
    whole_s = 0.0
    for start in range(0, tokens, STEP_TOKENS_MAX):
        whole_s += TIMING.step_s([(start, min(STEP_TOKENS_MAX, tokens - start))], 0, 0)
    cuts = sorted({0, tokens, *(chance.randrange(tokens) for _ in range(5))})
    parts_s = sum(TIMING.step_s([(a, b - a)], 0, 0) for a, b in zip(cuts, cuts[1:], strict=False))
    assert parts_s == pytest.approx(whole_s, rel=1e-12)


def test_by_the_peers_own_rule_small_chunks_are_cheaper_and_position_does_not_matter():
    assert OWN.step_s([(0, 8_192)], 0, 0) == pytest.approx(0.198872)
    assert OWN.step_s([(9_000, 4_096), (0, 4_096)], 0, 0) == OWN.step_s([(0, 8_192)], 0, 0)
    assert 8 * OWN.step_s([(0, 1_024)], 0, 0) < 0.9 * OWN.step_s([(0, 8_192)], 0, 0)


def test_a_step_is_its_prompts_and_its_decodes_added():
    both_s = TIMING.step_s([(0, 1_024)], 2, 8_192)
    assert both_s == pytest.approx(0.02118 + TIMING.step_s((), 2, 8_192))
    assert TIMING.step_s((), 2, 8_192) == pytest.approx(0.005194)  # a point of the table
    assert TIMING.step_s((), 0, 0) == 0.0


@pytest.mark.parametrize("timing", [TIMING, steptable.load(steptable.NAMES[0])])
@pytest.mark.parametrize("seed", range(20))
def test_second_differences_are_equal_within_a_cell(timing, seed):
    chance = random.Random(seed)
    rows = chance.randrange(1, 257)
    tokens = rows * chance.randrange(1, 20_000)
    count = min(200, timing.steps_in_cell(rows, tokens))
    times = [timing.step_s((), rows, tokens + i * rows) for i in range(count)]
    steps = SteadySteps.through(times[:3])
    assert [steps.step_s(i) for i in range(count)] == pytest.approx(times, abs=1e-9)
    assert steps.total_s(count) == pytest.approx(sum(times), abs=1e-9)
    for limit_s in (times[0], times[-1], sum(times) / count):
        assert steps.num_slower(limit_s - 1e-8, count) == sum(t > limit_s - 1e-8 for t in times)


def test_a_run_ends_with_the_step_in_which_somebody_arrives():
    steps = SteadySteps(0.01, 0.001, 0.0)
    assert steps.until(0.0101, 9) == 2 and steps.until(0.01, 9) == 1
    assert steps.until(9.0, 9) == 9 and steps.until(-1.0, 9) == 1


@pytest.mark.parametrize("seed", range(25))
def test_runs_of_steps_change_nothing(seed):
    rows = drawn(seed)
    num_blocks = 200 if seed % 2 else 1_600  # some have to preempt
    fast, outcomes = played(rows, num_blocks=num_blocks)
    slow, expected = played(rows, one_by_one(), num_blocks=num_blocks)
    assert len(outcomes) == len(rows)
    for one, other in zip(outcomes, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-7)
    assert fast.num_preempted == slow.num_preempted
    assert fast.cached_tokens == slow.cached_tokens
    assert fast.gaps.num == slow.gaps.num == sum(row.output_tokens - 1 for row in rows)
    assert fast.gaps.num_slow == pytest.approx(slow.gaps.num_slow, abs=2)


def test_full_blocks_make_the_newest_wait_again_and_all_get_their_tokens():
    rows = [TraceRequest(0.0, 2_000, 600, (i * 10, i * 10 + 1, i * 10 + 2)) for i in range(3)]
    worker, outcomes = played(rows, num_blocks=12)
    assert worker.num_preempted and [o.num_gaps for o in outcomes] == [599] * 3
    with pytest.raises(ValueError, match="6 blocks, a worker has 5"):
        played(rows, num_blocks=5)


def test_prompts_are_computed_first_come_first_served_and_ties_in_their_order():
    rows = [TraceRequest(1.0, 8_192, 1), TraceRequest(1.0, 100, 1), TraceRequest(1.05, 100, 1)]
    _, outcomes = played(rows)
    full_s = TIMING.step_s([(0, 8_192)], 1, 8_192)
    rest_s = TIMING.step_s([(0, 100), (0, 100)], 2, 200)
    assert [o.ttft_s for o in outcomes] == pytest.approx(
        [full_s, full_s + rest_s, full_s + rest_s - 0.05]
    )


def test_at_most_so_many_sequences_run():
    rows = [TraceRequest(0.0, 10, 2) for _ in range(SEQUENCES_MAX + 1)]
    _, outcomes = played(rows)
    assert len({round(o.ttft_s, 9) for o in outcomes[:-1]}) == 1
    assert outcomes[-1].ttft_s > outcomes[0].ttft_s + outcomes[0].decode_s


def test_a_prefix_that_is_here_is_not_computed_again_but_the_last_token_always_is():
    first = TraceRequest(0.0, 1_024, 1, (1, 2))
    worker, outcomes = played([first, replace(first, at_s=9.0)])
    assert worker.cached_tokens == 512
    assert outcomes[1].ttft_s == pytest.approx(TIMING.step_s([(512, 512)], 1, 1_024))


def test_blocks_that_nobody_uses_go_oldest_first_and_the_end_of_a_prefix_before_its_start():
    blocks = PeerBlocks(5)
    blocks.use((1, 2), 1)
    blocks.free((1, 2), 1)
    blocks.use((3,))
    assert blocks.num_available == 4 and blocks.cached((1, 2)) == 2
    blocks.use((), 3)
    assert blocks.cached((1, 2)) == 1 and blocks.num_shared((1, 3)) == 1
    with pytest.raises(AssertionError, match="1 more blocks"):
        blocks.use((), 2)


def test_good_is_by_the_mean_gap_and_strictly_good_by_its_p99():
    stalled = Outcome(1.0, 4.0, 100, 2)
    assert stalled.is_good and not stalled.is_strictly_good
    assert not Outcome(2.1, 0.0, 0, 0).is_good
    assert not Outcome(1.0, 5.1, 100, 0).is_good
    gaps = Gaps()
    gaps.add(0.01, 98)
    gaps.add(0.4, 2)
    row = figures([stalled, Outcome(0.5, 1.0, 100, 1)], 3, gaps)
    assert (row["requests"], row["good_requests"], row["good_requests_strict"]) == (3, 2, 1)
    assert row["ttft_ms"] == {"mean": 750.0, "p50": 500.0, "p90": 1000.0, "p99": 1000.0}
    assert row["itl_ms"] == {"p99": 400.0} and row["itl_miss"] == 0.02


def test_figures_without_an_answer():
    row = figures([], 2, Gaps())
    assert row["answered"] == 0 and row["itl_ms"] == {"p99": 0.0} and row["itl_miss"] == 0.0
