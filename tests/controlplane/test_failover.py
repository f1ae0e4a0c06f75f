"""A request survives its worker: continuation elsewhere, re-attachment, retry budget, handoffs."""

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.quarantine import Quarantine
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.factories import BATCH, INTERACTIVE, make_hello, make_load, make_request

LIVE = protocol.LiveSequence


def demo() -> Rig:
    rig = Rig()
    rig.join("prefill"), rig.join("decode")
    return rig


def test_closed_connection_moves_the_request_at_once_under_a_new_epoch():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    commands = rig.close("w1")
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert of(domain.FailoverCounted, commands) == [domain.FailoverCounted("r1", "w1", 2)]
    (decided,) = of(domain.Decided, commands)
    assert decided.outcome.epoch == 2
    assert decided.record.reason.startswith("w1 closed its connection; w2 computes and decodes")
    assert of(domain.CancelSequence, commands) == []


def test_all_requests_of_a_lost_worker_move_in_order_of_rank_and_arrival():
    rig = Rig()
    rig.join("decode")
    slow = domain.SLOClass("flex", 2, 10.0, 0.2)
    rig.submit("r1", slo=slow)
    for index in (2, 3):
        rig.now_s += 0.1
        rig.submit(f"r{index}")
    for index in (1, 2, 3):
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.join("decode")
    moved = [dispatch.request_id for dispatch in of(domain.Dispatch, rig.close("w1"))]
    assert moved == ["r2", "r3", "r1"]


def test_silent_worker_loses_its_requests_to_another():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    commands = rig.tick(3.2, heard=("w2",))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert of(domain.CloseWorker, commands)[0].worker_id == "w1"


@pytest.mark.parametrize("lost", ["w1", "w2"])
def test_with_no_worker_of_a_role_left_the_other_serves_both(lost):
    rig = demo()
    rig.submit("long", prompt_tokens=400)
    rig.submit("short", prompt_tokens=30)
    other = "w2" if lost == "w1" else "w1"
    rig.handle(domain.FirstToken("short", 0.1))
    if lost == "w2":
        rig.handle(domain.FirstToken("long", 0.1))
    rig.close(lost)
    rig.handle(domain.Progressed("long", 2))
    for request_id in ("long", "short", "new"):
        if request_id == "new":
            rig.submit("new", prompt_tokens=500)
        view = rig.request(request_id)
        assert view.placement.split == "local" and view.placement.decode_worker == other
    assert rig.worker(other).exception.startswith("serves ")


@pytest.mark.parametrize("has_first_token", [False, True])
@pytest.mark.parametrize("lost", ["w1", "w2"])
def test_loss_of_either_side_before_the_transfer_starts_the_request_anew(lost, has_first_token):
    rig = demo()
    rig.submit(prompt_tokens=400)
    if has_first_token:
        rig.handle(domain.FirstToken("r1", 1.0))
        assert rig.request().phase == "transfer"
    other = "w2" if lost == "w1" else "w1"
    commands = rig.close(lost)
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence(other, "r1", 1)]
    assert of(domain.Dispatch, commands) == [domain.Dispatch(other, "r1", 2, "full")]
    assert len(of(domain.FailoverCounted, commands)) == 1
    assert of(domain.HandoffCounted, commands) == []


def test_loss_of_the_prefill_worker_after_the_transfer_has_no_effect():
    rig = demo()
    rig.submit(prompt_tokens=400)
    rig.send("w1", protocol.HandoffReady("r1", 1, 25, 1000))
    assert rig.request().phase == "transfer"
    commands = rig.send("w2", protocol.HandoffDone("r1", 1, 25, 1000, 0.2))
    assert commands == [domain.HandoffCounted("r1", 1000, 0.2, 0)]
    assert rig.request().phase == "decode" and rig.worker("w1").requests == 0
    assert rig.close("w1") == []
    assert rig.request().epoch == 1
    assert of(domain.Dispatch, rig.close("w2")) == []


def test_failed_handoff_is_computed_again_and_counted():
    rig = demo()
    rig.submit(prompt_tokens=400)
    rig.send("w1", protocol.HandoffReady("r1", 1, 25, 1000))
    rig.now_s = 0.5
    commands = rig.send("w2", protocol.HandoffFailed("r1", 1, "checksum"))
    assert domain.CancelSequence("w1", "r1", 1) in commands
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert of(domain.HandoffCounted, commands) == [domain.HandoffCounted("r1", 0, 0.5, 400)]
    assert of(domain.FailoverCounted, commands) == []
    record = of(domain.Decided, commands)[0].record
    assert record.reason.startswith("handoff to w2 failed: checksum; ")
    assert "computed where it goes on" in record.split_reason


def test_late_word_about_an_older_epoch_changes_nothing():
    rig = demo()
    rig.submit(prompt_tokens=400)
    rig.send("w2", protocol.HandoffFailed("r1", 1, "timeout"))
    before = rig.plane.view(rig.now_s)
    for worker_id, message in (
        ("w2", protocol.HandoffFailed("r1", 1, "timeout")),
        ("w2", protocol.HandoffDone("r1", 1, 25, 1000, 0.2)),
        ("w1", protocol.HandoffReady("r1", 1, 25, 1000)),
        ("w1", protocol.Rejected("r1", 1, "no_kv_room", 0)),
        ("w1", protocol.Rejected("r1", 2, "no_kv_room", 0)),  # not the one that holds it
        ("w2", protocol.Rejected("r1", 1, "no_kv_room", 0)),  # it holds epoch 2
        ("w1", protocol.Accepted("unknown", 1)),
    ):
        assert rig.send(worker_id, message) == []
    assert rig.plane.view(rig.now_s) == before


def test_orphan_waits_in_place_and_goes_on_when_its_worker_returns():
    rig = Rig()
    rig.join("decode")
    rig.submit("r1"), rig.submit("r2")
    assert rig.close("w1") == []
    assert rig.request("r1").phase == "orphaned" and rig.request("r1").epoch == 1
    rig.now_s = 1.0
    commands = rig.rejoin(
        "w1", role="decode", sequences=(LIVE("r1", 1, 5), LIVE("gone", 1, 2), LIVE("r2", 7, 1))
    )
    assert of(domain.Reattach, commands) == [domain.Reattach("w1", "r1", 1)]
    assert of(domain.CancelSequence, commands) == [
        domain.CancelSequence("w1", "gone", 1),
        domain.CancelSequence("w1", "r2", 7),
    ]
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r2", 2, "full")]
    assert of(domain.FailoverCounted, commands) == [domain.FailoverCounted("r2", "w1", 2)]
    assert rig.request("r1").phase == "decode" and rig.worker("w1").requests == 2


def test_orphan_goes_to_the_next_worker_that_appears_and_the_old_copy_is_cancelled():
    rig = Rig()
    rig.join("decode")
    rig.submit()
    rig.close("w1")
    rig.now_s = 2.0
    commands = rig.hello(make_hello("decode"))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    back = rig.rejoin("w1", role="decode", sequences=(LIVE("r1", 1, 5),))
    assert of(domain.Reattach, back) == []
    assert of(domain.CancelSequence, back) == [domain.CancelSequence("w1", "r1", 1)]


def test_sequences_survive_a_new_connection_that_overtakes_the_old_ones_end():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit("r1")
    commands = rig.rejoin("w1", role="decode", sequences=(LIVE("r1", 1, 5),))
    assert of(domain.Reattach, commands) == [domain.Reattach("w1", "r1", 1)]
    assert of(domain.Dispatch, commands) == []
    assert rig.handle(domain.WorkerClosed("w1", 1)) == []
    assert rig.request().epoch == 1


def test_request_that_a_returning_worker_does_not_hold_moves():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit("r1")
    commands = rig.rejoin("w1", role="decode")
    assert [dispatch.epoch for dispatch in of(domain.Dispatch, commands)] == [2]
    assert of(domain.FailoverCounted, commands) == [domain.FailoverCounted("r1", "w1", 2)]


def test_open_handoff_is_not_resumed_by_the_worker_that_was_lost():
    rig = demo()
    rig.submit(prompt_tokens=400)
    rig.handle(domain.DrainOrdered("w2", "ann"))
    rig.close("w1")
    assert rig.request().phase == "orphaned"
    commands = rig.rejoin("w1", role="prefill", sequences=(LIVE("r1", 1, 1),))
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence("w1", "r1", 1)]
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r1", 2, "full")]


def test_orphan_that_finds_no_worker_in_time_ends_once():
    rig = Rig()
    rig.join("decode")
    rig.submit()
    rig.close("w1")
    assert of(domain.Decided, rig.tick(INTERACTIVE.queue_s_max)) == []
    outcome = rejection(rig.tick(0.2))
    assert outcome.code == "queue_timeout" and outcome.retry_after_s is not None
    assert rig.request() is None
    assert rig.finish() == []


def test_request_that_keeps_losing_its_worker_ends_at_the_retry_budget():
    rig = Rig(moves_max=5)
    for _ in range(7):
        rig.join("decode")
    rig.submit()
    for move in range(1, 6):
        worker_id = rig.request().placement.decode_worker
        assert [item.epoch for item in of(domain.Dispatch, rig.close(worker_id))] == [move + 1]
        rig.handle(domain.Progressed("r1", move + 1))
    outcome = rejection(rig.close(rig.request().placement.decode_worker))
    assert outcome.code == "retries_exhausted"
    assert "lost its worker 6 times, at most 5" in outcome.message
    assert rig.request() is None


def test_stalled_sequence_is_cancelled_and_moved_away():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    commands = rig.handle(domain.Stalled("r1", 1))
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence("w1", "r1", 1)]
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert rig.handle(domain.Stalled("r1", 1)) == [], "an older epoch"
    assert rig.handle(domain.Stalled("unknown", 1)) == []


def test_stalled_sequence_returns_to_the_only_worker_after_a_moment():
    rig = Rig(avoid_s=0.25)
    rig.join("decode")
    rig.submit()
    assert of(domain.Dispatch, rig.handle(domain.Stalled("r1", 1))) == []
    commands = rig.tick(0.4, heard=("w1",))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r1", 2, "full")]


def test_refusal_by_a_worker_leads_to_the_next_candidate():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    commands = rig.send("w1", protocol.Rejected("r1", 1, "no_kv_room", 0))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert of(domain.FailoverCounted, commands) == []
    assert of(domain.CancelSequence, commands) == []
    record = of(domain.Decided, commands)[0].record
    assert record.reason.startswith("w1 refused it: no_kv_room; ")
    rows = {row.worker_id: row for row in record.candidates}
    assert rows["w1"].reason == "refused this request a moment ago"


def test_refusal_of_one_side_of_a_handoff_cancels_the_other():
    rig = demo()
    rig.submit(prompt_tokens=400)
    commands = rig.send("w2", protocol.Rejected("r1", 1, "no_kv_room", 0))
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence("w1", "r1", 1)]
    assert rig.worker("w1").requests == rig.worker("w2").requests == 0
    commands = rig.tick(0.4, heard=("w1", "w2"))
    assert [dispatch.epoch for dispatch in of(domain.Dispatch, commands)] == [2, 2]


def test_refusals_for_room_are_repeated_ever_more_slowly_and_cost_no_move():
    rig = Rig(avoid_s=0.25, avoid_s_max=4.0)
    rig.join("decode")
    rig.submit()
    times = [0.0]
    while rig.request() is not None:
        epoch = rig.request().epoch
        rig.send("w1", protocol.Rejected("r1", epoch, "no_kv_room", 0))
        while rig.request() is not None and rig.request().epoch == epoch:
            rig.tick(0.1, heard=("w1",))
        times.append(rig.now_s)
        if rig.now_s > 20.0:
            break
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[:3] == pytest.approx([0.3, 0.5, 1.0], abs=0.11) and max(gaps) < 4.2


@pytest.mark.parametrize(
    ("reason", "code"), [("too_long", "prompt_too_long"), ("unknown_model", "model_not_served")]
)
def test_refusal_that_waiting_does_not_mend_by_every_worker_ends_the_request(reason, code):
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    rig.send("w1", protocol.Rejected("r1", 1, reason, 0))
    assert rejection(rig.send("w2", protocol.Rejected("r1", 2, reason, 0))).code == code
    assert rig.request() is None


def test_moved_request_starts_before_one_that_waits_for_its_first_start():
    rig = Rig(sequences_max=1)
    rig.join("decode")
    rig.submit("r1")
    rig.now_s = 0.1
    rig.submit("r2")
    rig.close("w1")
    rig.now_s = 0.2
    rig.rejoin("w1", role="decode")
    assert rig.request("r1").phase == "prefill" and rig.request("r2").phase == "queued"


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed"])
@pytest.mark.parametrize("stage", ["queued", "prefill", "transfer", "decode", "orphaned"])
def test_end_in_any_phase_frees_every_worker_and_nothing_follows(status, stage):
    rig = demo()
    if stage == "queued":
        rig.handle(domain.DrainOrdered("w1", "a")), rig.handle(domain.DrainOrdered("w2", "a"))
    rig.submit(prompt_tokens=400)
    if stage in ("transfer", "decode"):
        rig.send("w1", protocol.HandoffReady("r1", 1, 25, 1000))
    if stage == "decode":
        rig.send("w2", protocol.HandoffDone("r1", 1, 25, 1000, 0.1))
    if stage == "orphaned":
        rig.handle(domain.FirstToken("r1", 0.1))
        rig.close("w1"), rig.close("w2")
    assert rig.request().phase == stage
    cancelled = {item.worker_id for item in of(domain.CancelSequence, rig.finish(status=status))}
    expected = {"prefill": {"w1", "w2"}, "transfer": {"w1", "w2"}, "decode": {"w2"}}
    assert cancelled == expected.get(stage, set())
    assert rig.request() is None
    assert [view.requests for view in rig.plane.view(0.0).workers] == [0, 0]
    assert rig.finish() == []
    assert of(domain.Dispatch, rig.tick(0.5)) == []


def test_load_report_of_a_move_is_not_mistaken_for_the_old_reservation():
    rig = demo()
    rig.submit(prompt_tokens=400)
    rig.close("w1")
    rig.send("w2", make_load())
    assert rig.worker("w2").requests == 1
    rig.send("w2", protocol.Accepted("r1", 2))
    rig.send("w2", make_load())
    rig.finish()
    assert rig.worker("w2").requests == 0


def test_phase_of_a_moved_stream_is_decode_when_its_client_has_ids():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.join("decode")
    rig.submit("r1"), rig.submit("r2")
    started = rig.request("r1").placement.decode_worker
    rig.handle(domain.FirstToken("r1", 0.3))
    rig.close(started)
    assert rig.request("r1").phase == "decode"
    assert rig.request("r2").phase == "prefill"


# --- requests that kill ---------------------------------------------------------------------------


def test_request_that_kills_two_workers_is_given_up_and_its_neighbours_go_on():
    rig = Rig()
    for _ in range(3):
        rig.join("decode")
    rig.send("w2", make_load(prefill_tokens_waiting=1_000))
    rig.send("w3", make_load(prefill_tokens_waiting=1_000))
    for name in ("neighbour", "poison", "proven"):
        rig.submit(name)
    rig.handle(domain.FirstToken("proven", 0.1))
    assert rig.worker("w1").requests == 3
    rig.send("w2", make_load()), rig.send("w3", make_load())
    commands = rig.close("w1")
    assert [item.request_id for item in of(domain.Dispatch, commands)] == ["proven", "neighbour"]
    commands += rig.handle(domain.Progressed("proven", 2))
    where = {item.request_id: item.worker_id for item in of(domain.Dispatch, commands)}
    assert where["neighbour"] != where["poison"], "suspects are tried alone"
    outcome = rejection(rig.close(where["poison"]))
    assert outcome.code == "poison_request" and "2 workers died with it" in outcome.message
    assert outcome.retry_after_s is None
    assert rig.request("neighbour") is not None and rig.request("proven") is not None


def test_suspect_is_tried_alone_until_it_goes_on():
    rig = Rig()
    rig.join("decode")
    rig.submit("r1")
    rig.join("decode")
    rig.close("w1")
    rig.submit("r2")
    assert rig.request("r2").phase == "queued"
    assert "is tried alone" in of(domain.Decided, rig.commands)[-1].record.reason
    commands = rig.handle(domain.Progressed("r1", 2))
    assert [item.request_id for item in of(domain.Dispatch, commands)] == ["r2"]
    assert rig.handle(domain.Progressed("r1", 1)) == [] == rig.handle(domain.Progressed("r9", 1))


def test_request_that_went_on_is_no_suspect_any_more():
    rig = Rig(moves_max=20)
    for _ in range(8):
        rig.join("decode")
    rig.submit("r1")
    for epoch in range(2, 8):
        commands = rig.close(rig.request("r1").placement.decode_worker)
        assert len(of(domain.Dispatch, commands)) == 1
        rig.handle(domain.Progressed("r1", epoch))
    assert rig.request("r1") is not None


def test_suspect_batch_line_is_not_tried_on_the_last_worker():
    rig = Rig()
    rig.join("decode")
    rig.submit("b1", slo=BATCH)
    rig.join("decode")
    rig.close("w1")
    assert rig.request("b1").phase == "orphaned"
    assert [item.request_id for item in of(domain.Dispatch, rig.submit("r1"))] == ["r1"]
    rig.join("decode")
    rig.tick(0.1)
    assert rig.request("b1").placement.decode_worker == "w3"
    assert rig.request("b1").phase == "prefill"


def test_request_that_was_left_before_it_started_is_a_suspect_when_that_worker_dies():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.send("w2", make_load(prefill_tokens_waiting=900, running_online=1))
    rig.submit("r0", prompt_tokens=300), rig.submit("r1", prompt_tokens=100)
    rig.send("w2", make_load())
    rig.tick(0.1)
    assert rig.request("r1").placement.decode_worker == "w2" and rig.request("r1").epoch == 2
    rig.join("decode")
    rig.close("w1")
    (decided,) = [item for item in of(domain.Decided, rig.close("w2")) if item.request_id == "r1"]
    assert decided.outcome.code == "poison_request"


def test_prompt_of_a_poison_request_is_refused_for_ten_minutes():
    rig = Rig()
    for _ in range(4):
        rig.join("decode")
    rig.submit("r1", fingerprint=b"f")
    for _ in range(2):
        commands = rig.close(rig.request("r1").placement.decode_worker)
    assert rejection(commands).code == "poison_request"
    assert [view.status for view in rig.plane.view(0.0).workers].count("lost") == 2
    refused = rejection(rig.submit("r2", fingerprint=b"f"))
    assert (refused.code, refused.retry_after_s) == ("poison_request", 600.0)
    assert of(domain.Dispatch, rig.submit("r3", fingerprint=b"g"))
    rig.now_s = 600.0
    assert rig.plane.sizes()["quarantined"] == (1, 1_024)
    for worker_id in ("w3", "w4"):
        rig.send(worker_id, make_load())
    assert of(domain.Dispatch, rig.submit("r4", fingerprint=b"f"))
    assert rig.plane.sizes()["quarantined"] == (0, 1_024)


def test_quarantine_forgets_its_oldest_at_its_limit():
    quarantine = Quarantine(ControlPlaneConfig(quarantined_max=2))
    for index in range(3):
        quarantine.add(make_request(fingerprint=b"%d" % index), 0.0)
    quarantine.add(make_request(), 0.0)
    known = [quarantine.refuse(make_request(fingerprint=b"%d" % index), 1.0) for index in range(3)]
    assert len(quarantine) == 2 and known[0] is None and None not in known[1:]


# --- sequences that end in an error ---------------------------------------------------------------


def test_failed_sequence_moves_and_its_worker_is_out_for_a_while():
    rig = Rig()
    for _ in range(3):
        rig.join("decode")
    rig.submit()
    rig.handle(domain.FirstToken("r1", 0.1))
    commands = rig.handle(domain.SequenceFailed("w1", "r1", 1))
    assert [item.epoch for item in of(domain.Dispatch, commands)] == [2]
    assert "failed on it" in rig.worker("w1").exception
    assert all(placement(rig.submit(f"n{index}")).decode_worker != "w1" for index in range(6))
    assert rig.handle(domain.SequenceFailed("w1", "r1", 1)) == [], "an older epoch"
    assert rig.handle(domain.SequenceFailed("w1", "r1", 2)) == [], "not its worker"
    assert rig.handle(domain.SequenceFailed("w1", "gone", 1)) == []


def test_request_that_fails_on_two_workers_ends_and_they_are_innocent():
    rig = Rig()
    for _ in range(4):
        rig.join("mixed")
    rig.submit(fingerprint=b"f")
    rig.handle(domain.SequenceFailed("w1", "r1", 1))
    second = rig.request().placement.decode_worker
    commands = rig.handle(domain.SequenceFailed(second, "r1", 2))
    refused = rejection(commands)
    assert refused.code == "worker_error" and refused.retry_after_s is None
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence(second, "r1", 2)]
    assert all(view.exception == "" for view in rig.plane.view(rig.now_s).workers)
    assert rejection(rig.submit("r2", fingerprint=b"f")).code == "poison_request"


def test_errors_count_in_a_row_only():
    rig = Rig()
    for _ in range(6):
        rig.join("mixed")
    rig.submit()
    for epoch in range(1, 5):
        worker_id = rig.request().placement.decode_worker
        rig.handle(domain.SequenceFailed(worker_id, "r1", epoch))
        rig.handle(domain.Progressed("r1", epoch + 1))
    assert rig.request().epoch == 5
    out = [view for view in rig.plane.view(rig.now_s).workers if view.exception]
    assert len(out) == 3, "not more than half of them"


def test_error_on_the_only_worker_is_tried_there_once_more():
    rig = Rig(avoid_s=0.25)
    rig.join("mixed")
    rig.submit()
    assert of(domain.Dispatch, rig.handle(domain.SequenceFailed("w1", "r1", 1))) == []
    commands = rig.tick(0.4, heard=("w1",))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r1", 2, "full")]


# --- how many recover at a time -------------------------------------------------------------------


def dispatched(commands: list[domain.Command]) -> list[str]:
    return [item.request_id for item in of(domain.Dispatch, commands)]


def test_a_share_of_the_live_requests_recovers_at_a_time_and_batch_last():
    rig = Rig(recoveries_min=3, recovery_share=0.2)
    rig.join("decode")
    for index in range(10):
        rig.submit(f"r{index}")
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.submit("line", slo=BATCH)
    rig.handle(domain.FirstToken("line", 0.1))
    rig.join("decode"), rig.join("decode")
    assert dispatched(rig.close("w1")) == ["r0", "r1", "r2"]
    moved = []
    for index in range(10):
        moved += dispatched(rig.handle(domain.Progressed(f"r{index}", 2)))
    assert moved == ["r3", "r4", "r5", "r6", "r7", "r8", "r9", "line"]


def test_share_grows_with_the_live_requests():
    rig = Rig(recoveries_min=3, recovery_share=0.2)
    rig.join("decode")
    for index in range(30):
        rig.submit(f"r{index}")
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.join("decode")
    rig.now_s += 0.1
    assert len(dispatched(rig.close("w1"))) == 6


def test_recovering_request_that_ends_or_moves_again_makes_room():
    rig = Rig(recoveries_min=1, recovery_share=0.01)
    rig.join("decode")
    for index in range(4):
        rig.submit(f"r{index}")
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.join("decode"), rig.join("decode")
    assert dispatched(rig.close("w1")) == ["r0"]
    assert dispatched(rig.finish("r0", "cancelled")) == ["r1"]
    assert dispatched(rig.handle(domain.Stalled("r1", 2))) == ["r1"]
    assert dispatched(rig.handle(domain.Progressed("r1", 3))) == ["r2"]


def test_least_laxity_goes_first_within_a_class():
    rig = Rig(recoveries_min=1)
    rig.join("decode")
    rig.submit("short", prompt_tokens=40), rig.submit("long", prompt_tokens=900)
    for request_id in ("short", "long"):
        rig.handle(domain.FirstToken(request_id, 0.1))
    rig.join("decode")
    assert dispatched(rig.close("w1")) == ["long"], "its prompt takes longer, its gap is the same"


# --- suspects -------------------------------------------------------------------------------------


def test_request_that_a_silent_worker_has_not_started_moves_before_the_worker_is_given_up():
    rig = Rig()
    rig.join("mixed"), rig.join("mixed")
    rig.submit("begun")
    rig.handle(domain.FirstToken("begun", 0.1))
    silent = rig.request("begun").placement.decode_worker
    other = "w2" if silent == "w1" else "w1"
    rig.send(other, make_load(prefill_tokens_waiting=900, running_online=1))
    rig.submit("new", prompt_tokens=100)
    assert rig.request("new").placement.decode_worker == silent
    rig.send(other, make_load())
    commands = rig.tick(1.8, heard=(other,))
    assert dispatched(commands) == ["new"] and rig.request("new").placement.decode_worker == other
    assert "is silent" in of(domain.Decided, commands)[0].record.reason
    assert rig.request("begun").placement.decode_worker == silent, "it may come back with its KV"
    assert dispatched(rig.tick(1.5, heard=(other,))) == ["begun"]


def test_prefill_worker_takes_all_work_while_the_only_decode_worker_is_silent():
    rig = demo()
    rig.tick(1.8, heard=("w1",))
    commands = rig.submit("r1", prompt_tokens=400)
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r1", 1, "full")]
    assert of(domain.Decided, commands)[0].record.split_reason == "no decode worker can be reached"
