"""Where a new request goes: role, length, cached prefix, room, and the record that explains it."""

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.factories import BATCH, INTERACTIVE, MODEL, make_hello, make_load

SPLIT = [("prefill", "w1"), ("decode", "w2")]


def demo() -> Rig:
    """The demo's two CPU workers."""
    rig = Rig()
    for role, worker_id in SPLIT:
        assert rig.join(role) == worker_id
    return rig


@pytest.mark.parametrize("prompt_tokens", [1, 16, 48, 127])
def test_short_prompt_stays_on_the_decode_worker(prompt_tokens):
    commands = demo().submit(prompt_tokens=prompt_tokens)
    placed = placement(commands)
    assert (placed.split, placed.prefill_worker, placed.decode_worker) == ("local", "w2", "w2")
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 1, "full")]


@pytest.mark.parametrize("prompt_tokens", [128, 256, 600, 1500])
def test_long_prompt_is_handed_off_with_one_capability_for_both_sides(prompt_tokens):
    commands = demo().submit(prompt_tokens=prompt_tokens)
    placed = placement(commands)
    assert (placed.split, placed.prefill_worker, placed.decode_worker) == ("handoff", "w1", "w2")
    first, second = of(domain.Dispatch, commands)
    assert (first.worker_id, first.stage, first.epoch) == ("w1", "prefill", 1)
    assert (second.worker_id, second.stage, second.epoch) == ("w2", "decode", 1)
    assert first.handoff_out.capability == second.handoff_in.capability
    assert second.handoff_in.address == "127.0.0.1:9"
    assert second.handoff_in.timeout_s == pytest.approx(30.0 + 4 * placed.predicted_ttft_s)


def test_long_prompt_for_one_token_is_computed_apart_and_hands_nothing_off():
    commands = demo().submit(prompt_tokens=400, output_tokens_max=1)
    placed = placement(commands)
    assert (placed.split, placed.prefill_worker, placed.decode_worker) == ("local", "w1", "w1")
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w1", "r1", 1, "full")]
    record = of(domain.Decided, commands)[0].record
    assert record.split_reason.endswith("so nothing is handed off")
    assert placed.predicted_ttft_s < placement(demo().submit(prompt_tokens=400)).predicted_ttft_s


def test_capabilities_differ_by_request():
    rig = demo()
    shown = {
        of(domain.Dispatch, rig.submit(f"r{index}", prompt_tokens=300))[0].handoff_out.capability
        for index in range(3)
    }
    assert len(shown) == 3


def test_record_of_a_handoff_carries_the_numbers_that_decided():
    record = of(domain.Decided, demo().submit(prompt_tokens=400))[0].record
    assert record.outcome == "placed" and record.epoch == 1
    assert record.uncached_tokens == 400 and record.handoff_threshold_tokens == 128
    assert "400 uncached tokens reach the threshold of 128" in record.split_reason
    assert "w1 computes the prompt, w2 decodes" in record.reason
    rows = {row.worker_id: row for row in record.candidates}
    assert set(rows) == {"w1", "w2"}
    # 400 tokens at 3 ms; nobody decodes there, so chunks take up to half of 4 s of TTFT: one,
    # with a base of 45 ms
    assert rows["w1"].prefill_s == pytest.approx(400 * 0.003 + 0.045, abs=0.02)
    # 20 ms and 400 · 46,080 bytes at 200 MB/s
    assert rows["w1"].transfer_s == pytest.approx(0.02 + 400 * 46_080 / 200e6)
    assert rows["w2"].transfer_s == 0.0
    assert rows["w1"].ttft_s == record.placement.predicted_ttft_s
    assert rows["w1"].ttft_s == pytest.approx(
        rows["w1"].queue_s + rows["w1"].prefill_s + rows["w1"].transfer_s
    )
    assert rows["w2"].itl_s == record.placement.predicted_itl_s == pytest.approx(0.048, abs=1e-3)


def test_steady_demo_mix_is_split_by_length_alone():
    rig = demo()
    for index in range(40):
        long = index % 2 == 0
        commands = rig.submit(f"r{index}", prompt_tokens=256 + 8 * index if long else 48)
        assert placement(commands).split == ("handoff" if long else "local")
        for dispatch in of(domain.Dispatch, commands):
            rig.accept(dispatch)
        rig.tick(1.5, heard=("w1", "w2"))
        if long:
            rig.send("w1", protocol.HandoffReady(f"r{index}", 1, 20, 10**7))
            rig.now_s += 0.1
            rig.send("w2", protocol.HandoffDone(f"r{index}", 1, 20, 10**7, 0.1))
        rig.finish(f"r{index}")
    assert of(domain.PlanChanged, rig.commands) == []
    assert len(of(domain.HandoffCounted, rig.commands)) == 20


def test_slow_measured_transfer_keeps_prompts_local():
    rig = demo()
    for index in range(30):
        commands = rig.submit(f"r{index}", prompt_tokens=400)
        if placement(commands).split == "local":
            break
        rig.send("w1", protocol.HandoffReady(f"r{index}", 1, 25, 18_432_000))
        rig.tick(4.0, heard=("w1", "w2"))
        rig.send("w2", protocol.HandoffDone(f"r{index}", 1, 25, 18_432_000, 9.0))
        rig.finish(f"r{index}")
    record = of(domain.Decided, commands)[0].record
    assert "costs more than it saves" in record.split_reason


def test_long_prompt_spills_to_the_decode_worker_when_prefill_is_far_behind():
    rig = demo()
    rig.send("w1", make_load(running_online=3, prefill_tokens_waiting=1400))
    record = of(domain.Decided, rig.submit(prompt_tokens=300))[0].record
    assert record.placement.split == "local"
    assert "stay local" in record.split_reason and "target 4000 ms" in record.split_reason


def test_cached_prefix_counts_as_computed():
    rig = demo()
    hashes = tuple(bytes([index]) * 32 for index in range(12))  # 192 tokens
    first = of(domain.Decided, rig.submit("r1", prompt_tokens=40, block_hashes=hashes[:2]))[0]
    assert first.record.candidates[0].cached_tokens == 0
    rig.submit("r2", prompt_tokens=100, block_hashes=hashes[:6])
    record = of(domain.Decided, rig.submit("r3", prompt_tokens=200, block_hashes=hashes))[0].record
    assert record.placement.split == "local", "104 uncached tokens are below the floor of 128"
    assert record.uncached_tokens == 104 and record.candidates[0].cached_tokens == 96


def test_last_prompt_token_is_always_computed():
    rig = demo()
    hashes = tuple(bytes([index]) * 32 for index in range(2))
    rig.submit("r1", prompt_tokens=32, block_hashes=hashes)
    record = of(domain.Decided, rig.submit("r2", prompt_tokens=32, block_hashes=hashes))[0].record
    assert record.candidates[0].cached_tokens == 16


def test_load_spreads_over_equal_workers_once_one_is_no_longer_well_in_time():
    rig = Rig()
    rig.join("mixed"), rig.join("mixed")
    where = [
        placement(rig.submit(f"r{index}", prompt_tokens=100)).decode_worker for index in range(6)
    ]
    assert where[:3] == ["w1", "w1", "w2"], "before any of them has reported"
    assert where.count("w1") == where.count("w2") == 3


def test_prefill_tokens_given_but_not_reported_count_as_wait():
    rig = demo()
    commands = rig.submit("r1", prompt_tokens=500)
    rows = of(domain.Decided, rig.submit("r2", prompt_tokens=500))[0].record.candidates
    waits = {row.worker_id: row.queue_s for row in rows}
    assert waits["w1"] > 500 * 0.003
    for dispatch in of(domain.Dispatch, commands):
        rig.accept(dispatch)
    rig.send("w1", make_load(prefill_tokens_waiting=0))
    rig.finish("r2")
    rows = of(domain.Decided, rig.submit("r3", prompt_tokens=500))[0].record.candidates
    assert {row.worker_id: row.queue_s for row in rows}["w1"] == 0.0, "its report includes r1"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_single_worker_of_any_role_serves_everything(role):
    rig = Rig()
    rig.join(role)
    record = of(domain.Decided, rig.submit(prompt_tokens=600))[0].record
    assert record.placement.split == "local"
    assert "is live" in record.split_reason
    assert "serves" in rig.worker("w1").exception


def test_no_exception_while_both_roles_are_live():
    rig = demo()
    assert [rig.worker(worker_id).exception for _, worker_id in SPLIT] == ["", ""]


def test_mixed_worker_takes_prompts_of_any_length():
    rig = Rig()
    rig.join("mixed")
    assert placement(rig.submit(prompt_tokens=600)).split == "local"
    assert rig.worker("w1").exception == ""


def test_worker_without_handoff_address_is_mixed_only():
    rig = Rig()
    commands = rig.hello(make_hello("prefill", handoff_address=None))
    assert of(domain.SendRole, commands) == [domain.SendRole("w1", "mixed")]
    assert rig.worker("w1").role == "mixed"
    assert rig.handle(domain.RoleOrdered("w1", "prefill", "ann")) == []


@pytest.mark.parametrize("facts", [{"block_tokens": 32}, {"dtype": "bf16"}])
def test_workers_with_other_kv_do_not_hand_off(facts):
    rig = Rig()
    rig.join("prefill")
    rig.join("decode", **facts)
    record = of(domain.Decided, rig.submit(prompt_tokens=600))[0].record
    assert record.placement.split == "local"
    assert "does not fit" in record.split_reason


def test_batch_line_goes_to_the_worker_with_fewest_batch_lines_of_any_role():
    rig = demo()
    where = [
        placement(rig.submit(f"b{index}", slo=BATCH, prompt_tokens=200)).decode_worker
        for index in range(4)
    ]
    assert where == ["w1", "w2", "w1", "w2"]


def test_emptying_the_batch_queue_changes_no_online_decision():
    records = []
    for num_batch in (0, 30):
        rig = demo()
        for index in range(num_batch):
            rig.submit(f"b{index}", slo=BATCH, prompt_tokens=200)
        decided = of(domain.Decided, rig.submit("r1", prompt_tokens=300))[0]
        records.append((decided.outcome, decided.record.split_reason))
    assert records[0] == records[1]


def test_kv_held_by_batch_counts_as_free_for_online_work_only():
    rig = Rig()
    rig.join("mixed", num_blocks=100)
    rig.send("w1", make_load(kv_blocks_free=0, kv_blocks_held_batch=100))
    assert placement(rig.submit("r1", prompt_tokens=100)).decode_worker == "w1"
    decided = of(domain.Decided, rig.submit("b1", slo=BATCH, prompt_tokens=100))[0]
    assert isinstance(decided.outcome, domain.Queued)


def test_batch_leaves_a_reserve_of_kv_blocks():
    rig = Rig(batch_kv_reserve=0.1)
    rig.join("mixed", num_blocks=100)
    facts = {"slo": BATCH, "output_tokens_max": 1}
    first = of(domain.Decided, rig.submit("b1", prompt_tokens=90 * 16, **facts))[0]
    assert isinstance(first.outcome, domain.Placed)
    second = of(domain.Decided, rig.submit("b2", prompt_tokens=16, **facts))[0]
    assert isinstance(second.outcome, domain.Queued)
    assert "needs 1 KV blocks, 0 free" in second.record.reason


def test_blocks_given_but_not_reported_are_not_given_twice():
    rig = Rig()
    rig.join("mixed", num_blocks=10)
    assert placement(rig.submit("r1", prompt_tokens=80, output_tokens_max=1))
    assert placement(rig.submit("r2", prompt_tokens=80, output_tokens_max=1))
    decided = of(domain.Decided, rig.submit("r3", prompt_tokens=1, output_tokens_max=1))[0]
    assert isinstance(decided.outcome, domain.Queued)
    started = rig.finish("r1")
    assert placement(started).decode_worker == "w1"


def test_prompt_and_output_longer_than_the_model_are_rejected():
    rig = demo()
    outcome = rejection(rig.submit(prompt_tokens=MODEL.max_model_len, output_tokens_max=1))
    assert outcome.code == "prompt_too_long" and "at most 2048 together" in outcome.message
    assert placement(rig.submit("r2", prompt_tokens=MODEL.max_model_len - 1, output_tokens_max=1))


def test_request_that_no_kv_cache_could_hold_is_rejected():
    rig = Rig()
    rig.join("mixed", num_blocks=4)
    assert rejection(rig.submit("r1", prompt_tokens=64, output_tokens_max=2)).code == (
        "prompt_too_long"
    )
    assert placement(rig.submit("r2", prompt_tokens=64, output_tokens_max=1))


def test_unknown_model_and_empty_cluster_are_told_apart():
    rig = Rig()
    assert rejection(rig.submit("r1")).code == "no_worker"
    rig.join("mixed")
    assert rejection(rig.submit("r2", model_id="other")).code == "model_not_served"


def test_batch_line_waits_for_a_worker_that_serves_its_model():
    rig = Rig()
    decided = of(domain.Decided, rig.submit("b1", slo=BATCH))[0]
    assert isinstance(decided.outcome, domain.Queued)
    commands = rig.hello(make_hello("mixed"))
    assert placement(commands).decode_worker == "w1"


def test_records_name_at_most_the_configured_candidates_the_chosen_ones_first():
    rig = Rig(candidates_max=3)
    for _ in range(6):
        rig.join("decode")
    rig.join("prefill")
    record = of(domain.Decided, rig.submit(prompt_tokens=400))[0].record
    assert len(record.candidates) == 3
    assert {row.worker_id for row in record.candidates[:2]} == {"w7", "w1"}


def test_step_in_hand_is_taken_off_the_wait_for_the_prompts_before():
    rig = demo()
    rig.send("w2", make_load(prefill_tokens_waiting=400))
    waits = []
    for index in range(3):
        record = of(domain.Decided, rig.submit(f"r{index}", prompt_tokens=40))[0].record
        waits.append(record.candidates[0].queue_s)
        rig.finish(f"r{index}")
        rig.now_s += 0.5
    assert waits[0] > 1.2
    assert waits[0] - waits[1] == pytest.approx(0.5) and waits[1] - waits[2] == pytest.approx(0.5)


def test_large_cluster_measures_holders_of_the_prefix_and_a_sample_by_load():
    rig = Rig(measure_all_max=3, sampled_max=2)
    for _ in range(12):
        rig.join("mixed")
    hashes = tuple(bytes([index]) * 32 for index in range(8))
    first = placement(rig.submit("r1", prompt_tokens=128, block_hashes=hashes)).decode_worker
    rig.finish("r1")
    for index in range(1, 13):
        rig.send(f"w{index}", make_load(prefill_tokens_waiting=10 * index))
    record = of(domain.Decided, rig.submit("r2", prompt_tokens=128, block_hashes=hashes))[0].record
    assert len(record.candidates) == 3
    assert record.placement.decode_worker == first, "computing nothing is worth a short wait"


def test_large_cluster_finds_the_workers_that_can_take_it():
    rig = Rig(measure_all_max=2, sampled_max=2)
    for _ in range(30):
        rig.join("mixed")
    rig.now_s = 2.0
    rig.send("w5", make_load(prefill_tokens_waiting=100))
    assert placement(rig.submit()).decode_worker == "w5"


def test_cost_of_a_decision_does_not_grow_with_the_cluster():
    measured = []
    for num_workers in (100, 400):
        rig = Rig(candidates_max=100)
        for _ in range(num_workers):
            rig.join("mixed")
        hashes = tuple(bytes([index]) * 32 for index in range(8))
        for index in range(20):
            record = of(
                domain.Decided, rig.submit(f"r{index}", prompt_tokens=128, block_hashes=hashes)
            )[0].record
        measured.append(len(record.candidates))
    config = ControlPlaneConfig()
    assert max(measured) <= config.holders_measured + config.sampled_max


def test_fullest_of_equally_good_workers_is_taken_while_it_is_well_in_time():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit("r0", prompt_tokens=16)
    assert rig.worker("w1").requests == 1
    rig.send("w1", make_load(running_online=1)), rig.send("w2", make_load())
    rig.accept(of(domain.Dispatch, rig.commands)[0])
    rig.send("w1", make_load(running_online=1))
    rig.handle(domain.FirstToken("r0", 0.1))
    assert placement(rig.submit("r1", prompt_tokens=100)).decode_worker == "w1"
    assert placement(rig.submit("r2", prompt_tokens=400)).decode_worker == "w2", "not so well"


def test_affinity_yields_before_it_hurts():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    hashes = tuple(bytes([index]) * 32 for index in range(30))
    facts = {"prompt_tokens": 500, "block_hashes": hashes, "slo": INTERACTIVE}
    holder = placement(rig.submit("r0", **facts)).decode_worker
    rig.finish("r0")
    other = "w2" if holder == "w1" else "w1"
    rig.send(holder, make_load(prefill_tokens_waiting=300)), rig.send(other, make_load())
    assert placement(rig.submit("r1", **facts)).decode_worker == holder
    rig.finish("r1")
    rig.send(holder, make_load(prefill_tokens_waiting=1_500)), rig.send(other, make_load())
    assert placement(rig.submit("r2", **facts)).decode_worker == other


# --- requests that have not started --------------------------------------------------------------


def stuck(**settings) -> Rig:
    """r1 waits on w1 behind 1.1 s of prompts; w2 has just become free."""
    rig = Rig(**settings)
    rig.join("decode"), rig.join("decode")
    rig.send("w2", make_load(prefill_tokens_waiting=900, running_online=1))
    rig.submit("r0", prompt_tokens=300)
    rig.submit("r1", prompt_tokens=100)
    assert rig.worker("w1").requests == 2
    rig.send("w2", make_load())
    return rig


def test_request_moves_to_a_worker_that_starts_it_sooner_and_only_before_it_has_started():
    rig = stuck()
    commands = rig.tick(0.1)
    assert of(domain.CancelSequence, commands) == [domain.CancelSequence("w1", "r1", 1)]
    assert of(domain.Dispatch, commands) == [domain.Dispatch("w2", "r1", 2, "full")]
    record = of(domain.Decided, commands)[0].record
    assert record.reason.startswith("w2 starts it in 0 ms, w1 in")
    assert rig.request("r0").placement.decode_worker == "w1", "it is first in line: it has started"
    assert of(domain.FailoverCounted, rig.commands) == []


def test_request_that_would_start_hardly_sooner_stays():
    rig = stuck()
    rig.send("w2", make_load(prefill_tokens_waiting=280, running_online=1))
    assert of(domain.Dispatch, rig.tick(0.1)) == []


def test_request_moves_at_most_twice():
    rig = Rig(replaces_max=2)
    rig.join("decode"), rig.join("decode")
    rig.send("w2", make_load(prefill_tokens_waiting=900, running_online=1))
    rig.submit("r1", prompt_tokens=100)
    moves = []
    for turn in range(8):
        here = rig.request("r1").placement.decode_worker
        there = "w2" if here == "w1" else "w1"
        rig.submit(f"x{turn}", tenant_id="other", prompt_tokens=16)
        for dispatch in of(domain.Dispatch, rig.commands):
            if dispatch.request_id == "r1":
                rig.accept(dispatch)
        rig.send(here, make_load(prefill_tokens_waiting=1_000, running_online=1))
        rig.send(there, make_load())
        moves += [item for item in of(domain.Dispatch, rig.tick(0.1)) if item.request_id == "r1"]
    assert len(moves) <= 2


def test_only_the_longest_waits_are_looked_at_in_one_tick():
    rig = Rig(replace_scan=1)
    rig.join("decode"), rig.join("decode")
    rig.send("w2", make_load(prefill_tokens_waiting=1_200, running_online=1))
    for index in range(4):
        rig.submit(f"r{index}", prompt_tokens=100)
    assert rig.worker("w1").requests == 4
    rig.send("w2", make_load())
    assert [item.request_id for item in of(domain.Dispatch, rig.tick(0.1))] == ["r3"]


# --- ejection ------------------------------------------------------------------------------------


def slow(factor: float) -> protocol.StepModel:
    return protocol.StepModel(0.045 * factor, 0.003 * factor, 1e-6 * factor)


def steps(rig: Rig, factors: dict[str, float], first: int, count: int = 20) -> None:
    """Every worker reports so many steps, those in `factors` slower than they joined."""
    for index in range(first, first + count):
        for worker in rig.plane.view(rig.now_s).workers:
            model = slow(factors.get(worker.worker_id, 1.0))
            rig.send(worker.worker_id, make_load(step_index=index, step_model=model))
        rig.tick(0.1)


def test_gray_slow_worker_gets_less_then_none_and_comes_back_by_a_trial():
    """reliability.md section 6, row 25."""
    rig = Rig(ejected_s=5.0)
    for _ in range(4):
        rig.join("mixed")
    steps(rig, {"w2": 10.0}, 1, 10)  # not enough to judge it, enough to predict with
    names = [placement(rig.submit(f"a{index}")).decode_worker for index in range(8)]
    assert names.count("w2") <= 1
    steps(rig, {"w2": 10.0}, 11)
    assert "10.0 times" in rig.worker("w2").exception
    assert "w2" not in [placement(rig.submit(f"b{index}")).decode_worker for index in range(8)]
    for index in range(8):
        rig.finish(f"a{index}"), rig.finish(f"b{index}")
    rig.tick(6.0, heard=("w1", "w2", "w3", "w4"))
    names = [placement(rig.submit(f"c{index}")).decode_worker for index in range(8)]
    assert names.count("w2") == 1, "on trial it is predicted as fast as it joined, with one request"
    steps(rig, {}, 40)
    rig.tick(1.0, heard=("w1", "w2", "w3", "w4"))
    assert rig.worker("w2").exception == ""
    names = [placement(rig.submit(f"d{index}")).decode_worker for index in range(8)]
    assert names.count("w2") >= 2


def test_worker_that_is_still_slow_on_trial_is_out_again():
    rig = Rig(ejected_s=5.0)
    for _ in range(4):
        rig.join("mixed")
    steps(rig, {"w2": 10.0}, 1, 30)
    rig.tick(6.0, heard=("w1", "w2", "w3", "w4"))
    assert rig.worker("w2").exception.startswith("tried with one request")
    steps(rig, {"w2": 10.0}, 40, 30)
    assert rig.worker("w2").exception.startswith("gets no work for another")


def test_ejected_worker_takes_work_when_all_others_are_gone():
    rig = Rig()
    rig.join("mixed"), rig.join("mixed")
    steps(rig, {"w2": 10.0}, 1, 30)
    assert rig.worker("w2").exception
    rig.close("w1")
    rig.tick(1.1, heard=("w2",))
    assert rig.worker("w2").exception == ""
    assert placement(rig.submit()).decode_worker == "w2"


def test_slow_device_that_always_was_slow_is_no_outlier():
    rig = Rig(slow_reports_min=5)
    names = [rig.join("mixed", step_model=slow(10.0 if index == 1 else 1.0)) for index in range(4)]
    for step in range(30):
        for index, name in enumerate(names):
            rig.send(name, make_load(step_index=step, step_model=slow(10.0 if index == 1 else 1.0)))
        rig.tick(0.1)
    assert all(rig.worker(name).exception == "" for name in names)


def test_worker_that_fails_again_and_again_is_ejected_and_one_success_starts_the_count_anew():
    rig = Rig(failures_max=3)
    names = tuple(rig.join("mixed") for _ in range(3))

    def fail(request_id: str) -> str:
        rig.submit(request_id)
        where = rig.request(request_id).placement.decode_worker
        rig.finish(request_id, "failed")
        return where

    victim = fail("a0")
    assert fail("a1") == victim
    rig.submit("ok")
    rig.handle(domain.FirstToken("ok", 0.1))
    rig.finish("ok")
    rig.tick(1.1, heard=names)
    assert rig.worker(victim).exception == ""
    assert {fail(f"b{index}") for index in range(3)} == {victim}
    rig.tick(1.1, heard=names)
    assert "3 failures in a row" in rig.worker(victim).exception


def test_only_a_share_of_a_pool_is_ejected_at_once_and_never_the_last_worker():
    for num_workers, expected in ((1, 0), (2, 1), (20, 2)):
        rig = Rig(slow_reports_min=5)
        names = [rig.join("mixed") for _ in range(num_workers)]
        for step in range(22):
            for index, name in enumerate(names):
                is_slow = index < (num_workers + 1) // 2 - (num_workers > 2)
                rig.send(name, make_load(step_index=step, step_model=slow(9.0 if is_slow else 1.0)))
            rig.tick(0.1)
        assert sum(rig.worker(name).exception != "" for name in names) == expected


def test_short_prompt_is_local_for_its_length_even_while_prefill_is_away():
    rig = demo()
    rig.tick(2.0, heard=("w2",))
    assert rig.worker("w1").status == "suspect"
    short = of(domain.Decided, rig.submit("r1", prompt_tokens=40))[0].record
    assert short.split_reason == "40 uncached tokens are below the handoff threshold of 128"
    assert short.handoff_threshold_tokens == 128
    long = of(domain.Decided, rig.submit("r2", prompt_tokens=400))[0].record
    assert long.split_reason.startswith("no prefill worker can take it: nothing heard for 2.0 s")
