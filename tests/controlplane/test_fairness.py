"""A flood beside a tenant that keeps to its share: pace, places in the queue, and the bench."""

import json
from dataclasses import replace

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.failover import Tracked
from controlplane.ledger import BURST_S, Pace
from controlplane.registry import Pace as WorkerPace
from controlplane.replacing import not_started
from controlplane.sim.__main__ import main
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.controlplane.test_contracts import make_contract
from tests.factories import INTERACTIVE, make_load, make_request


def test_pace_allows_a_burst_then_its_rate_and_forgives_a_large_amount_in_time():
    pace = Pace(BURST_S)
    taken = 0
    while not pace.is_ahead(600, 0.0):
        pace.add(1)
        taken += 1
    assert taken == BURST_S * 10
    assert not pace.is_ahead(600, 0.1)
    pace.add(500)
    assert pace.is_ahead(600, 40.0) and not pace.is_ahead(600, 51.0)
    pace.add(60)
    pace.add(-60)  # reserved and not used
    assert not pace.is_ahead(600, 51.0)


def test_a_slow_contract_may_always_start_one():
    pace = Pace(BURST_S)
    assert not pace.is_ahead(1, 0.0)
    pace.add(2)
    assert pace.is_ahead(1, 30.0) and not pace.is_ahead(1, 61.0)


def decided(commands):
    return of(domain.Decided, commands)[-1].outcome


def busy() -> Rig:
    """One worker at which prompts wait."""
    rig = Rig()
    rig.join("mixed")
    rig.handle(domain.ContractsSet((make_contract(tokens_per_min=600_000),)))
    rig.send("w1", make_load(running_online=1, prefill_tokens_waiting=450))
    return rig


def test_a_share_is_lent_while_nobody_waits():
    rig = Rig()
    rig.join("mixed")
    rig.handle(domain.ContractsSet((make_contract(tokens_per_min=600_000, concurrency_max=50),)))
    for index in range(20):  # a third of its minute at once
        assert decided(rig.submit(f"r{index}", prompt_tokens=1)).demotion is None


def test_what_comes_faster_than_its_share_is_surplus_where_others_wait():
    rig = busy()
    outcomes = [decided(rig.submit(f"r{index}", prompt_tokens=1)) for index in range(7)]
    codes = [outcome.demotion.code if outcome.demotion else "" for outcome in outcomes]
    assert codes == [""] + ["contract_pace"] * 6, "1 s of 60 a minute"
    assert "1 s ahead of its 60 requests a minute" in outcomes[-1].demotion.message
    (account,) = rig.plane.accounts(0.0)
    assert (account.requests_last_min, account.num_surplus) == (1, 6)


def flooded() -> Rig:
    """The worker's only row is taken and the surplus queue is full of one tenant's requests."""
    rig = Rig(sequences_max=1, queue_max=4)
    rig.join("mixed")
    placement(rig.submit("r0", tenant_id="other"))
    for index in range(4):
        rig.submit(f"f{index}", tenant_id="flood", weight=0.0)
    return rig


def test_one_tenant_does_not_keep_others_out_of_the_surplus_queue():
    rig = flooded()
    commands = rig.submit("n0", tenant_id="new", weight=0.0)
    (out,) = [item for item in of(domain.Decided, commands) if item.request_id == "f3"]
    assert isinstance(out.outcome, domain.Rejected) and out.outcome.code == "queue_full"
    assert "gave its place to a tenant with fewer" in out.outcome.message
    assert out.outcome.retry_after_s is not None
    assert rig.request("n0").phase == "queued" and rig.request("f3") is None
    assert rejection(rig.submit("f4", tenant_id="flood", weight=0.0)).code == "queue_full"


def test_tenants_with_as_many_displace_nobody():
    rig = flooded()
    rig.submit("n0", tenant_id="new", weight=0.0)
    rig.submit("n1", tenant_id="new", weight=0.0)
    assert rejection(rig.submit("n2", tenant_id="new", weight=0.0)).code == "queue_full"
    assert rig.request("f1") is not None


def test_surplus_leaves_rows_to_those_with_a_share():
    rig = Rig(sequences_max=8, surplus_reserve=0.25)
    rig.join("mixed")
    slow = replace(INTERACTIVE, itl_s_p99=5.0)  # a step has room for all of these prompts
    for index in range(6):
        placement(rig.submit(f"s{index}", weight=0.0, slo=slow))
    rig.submit("s6", weight=0.0, slo=slow)
    assert rig.request("s6").phase == "queued"
    placement(rig.submit("paid"))


def test_surplus_prompts_wait_here_while_a_worker_has_a_step_of_prompts():
    rig = Rig()
    rig.join("mixed")
    placement(rig.submit("s0", weight=0.0))
    rig.submit("s1", weight=0.0)
    rig.submit("s2", weight=0.0)
    assert rig.request("s2").phase == "queued"
    placement(rig.submit("paid"))
    started = rig.finish("s0") + rig.finish("s1") + rig.finish("paid")
    assert [item.request_id for item in of(domain.Dispatch, started)] == ["s2"]


def test_a_long_surplus_queue_keeps_no_other_request_waiting():
    rig = Rig()
    rig.join("mixed")
    for index in range(40):  # more than one pass looks at, and a pass was just made
        rig.submit(f"s{index}", weight=0.0)
    placement(rig.submit("paid"))


def pace(rig: Rig) -> WorkerPace:
    return rig.plane._registry.workers["w1"].pace


def test_surplus_prompts_are_not_ahead_of_others_however_far_they_are():
    rig = Rig()
    rig.join("mixed")
    rig.accept(of(domain.Dispatch, rig.submit("s0", weight=0.0, prompt_tokens=900))[0])
    rig.send("w1", make_load(running_online=1, prefill_tokens_waiting=400))
    assert pace(rig).ahead_tokens == 0
    rig.submit("paid", prompt_tokens=50)
    assert pace(rig).ahead_tokens == 50
    assert pace(rig).ahead_tokens_all == 450


def test_a_prompt_is_not_expected_to_wait_for_the_surplus_ones_given_before_it():
    rig = Rig()
    rig.join("mixed")
    rig.submit("s0", weight=0.0, prompt_tokens=900)
    rig.submit("paid", prompt_tokens=50)
    requests, workers = rig.plane._requests.tracked, rig.plane._registry.workers.values()
    waits = not_started(workers, requests, ControlPlaneConfig(), rig.now_s)
    assert [item.tracked.request_id for item in waits] == ["s0"]


def test_one_that_was_predicted_late_is_told_to_be_surplus_when_its_deadline_has_passed():
    late = Tracked(make_request(arrived_at_s=10.0), "queued", 10.0)
    late.demotion = domain.Demotion("late", "")
    limit_s = late.request.slo.ttft_s_p99
    assert late.worker_tier(10.0) == "guaranteed"
    assert late.worker_tier(10.0 + limit_s) == "surplus"
    late.has_first_token = True  # a stream that goes on elsewhere
    assert late.worker_tier(10.0 + limit_s) == "guaranteed"


def test_bench_shows_a_victim_that_a_flood_does_not_starve(capsys):
    """Small: one worker and seconds, so only the causes and not the promised figures are here."""
    assert main(["fairness", "--workers", "1", "--seconds", "16"]) == 0
    figures = json.loads(capsys.readouterr().out)
    arms = figures["arms"]
    assert figures["fair_victim_attainment_drop"] <= 0.1
    assert arms["unfair flood"]["victim_attainment"] < 0.5
    assert arms["flood"]["neighbour_surplus_share"] > 0.1
    assert figures["fair_throughput_vs_unfair"] >= 0.9
