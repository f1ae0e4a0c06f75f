"""A short run of the deadline figures; `python -m controlplane.sim deadlines` measures 28 days."""

from math import inf

from controlplane.escalation import BACK, DWELL_S, LOOSE_KAPPAS, SLACKS, Escalation
from controlplane.sim import deadlines
from controlplane.sim.deadlines import BIN_S, Job, serve


def test_two_weeks_keep_their_promises():
    found = deadlines.run([1], num_days=14)
    assert found["jobs"] == 14 * deadlines.JOBS_PER_DAY
    assert found["item_miss"] < 0.001
    assert found["accepted_of_feasible"] >= 0.9
    assert found["accepted_as_asked"] < found["jobs"]  # some ask for too much
    assert 0.8 <= found["interval_coverage"] <= 0.98  # few jobs: wider than over 28 days
    assert found["quoted_over_actual_median"] <= 0.3


def test_the_past_does_not_depend_on_what_comes():
    """Two worlds with the same first week: what was promised in it is the same."""
    short, long = deadlines.draw(3, 7), deadlines.draw(3, 7)
    half = len(long.online) // 2
    long.online[half:] = [0.9] * half
    promised = []
    for world in (short, long):
        past = deadlines.draw(2, 7)
        profile = deadlines.capacity.fit(past.days(), BIN_S)
        supply = deadlines.capacity.Supply(deadlines.NUM_WORKERS, deadlines.CEILING)
        server = deadlines.Server(
            world, profile, supply, deadlines.inflow_of(past), deadlines.FinishRatios()
        )
        server.run(deadlines.Events(1).random)
        early = [job for job in server.accepted if job.bin_index < half]
        promised.append([(job.name, job.due_s, job.quote) for job in early])
    assert promised[0] == promised[1] and promised[0]


def job_of(name, due_s, work_s):
    job = Job(name, 0, due_s, [work_s / 2, work_s], work_s / 2, due_s=due_s)
    return job


def test_a_bin_serves_the_earliest_deadline_first():
    late, soon = job_of(1, 9_000.0, 100.0), job_of(2, 600.0, 120.0)
    serve([late, soon], 180.0, 0.0)
    assert (soon.finished_at_s, soon.num_done) == (BIN_S * 120.0 / 180.0, 2)
    assert (late.served_s, late.num_done, late.finished_at_s) == (60.0, 1, inf)


def test_nothing_is_served_after_its_deadline_within_a_bin():
    job = job_of(1, 150.0, 300.0)
    serve([job], 300.0, 0.0)
    assert job.served_s == 150.0


# --- levels --------------------------------------------------------------------------------------


def test_levels_rise_and_fall_one_at_a_time():
    escalation, levels = Escalation(), []
    for minute, slack in enumerate((1.0, -0.5, -0.5, -0.5, -0.5, 2.0, 2.0, 2.0, 2.0)):
        escalation.assess(slack, DWELL_S * minute)
        levels.append(escalation.level)
    assert levels == [0, 1, 2, 3, 3, 2, 1, 0, 0]


def test_a_level_is_left_only_well_above_its_slack():
    escalation = Escalation(level=1)
    assert not escalation.assess(SLACKS[0] + 0.5 * BACK, 0.0)
    assert escalation.assess(SLACKS[0] + BACK, 1.0) and escalation.level == 0


def test_a_change_waits_for_the_dwell():
    escalation = Escalation()
    assert escalation.assess(0.3, 0.0)
    assert not escalation.assess(0.1, DWELL_S / 2)
    assert escalation.assess(0.1, DWELL_S) and escalation.level == 2


def test_no_slack_at_the_highest_level_asks_for_nothing_more():
    escalation = Escalation(level=3)
    assert not escalation.assess(-1.0, 0.0)
    assert list(LOOSE_KAPPAS) == sorted(LOOSE_KAPPAS)
