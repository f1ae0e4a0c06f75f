"""One simulated history as data: workers, contracts, arrivals and faults, drawn from a seed.

Every seed draws which classes of faults are on at all (swarm testing, Groce et al. 2012), so that
some histories are full of one thing. As data it can be made smaller: see shrink.py.
"""

from dataclasses import dataclass
from typing import Literal

from controlplane import domain, protocol
from controlplane.protocol import Role
from controlplane.sim.cluster import Frames
from controlplane.sim.events import Chance, Events

FaultKind = Literal[
    "kill", "freeze", "slow", "partition", "cut", "restart", "drain", "role", "cancel", "flood",
    "join", "poison", "error", "stall", "impostor", "goodbye",
]  # fmt: skip
FAULTS: tuple[FaultKind, ...] = (
    "kill", "freeze", "slow", "partition", "cut", "restart", "drain", "role", "cancel", "flood",
    "join", "poison", "error", "stall", "impostor", "goodbye",
)  # fmt: skip
BACKGROUND = ("frames", "transfers", "kv")  # classes that are on all the time or not at all
FAULTS_S = (3.0, 50.0)
ARRIVALS_S = 45.0
BACKLOG_SHARE = (
    0.05  # of the seeds: two equal tenants ask for more than there is, for over a minute
)
BACKLOG_S = 75.0
BACKLOG_PER_S = 4.0  # of each of the two
BACKLOG_SEQUENCES_MAX = 2  # on a worker, so that it is more than they can do
HEAL_AT_S = 55.0
BLOCK_TOKENS = 16
SHARED_TOKENS = 48  # that many prompts begin with, whoever sends them
MODEL = protocol.ModelFacts("llama-3.1-8b", "a" * 64, 2048, 128_256, 131_072)
STEP = protocol.StepModel(0.08, 0.002, 2e-6, (2e-4, 1e-4))
CLASSES = (
    domain.SLOClass("interactive", 0, ttft_s_p99=4.0, itl_s_p99=0.4, queue_s_max=20.0),
    domain.SLOClass("flex", 1, ttft_s_p99=10.0, itl_s_p99=1.0, queue_s_max=60.0),
    domain.SLOClass("batch", 3, 3600.0, 60.0, is_batch=True, deadline_s=600.0),
    # Of the backlog: never late, so that all of it waits in one line.
    domain.SLOClass("patient", 2, ttft_s_p99=500.0, itl_s_p99=1.0, queue_s_max=500.0),
)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    role: Role
    num_blocks: int
    slowness: float


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    request_id: str
    tenant: int
    slo: int  # of CLASSES
    prompt_tokens: int
    output_tokens_max: int
    output_tokens: int  # that it will really have
    is_shared: bool  # begins with the shared prefix


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    kind: FaultKind
    pick: float  # of the target, in [0, 1)
    value: float


@dataclass(frozen=True, slots=True)
class Scenario:
    seed: int
    settings: tuple[tuple[str, float], ...]
    workers: tuple[WorkerSpec, ...]
    contracts: tuple[domain.Contract, ...]
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...]
    frames: Frames
    transfer_failures: float
    backlog: tuple[Arrival, ...] = ()  # all of one class, of two tenants without contracts


def draw(seed: int) -> Scenario:
    """At least 3 workers, 2 tenants, 30 requests and a batch, 2 classes of faults."""
    chance = Events(seed).random
    kinds = chance.sample([*FAULTS, *BACKGROUND], chance.randint(3, 8))
    timed = [kind for kind in kinds if kind in FAULTS] or ["kill"]
    num_tenants = chance.randint(2, 4)
    faults = [
        Fault(chance.uniform(*FAULTS_S), chance.choice(timed), chance.random(), chance.random())
        for _ in range(chance.randint(3, 9))
    ]
    faults += [
        Fault(chance.uniform(*FAULTS_S), kind, chance.random(), chance.random()) for kind in timed
    ]
    has_kv_shortage = "kv" in kinds
    workers = tuple(
        WorkerSpec(
            chance.choice(("mixed", "mixed", "prefill", "decode")),
            chance.choice((40, 64)) if has_kv_shortage else chance.choice((128, 400)),
            chance.choice((1.0, 1.0, 2.0)),
        )
        for _ in range(chance.randint(3, 5))
    )
    has_frames = "frames" in kinds
    backlog = _backlog(chance) if chance.random() < BACKLOG_SHARE else ()
    sequences_max = BACKLOG_SEQUENCES_MAX if backlog else chance.choice((4, 64))
    return Scenario(
        seed=seed,
        settings=(
            ("queue_max", 50 if backlog else chance.choice((4, 50))),
            ("sequences_max", sequences_max),
            ("plan_dwell_s", chance.choice((8.0, 30.0))),
            ("plan_window_s", 15.0),
            ("prefix_blocks_max", chance.choice((40, 100_000))),
            ("measure_all_max", chance.choice((2, 32))),
        ),
        workers=workers,
        contracts=_contracts(chance, num_tenants),
        arrivals=_arrivals(chance, num_tenants),
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        frames=Frames(0.1, 0.1, 0.1) if has_frames else Frames(),
        transfer_failures=0.3 if "transfers" in kinds else 0.0,
        backlog=backlog,
    )


def _backlog(chance: Chance) -> tuple[Arrival, ...]:
    """Outputs are as long as they may be, so that what each tenant got can be counted."""
    made = []
    for index in range(int(2 * BACKLOG_PER_S * BACKLOG_S)):
        tenant = index % 2
        output = chance.randint(8, 32)
        made.append(
            Arrival(
                at_s=HEAL_AT_S + chance.uniform(0.0, BACKLOG_S),
                request_id=f"q{index}",
                tenant=100 + tenant,
                slo=3,
                prompt_tokens=chance.randint(50, 250),
                output_tokens_max=output,
                output_tokens=output,
                is_shared=False,
            )
        )
    return tuple(sorted(made, key=lambda arrival: arrival.at_s))


def _contracts(chance: Chance, num_tenants: int) -> tuple[domain.Contract, ...]:
    """Some tenants have one, with limits that the load reaches."""
    made = []
    for tenant in range(num_tenants):
        if chance.random() < 0.3:
            continue
        made.append(
            domain.Contract(
                f"t{tenant}",
                MODEL.model_id,
                chance.choice(CLASSES[:3]).name,
                requests_per_min=chance.choice((6, 60)),
                tokens_per_min=chance.choice((1_500, 60_000)),
                concurrency_max=chance.choice((2, 40)),
                over_limit=chance.choice(("surplus", "reject")),
                when_late=chance.choice(("surplus", "reject")),
                budget_tokens=chance.choice((None, 3_000)),
                usd_per_million_prompt=1.0,
                usd_per_million_output=4.0,
            )
        )
    return tuple(
        contract
        if contract.class_name != "batch"
        else domain.Contract(
            contract.tenant_id, MODEL.model_id, "batch", 6, 1_500, 2, budget_tokens=3_000,
            is_batch=True,
        )
        for contract in made
    )  # fmt: skip


def _arrivals(chance: Chance, num_tenants: int) -> tuple[Arrival, ...]:
    made = []
    for index in range(chance.randint(30, 45)):
        made.append(_arrival(chance, f"r{index}", num_tenants, chance.choice((0, 0, 1))))
    batch_at_s = chance.uniform(1.0, 20.0)
    for index in range(chance.randint(6, 12)):
        made.append(_arrival(chance, f"b{index}", num_tenants, 2, batch_at_s))
    return tuple(sorted(made, key=lambda arrival: (arrival.at_s, arrival.request_id)))


def _arrival(
    chance: Chance, name: str, num_tenants: int, slo: int, at_s: float | None = None
) -> Arrival:
    prompt = chance.choice((chance.randint(8, 60), chance.randint(60, 400)))
    output_max = chance.randint(2, 48)
    return Arrival(
        at_s=chance.uniform(0.5, ARRIVALS_S) if at_s is None else at_s,
        request_id=name,
        tenant=chance.randrange(num_tenants),
        slo=slo,
        prompt_tokens=prompt,
        output_tokens_max=output_max,
        output_tokens=chance.randint(1, output_max),
        is_shared=prompt > SHARED_TOKENS and chance.random() < 0.5,
    )
