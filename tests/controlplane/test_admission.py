"""Admission before prefill: calibrated prediction, batch removed, retry times that are kept."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import domain
from controlplane.admission import RetryBook, retry_key
from controlplane.calibration import MARGIN_AT_START, SCORES_MIN, TTFTCalibration, bucket_of
from controlplane.config import ControlPlaneConfig
from controlplane.sim.events import Events
from tests.controlplane.rig import Rig, of, rejection
from tests.controlplane.test_contracts import make_contract
from tests.factories import BATCH, INTERACTIVE, make_load, make_request

STRICT = replace(INTERACTIVE, ttft_s_p99=1.0)


def busy(tokens_waiting: int, **settings) -> Rig:
    """One worker that has so many prompt tokens before it."""
    rig = Rig(**settings)
    rig.join("decode")
    rig.send("w1", make_load(prefill_tokens_waiting=tokens_waiting, running_online=1))
    return rig


def rejecting(rig: Rig, **facts) -> Rig:
    contract = make_contract(
        requests_per_min=6_000, tokens_per_min=600_000, concurrency_max=500, when_late="reject"
    )
    rig.handle(domain.ContractsSet((replace(contract, **facts),)))
    return rig


def test_request_that_would_be_late_everywhere_runs_in_the_surplus_tier():
    (decided,) = of(domain.Decided, busy(400).submit(slo=STRICT))
    assert decided.outcome.demotion.code == "late"
    assert "predicted TTFT p99" in decided.record.reason and "target 1000 ms" in (
        decided.record.reason
    )


def test_contract_that_rejects_late_requests_says_when_to_come_back_and_keeps_it():
    rig = rejecting(busy(400))
    refused = rejection(rig.submit("r1", slo=STRICT))
    assert refused.code == "late" and refused.retry_after_s > 0.1
    rig.now_s += refused.retry_after_s
    rig.send("w1", make_load(prefill_tokens_waiting=0))
    (decided,) = of(domain.Decided, rig.submit("r2", slo=STRICT))
    assert isinstance(decided.outcome, domain.Placed) and decided.outcome.demotion is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2_000), st.integers(0, 60), st.integers(1, 400), st.booleans())
def test_batch_changes_no_decision(waiting, num_batch, prompt, is_rejecting):
    """algorithms.md 2c: emptying every batch queue changes no accept or reject."""
    outcomes = []
    for has_batch in (False, True):
        rig = Rig()
        rig.join("decode"), rig.join("mixed")
        if is_rejecting:
            rejecting(rig)
        for worker_id in ("w1", "w2"):
            held = 3 * num_batch if has_batch else 0
            load = make_load(
                prefill_tokens_waiting=waiting,
                running_batch=num_batch if has_batch else 0,
                kv_blocks_held_batch=held,
                kv_blocks_free=2048 - held,
                predicted_s=0.01,
            )
            rig.send(worker_id, load)
        for index in range(num_batch if has_batch else 0):
            rig.submit(f"b{index}", slo=BATCH)
        rig.now_s = 0.02
        (decided,) = of(domain.Decided, rig.submit("r", slo=STRICT, prompt_tokens=prompt))
        outcome = decided.outcome
        code = outcome.code if isinstance(outcome, domain.Rejected) else outcome.demotion
        outcomes.append((type(outcome), code if isinstance(code, str) else bool(code)))
    assert outcomes[0] == outcomes[1]


def test_surplus_prompts_do_not_make_later_requests_late():
    rig = Rig()
    rig.join("decode")
    rig.handle(domain.ContractsSet((make_contract(requests_per_min=1, tokens_per_min=100_000),)))
    rig.submit("r0")
    rig.finish("r0")
    for index in range(5):
        slow = replace(STRICT, itl_s_p99=5.0)  # a step has room for all of these prompts
        rig.submit(f"s{index}", slo=slow, prompt_tokens=100)
    tiers = [item.tier for item in of(domain.Dispatch, rig.commands)]
    assert tiers.count("surplus") == 5
    (decided,) = of(domain.Decided, rig.submit("r1", tenant_id="beta", slo=STRICT))
    assert decided.outcome.demotion is None


def test_waiting_request_that_can_no_longer_be_in_time_goes_behind_those_that_can():
    rig = Rig(sequences_max=1)
    rig.join("decode")
    rig.submit("r0", tenant_id="other")
    rig.submit("old", slo=STRICT)
    rig.tick(1.2, heard=("w1",))
    rig.submit("new", slo=STRICT, tenant_id="other")
    assert [item.request_id for item in of(domain.Dispatch, rig.finish("r0"))] == ["new"]
    commands = rig.finish("new")
    (decided,) = of(domain.Decided, commands)
    assert decided.request_id == "old" and decided.outcome.demotion.code == "late"


def test_request_admitted_as_feasible_is_never_rejected_as_late():
    rig = rejecting(Rig(sequences_max=1))
    rig.join("decode")
    rig.submit("r0", tenant_id="other")
    rig.submit("r1", slo=STRICT)
    rig.tick(5.0, heard=("w1",))
    rig.finish("r0")
    (decided,) = [item for item in of(domain.Decided, rig.commands) if item.request_id == "r1"][1:]
    assert isinstance(decided.outcome, domain.Placed)


# --- promised retries ----------------------------------------------------------------------------


def book(**values) -> RetryBook:
    return RetryBook(ControlPlaneConfig(**values))


def test_each_refusal_gets_a_time_of_its_own_and_no_sooner_than_its_work_allows():
    target = book(retry_share=0.5)
    waits = [target.promise("t", 0.2, 1.0, 2, 0.0) for _ in range(4)]
    assert waits == pytest.approx([0.2, 1.2, 2.2, 3.2])
    assert target.ahead_s(1.5, 2, 0.0) == pytest.approx(1.0)


def test_promise_is_redeemed_once_by_its_retry_when_it_is_due():
    target = book()
    target.promise("a", 1.0, 1.0, 1, 0.0)
    assert not target.redeem("a", 0.5) and not target.redeem("b", 1.0)
    assert target.redeem("a", 1.0) and not target.redeem("a", 1.0)
    assert len(target) == 0 and target.ahead_s(10.0, 1, 1.0) == 0.0


def test_promise_lapses_after_its_grace():
    target = book(retry_grace_s=2.0)
    target.promise("a", 1.0, 1.0, 1, 0.0)
    target.promise("b", 1.0, 1.0, 1, 0.0)
    assert target.redeem("a", 2.9)
    assert not target.redeem("b", 6.4) and len(target) == 0


def test_promises_count_as_far_as_clients_come_back():
    target = book(retry_share=1.0, retry_grace_s=1.0)
    for index in range(200):
        target.promise(f"{index}", 0.1, 0.1, 1, 10.0 * index)
    target.promise("last", 1.0, 2.0, 1, 2_010.0)
    assert target.kept_share < 0.05
    assert target.ahead_s(5.0, 1, 2_010.0) == pytest.approx(2.0 * target.kept_share)
    for index in range(200):
        now_s = 3_000.0 + 10.0 * index
        target.promise(f"kept {index}", 0.1, 0.1, 1, now_s)
        assert target.redeem(f"kept {index}", now_s + 0.1)
    assert target.kept_share > 0.95


def test_a_retry_is_known_by_what_it_asks_and_not_by_its_tenant():
    request = make_request("r1", tenant_id="a", prompt_tokens=64)
    again = replace(request, request_id="r2", arrived_at_s=9.0)
    assert retry_key(again) == retry_key(request)
    for other in (
        replace(request, prompt_tokens=63),
        replace(request, tenant_id="b"),
        replace(request, slo=replace(request.slo, name="other")),
        replace(request, block_hashes=(b"other",)),
    ):
        assert retry_key(other) != retry_key(request)


def test_full_book_promises_nothing_more_and_still_names_its_end():
    target = book(promises_max=2, retry_share=1.0)
    waits = [target.promise("a", 0.1, 1.0, 1, 0.0) for _ in range(4)]
    assert len(target) == 2 and waits == pytest.approx([0.1, 1.1, 2.1, 2.1])


def test_room_promised_to_others_is_not_given_to_a_newcomer():
    rig = rejecting(busy(400, retry_share=4.0))
    for index in range(8):
        rejection(rig.submit(f"r{index}", slo=STRICT, prompt_tokens=150))
    rig.now_s = 2.3
    rig.send("w1", make_load(prefill_tokens_waiting=100))
    (newcomer,) = of(domain.Decided, rig.submit("n", slo=STRICT, tenant_id="beta"))
    assert newcomer.outcome.demotion.code == "late"
    assert "promised to earlier refusals" in newcomer.outcome.demotion.message


# --- calibration ---------------------------------------------------------------------------------


def test_p99_covers_99_of_100_and_is_sharp():
    chance, target = Events(3).random, TTFTCalibration()
    bucket = bucket_of(0.1, 0.1, 0, False)
    ratios = []
    for _ in range(20_000):
        actual_s = 0.2 * chance.lognormvariate(0.0, 0.1)
        ratios.append(target.margin(bucket) * 0.2 / actual_s)
        target.observe(bucket, 0.2, actual_s)
    assert 0.985 <= 1.0 - target.num_missed / target.num_seen <= 0.995
    assert sorted(ratios)[10_000] <= 1.5


def test_a_kind_has_the_margin_at_start_until_its_own_scores_say_otherwise():
    target = TTFTCalibration()
    short, long = bucket_of(0.0, 0.01, 0, False), bucket_of(0.0, 1.0, 0, False)
    assert target.margin(short) == MARGIN_AT_START
    margins = []
    for _ in range(SCORES_MIN - 1):
        target.observe(short, 1.0, 3.0)
        margins.append(target.margin(short))
    assert margins == sorted(margins) and margins[-1] == pytest.approx(3.0, rel=0.1)
    assert target.margin(long) == MARGIN_AT_START
    target.observe(short, 1.0, 3.0)
    assert target.margin(short) == pytest.approx(3.0)


def test_one_bad_score_of_few_does_not_become_the_margin():
    target, bucket = TTFTCalibration(), bucket_of(0.0, 0.01, 0, False)
    for _ in range(SCORES_MIN - 2):
        target.observe(bucket, 1.0, 1.0)
    target.observe(bucket, 1.0, 9.0)
    assert 1.0 < target.margin(bucket) < 2.5


def test_prediction_is_scored_from_placement_to_first_token_and_only_in_the_guaranteed_tier():
    rig = Rig()
    rig.join("decode")
    rig.submit("r1")
    rig.now_s = 0.4
    rig.handle(domain.FirstToken("r1", 0.4))
    rig.handle(domain.FirstToken("r1", 0.4))
    calibration = rig.plane.calibration
    assert calibration.num_seen == 1
    rig.submit("late", slo=replace(INTERACTIVE, ttft_s_p99=0.01))
    rig.handle(domain.FirstToken("late", 0.4))
    assert calibration.num_seen == 1
