"""The load parts of `bench plane`: what their figures count, and a run that is cut short."""

import pytest

from controlplane.sim import planebench, planeload, planepredict
from controlplane.sim.planeload import Bench, Capacity
from controlplane.sim.replay import Record


def record(at_s: float, name: str = "chat", **facts) -> Record:
    made = Record(1, 0, at_s, name, 0.5, 0.03, 100, 10)
    for key, value in ({"ttft_s": 0.1, "ended_at_s": at_s + 1.0} | facts).items():
        setattr(made, key, value)
    return made


def test_goodput_counts_first_token_and_every_gap_and_no_refusal():
    records = [
        record(1.0),
        record(2.0, ttft_s=0.51),
        record(3.0, gap_s_max=0.031),
        record(4.0, code="late", ttft_s=None),
        record(5.0, ended_at_s=None),
        record(10.0),
    ]
    assert planeload.goodput(records, 0.0, 10.0) == pytest.approx(0.1)


def test_recovery_is_over_when_every_class_stays_in_time():
    fine = [record(0.1 * index) for index in range(1_000)]
    assert planeload.recovered_s(fine, 30.0, 100.0) == 0.0
    late = [record(37.0 + 0.1 * index, "code", ttft_s=3.0) for index in range(5)]
    assert planeload.recovered_s(fine + late, 30.0, 100.0) == 10.0


def test_coverage_counts_from_the_placement_on():
    timely = record(0.0, ttft_s=0.4, placed_at_s=0.3, predicted_s_p99=0.12)
    late = record(0.0, ttft_s=0.4, placed_at_s=0.2, predicted_s_p99=0.12)
    unplaced = record(0.0, ttft_s=None)
    coverage, sharpness = planepredict.audit([timely, late, unplaced])
    assert coverage == 0.5 and sharpness == pytest.approx(1.2)


def test_an_unknown_part_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="part 'speed': expected one of prediction, overload"):
        planebench.run(Bench(""), ["speed"], "m", print)


def test_an_interrupted_run_keeps_the_parts_that_are_done_and_says_what_is_missing(monkeypatch):
    def interrupted(bench, say):
        raise KeyboardInterrupt

    monkeypatch.setitem(planebench.ALONE, "deadlines", lambda bench, say: {"ok": True})
    monkeypatch.setitem(planebench.ALONE, "fairness", interrupted)
    answer = planebench.run(Bench(""), ["deadlines", "fairness", "ledger"], "m", lambda line: None)
    assert answer["deadlines"] == {"ok": True}
    assert answer["is_partial"] and answer["missing"] == ["fairness", "ledger"]
    assert answer["machine"] == "m" and "sigma" in str(answer["noise"])


def test_the_load_parts_find_their_capacity_once(monkeypatch):
    found, said = Capacity(10.0, ((10.0, 10.0),)), []
    monkeypatch.setattr(planeload, "capacity", lambda bench, say: said.append("sweep") or found)
    for name in planebench.LOADED:
        monkeypatch.setitem(planebench.LOADED, name, lambda bench, found, say: {"ok": True})
    answer = planebench.run(Bench(""), list(planebench.LOADED), "m", lambda line: None)
    assert said == ["sweep"] and answer["capacity_per_s"] == 10.0
    assert not answer["is_partial"] and answer["missing"] == []
