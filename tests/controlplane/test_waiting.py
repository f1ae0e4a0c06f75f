"""Queueing and refusal: tenant concurrency, bounded queues, order, fairness, time limits, drain."""

import pytest

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.errors import ConfigError
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.factories import BATCH, INTERACTIVE, make_hello, make_load


def full(**settings) -> Rig:
    """One worker with room for one online request, which `r0` takes."""
    rig = Rig(sequences_max=1, **settings)
    rig.join("decode")
    rig.submit("r0", tenant_id="other")
    return rig


def queued(commands: list[domain.Command]) -> domain.Queued:
    (decided,) = of(domain.Decided, commands)
    assert isinstance(decided.outcome, domain.Queued), decided
    assert decided.record.outcome == "queued" and decided.record.placement is None
    return decided.outcome


def test_request_without_room_is_queued_with_its_place_and_the_reason():
    rig = full()
    assert queued(rig.submit("r1")).position == 1
    commands = rig.submit("r2")
    assert queued(commands).position == 2
    assert "w1: 1 online sequences, at most 1" in of(domain.Decided, commands)[0].record.reason
    assert rig.request("r2").phase == "queued" and rig.request("r2").epoch == 0
    assert rig.plane.view(0.0).queued_by_class == (("interactive", 2),)


def test_queued_request_starts_when_room_appears_and_its_record_says_how_long_it_waited():
    rig = full()
    rig.submit("r1")
    rig.now_s = 1.5
    commands = rig.finish("r0")
    assert placement(commands).decode_worker == "w1"
    record = of(domain.Decided, commands)[0].record
    assert record.waited_s == 1.5 and record.epoch == 1


def test_tenant_at_its_concurrency_is_rejected_and_others_are_not():
    rig = full()
    for index in range(3):
        queued(rig.submit(f"a{index}", tenant_concurrency_max=3))
    outcome = rejection(rig.submit("a3", tenant_concurrency_max=3))
    assert outcome.code == "tenant_concurrency"
    assert "3 requests of acme are running or waiting, at most 3" in outcome.message
    queued(rig.submit("b0", tenant_id="beta", tenant_concurrency_max=1))
    rig.finish("a1", "cancelled")
    queued(rig.submit("a4", tenant_concurrency_max=3))


def test_rejected_and_batch_requests_do_not_count_as_concurrent():
    rig = full()
    for index in range(5):
        rig.submit(f"b{index}", slo=BATCH, tenant_concurrency_max=1)
    queued(rig.submit("a0", tenant_concurrency_max=1))
    for index in range(3):
        rejection(rig.submit(f"x{index}", tenant_concurrency_max=1))
    rig.finish("a0")
    queued(rig.submit("a1", tenant_concurrency_max=1))


def test_queue_of_a_class_is_bounded_and_refuses_at_its_maximum():
    rig = full(queue_max=3)
    for index in range(3):
        queued(rig.submit(f"r{index + 1}"))
    outcome = rejection(rig.submit("r4"))
    assert outcome.code == "queue_full" and outcome.retry_after_s is not None
    assert "3 requests of class interactive are waiting, at most 3" in outcome.message
    standard = domain.SLOClass("standard", 1, 10.0, 0.2)
    queued(rig.submit("s1", slo=standard))


def test_all_requests_together_are_bounded_batch_included():
    rig = full(requests_max=4)
    for index in range(3):
        rig.submit(f"b{index}", slo=BATCH)
    assert rejection(rig.submit("b3", slo=BATCH)).code == "queue_full"
    assert rejection(rig.submit("r1")).code == "queue_full"
    rig.finish("b0")
    queued(rig.submit("r1"))


def test_batch_is_not_refused_by_the_queue_of_its_class():
    rig = full(queue_max=1, batch_rows_max=1)
    outcomes = [of(domain.Decided, rig.submit(f"b{index}", slo=BATCH))[0] for index in range(5)]
    assert [item.record.outcome for item in outcomes] == ["placed"] + ["queued"] * 4


def test_classes_start_by_rank_and_batch_last():
    rig = full(batch_rows_max=1)
    rig.submit("b0", slo=BATCH)
    standard = domain.SLOClass("standard", 1, 10.0, 0.2)
    rig.submit("s1", slo=standard, tenant_id="t1")
    rig.submit("i1", tenant_id="t2")
    started = []
    for request_id in ("r0", "i1", "s1"):
        started += [item.request_id for item in of(domain.Dispatch, rig.finish(request_id))]
    assert started == ["i1", "s1"]


def test_tenants_take_turns_by_the_work_they_were_given():
    rig = full()
    for index in range(4):
        rig.submit(f"a{index}", tenant_id="a")
    for index in range(2):
        rig.submit(f"b{index}", tenant_id="b")
    started, running = [], "r0"
    for _ in range(6):
        (dispatch,) = of(domain.Dispatch, rig.finish(running))
        running = dispatch.request_id
        started.append(running)
    assert started == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_request_that_finds_no_room_holds_up_none_behind_it():
    rig = Rig()
    rig.join("prefill"), rig.join("decode")
    rig.send("w1", make_load(running_online=1, prefill_tokens_waiting=3000))
    rig.send("w2", make_load(running_online=1, prefill_tokens_waiting=2000))
    rig.submit("r1", prompt_tokens=600)
    assert rig.request("r1").phase == "queued"
    rig.send("w2", make_load())
    assert rig.request("r1").phase == "prefill", "it spilled to the decode worker"
    rig = full()
    rig.join("decode", models=(make_hello().models[0].__class__("m2", "c" * 64, 99, 9, 9),))
    rig.submit("r1")
    assert placement(rig.submit("r2", model_id="m2")).decode_worker == "w2"


def test_prompts_wait_here_rather_than_behind_many_at_a_worker():
    rig = Rig(hold_s_min=2.0)
    rig.join("mixed")
    rig.send("w1", make_load(running_online=1, prefill_tokens_waiting=1500))
    commands = rig.submit("r1")
    outcome = queued(commands)
    assert outcome.predicted_start_s > 4.0
    assert "more than the 4000 ms that may wait" in of(domain.Decided, commands)[0].record.reason
    assert placement(rig.send("w1", make_load())).decode_worker == "w1"


def test_request_that_waits_longer_than_its_class_allows_ends_as_timeout():
    rig = full()
    rig.submit("r1")
    assert of(domain.Decided, rig.tick(INTERACTIVE.queue_s_max, heard=("w1",))) == []
    outcome = rejection(rig.tick(0.2, heard=("w1",)))
    assert outcome.code == "queue_timeout" and "waited 30.1 s" in outcome.message
    assert rig.request("r1") is None and rig.plane.view(0.0).queued_by_class[0][1] == 0


def test_batch_line_waits_until_its_deadline():
    rig = Rig()
    slo = domain.SLOClass("batch", 3, 60.0, 10.0, is_batch=True, deadline_s=100.0)
    queued(rig.submit("b1", slo=slo))
    assert of(domain.Decided, rig.tick(99.9)) == []
    assert rejection(rig.tick(0.3)).code == "queue_timeout"


def test_draining_console_refuses_new_requests_and_serves_those_it_has():
    rig = full()
    rig.submit("r1")
    assert rig.handle(domain.ServerDraining()) == []
    outcome = rejection(rig.submit("r2"))
    assert outcome.code == "draining" and outcome.retry_after_s is not None
    assert placement(rig.finish("r0")).decode_worker == "w1"


def test_many_waiting_requests_are_retried_in_passes_not_at_every_event():
    rig = full(scan_max=2, retry_every_s=0.02)
    for index in range(5):
        rig.now_s += 0.1
        rig.submit(f"r{index + 1}", tenant_id=f"t{index}")
    assert of(domain.Dispatch, rig.finish("r0")) == [], "a pass has just found no room"
    rig.now_s += 0.03
    assert len(of(domain.Dispatch, rig.send("w1", make_load()))) == 1


def test_request_id_is_submitted_once():
    rig = full()
    with pytest.raises(AssertionError, match="r0 submitted twice"):
        rig.plane.handle(domain.Submit(rig_request("r0")), 0.0, lambda: 0.5)


def rig_request(request_id: str) -> domain.GenerateRequest:
    return domain.GenerateRequest(request_id, "t", "m", INTERACTIVE, 1, 1, (), 0.0, 1)


def test_view_of_requests_is_bounded_oldest_first():
    rig = full(requests_view_max=2)
    for index in range(4):
        rig.submit(f"r{index + 1}")
    assert [view.request_id for view in rig.plane.view(0.0).requests] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"queu_max": 3}, "queu_max=3: unknown setting"),
        ({"queue_max": "3"}, "queue_max='3': expected"),
        ({"queue_max": 2.5}, "queue_max=2.5: expected"),
        ({"queue_max": True}, "queue_max=True: expected"),
        ({"queue_max": 0}, "queue_max=0: expected a number above 0"),
        ({"stall_s": float("nan")}, "stall_s=nan: expected a number above 0"),
        ({"suspect_s_min": 3.0}, "dead_s_min=3.0: expected more than suspect_s_min=3.0"),
    ],
)
def test_bad_setting_stops_the_start_and_is_named(values, text):
    with pytest.raises(ConfigError, match=text.replace("(", r"\(")):
        ControlPlaneConfig.from_mapping(values)


def test_settings_are_taken_by_name():
    config = ControlPlaneConfig.from_mapping({"queue_max": 7, "stall_s": 1})
    assert (config.queue_max, config.stall_s) == (7, 1)
