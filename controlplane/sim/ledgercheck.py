"""Does every worker account for all of its time? A cluster under interactive and batch work.

`run` gives one dict: interactive + batch + measured idle over the wall time of each worker, judged
by the plane's own GPU ledger from the reports that workers send; and how much of the work can be
named: what requests were charged over what lanes were.
"""

from collections.abc import Sequence
from functools import partial

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.gpuledger import LOSS_MAX
from controlplane.gpuseconds import GpuMeter, Row
from controlplane.plane import ControlPlane
from controlplane.sim import h200, hardware
from controlplane.sim.cluster import Cluster
from controlplane.sim.workload import Arrival, arrivals

INTERACTIVE = domain.SLOClass("interactive", 0, 0.5, 0.05)
BATCH = domain.SLOClass("batch", 3, 3600.0, 60.0, is_batch=True, deadline_s=86_400.0)
BATCH_PROMPT, BATCH_OUTPUT = 1_000, 250
BATCH_LINES = 100  # for each worker: fewer than it could do, so that it is idle as well
OUTPUT_SHARE_MAX = 2.0  # a client asks for at most this many times the output that it gets


class LosingMeter(GpuMeter):
    """Loses count of a share of every step: what the check has to find."""

    def __init__(self, lost_share: float) -> None:
        super().__init__()
        self._lost_share = lost_share

    def add_step(
        self,
        model: protocol.StepModel,
        rows: Sequence[Row],
        num_online: int,
        is_decode: Sequence[bool],
        measured_s: float,
    ) -> list[float]:
        charged = super().add_step(model, rows, num_online, is_decode, measured_s)
        self.add_host(-self._lost_share * measured_s)
        return charged


class ChargedCluster(Cluster):
    """Keeps what each sequence was charged; sequences here never leave their worker."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, ControlPlaneConfig())
        self.charged_s: dict[tuple[str, int], float] = {}

    def _receive(self, worker_id: str, epoch: int, message: object, plane: ControlPlane) -> None:
        if isinstance(message, protocol.StepReport):
            for report in message.sequences:
                key = (report.request_id, report.epoch)
                self.charged_s[key] = report.prefill_gpu_s + report.decode_gpu_s
        super()._receive(worker_id, epoch, message, plane)

    def arrive(self, request_id: str, slo: domain.SLOClass, arrival: Arrival) -> None:
        tokens_max = int(OUTPUT_SHARE_MAX * arrival.output_tokens)
        tokens = (arrival.prompt_tokens, tokens_max)
        ids = h200.prompt_ids(len(self.streams), arrival.prompt_tokens)
        request = h200.request(request_id, "acme", slo, tokens, self.events.now_s)
        self.submit(request, arrival.output_tokens, ids)


def run(
    seed: int = 1,
    num_workers: int = 8,
    seconds: float = 90.0,
    rate_per_worker: float = 2.0,
    calibration: str = "",
    lost_share: float = 0.0,
) -> dict[str, object]:
    """`lost_share` of each step is not counted, on every worker: a check of the check."""
    cluster = ChargedCluster(seed)
    device = hardware.read(calibration)
    for index in range(num_workers):
        member = cluster.add(h200.hello(f"worker{index}", device))
        if lost_share:
            member.worker.gpu = LosingMeter(lost_share)
    online = arrivals(seed, rate_per_worker * num_workers, seconds)
    for index, arrival in enumerate(online):
        cluster.events.at(arrival.at_s, partial(cluster.arrive, f"r{index}", INTERACTIVE, arrival))
    line = Arrival(1.0, BATCH_PROMPT, BATCH_OUTPUT)
    for index in range(BATCH_LINES * num_workers):
        cluster.events.at(line.at_s, partial(cluster.arrive, f"b{index}", BATCH, line))
    cluster.events.run(seconds)
    return _figures(cluster)


def _figures(cluster: ChargedCluster) -> dict[str, object]:
    views = cluster.plane.gpu_seconds()
    losses = [view.loss for view in views if view.loss is not None]
    assert len(losses) == len(cluster.members), (len(losses), len(cluster.members))
    worst = max(losses, key=abs)
    lanes_s = sum(view.spent.online_s + view.spent.batch_s for view in views)
    wall_s = sum(view.wall_s for view in views)
    return {
        "ledger_loss_worst": worst,
        "ledger_is_balanced": abs(worst) <= LOSS_MAX,
        "loss_max": LOSS_MAX,
        "workers": len(views),
        "wall_gpu_s": wall_s,
        "interactive_share": sum(view.spent.online_s for view in views) / wall_s,
        "batch_share": sum(view.spent.batch_s for view in views) / wall_s,
        "idle_share": sum(view.spent.idle_s for view in views) / wall_s,
        "charged_to_requests": sum(cluster.charged_s.values()) / lanes_s,
        "requests": len(cluster.streams),
    }
