"""Predicted seconds and scores of one worker, as tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane import protocol
from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TOKENS_NEVER, can_pair, choose, threshold_tokens
from controlplane.domain import Candidate, SLOClass, WorkerHello
from controlplane.latency import StepFeatures, step_s
from controlplane.prefixes import Hit
from controlplane.protocol import ALONE_TTFT_SHARE
from controlplane.registry import Pace, Registry, Reservation, Worker
from controlplane.scorers import (
    Ask,
    blocks_needed,
    ineligible_reason,
    measure,
    prefill_s,
    prompt_step_s,
    score,
)
from tests.factories import BATCH, CPU_STEP, MODEL, make_hello, make_load, make_request

CONFIG = ControlPlaneConfig()
EMPTY = StepFeatures()


def make_worker(role: protocol.Role = "decode", **facts) -> Worker:
    registry = Registry(CONFIG, b"s" * 32)
    worker = registry.join(WorkerHello("c1", make_hello(role, **facts)), 0.0, lambda: 0.5)
    assert isinstance(worker, Worker), worker
    return worker


def ask(now_s: float = 0.0, ttft_s_left: float = 4.0, avoid=frozenset(), cached=None, **facts):
    hits = {name: Hit(count, 0) for name, count in (cached or {}).items()}
    return Ask(make_request(**facts), now_s, ttft_s_left, hits, avoid)


def row(*arguments, **options) -> Candidate:
    return measure(*arguments, **options).candidate


def pace(model: protocol.StepModel = CPU_STEP, rows: int = 0, context_tokens: int = 0) -> Pace:
    worker = make_worker(step_model=model)
    worker.num_online_decoding, worker.online_context_tokens = rows, context_tokens
    return worker.pace


def hold(worker: Worker, request_id: str, stage="full", is_batch=False, **facts) -> None:
    facts = {"prefill_tokens": 0, "blocks": 0, "context_tokens": 0} | facts
    worker.reserve(Reservation(request_id, stage, is_batch, **facts))


@pytest.mark.parametrize(
    ("tokens", "itl_s", "num_steps"),
    [
        (1, 0.2, 1),
        (51, 0.2, 1),  # (200 - 45) ms at 3 ms a token
        (52, 0.2, 2),
        (600, 0.2, 12),
        (600, 10.0, 1),
        (10, 0.045, 7),  # the base alone meets the target: a tenth of it is left
    ],
)
def test_prefill_pays_the_base_once_per_chunk(tokens, itl_s, num_steps):
    model = protocol.StepModel(0.045, 0.003, 0.0)
    expected_s = num_steps * 0.045 + tokens * 0.003
    assert prefill_s(pace(model), 0, tokens, itl_s) == pytest.approx(expected_s)


def test_decode_rows_beside_stretch_a_prefill():
    alone_s = prefill_s(pace(), 0, 300, 0.2)
    beside_s = prefill_s(pace(rows=16, context_tokens=5000), 0, 300, 0.2)
    crowded_s = prefill_s(pace(rows=40, context_tokens=20_000), 0, 300, 0.2)
    assert alone_s < beside_s < crowded_s


def test_cached_start_costs_context_but_no_rows():
    model = protocol.StepModel(0.045, 0.003, 1e-4)
    assert prefill_s(pace(model), 512, 16, 10.0) == pytest.approx(
        0.045 + 16 * 0.003 + (512 + 8) * 1e-4
    )


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 64), st.floats(0.001, 2.0))
def test_prefill_time_is_finite_and_grows_with_its_tokens(tokens, more, rows, itl_s):
    beside = pace(rows=rows, context_tokens=100 * rows)
    short_s = prefill_s(beside, 0, tokens, itl_s)
    long_s = prefill_s(beside, 0, tokens + more, itl_s)
    assert 0.0 < short_s < long_s < math.inf


@pytest.mark.parametrize(
    ("ttft_s", "itl_s", "expected"),
    [(0.0, 0.0, 1.0), (4.0, 0.2, 0.5), (0.0, 0.2, 0.85), (4.0, 0.0, 0.65)],
)
def test_score_is_one_without_latency_and_a_half_at_the_targets(ttft_s, itl_s, expected):
    assert score(ttft_s, 4.0, itl_s, 0.2) == pytest.approx(expected)


@given(st.floats(0, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(1e-6, 1e3))
def test_score_stays_between_zero_and_one(ttft_s, left_s, itl_s, itl_target_s):
    assert 0.0 <= score(ttft_s, left_s, itl_s, itl_target_s) <= 1.0


@pytest.mark.parametrize(
    ("prompt", "output", "expected"), [(1, 1, 1), (16, 1, 1), (16, 2, 2), (17, 16, 2), (33, 0, 3)]
)
def test_blocks_cover_prompt_and_output_but_not_the_last_id(prompt, output, expected):
    request = make_request(prompt_tokens=prompt)
    assert blocks_needed(make_worker(), request, output) == expected


def reason(worker: Worker, question: Ask, config: ControlPlaneConfig = CONFIG) -> str:
    output = question.request.output_tokens_max
    return ineligible_reason(worker, question, config, output)


def test_worker_in_order_has_no_reason_against_it():
    assert reason(make_worker(), ask()) == ""


@pytest.mark.parametrize("status", ["draining", "drained", "lost"])
def test_worker_that_is_not_live_says_its_status(status):
    worker = make_worker()
    worker.status = status
    assert reason(worker, ask()) == status


def test_reasons_name_the_numbers():
    worker = make_worker(num_blocks=4)
    assert reason(worker, ask(now_s=1.6)) == "nothing heard for 1.6 s, in one step for 0.0 s"
    assert "refused" in reason(worker, ask(avoid=frozenset({"w1"})))
    assert reason(worker, ask(prompt_tokens=2040)) == (
        "prompt and output of 2056 tokens, at most 2048"
    )
    assert reason(worker, ask(prompt_tokens=60)) == "needs 5 KV blocks, 4 free"
    limited = ControlPlaneConfig(sequences_max=1, batch_rows_max=1)
    hold(worker, "r1"), hold(worker, "b1", is_batch=True)
    assert reason(worker, ask(), limited) == "1 online sequences, at most 1"
    assert reason(worker, ask(slo=BATCH), limited) == "1 batch sequences, at most 1"


def test_prefill_stage_needs_room_for_the_prompt_only():
    worker = make_worker("prefill", num_blocks=4)
    question = ask(prompt_tokens=64, output_tokens_max=100)
    assert not row(worker, question, CONFIG, is_prefill=False).eligible
    assert row(worker, question, CONFIG, is_prefill=True).eligible


def test_step_prediction_counts_sequences_that_decode_here_now_or_soon():
    worker = make_worker()
    base_s = row(worker, ask(), CONFIG, is_prefill=False).itl_s
    hold(worker, "r1", "prefill", context_tokens=500)
    hold(worker, "b1", is_batch=True, context_tokens=500)
    assert row(worker, ask(), CONFIG, is_prefill=False).itl_s == base_s
    hold(worker, "r2", "decode", context_tokens=500)
    joined = StepFeatures(1, 500).with_tokens(32, 1)
    assert row(worker, ask(), CONFIG, is_prefill=False).itl_s == pytest.approx(
        step_s(CPU_STEP, joined)
    )


def test_wait_ends_with_the_step_in_hand_when_no_prompt_is_before():
    worker = make_worker()
    worker.report(make_load(running_online=2, predicted_s=0.4))
    rows = [row(worker, ask(now_s=t), CONFIG, is_prefill=False) for t in (0.0, 0.3, 0.9)]
    assert [row.queue_s for row in rows] == pytest.approx([0.4, 0.1, 0.0])
    worker.report(make_load(predicted_s=0.4))
    assert row(worker, ask(), CONFIG, is_prefill=False).queue_s == 0.0


def test_batch_prompts_before_an_online_one_are_no_wait():
    worker = make_worker()
    hold(worker, "b1", is_batch=True, prefill_tokens=1000)
    assert row(worker, ask(), CONFIG, is_prefill=False).queue_s == 0.0
    hold(worker, "r1", prefill_tokens=1000)
    assert row(worker, ask(), CONFIG, is_prefill=False).queue_s > 3.0


@pytest.mark.parametrize(
    ("block_tokens", "matched", "prompt", "expected"),
    [(16, 3, 100, 48), (32, 3, 100, 32), (64, 3, 100, 0), (16, 4, 64, 48), (16, 0, 64, 0)],
)
def test_cached_tokens_are_whole_blocks_of_the_worker_below_the_prompt(
    block_tokens, matched, prompt, expected
):
    worker = make_worker(block_tokens=block_tokens)
    question = ask(cached={"w1": matched}, prompt_tokens=prompt)
    assert question.cached_tokens(worker, CONFIG) == (expected, 0)


def test_reservations_balance_to_zero():
    worker = make_worker()
    for index, stage in enumerate(("full", "prefill", "decode", "full")):
        hold(
            worker,
            f"r{index}",
            stage,
            is_batch=index == 3,
            prefill_tokens=9,
            blocks=2,
            context_tokens=100,
        )
        worker.check_integrity()
    assert (worker.num_online, worker.num_online_decoding, worker.num_batch) == (3, 2, 1)
    assert worker.blocks_free(is_batch=False) == 2048 - 6
    assert worker.blocks_free(is_batch=True) == 2048 - 8
    worker.accepted("r0"), worker.report(make_load())
    assert worker.blocks_free(is_batch=True) == 2048 - 6
    for index in range(4):
        assert worker.release(f"r{index}")
        assert not worker.release(f"r{index}"), "credited once"
        worker.check_integrity()
    assert (worker.num_online, worker.num_online_decoding, worker.num_batch) == (0, 0, 0)
    assert worker.online_context_tokens == worker.prefill_tokens_given == 0
    assert worker.blocks_free(is_batch=True) == 2048


# --- handing off -------------------------------------------------------------------------------


def candidate(worker_id: str, ttft_s: float) -> Candidate:
    return Candidate(
        worker_id, "mixed", True, "", 0.0, ttft_s, 0.0, ttft_s, 0.05, 0, 100, 0.5, ttft_s
    )


@pytest.mark.parametrize(
    ("rows", "transfer_per_token_s", "expected"),
    [
        (0, 0.0, 128),  # the floor: 20 ms of set-up is worth 8 tokens at 2.7 ms
        (1, 0.0023, 128),
        (1, 0.00262, 251),  # 20 ms / (2.7 - 2.62) ms
        (1, 0.0027, TOKENS_NEVER),
        (2, 0.0027, 128),  # two rows stalled are worth more
        (1, 0.1, TOKENS_NEVER),
    ],
)
def test_threshold_weighs_the_transfer_against_the_rows_it_spares(
    rows, transfer_per_token_s, expected
):
    found = threshold_tokens(make_worker(), rows, 0.02, transfer_per_token_s, False, CONFIG)
    assert found == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("uncached", "local_s", "remote_s", "is_handoff"),
    [
        (127, 9.0, 0.1, False),
        (128, 0.1, 3.7, True),  # both in time: spare the decode rows
        (400, 2.0, 5.0, False),  # late, and local is much sooner
        (400, 3.7, 5.0, False),  # only local is in time
        (400, 9.0, 5.0, True),
    ],
)
def test_choice_between_local_and_handoff(uncached, local_s, remote_s, is_handoff):
    chosen, why = choose(
        uncached, 128, candidate("w2", local_s), candidate("w1", remote_s), 4.0, False, CONFIG
    )
    assert chosen is is_handoff
    assert str(uncached) in why


@pytest.mark.parametrize(
    "facts",
    [
        {"block_tokens": 32},
        {"dtype": "bf16"},
        {"models": (protocol.ModelFacts(MODEL.model_id, "b" * 64, 2048, 49_152, 46_080),)},
        {"models": (protocol.ModelFacts(MODEL.model_id, "a" * 64, 2048, 49_152, 23_040),)},
    ],
)
def test_pair_must_hold_the_same_kv(facts):
    prefill, decode, other = make_worker("prefill"), make_worker(), make_worker(**facts)
    decode.worker_id, other.worker_id = "w2", "w3"
    assert can_pair(prefill, decode, MODEL.model_id)
    assert not can_pair(prefill, other, MODEL.model_id)
    assert not can_pair(prefill, prefill, MODEL.model_id)


def test_prompt_tokens_from_the_host_tier_cost_a_share_of_computing_them():
    worker = make_worker()
    facts = {"request": make_request(prompt_tokens=161), "now_s": 0.0, "ttft_s_left": 4.0}
    seconds = []
    for device, host in ((10, 0), (4, 6), (0, 10), (0, 0)):
        question = Ask(hits={"w1": Hit(device, host)}, avoid=frozenset(), **facts)
        assert question.cached_tokens(worker, CONFIG) == (16 * (device + host), 16 * host)
        seconds.append(row(worker, question, CONFIG, is_prefill=False).prefill_s)
    assert seconds == sorted(seconds)
    token_s = CPU_STEP.per_token_s
    assert seconds[1] - seconds[0] == pytest.approx(CONFIG.restore_share * token_s * 96)


def test_chunks_are_paced_by_the_itl_target_only_where_somebody_decodes():
    slo = SLOClass("interactive", 0, ttft_s_p99=4.0, itl_s_p99=0.2)
    assert prompt_step_s(pace(), slo) == ALONE_TTFT_SHARE * 4.0
    assert prompt_step_s(pace(rows=1, context_tokens=100), slo) == 0.2
    loose = SLOClass("flex", 2, ttft_s_p99=0.4, itl_s_p99=0.2)
    assert prompt_step_s(pace(), loose) == 0.2
    others = make_worker()  # decode rows that another gateway has placed
    others.report(make_load(running_online=1))
    assert prompt_step_s(others.pace, slo) == 0.2
