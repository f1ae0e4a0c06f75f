"""Does a tenant that floods the cluster hurt one that does not?

A victim runs beside a neighbour that fills the cluster to 70 % of its capacity, then beside the
same neighbour at ten times that rate, with the same arrivals of its own. Both have contracts for
what they send in the first arm. A third arm treats all requests of the flood alike: no contracts,
one tenant; it shows what fairness costs in work done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.gpuseconds import request_s
from controlplane.sim.coserve import quantile
from controlplane.sim.hardware import Hardware
from controlplane.sim.replay import MODEL_ID, Client, Record, Replay
from controlplane.sim.traces import TraceRequest
from controlplane.sim.workload import Arrival, arrivals

SLO = domain.SLOClass("interactive", 0, 0.5, 0.05)
VICTIM, NEIGHBOUR = "victim", "neighbour"
LOAD, VICTIM_LOAD = 0.70, 0.05  # of the cluster's capacity
FLOOD = 10.0
VICTIM_HEADROOM = 3.0  # its contract allows for its busiest seconds
CONTRACT_SHARE = 1.05  # of what a tenant sends when it behaves
TOKENS_PER_REQUEST = 4_096  # of a contract: the worst case of what runs is reserved
OUTPUT_TOKENS_MAX = 2_048
STREAMS = 16  # of users laid over each other, each in bursts of its own
WARM_S = 5.0
TTFT_RATIO_MAX, ATTAINMENT_DROP_MAX, THROUGHPUT_MIN = 1.1, 0.005, 0.98


@dataclass(frozen=True, slots=True)
class Arm:
    """One run: who sent what, and what came of it."""

    records: list[Record]
    victims: frozenset[int]  # indices of arrivals
    model: protocol.StepModel
    seconds: float

    def _counted(self, is_victim: bool) -> list[Record]:
        return [
            record
            for record in self.records
            if (record.index in self.victims) == is_victim and record.at_s >= WARM_S
        ]

    def ttft_s_p99(self) -> float:
        """Of the victim's requests; one that got no token counts as the longest wait there is."""
        values = [self.seconds if r.ttft_s is None else r.ttft_s for r in self._counted(True)]
        return quantile(values, 0.99)

    def attainment(self) -> float:
        victims = self._counted(True)
        return sum(record.is_good for record in victims) / len(victims)

    def work_s_per_s(self) -> float:
        """Marginal GPU-seconds of requests that ended in the run, each second."""
        done = [r for r in self.records if r.is_done and (r.ended_at_s or 0.0) <= self.seconds]
        work_s = sum(
            request_s(self.model, r.prompt_tokens, r.prompt_tokens, r.output_tokens) for r in done
        )
        return work_s / self.seconds

    def row(self) -> dict[str, float]:
        victims, others = self._counted(True), self._counted(False)
        return {
            "victim_ttft_p50_ms": 1e3
            * quantile([r.ttft_s or 0.0 for r in self._counted(True)], 0.5),
            "victim_ttft_p99_ms": 1e3 * self.ttft_s_p99(),
            "victim_attainment": self.attainment(),
            "neighbour_good_share": sum(r.is_good for r in others) / len(others),
            "neighbour_refused_share": sum(bool(r.code) for r in others) / len(others),
            "victim_surplus_share": sum(bool(r.demoted) for r in victims) / len(victims),
            "neighbour_surplus_share": sum(bool(r.demoted) for r in others) / len(others),
            "work_gpu_s_per_s": self.work_s_per_s(),
            "requests": len(self.records),
        }


def run(
    hardware: Hardware,
    seed: int = 1,
    num_workers: int = 8,
    seconds: float = 60.0,
    load: float = LOAD,
) -> dict[str, object]:
    """The figures with their limits; `ok` when all are kept."""
    model = hardware.profile()
    capacity_per_s = num_workers / _request_gpu_s(model, arrivals(seed, 10.0, 200.0))
    victim = _users(seed + 1, VICTIM_LOAD * capacity_per_s, seconds)
    rate_per_s = load * capacity_per_s
    calm = _mixed(victim, _users(seed, rate_per_s, seconds))
    flood = _mixed(victim, _users(seed, FLOOD * rate_per_s, seconds))
    contracts = (
        _contract(VICTIM, VICTIM_HEADROOM * VICTIM_LOAD * capacity_per_s),
        _contract(NEIGHBOUR, rate_per_s),
    )

    def play(sent: Sequence[tuple[Arrival, str]], given: tuple[domain.Contract, ...]) -> Arm:
        names = ["", *(name if given else NEIGHBOUR for _, name in sent)]  # arrivals count from 1
        client = Client(lambda row: SLO, OUTPUT_TOKENS_MAX, names)
        replay = Replay(ControlPlaneConfig(), hardware, client, seed)
        for _ in range(num_workers):
            replay.add()
        replay.handle(domain.PlannerOrdered("shadow", "bench"))  # the split is not what we compare
        if given:
            replay.handle(domain.ContractsSet(given))
        rows = (TraceRequest(a.at_s, a.prompt_tokens, a.output_tokens) for a, _ in sent)
        victims = frozenset(i for i, (_, name) in enumerate(sent, 1) if name == VICTIM)
        return Arm(replay.run(rows, seconds), victims, model, seconds)

    before, during, unfair = play(calm, contracts), play(flood, contracts), play(flood, ())
    limit_s = max(TTFT_RATIO_MAX * before.ttft_s_p99(), before.ttft_s_p99() + SLO.itl_s_p99)
    figures = {
        "fair_victim_ttft_p99_ratio": during.ttft_s_p99() / before.ttft_s_p99(),
        "fair_victim_attainment_drop": before.attainment() - during.attainment(),
        "fair_throughput_vs_unfair": during.work_s_per_s() / unfair.work_s_per_s(),
    }
    return figures | {
        "ok": during.ttft_s_p99() <= limit_s
        and figures["fair_victim_attainment_drop"] <= ATTAINMENT_DROP_MAX
        and figures["fair_throughput_vs_unfair"] >= THROUGHPUT_MIN,
        "fair_victim_ttft_p99_limit_ms": 1e3 * limit_s,
        "seed": seed,
        "workers": num_workers,
        "virtual_s": seconds,
        "arms": {"calm": before.row(), "flood": during.row(), "unfair flood": unfair.row()},
    }


def _request_gpu_s(model: protocol.StepModel, sample: Sequence[Arrival]) -> float:
    """Mean GPU-seconds of a request, in steps as long as the ITL target allows."""
    work_s = sum(
        request_s(model, a.prompt_tokens, a.prompt_tokens, a.output_tokens) for a in sample
    )
    efficiency = 1.0 - model.base_s / SLO.itl_s_p99
    return work_s / len(sample) / efficiency


def _users(seed: int, rate_per_s: float, seconds: float) -> list[Arrival]:
    """Many users: their bursts do not fall together."""
    rate_per_user = rate_per_s / STREAMS
    seeds = range(STREAMS * seed, STREAMS * (seed + 1))
    made = [item for one in seeds for item in arrivals(one, rate_per_user, seconds)]
    return sorted(made, key=lambda item: item.at_s)


def _mixed(victim: Sequence[Arrival], other: Sequence[Arrival]) -> list[tuple[Arrival, str]]:
    sent = [(arrival, VICTIM) for arrival in victim] + [(arrival, NEIGHBOUR) for arrival in other]
    return sorted(sent, key=lambda item: (item[0].at_s, item[1]))


def _contract(tenant_id: str, rate_per_s: float) -> domain.Contract:
    requests_per_min = max(1, int(60.0 * CONTRACT_SHARE * rate_per_s))
    return domain.Contract(
        tenant_id,
        MODEL_ID,
        SLO.name,
        requests_per_min=requests_per_min,
        tokens_per_min=TOKENS_PER_REQUEST * requests_per_min,
        concurrency_max=100_000,
        itl_s=SLO.itl_s_p99,
    )
