"""What workers' time went into, as the plane reports it once a minute."""

from math import nan

from pytest import approx

from controlplane import domain
from controlplane.harvest import HARVEST_S, HarvestMeter, cost_tokens
from tests.controlplane.rig import Rig, of
from tests.factories import BATCH, make_load


def test_a_minute_of_two_workers_adds_up():
    rig = Rig()
    first, second = rig.join(), rig.join()
    rig.tick()
    for worker_id in (first, second):
        for _ in range(10):
            rig.send(worker_id, make_load(online_s=0.25, batch_s=0.5))
    (report,) = of(domain.Harvested, rig.tick(HARVEST_S, heard=(first, second)))
    assert report.seconds == approx(HARVEST_S)
    assert report.worker_s == approx(2.0 * HARVEST_S) == report.member_s
    assert (report.online_s, report.batch_s) == (approx(5.0), approx(10.0))
    assert of(domain.Harvested, rig.tick(1.0)) == []


def test_the_time_of_a_lost_worker_is_not_there_to_be_used():
    rig = Rig()
    first, second = rig.join(), rig.join()
    rig.tick()
    rig.close(second)
    (report,) = of(domain.Harvested, rig.tick(HARVEST_S, heard=(first,)))
    assert report.worker_s == approx(HARVEST_S)
    assert report.member_s == approx(2.0 * HARVEST_S)


def test_a_batch_line_counts_what_it_cost_when_it_is_complete():
    rig = Rig()
    worker = rig.join()
    rig.tick()
    for name, status in (("b1", "completed"), ("b2", "cancelled")):
        rig.submit(name, slo=BATCH, prompt_tokens=32)
        rig.finish(name, status)
    rig.submit("r1", prompt_tokens=32)
    rig.finish("r1")
    (report,) = of(domain.Harvested, rig.tick(HARVEST_S, heard=(worker,)))
    assert report.batch_tokens == cost_tokens(32, 4)


def test_numbers_that_cannot_be_count_for_nothing():
    rig, meter = Rig(), HarvestMeter()
    worker = rig.plane._registry.workers[rig.join()]
    meter.tick([worker], frozenset(), 0.0)
    for bad in (nan, -1.0, float("inf")):
        meter.load(worker, make_load(online_s=bad, batch_s=1.0))
        meter.load(worker, make_load(online_s=1.0, batch_s=bad))
    (report,) = meter.tick([worker], frozenset({worker.model_id}), HARVEST_S)
    assert (report.online_s, report.batch_s) == (0.0, 0.0)
    assert report.backlog_s == HARVEST_S


def test_a_decoded_token_costs_two_of_the_prompt():
    assert cost_tokens(100, 20) == 140
