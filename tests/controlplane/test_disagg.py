"""Conditional disaggregation: links are measured by pair, choices hold, KV is reserved for real."""

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TOKENS_NEVER, TransferRates, threshold_tokens
from tests.controlplane.rig import Rig, of, placement
from tests.controlplane.test_scorers import make_worker
from tests.factories import CPU_STEP, MODEL

CONFIG = ControlPlaneConfig()
PAIR, OTHER = ("w1", "w2"), ("w1", "w3")
KV_BYTES = MODEL.kv_bytes_per_token


def test_an_unmeasured_pair_is_taken_for_the_mean_of_the_measured_ones():
    rates = TransferRates(CONFIG)
    before_s = rates.transfer_s(OTHER, 10**9)
    assert before_s == pytest.approx(CONFIG.transfer_setup_s + 10**9 / CONFIG.transfer_bytes_per_s)
    for _ in range(60):
        rates.observe(PAIR, 10**9, 0.04, 1.0)
    assert rates.transfer_s(OTHER, 10**9) < 0.1 * before_s
    assert rates.transfer_s(PAIR, 10**9) == pytest.approx(0.04, rel=0.1)


def test_each_pair_keeps_its_own_speed():
    rates = TransferRates(CONFIG)
    for _ in range(60):
        rates.observe(PAIR, 10**8, 0.03, 1.0)
        rates.observe(OTHER, 10**8, 3.0, 1.0)
    assert rates.transfer_s(PAIR, 10**8) == pytest.approx(0.03, rel=0.1)
    assert rates.transfer_s(OTHER, 10**8) == pytest.approx(3.0, rel=0.1)


def test_what_a_transfer_costs_falls_to_its_set_up_as_the_link_grows_faster():
    costs = []
    for bytes_per_s in (1e8, 1e9, 1e10, 1e12):
        rates = TransferRates(CONFIG)
        for _ in range(200):
            for num_bytes in (10**7, 10**8, 10**9):
                rates.observe(PAIR, num_bytes, 0.003 + num_bytes / bytes_per_s, 1.0)
        costs.append(rates.transfer_s(PAIR, 10**8))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(0.003, rel=0.1)


def test_a_pair_is_tried_once_in_a_while_and_not_again_before_it_answers():
    rates = TransferRates(CONFIG)
    assert rates.is_due(PAIR, 0.0)
    rates.chosen(PAIR, True, 0.0)
    assert not rates.is_due(PAIR, CONFIG.transfer_stale_s - 0.1)
    assert rates.is_due(PAIR, CONFIG.transfer_stale_s)
    rates.observe(PAIR, 10**6, 0.1, 90.0)
    assert not rates.is_due(PAIR, 100.0) and rates.is_due(OTHER, 100.0)


def test_every_table_of_links_stops_at_its_limit():
    rates = TransferRates(ControlPlaneConfig(pairs_max=3))
    for index in range(10):
        pair = (f"w{index}", f"w{index + 100}")
        rates.chosen(pair, True, 0.0)
        rates.observe(pair, 10**6, 0.1, 0.0)
    assert len(rates) == 3


def test_equal_costs_keep_the_current_choice():
    worker, rows = make_worker(), 4
    equal_s = rows * CPU_STEP.per_token_s  # a stalled prompt token costs what its transfer would
    away = threshold_tokens(worker, rows, 0.02, equal_s, True, CONFIG)
    here = threshold_tokens(worker, rows, 0.02, equal_s, False, CONFIG)
    assert (away, here) == (128, TOKENS_NEVER)
    for is_apart, factor in ((True, 1.2), (False, 0.8)):  # a clear difference decides
        found = threshold_tokens(worker, rows, 0.0, factor * equal_s, is_apart, CONFIG)
        assert found == (TOKENS_NEVER if is_apart else 128)


def test_a_short_prompt_measures_a_link_that_is_taken_for_slow_and_long_ones_follow():
    rig = Rig(transfer_bytes_per_s=5e6)
    for role in ("prefill", "decode"):
        rig.join(role)
    assert placement(rig.submit("long", prompt_tokens=600)).split == "local"
    rig.finish("long")
    assert placement(rig.submit("short", prompt_tokens=128)).split == "handoff"
    assert "measure an unknown link" in rig.plane.explain("short").records[0].split_reason
    assert placement(rig.submit("next", prompt_tokens=128)).split == "local", "one at a time"
    rig.finish("next")
    rig.send("w1", protocol.HandoffReady("short", 1, 8, 1))
    rig.now_s += 0.01
    rig.send("w2", protocol.HandoffDone("short", 1, 8, 128 * KV_BYTES, 0.01))
    rig.finish("short")
    assert placement(rig.submit("more", prompt_tokens=600)).split == "handoff"


def test_a_prompt_that_is_late_either_way_measures_an_unknown_link():
    rig = Rig(transfer_bytes_per_s=1e5)
    for role in ("prefill", "decode"):
        rig.join(role)
    assert placement(rig.submit("timely", prompt_tokens=600)).split == "local"
    rig.finish("timely")
    assert placement(rig.submit("late", prompt_tokens=1900)).split == "handoff"
    assert "measure an unknown link" in rig.plane.explain("late").records[0].split_reason


def test_the_decode_side_reserves_what_it_will_hold_and_gives_it_back_once():
    rig = Rig()
    rig.join("prefill")
    rig.join("decode", num_blocks=64)
    sent = 0
    while of(domain.Dispatch, rig.submit(f"r{sent}", prompt_tokens=200, output_tokens_max=16)):
        sent += 1
    assert sent == 64 // -(-(200 + 15) // 16), "no more than its blocks"
    assert rig.worker("w2").requests == sent
    rig.send("w2", protocol.HandoffFailed("r0", 1, "timeout"))
    rig.finish("r0", "failed")
    rig.finish("r0", "failed")
    assert rig.request("r0") is None


def test_a_reservation_whose_transfer_never_ends_expires():
    rig = Rig(transfer_timeout_s=2.0)
    rig.join("prefill")
    rig.join("decode")
    assert placement(rig.submit(prompt_tokens=600)).split == "handoff"
    due_s = of(domain.Dispatch, rig.commands)[1].handoff_in.timeout_s
    rig.tick(due_s, heard=("w1", "w2"))
    assert rig.request().epoch == 1
    commands = rig.tick(4.0, heard=("w1", "w2"))
    moved = placement([item for item in commands if isinstance(item, domain.Decided)])
    assert moved.split == "local"
    assert {item.worker_id for item in of(domain.CancelSequence, commands)} == {"w1", "w2"}
    record = rig.plane.explain("r1").records[-1]
    assert record.cause == "handoff_failed" and "its KV was not there after" in record.reason
