"""The story of a request: every decision, what bound it, how it turned out, and what else could
have been."""

from dataclasses import replace

import pytest

from controlplane import domain, protocol
from controlplane.counterfactuals import REMEDIES
from controlplane.domain import SLOClass
from tests.controlplane.rig import Rig, of, rejection
from tests.factories import BATCH, INTERACTIVE, make_load

STANDARD = SLOClass("standard", 1, ttft_s_p99=20.0, itl_s_p99=1.0)
TIGHT = replace(INTERACTIVE, name="tight", ttft_s_p99=0.02)


def story(rig: Rig, request_id: str = "r1"):
    found = rig.plane.explain(request_id)
    assert found is not None
    return found


def test_an_unknown_request_has_no_story():
    assert Rig().plane.explain("r1") is None


def test_a_candidate_says_every_part_of_its_prediction():
    rig = Rig()
    rig.join("mixed")
    hashes = tuple(bytes([i]) * 8 for i in range(4))
    rig.submit("warm", prompt_tokens=64, block_hashes=hashes)
    rig.submit("r1", prompt_tokens=80, block_hashes=(*hashes, b"x" * 8))
    (row,) = story(rig).records[-1].candidates
    assert (row.hit_blocks, row.cached_tokens) == (4, 64)
    assert row.ttft_s == pytest.approx(row.queue_s + row.prefill_s + row.transfer_s)
    assert row.ttft_s_p99 > row.ttft_s and row.itl_added_s > 0.0 and row.queue_s > 0.0


def test_a_handed_off_prompt_tells_its_transfer_apart_and_compares_it_with_the_outcome():
    rig = Rig()
    rig.join("prefill")
    rig.join("decode")
    rig.submit(prompt_tokens=600)
    rig.send("w1", protocol.HandoffReady("r1", 1, 38, 1))
    rig.now_s += 0.3
    rig.send("w2", protocol.HandoffDone("r1", 1, 38, 28_000_000, 0.25))
    rig.handle(domain.FirstToken("r1", 0.9))
    rig.handle(domain.Finished("r1", "completed", 8, 0.05))
    told = story(rig)
    (record,) = told.records
    assert record.candidates[0].transfer_s > 0.0
    assert [(item.bytes, item.took_s) for item in told.transfers] == [(28_000_000, 0.25)]
    assert told.outcome.transfer_s == 0.25
    assert told.outcome.transfer_s_predicted == record.candidates[0].transfer_s
    assert told.outcome.ttft_s_predicted == record.placement.predicted_ttft_s
    assert (told.outcome.ttft_s, told.outcome.itl_s_p99) == (0.9, 0.05)
    assert told.outcome.is_met and told.outcome.status == "completed"


def test_the_outcome_is_open_until_the_terminal_event():
    rig = Rig()
    rig.join("mixed")
    rig.submit()
    assert story(rig).outcome is None
    rig.finish(status="cancelled")
    assert (story(rig).outcome.status, story(rig).outcome.ttft_s) == ("cancelled", None)


def test_the_prediction_that_is_judged_is_that_of_the_first_tokens_placement():
    rig = Rig()
    rig.join("mixed")
    rig.join("mixed")
    rig.submit(prompt_tokens=32)
    rig.handle(domain.FirstToken("r1", 0.2))
    rig.now_s = 1.0
    first = story(rig).records[0].placement.decode_worker
    rig.close(first)
    rig.finish()
    told = story(rig)
    assert [record.cause for record in told.records] == ["submitted", "failover"]
    assert told.records[1].after_s == pytest.approx(1.0)
    assert told.outcome.ttft_s_predicted == told.records[0].placement.predicted_ttft_s


def test_a_refusal_by_its_worker_and_a_failed_handoff_name_themselves_as_causes():
    rig = Rig()
    for role in ("prefill", "decode", "decode"):
        rig.join(role)
    rig.submit(prompt_tokens=600)
    decode = story(rig).records[0].placement.decode_worker
    rig.send(decode, protocol.HandoffFailed("r1", 1, "timeout"))
    moved = story(rig).records[1].placement.decode_worker
    rig.send(moved, protocol.Rejected("r1", 2, "no_kv_room", 0))
    causes = [record.cause for record in story(rig).records]
    assert causes == ["submitted", "handoff_failed", "refused"]


def test_what_bound_the_choice_is_named():
    rig = Rig()
    rig.join("mixed")
    rig.submit("alone")
    assert story(rig, "alone").records[0].bound == "only_one"
    rig.join("mixed")
    rig.submit("cheap", prompt_tokens=8)
    assert story(rig, "cheap").records[0].bound == "cost"
    rig.submit("line", slo=BATCH)
    assert story(rig, "line").records[0].bound == "batch"
    rig.submit("late", slo=TIGHT, prompt_tokens=400)
    assert story(rig, "late").records[0].bound == "damage"


def test_a_queued_request_says_whether_filters_or_order_hold_it():
    rig = Rig(batch_rows_max=1)
    rig.join("mixed")
    rig.submit("b1", slo=BATCH)
    rig.submit("b2", slo=BATCH)
    assert story(rig, "b2").records[0].bound == "filters"
    assert "batch sequences, at most 1" in story(rig, "b2").records[0].reason


def test_the_next_best_worker_and_each_class_are_told():
    rig = Rig()
    rig.handle(domain.ClassesSet((INTERACTIVE, STANDARD, TIGHT, BATCH)))
    rig.join("mixed")
    rig.join("mixed")
    rig.submit(prompt_tokens=400)
    told = {(item.kind, item.name): item for item in story(rig).counterfactuals}
    assert set(told) == {
        ("worker", "w2"),
        ("class", "standard"),
        ("class", "tight"),
        ("class", "batch"),
    }
    assert told["worker", "w2"].is_met
    assert told["class", "standard"].is_met and not told["class", "tight"].is_met
    assert "late, TTFT p99" in told["class", "tight"].text


def test_no_more_classes_are_compared_than_the_limit_and_the_strictest_stay():
    rig = Rig(classes_max=2)
    rig.handle(domain.ClassesSet((BATCH, STANDARD, TIGHT)))
    rig.join("mixed")
    rig.submit()
    names = [item.name for item in story(rig).counterfactuals if item.kind == "class"]
    assert names == ["tight", "standard"]


def test_a_refusal_for_lateness_keeps_its_candidates_and_says_what_would_have_let_it_in():
    rig = Rig()
    rig.handle(domain.ClassesSet((TIGHT, STANDARD)))
    rig.handle(domain.ContractsSet((_contract(TIGHT),)))
    rig.join("mixed")
    refused = rejection(rig.submit(slo=TIGHT, prompt_tokens=400))
    told = story(rig)
    (record,) = told.records
    assert (refused.code, record.bound, record.outcome) == ("late", "late", "rejected")
    assert record.candidates and record.retry_after_s == refused.retry_after_s
    by_name = {item.name: item for item in told.counterfactuals}
    assert by_name["standard"].is_met and by_name["retry"].is_met
    needed_s = by_name["ttft_target"].ttft_s
    looser = replace(TIGHT, ttft_s_p99=needed_s * 1.001)
    rig = Rig()  # nothing is promised to an earlier refusal here
    rig.handle(domain.ContractsSet((_contract(looser),)))
    rig.join("mixed")
    commands = rig.submit("r2", slo=looser, prompt_tokens=400)
    assert of(domain.Dispatch, commands), "the target that was named lets it in"


def _contract(slo: SLOClass) -> domain.Contract:
    return domain.Contract(
        "acme", "smollm2-135m", slo.name, 600, 600_000, 50, when_late="reject", itl_s=slo.itl_s_p99
    )


def test_every_code_of_a_refusal_has_its_remedy():
    _, _, codes = domain.Rejected.__doc__.partition("is stable:")
    assert {"late", *REMEDIES} == set(
        codes.strip(". ").replace("\n", " ").replace(",", " ").split()
    )


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        ({"prompt_tokens": 4000}, "prompt_too_long", "fewer tokens"),
        ({"model_id": "other"}, "model_not_served", "a worker that serves the model"),
        ({"tenant_concurrency_max": 1}, "tenant_concurrency", "one request less"),
    ],
)
def test_each_limit_names_its_remedy(facts, code, words):
    rig = Rig()
    rig.join("mixed")
    rig.submit("first")
    assert rejection(rig.submit("r2", **facts)).code == code
    remedies = [item for item in story(rig, "r2").counterfactuals if item.kind == "remedy"]
    assert any(words in item.text for item in remedies)
    assert story(rig, "r2").outcome.status == code and not story(rig, "r2").outcome.is_met


def test_records_of_one_request_stop_at_their_limit_with_the_first_and_the_latest():
    rig = Rig(records_max=3, moves_max=10)
    for _ in range(6):
        rig.join("mixed")
    rig.submit()
    rig.handle(domain.FirstToken("r1", 0.1))
    for epoch in range(1, 6):
        rig.handle(domain.Progressed("r1", epoch))  # it is not what kills them
        rig.close(story(rig).records[-1].placement.decode_worker)
    told = story(rig)
    assert [record.epoch for record in told.records] == [1, 5, 6]
    assert told.records_left_out == 3


def test_ended_stories_stop_at_their_limit_and_the_oldest_goes():
    rig = Rig(decided_max=2)
    rig.join("mixed")
    for name in ("r1", "r2", "r3"):
        rig.submit(name)
        rig.finish(name)
    assert rig.plane.explain("r1") is None
    assert rig.plane.sizes()["decided"] == (2, 2)
    assert story(rig, "r2").outcome and story(rig, "r3").outcome


def test_a_line_that_is_tried_again_begins_a_new_story():
    rig = Rig()
    rig.join("mixed")
    rig.submit("b1", slo=BATCH)
    rig.finish("b1", "failed")
    rig.submit("b1", slo=BATCH)
    assert story(rig, "b1").outcome is None and len(story(rig, "b1").records) == 1
    assert rig.plane.sizes()["decided"][0] == 0


def test_a_move_before_the_start_is_a_decision_of_its_own():
    rig = Rig()
    rig.join("mixed")
    for index in range(4):
        rig.submit(f"r{index}", prompt_tokens=400)
    rig.join("mixed")
    rig.tick(0.3)
    rig.send("w1", make_load(prefill_tokens_waiting=1600, running_online=1))
    rig.tick(0.3)
    causes = {record.cause for index in range(4) for record in story(rig, f"r{index}").records}
    assert causes == {"submitted", "replaced"}
