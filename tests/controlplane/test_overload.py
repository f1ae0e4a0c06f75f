"""The overload ladder: rungs, what they hold back, and what each refusal says."""

from dataclasses import replace

import pytest

from controlplane import domain, overload
from controlplane.overload import Overload
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.factories import BATCH, INTERACTIVE, make_load, make_request

STANDARD = domain.SLOClass("standard", 1, 10.0, 0.2)


@pytest.mark.parametrize(
    ("share", "rung"),
    [(0.0, 0), (0.69, 0), (0.7, 1), (0.8, 2), (0.9, 3), (0.949, 3), (0.95, 4), (3.0, 4)],
)
def test_the_highest_signal_decides_the_rung(share, rung):
    ladder = Overload()
    ladder.observe({"loop": share, "queue": 0.1}, 0.0)
    assert ladder.rung == rung
    assert ladder.bound == ("loop" if share > 0.1 else "queue")


def test_rungs_are_climbed_at_once_and_left_one_by_one_below_their_threshold():
    ladder = Overload()
    seen = []
    for share in (0.96, 0.93, 0.9, 0.89, 0.84, 0.5, 0.5, 0.5):
        ladder.observe({"loop": share}, 0.0)
        seen.append(ladder.rung)
    assert seen == [4, 4, 4, 3, 2, 1, 0, 0]


def test_full_kv_holds_work_back_and_refuses_nobody():
    ladder = Overload()
    ladder.observe({"kv": 1.0}, 0.0)
    assert ladder.rung == overload.NO_BATCH
    assert ladder.refuse(make_request(), 50, 1.0, 0.0, 0.5) is None


def test_signals_are_looked_at_four_times_a_second():
    ladder = Overload()
    assert ladder.is_due(0.0)
    ladder.observe({}, 10.0)
    assert not ladder.is_due(10.2) and ladder.is_due(10.25)


def host(rig: Rig, share: float) -> None:
    rig.handle(domain.HostLoad({"loop": share}))
    rig.tick(0.1, heard=("w1",))


def test_first_no_batch_line_starts_and_then_no_surplus_request():
    rig = Rig()
    rig.join("mixed")
    host(rig, 0.75)
    rig.submit("b1", slo=BATCH)
    slow = replace(INTERACTIVE, itl_s_p99=5.0)  # a step has room for all of these prompts
    placement(rig.submit("free1", weight=0.0, slo=slow))
    assert rig.request("b1").phase == "queued"
    host(rig, 0.85)
    rig.submit("free2", weight=0.0, slo=slow)
    assert rig.request("free2").phase == "queued"
    placement(rig.submit("paid"))
    rig.handle(domain.HostLoad({"loop": 0.0}))
    started = {item.request_id for item in of(domain.Dispatch, rig.tick(1.0, heard=("w1",)))}
    assert started == {"b1", "free2"}


def test_then_tenants_above_their_share_are_refused_with_a_time():
    rig = Rig()
    rig.join("mixed")
    for index in range(3):
        rig.submit(f"a{index}", tenant_id="acme")
    rig.submit("b0", tenant_id="beta")
    host(rig, 0.92)
    outcome = rejection(rig.submit("a3", tenant_id="acme"))
    assert outcome.code == "overload_share"
    assert "loop at 92%: 3 requests of acme run or wait, its share is 2.5" in outcome.message
    assert outcome.retry_after_s == pytest.approx(1.25)
    placement(rig.submit("b1", tenant_id="beta"))
    placement(rig.submit("c0", tenant_id="gamma"))


def test_at_last_only_work_in_flight_goes_on_and_batch_still_waits():
    rig = Rig()
    rig.join("mixed")
    placement(rig.submit("r0"))
    host(rig, 0.97)
    outcome = rejection(rig.submit("r1", tenant_id="new"))
    assert outcome.code == "overloaded" and outcome.retry_after_s >= overload.RETRY_S_MIN
    rig.submit("b1", slo=BATCH)
    assert rig.request("b1").phase == "queued" and rig.request("r0") is not None
    host(rig, 0.0)
    rig.tick(1.0, heard=("w1",))
    placement(rig.submit("r2", tenant_id="new"))


def test_waiting_counts_by_what_the_class_allows_and_only_where_a_worker_is():
    rig = Rig(sequences_max=1)
    rig.join("mixed")
    rig.submit("r0", slo=STANDARD)
    slow = domain.SLOClass("slow", 1, ttft_s_p99=60.0, itl_s_p99=0.2, queue_s_max=10.0)
    rig.submit("r1", slo=slow)
    rig.submit("gone", slo=slow, model_id="other")
    rig.tick(5.0, heard=("w1",))
    assert rig.plane.overload().signals["queue"] == pytest.approx(0.5, abs=0.03)
    rig.tick(2.5, heard=("w1",))
    assert rig.plane.overload().rung == overload.NO_BATCH
    rig.close("w1")
    rig.tick(0.3)
    assert rig.plane.overload().signals["queue"] == 0.0, "that is no overload"


def test_kv_and_time_that_batch_takes_count_as_free():
    rig = Rig()
    rig.join("mixed", num_blocks=64)
    rig.send("w1", make_load(kv_blocks_total=64, kv_blocks_free=64))
    placement(rig.submit("b1", slo=BATCH, prompt_tokens=480))
    rig.tick(0.5, heard=())
    assert rig.plane.overload().signals["kv"] == 0.0
    placement(rig.submit("r1", slo=INTERACTIVE, prompt_tokens=496, output_tokens_max=16))
    rig.tick(0.5, heard=())
    assert rig.plane.overload().signals["kv"] == pytest.approx(32 / 64)
