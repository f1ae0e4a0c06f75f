"""Streams leave a worker that still serves them: drain, flip, who stays, and what limits it."""

import msgspec
import pytest

from controlplane import domain, protocol
from tests.controlplane.rig import Rig, of
from tests.factories import BATCH, make_load

LONG = {"prompt_tokens": 300, "output_tokens_max": 400}  # of 45 ms steps: 18 s


def streaming(num_workers: int = 2, **facts) -> Rig:
    """w1 decodes r1; the other workers are idle."""
    rig = Rig()
    rig.join("mixed")
    rig.submit("r1", **{**LONG, **facts})
    rig.handle(domain.FirstToken("r1", 0.1))
    for _ in range(num_workers - 1):
        rig.join("mixed")
    return rig


def test_drained_worker_hands_the_kv_of_its_stream_over_before_it_is_told():
    rig = streaming()
    commands = rig.handle(domain.DrainOrdered("w1", "ann"))
    out, into = of(domain.Dispatch, commands)
    assert (out.worker_id, out.stage, out.epoch) == ("w1", "prefill", 2)
    assert (into.worker_id, into.stage, into.epoch) == ("w2", "decode", 2)
    assert out.handoff_out.capability == into.handoff_in.capability
    assert of(domain.CancelSequence, commands) == [], "the new epoch replaces the old one there"
    assert of(domain.MoveCounted, commands) == [domain.MoveCounted("r1", "w1", "w2", 2, True)]
    (decided,) = of(domain.Decided, commands)
    assert decided.record.cause == "planned"
    assert decided.record.reason.startswith("drained by ann; w2 computes and decodes")
    assert decided.record.split_reason == "its KV is copied from w1"
    assert commands[-1] == domain.SendDrain("w1")
    rig.handle(domain.Progressed("r1", 2))
    rig.send("w1", protocol.HandoffReady("r1", 2, 20, 1000))
    rig.send("w2", protocol.HandoffDone("r1", 2, 20, 1000, 0.02))
    assert rig.request().phase == "decode"
    assert (rig.worker("w1").requests, rig.worker("w2").requests) == (0, 1)


def test_copy_that_fails_is_computed_again_from_the_ids():
    rig = streaming()
    rig.handle(domain.DrainOrdered("w1", "ann"))
    commands = rig.send("w2", protocol.HandoffFailed("r1", 2, "checksum"))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 3, "full")]


@pytest.mark.parametrize("facts", [{"handoff_address": None}, {"block_tokens": 32}])
def test_stream_is_computed_again_where_no_transfer_reaches(facts):
    rig = streaming(num_workers=1)
    rig.join("mixed", **({} if "handoff_address" in facts else facts))
    if "handoff_address" in facts:
        rig.rejoin("w1", sequences=(protocol.LiveSequence("r1", 1, 1),), **facts)
    commands = rig.handle(domain.DrainOrdered("w1", "ann"))
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence("w1", "r1", 1)]
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    assert of(domain.MoveCounted, commands) == [domain.MoveCounted("r1", "w1", "w2", 2, False)]


def test_short_context_is_computed_again():
    rig = streaming(prompt_tokens=60)
    commands = rig.handle(domain.DrainOrdered("w1", "ann"))
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]


@pytest.mark.parametrize(
    "facts", [{"output_tokens_max": 20}, {"slo": BATCH}], ids=["ends soon", "batch"]
)
def test_row_that_ends_soon_and_a_batch_line_stay(facts):
    rig = streaming(**facts)
    commands = rig.handle(domain.DrainOrdered("w1", "ann"))
    assert commands == [domain.SendDrain("w1")]
    assert rig.request().placement.decode_worker == "w1"


def test_stream_without_another_worker_stays_and_the_drain_is_told_at_once():
    rig = streaming(num_workers=1)
    assert rig.handle(domain.DrainOrdered("w1", "ann")) == [domain.SendDrain("w1")]


def test_request_that_has_not_begun_leaves_when_it_decodes():
    rig = Rig()
    rig.join("mixed"), rig.join("mixed")
    rig.submit("r1", **LONG)
    assert of(domain.SendDrain, rig.handle(domain.DrainOrdered("w1", "ann"))) == []
    rig.tick(0.5, heard=("w1", "w2"))
    rig.handle(domain.FirstToken("r1", 0.1))
    commands = rig.tick(0.1, heard=("w1", "w2"))
    assert len(of(domain.MoveCounted, commands)) == 1
    assert of(domain.SendDrain, commands) == [domain.SendDrain("w1")]


def test_what_cannot_leave_in_time_stays():
    rig = Rig(evacuate_s_max=3.0, sequences_max=1)
    rig.join("mixed")
    rig.submit("r1", **LONG)
    rig.handle(domain.FirstToken("r1", 0.1))
    rig.join("mixed")
    rig.submit("r2", **LONG)
    rig.handle(domain.FirstToken("r2", 0.1))
    assert rig.handle(domain.DrainOrdered("w1", "ann")) == []
    assert of(domain.SendDrain, rig.tick(2.9, heard=("w1", "w2"))) == []
    assert of(domain.SendDrain, rig.tick(0.3, heard=("w1", "w2"))) == [domain.SendDrain("w1")]
    assert rig.request("r1").placement.decode_worker == "w1"


def test_so_many_streams_leave_at_a_time():
    rig = Rig(moves_per_tick=2)
    rig.join("mixed")
    for index in range(3):
        rig.submit(f"r{index}", **LONG)
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.join("mixed")
    moved = [len(of(domain.MoveCounted, rig.handle(domain.DrainOrdered("w1", "ann"))))]
    moved += [len(of(domain.MoveCounted, rig.tick(0.1, heard=("w1", "w2")))) for _ in range(3)]
    assert moved == [2, 1, 0, 0]


def test_flip_to_prefill_lets_the_streams_go_and_the_worker_stays_live():
    rig = streaming()
    commands = rig.handle(domain.RoleOrdered("w1", "prefill", "ann"))
    assert of(domain.MoveCounted, commands) == [domain.MoveCounted("r1", "w1", "w2", 2, True)]
    assert of(domain.SendDrain, commands) == []
    assert rig.worker("w1").status == "live"


def test_flip_to_decode_moves_nothing():
    rig = streaming()
    commands = rig.handle(domain.RoleOrdered("w1", "decode", "ann"))
    assert of(domain.MoveCounted, commands) == [] and rig.request().epoch == 1


def test_worker_that_dies_while_it_is_left_is_forgotten_and_its_streams_move():
    rig = Rig(moves_per_tick=1)
    rig.join("mixed")
    for index in range(2):
        rig.submit(f"r{index}", **LONG)
        rig.handle(domain.FirstToken(f"r{index}", 0.1))
    rig.join("mixed")
    rig.handle(domain.DrainOrdered("w1", "ann"))
    rig.close("w1")
    assert of(domain.SendDrain, rig.tick(0.3, heard=("w2",))) == []
    rig.handle(domain.Progressed("r0", 3)), rig.handle(domain.Progressed("r1", 2))
    assert {rig.request(name).placement.decode_worker for name in ("r0", "r1")} == {"w2"}


def test_ids_that_are_out_already_count_by_the_reported_context():
    """Of 400 ids 380 are out: the rest takes less than 2 s."""
    rig = streaming()
    rig.now_s = 20.0
    for worker_id, context in (("w1", 300 + 380), ("w2", 0)):
        load = make_load(running_online=1)
        rig.send(worker_id, msgspec.structs.replace(load, context_tokens_running=context))
    assert rig.handle(domain.DrainOrdered("w1", "ann")) == [domain.SendDrain("w1")]
