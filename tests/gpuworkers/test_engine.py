"""The engine over a scripted runner: assignments, stages, reports, resend, load."""

import pytest

from controlplane import protocol
from gpuworkers.engine import EngineConfig
from tests.gpuworkers.enginekit import BATCH, EOS, EngineBench, ScriptedRunner


def rejection(answer: protocol.Accepted | protocol.Rejected) -> str:
    assert isinstance(answer, protocol.Rejected), answer
    return answer.reason


@pytest.fixture
def bench() -> EngineBench:
    return EngineBench()


def test_a_request_runs_to_its_limit_and_frees_its_blocks(bench):
    assert bench.assign("r", 20, 4) == protocol.Accepted("r", 1)
    bench.run_dry()
    assert len(bench.output("r")) == 4 and bench.finish_reasons("r") == ["length"]
    assert bench.engine.is_idle()
    assert bench.engine.pool.num_available == 64


def test_eos_and_stop_ids_end_a_request_and_are_reported(bench):
    bench.runner.script = {("e", 1): EOS, ("s", 2): 99}
    bench.assign("e", 20, 9)
    bench.assign("s", 20, 9, stop_token_ids=[99])
    bench.run_dry()
    assert bench.output("e")[-1] == EOS and len(bench.output("e")) == 2
    assert bench.output("s")[-1] == 99 and len(bench.output("s")) == 3
    assert bench.finish_reasons("e") == bench.finish_reasons("s") == ["stop"]


def test_logits_that_are_no_numbers_end_only_their_own_request(bench):
    bench.runner.script = {("bad", 1): None}
    bench.assign("bad", 20, 9)
    bench.assign("good", 20, 3)
    bench.run_dry()
    assert bench.finish_reasons("bad") == ["error"] and len(bench.output("bad")) == 1
    assert bench.finish_reasons("good") == ["length"]


def test_delivered_ids_are_not_reported_again_and_output_goes_on_as_undisturbed(bench):
    bench.assign("whole", 20, 9)
    bench.run_dry()
    whole = bench.output("whole")
    bench.assign("moved", 20, 9, epoch=2, delivered=whole[:5])
    bench.run_dry()
    assert bench.output("moved") == whole[5:]
    assert [r.seq for r in bench.reports if r.request_id == "moved" and r.token_ids][0] == 5


def test_delivered_ids_that_already_end_the_request_only_report_the_end(bench):
    for name, delivered in (("full", [60, 61]), ("eos", [EOS])):
        bench.assign(name, 20, 2, delivered=delivered)
    bench.run_dry()
    assert bench.runner.plans == []
    assert bench.finish_reasons("full") == ["length"] and bench.finish_reasons("eos") == ["stop"]


def test_a_prefill_is_held_until_its_peer_has_it(bench):
    bench.assign("p", 40, 9, stage="prefill")
    result = bench.step()
    assert result.ready == [("p", 1)] and not bench.engine.has_work()
    assert bench.engine.first_ids("p", 1) == bench.output("p") and len(bench.output("p")) == 1
    assert len(bench.engine.blocks_of("p", 1)) == 3
    bench.engine.handed_off("p", 1)
    bench.run_dry()
    assert bench.finish_reasons("p") == ["handed_off"] and bench.engine.is_idle()


def test_a_prefill_that_ends_with_its_first_id_needs_no_handoff(bench):
    bench.assign("one", 40, 1, stage="prefill")
    bench.runner.script = {("eos", 0): EOS}
    bench.assign("eos", 40, 9, stage="prefill")
    result = bench.step()
    assert result.ready == [] and bench.engine.is_idle()
    assert bench.finish_reasons("one") == ["length"] and bench.finish_reasons("eos") == ["stop"]


def test_a_decode_waits_for_its_kv_and_goes_on_after_the_peers_ids(bench):
    bench.assign("whole", 20, 5)
    bench.run_dry()
    whole = bench.output("whole")
    bench.assign("d", 20, 5, stage="decode")
    assert not bench.engine.has_work() and len(bench.engine.blocks_of("d", 1)) == 2
    bench.engine.installed("d", 1, whole[:1], bench.now_s)
    bench.run_dry()
    assert bench.output("d") == whole[1:]
    assert [row.start for plan in bench.runner.plans for row in plan.rows][-4:] == [20, 21, 22, 23]


def test_a_handoff_carries_prompt_and_delivered_ids(bench):
    bench.assign("whole", 20, 9)
    bench.run_dry()
    whole = bench.output("whole")
    bench.assign("p", 20, 9, stage="prefill", delivered=whole[:3])
    bench.step()
    first = bench.engine.first_ids("p", 1)
    assert first == whole[3:4]
    bench.assign("d", 20, 9, stage="decode", delivered=whole[:3])
    assert len(bench.engine.blocks_of("d", 1)) == len(bench.engine.blocks_of("p", 1)) == 2
    bench.engine.installed("d", 1, first, bench.now_s)
    bench.run_dry()
    assert bench.output("d") == whole[4:]


def test_an_installed_sequence_that_has_all_its_ids_ends(bench):
    bench.assign("d", 20, 1, stage="decode")
    bench.engine.installed("d", 1, [60], bench.now_s)
    bench.run_dry()
    assert bench.finish_reasons("d") == ["length"] and bench.output("d") == []


def test_an_abandoned_transfer_frees_everything_and_says_nothing(bench):
    bench.assign("d", 20, 9, stage="decode")
    bench.assign("p", 20, 9, stage="prefill")
    bench.step()
    reports = len(bench.reports)
    for name in ("d", "p"):
        bench.engine.abandon(name, 1)
    bench.engine.installed("d", 1, [60], bench.now_s)
    bench.engine.handed_off("p", 1)
    bench.run_dry()
    assert len(bench.reports) == reports and bench.engine.is_idle()
    assert bench.engine.pool.num_available == 64


def test_cancel_frees_a_running_sequence_at_once(bench):
    bench.assign("r", 20, 50)
    bench.step()
    bench.engine.cancel("r", 1)
    bench.engine.cancel("unknown", 1)
    bench.engine.check_integrity()
    assert bench.engine.is_idle() and bench.engine.pool.num_available == 64


def test_assigning_twice_changes_nothing_and_an_older_epoch_is_stale(bench):
    bench.assign("r", 20, 3, epoch=2)
    assert bench.assign("r", 20, 3, epoch=2) == protocol.Accepted("r", 2)
    assert rejection(bench.assign("r", 20, 3, epoch=1)) == "stale_epoch"
    bench.run_dry()
    assert len(bench.output("r")) == 3
    assert bench.assign("r", 20, 3, epoch=2) == protocol.Accepted("r", 2)
    assert bench.engine.is_idle()


def test_a_newer_epoch_replaces_the_older(bench):
    bench.assign("r", 20, 3, epoch=1)
    bench.assign("r", 20, 3, epoch=2)
    bench.run_dry()
    assert {r.epoch for r in bench.reports} == {2} and len(bench.output("r")) == 3


def test_what_cannot_be_served_is_refused_with_the_reason(bench):
    assert rejection(bench.assign("r", 20, model_id="other")) == "unknown_model"
    assert rejection(bench.assign("r", 20, 981)) == "too_long"
    assert rejection(bench.assign("r", 20, 0)) == "too_long"
    assert rejection(bench.assign("r", [])) == "bad_token_ids"
    assert rejection(bench.assign("r", [5, 512])) == "bad_token_ids"
    assert rejection(bench.assign("r", [5, -1])) == "bad_token_ids"
    assert isinstance(bench.assign("r", 20, 980), protocol.Accepted)
    bench.engine.drain()
    assert rejection(bench.assign("s", 20)) == "draining"


def test_without_room_for_the_whole_output_a_sequence_is_refused():
    bench = EngineBench(ScriptedRunner(num_blocks=4))
    assert isinstance(bench.assign("a", 20, 13), protocol.Accepted)
    answer = bench.assign("b", 20, 14)
    assert rejection(answer) == "no_kv_room" and answer.free_blocks == 2
    assert rejection(bench.assign("c", 20, 46)) == "too_long"
    assert isinstance(bench.assign("b", 20, 13), protocol.Accepted)


@pytest.mark.parametrize("targets_of", ["online", "batch"])
def test_the_queue_is_full_at_its_maximum(targets_of):
    bench = EngineBench(config=EngineConfig(sequences_max=3))
    kwargs = {"targets": BATCH} if targets_of == "batch" else {}
    for index in range(3):
        assert isinstance(bench.assign(f"r{index}", 20, 3, **kwargs), protocol.Accepted)
    assert rejection(bench.assign("r3", 20, 3, **kwargs)) == "queue_full"
    bench.run_dry()
    assert isinstance(bench.assign("r3", 20, 3, **kwargs), protocol.Accepted)


def test_ids_can_be_sent_again_while_a_sequence_runs_and_after_its_end(bench):
    bench.assign("r", 20, 5)
    bench.step()
    bench.step()
    assert bench.engine.resend("r", 1, 1).token_ids == bench.output("r")[1:]
    assert bench.engine.resend("r", 1, 9) is None and bench.engine.resend("x", 1, 0) is None
    bench.run_dry()
    again = bench.engine.resend("r", 1, 2)
    assert (again.seq, again.token_ids, again.finish_reason) == (2, bench.output("r")[2:], "length")
    assert protocol.LiveSequence("r", 1, 5) in bench.engine.live_sequences()


def test_ids_of_ended_sequences_are_kept_up_to_the_maximum():
    bench = EngineBench(config=EngineConfig(finished_kept_max=2))
    for name in ("a", "b", "c"):
        bench.assign(name, 20, 1)
        bench.run_dry()
    assert bench.engine.resend("a", 1, 0) is None
    assert [s.request_id for s in bench.engine.live_sequences()] == ["b", "c"]


def test_a_shared_prefix_is_computed_once_for_one_tenant_only(bench):
    bench.assign("a", 100, 1, salt=b"one")
    bench.run_dry()
    bench.assign("b", 100, 1, salt=b"one")
    bench.assign("c", 100, 1, salt=b"two")
    bench.run_dry()
    cached = {r.request_id: r.cached_tokens for r in bench.reports}
    computed = {r.request_id: r.prefill_tokens for r in bench.reports if r.token_ids}
    assert cached == {"a": 0, "b": 96, "c": 0}
    assert computed == {"a": 100, "b": 4, "c": 100}


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token(bench):
    for name in ("a", "b"):
        bench.assign(name, 64, 1)
        bench.run_dry()
    assert bench.reports[-1].cached_tokens == 48
    assert bench.output("a") == bench.output("b")


def test_output_becomes_a_prefix_for_the_next_turn_of_a_conversation(bench):
    bench.assign("a", 30, 20)
    bench.run_dry()
    turn = [7 + i % 400 for i in range(30)] + bench.output("a") + [5, 6, 7]
    bench.assign("b", turn, 1)
    bench.run_dry()
    assert bench.reports[-1].cached_tokens == 48


def test_load_counts_what_is_there_and_its_sums_start_again(bench):
    bench.assign("a", 100, 9)
    bench.assign("p", 40, 9, stage="prefill")
    bench.assign("b", 40, 9, targets=BATCH)
    before = bench.engine.load(1.5)
    assert (before.waiting_online, before.waiting_batch, before.idle_s) == (2, 1, 1.5)
    assert before.prefill_tokens_waiting == 140 and before.step_index == 0
    bench.step()
    bench.step()
    load = bench.engine.load(0.0)
    assert load.step_index == 2
    assert (load.running_online, load.waiting_online) == (1, 0)  # the other waits for its peer
    assert load.online_s + load.batch_s == pytest.approx(0.04) and load.batch_s > 0
    assert load.kv_blocks_total == 64 and load.kv_blocks_held_batch == 3
    again = bench.engine.load(0.0)
    assert again.online_s == again.batch_s == 0.0 and again.rows_online == load.rows_online


def test_a_role_is_only_a_preference(bench):
    bench.engine.set_role("prefill")
    bench.assign("r", 20, 3)
    bench.run_dry()
    assert bench.engine.load(0.0).role == "prefill" and len(bench.output("r")) == 3


def test_draining_finishes_what_is_there(bench):
    bench.assign("r", 20, 3)
    bench.engine.drain()
    assert not bench.engine.is_idle()
    bench.run_dry()
    assert bench.engine.is_idle() and bench.finish_reasons("r") == ["length"]
