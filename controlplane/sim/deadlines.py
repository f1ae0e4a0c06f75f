"""Are promised deadlines kept? 28 days of batch jobs on a cluster that online work leaves.

The certificate is fitted on 28 other days of the same weekly profile. While the measured days run
it sees their past only: what each finished bin was used for, and what finished lines cost.
Promises are compared with a clairvoyant that knows capacity and costs, and admits by EDF on them.

The jobs are a fluid of lines served in order of deadline; workers are so many equal shares of time.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf, log, pi, sin, sqrt

from controlplane import capacity, certificate
from controlplane.certificate import Demand, FinishRatios, Forecast, Lines
from controlplane.escalation import LOOSE_KAPPAS, Escalation
from controlplane.sim.events import Chance, Events

BIN_S = 300.0
BINS = int(capacity.DAY_S / BIN_S)  # of a day
DAYS = 28
HORIZON_S = 7 * capacity.DAY_S
NUM_WORKERS = 8
T0_S, ITL_S, KAPPA = 0.0051, 0.05, 0.6  # algorithms.md, 8B on H200: fixed cost of a step, target
PHI, PHI_NOISE = 0.93, 0.03  # harvest over the bound, and its error in one bin
FACTOR_SD = 0.15  # of a day's load
# Of one bin's load: 10,000 requests with an index of dispersion of 8 (algorithms.md 2e) give 3 %,
# and their lengths the rest.
SHARE_NOISE = 0.05
ONLINE_MEAN, ONLINE_MAX = 0.42, 0.95  # share of the workers' time
LOOSE_STEPS = 0.3  # share of the steps that have no row of the top class
OUTAGES_PER_DAY, OUTAGE_BINS = 0.5, 6  # of one worker
BATCH_LOAD = 0.7  # work asked for, over the mean capacity
JOBS_PER_DAY = 15
# Deadline asked for in hours, its share of the jobs, and their median work as a share of what the
# cluster gives in that time.
KINDS = ((1, 0.25, 0.16), (4, 0.35, 0.1), (24, 0.3, 0.05), (72, 0.1, 0.04))
WORK_SIGMA = 1.0  # of log work within a kind
LINE_S = 2.0  # GPU-seconds, median of the jobs' mean line
LINES_MIN, LINES_MAX = 100, 3_000
LINE_CV = 0.6  # of the lines of one job
BIAS_SD = 0.05  # of a job's mean line as estimated at submit: from 150 earlier lines at that cv
TAKES_OFFER = 0.5  # of those who asked for too much, when twice their deadline is enough


@dataclass(slots=True)
class Job:
    """`costs_s` sums the lines' true GPU-seconds; `line_s` is what the tenant's server expects."""

    name: int
    bin_index: int
    asked_s: float
    costs_s: list[float]
    line_s: float
    due_s: float = 0.0  # promised, on the clock of the 28 days
    served_s: float = 0.0
    finished_at_s: float = inf
    quote: certificate.Finish | None = None

    @property
    def num_lines(self) -> int:
        return len(self.costs_s)

    @property
    def num_done(self) -> int:
        return bisect_right(self.costs_s, self.served_s + 1e-9)

    def demand(self, now_s: float) -> Demand:
        """What is left, as known from the estimate and from the lines that are done."""
        done = self.num_done
        done_s = self.costs_s[done - 1] if done else 0.0
        lines = Lines(self.num_lines - done, self.line_s, BIAS_SD, LINE_CV, done, done_s)
        mean_s, var_s2 = lines.left()
        begun_s = self.served_s - done_s  # of the line in hand
        return Demand(self.due_s - now_s, max(0.0, mean_s - begun_s), var_s2)


@dataclass(slots=True)
class World:
    """28 days that happen: online share, capacity factor and workers up in each bin, and jobs."""

    online: list[float]
    phi: list[float]
    workers: list[int]
    jobs: list[Job]

    @property
    def total_s(self) -> float:
        return BIN_S * len(self.online)

    def capacity_s(self, index: int, level: int) -> float:
        """GPU-seconds of batch work in one bin at an escalation level."""
        kappa = min(1.0, LOOSE_KAPPAS[level] or KAPPA)  # in most steps a row has a token due
        tax = (1.0 - LOOSE_STEPS) * T0_S / (KAPPA * ITL_S) + LOOSE_STEPS * T0_S / (kappa * ITL_S)
        share = max(0.0, 1.0 - tax - self.online[index])
        return self.workers[index] * BIN_S * self.phi[index] * share

    def days(self) -> list[capacity.Day]:
        return [
            capacity.Day(day % 7, tuple(self.online[day * BINS : (day + 1) * BINS]))
            for day in range(len(self.online) // BINS)
        ]


CEILING = 1.0 - T0_S / (KAPPA * ITL_S)


def usual_share(weekday: int, place: int) -> float:
    """The weekly profile: a day's wave with its peak in the afternoon, and quiet weekends."""
    hour = 24.0 * place / BINS
    wave = 1.0 + 0.45 * sin(2.0 * pi * (hour - 9.0) / 24.0) + 0.1 * sin(4.0 * pi * hour / 24.0)
    return ONLINE_MEAN * wave * (0.7 if weekday >= 5 else 1.1)


def draw(seed: int, num_days: int = DAYS) -> World:
    chance = Events(seed).random
    online: list[float] = []
    for day in range(num_days):
        factor = max(0.3, chance.gauss(1.0, FACTOR_SD))
        for place in range(BINS):
            share = factor * usual_share(day % 7, place) * chance.gauss(1.0, SHARE_NOISE)
            online.append(min(ONLINE_MAX, max(0.0, share)))
    phi = [min(1.0, chance.gauss(PHI, PHI_NOISE)) for _ in online]
    workers = [NUM_WORKERS] * len(online)
    for _ in range(int(OUTAGES_PER_DAY * num_days)):
        first = chance.randrange(len(online))
        for index in range(first, min(first + OUTAGE_BINS, len(online))):
            workers[index] -= 1
    usual = sum(max(0.0, CEILING - usual_share(d, b)) for d in range(7) for b in range(BINS))
    rate = NUM_WORKERS * PHI * usual / (7 * BINS)  # GPU-seconds per second
    return World(online, phi, workers, _jobs(chance, rate, num_days))


def _jobs(chance: Chance, rate: float, num_days: int) -> list[Job]:
    drawn = []
    for _ in range(JOBS_PER_DAY * num_days):
        hours, _, share = chance.choices(KINDS, [kind[1] for kind in KINDS])[0]
        work_s = share * 3600.0 * hours * rate * chance.lognormvariate(0.0, WORK_SIGMA)
        drawn.append((chance.randrange(num_days * BINS), 3600.0 * hours, work_s))
    scale = BATCH_LOAD * rate * num_days * capacity.DAY_S / sum(work_s for _, _, work_s in drawn)
    jobs = []
    for name, (index, asked_s, work_s) in enumerate(sorted(drawn)):
        line_s = LINE_S * chance.lognormvariate(0.0, 0.5)
        lines = min(LINES_MAX, max(LINES_MIN, round(scale * work_s / line_s)))
        line_s = scale * work_s / lines
        sigma = sqrt(log(1.0 + LINE_CV**2))
        costs = [line_s * chance.lognormvariate(-(sigma**2) / 2.0, sigma) for _ in range(lines)]
        estimate_s = line_s * max(0.5, chance.gauss(1.0, BIAS_SD))
        jobs.append(Job(name, index, asked_s, list(accumulate(costs)), estimate_s))
    return jobs


@dataclass(slots=True)
class Server:
    """The certificate at work in one world; it looks at no bin before it is over."""

    world: World
    profile: capacity.Profile
    supply: capacity.Supply
    inflow: Sequence[tuple[float, float]]
    ratios: FinishRatios
    queue: list[Job] = field(default_factory=list)
    accepted: list[Job] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)  # jobs accepted with the deadline they asked for
    num_offers: int = 0
    level_bins: list[int] = field(default_factory=lambda: [0] * len(LOOSE_KAPPAS))
    escalation: Escalation = field(default_factory=Escalation)

    def forecast(self, index: int, horizon_s: float = HORIZON_S) -> Forecast:
        day, place = divmod(index, BINS)
        seen = self.world.online[day * BINS : index]
        at_s = place * BIN_S
        return self.profile.forecast(day % 7, at_s, seen, self.supply, horizon_s)

    def run(self, chance: Chance) -> None:
        coming = deque(sorted(self.world.jobs, key=lambda job: job.name))
        for index in range(len(self.world.online)):
            now_s = index * BIN_S
            while coming and coming[0].bin_index <= index:
                self.submit(coming.popleft(), index, chance)
            if self.queue:
                last_s = max(job.due_s for job in self.queue) - now_s
                forecast = self.forecast(index, max(last_s + BIN_S, 2 * BIN_S))
                queue = [job.demand(now_s) for job in self.queue]
                slacks = certificate.slack_by(queue, forecast)
                self.escalation.assess(min(slack for _, slack in slacks), now_s)
            else:
                self.escalation.assess(inf, now_s)
            self.level_bins[self.escalation.level] += 1
            serve(self.queue, self.world.capacity_s(index, self.escalation.level), now_s)
            for job in self.queue:
                if job.finished_at_s < inf and job.quote is not None:
                    took_s = job.finished_at_s - job.bin_index * BIN_S
                    self.ratios.observe(job.quote.expected_s, took_s)
            self.queue = [
                job for job in self.queue
                if job.finished_at_s == inf and job.due_s > now_s + BIN_S
            ]  # fmt: skip

    def submit(self, job: Job, index: int, chance: Chance) -> None:
        now_s = index * BIN_S
        takes_offer = chance.random() < TAKES_OFFER
        forecast = self.forecast(index)
        queue = [item.demand(now_s) for item in self.queue]
        job.due_s = now_s + job.asked_s
        outcome = certificate.certify(queue, job.demand(now_s), forecast)
        if isinstance(outcome, certificate.Refused):
            earliest_s = outcome.earliest_s
            if earliest_s is None or earliest_s > 2.0 * job.asked_s or not takes_offer:
                return
            self.num_offers += 1
            job.due_s = now_s + earliest_s
        else:
            self.asked.add(job.name)
        mine = job.demand(now_s)
        job.quote = certificate.finish(queue, mine, forecast, self.inflow, self.ratios)
        self.queue.append(job)
        self.accepted.append(job)


def serve(queue: list[Job], capacity_s: float, now_s: float) -> None:
    """One bin of EDF."""
    left_s = capacity_s
    for job in sorted(queue, key=lambda item: (item.due_s, item.name)):
        wanted_s = job.costs_s[-1] - job.served_s
        given_s = min(left_s, wanted_s)
        room_s = max(0.0, job.due_s - now_s)
        if room_s < BIN_S:  # its deadline falls into the bin
            given_s = min(given_s, capacity_s * room_s / BIN_S)
        job.served_s += given_s
        left_s -= given_s
        if given_s == wanted_s:
            used = (capacity_s - left_s) / capacity_s if capacity_s else 0.0
            job.finished_at_s = now_s + BIN_S * used
            job.served_s = job.costs_s[-1]


def inflow_of(world: World) -> list[tuple[float, float]]:
    """GPU-seconds per second that keep coming, by the deadline asked for."""
    found: dict[float, float] = {}
    for job in world.jobs:
        rate = job.num_lines * job.line_s / world.total_s
        found[job.asked_s] = found.get(job.asked_s, 0.0) + rate
    return sorted(found.items())


def clairvoyant(world: World, level: int = 0) -> set[int]:
    """Jobs that are admitted, in order of submission, with capacity and costs known."""
    made = [world.capacity_s(index, level) for index in range(len(world.online))]
    made += made[-7 * BINS :]  # what follows the last day, for deadlines beyond it
    curve = list(accumulate(made, initial=0.0))
    queue: list[tuple[Job, float]] = []  # with the true work left
    admitted: set[int] = set()
    coming = deque(sorted(world.jobs, key=lambda job: job.name))
    for index in range(len(world.online)):
        now_s = index * BIN_S
        while coming and coming[0].bin_index <= index:
            job = coming.popleft()
            known = tuple(value - curve[index] for value in curve[index : index + 7 * BINS])
            exact = Forecast(BIN_S, known, known, known)
            due_s = now_s + job.asked_s
            others = [Demand(item.bin_index * BIN_S + item.asked_s - now_s, w) for item, w in queue]
            mine = Demand(due_s - now_s, job.costs_s[-1])
            if isinstance(certificate.certify(others, mine, exact), certificate.Admitted):
                queue.append((job, job.costs_s[-1]))
                admitted.add(job.name)
        left_s = made[index]
        after = []
        for job, work_s in sorted(queue, key=lambda row: row[0].bin_index * BIN_S + row[0].asked_s):
            given_s = min(left_s, work_s)
            left_s -= given_s
            if work_s - given_s > 1e-9:
                after.append((job, work_s - given_s))
        queue = after
    return admitted


def run(
    seeds: Sequence[int], say: Callable[[str], None] = lambda line: None, num_days: int = DAYS
) -> dict[str, object]:
    """The figures of so many pairs of 28 days, counted together."""
    outcomes = []
    for seed in seeds:
        outcomes.append(measure(seed, num_days))
        say(f"deadlines seed={seed} {figures(outcomes[-1:])}")
    return figures(outcomes)


def measure(seed: int, num_days: int) -> tuple[Server, set[int]]:
    """One pair: the certificate on the measured days, and what was feasible on them.

    The interval's ratios come from a rehearsal on the days of the fit, and then from the past."""
    past, future = draw(2 * seed, num_days), draw(2 * seed + 1, num_days)
    profile = capacity.fit(past.days(), BIN_S)
    assert profile is not None
    failed = 1.0 - sum(past.workers) / (NUM_WORKERS * len(past.workers))
    phi = sum(past.phi) / len(past.phi)
    supply = capacity.Supply(NUM_WORKERS, CEILING, phi, failed)
    inflow = inflow_of(past)
    rehearsal = Server(past, profile, supply, inflow, FinishRatios())
    rehearsal.run(Events(seed).random)
    server = Server(future, profile, supply, inflow, rehearsal.ratios)
    server.run(Events(seed).random)
    return server, clairvoyant(future)


def figures(outcomes: Sequence[tuple[Server, set[int]]]) -> dict[str, object]:
    """Lines and intervals of the jobs whose promised time lies within the measured days."""
    servers = [server for server, _ in outcomes]
    jobs = [
        job for server in servers for job in server.accepted if job.due_s <= server.world.total_s
    ]
    assert jobs, "nobody was accepted"
    num_lines = sum(job.num_lines for job in jobs)
    late = [job for job in jobs if job.finished_at_s > job.due_s]
    num_covered, over, width = 0, [], []
    for job in jobs:
        assert job.quote is not None
        took_s = job.finished_at_s - job.bin_index * BIN_S
        num_covered += job.quote.from_s <= took_s <= job.quote.by_s
        over.append((job.quote.by_s - took_s) / took_s if took_s < inf else -1.0)
        width.append((job.quote.by_s - job.quote.from_s) / job.quote.expected_s)
    num_feasible = sum(len(feasible) for _, feasible in outcomes)
    num_both = sum(len(server.asked & feasible) for server, feasible in outcomes)
    levels = [sum(server.level_bins[level] for server in servers) for level in range(4)]
    return {
        "days": sum(len(server.world.online) for server in servers) // BINS,
        "jobs": sum(len(server.world.jobs) for server in servers),
        "accepted_as_asked": sum(len(server.asked) for server in servers),
        "accepted_as_offered": sum(server.num_offers for server in servers),
        "clairvoyant_feasible": num_feasible,
        "accepted_of_feasible": num_both / num_feasible,
        "items": num_lines,
        "item_miss": sum(job.num_lines - job.num_done for job in late) / num_lines,
        "jobs_late": len(late),
        "interval_coverage": num_covered / len(jobs),
        "quoted_over_actual_median": sorted(over)[len(over) // 2],
        "interval_width_median": sorted(width)[len(width) // 2],
        "escalated_share": 1.0 - levels[0] / sum(levels),
        "level_share": [bins / sum(levels) for bins in levels],
    }
