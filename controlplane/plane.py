"""The control plane: one object that holds all serving state and turns events into commands.

`handle` is the only way in. It is deterministic: the same events at the same times with the same
chance give the same commands. Requests in == completed + failed + cancelled + rejected + tracked.
"""

from collections.abc import Callable, Sequence

import msgspec

from controlplane import domain, protocol, views
from controlplane.backfill import Allotment, Backfill, OpenBatch, allot
from controlplane.calibration import TTFTCalibration
from controlplane.config import ControlPlaneConfig
from controlplane.contracts import Preview, preview
from controlplane.decisions import Explanation
from controlplane.domain import Command
from controlplane.gpuledger import GpuLedger, GpuView
from controlplane.harvest import HarvestMeter, cost_tokens
from controlplane.ledger import AccountView, RateView
from controlplane.overload import OverloadView
from controlplane.planner import Planner, SplitView
from controlplane.plans import Plans
from controlplane.prefixes import PrefixIndex
from controlplane.registry import Registry, Worker
from controlplane.requests import Requests


class ControlPlane:
    """Owner of workers, requests and queues. Not thread-safe; called from one loop."""

    def __init__(self, config: ControlPlaneConfig, secret: bytes) -> None:
        assert len(secret) >= 16, f"secret of {len(secret)} bytes, at least 16"
        self._config = config
        self._registry = Registry(config, secret)
        self._planner = Planner(config)
        self._gpu = GpuLedger()
        self._harvest = HarvestMeter()
        self._backfill = Backfill(config)
        self._ticked_at_s: float | None = None
        self._commands: list[Command] = []  # of the event in hand
        self._requests = Requests(
            config, self._registry, self._planner, self._backfill, self._commands
        )
        self._plans = Plans(config, self._registry, self._planner, self._requests, self._commands)

    def handle(
        self, event: domain.Event, now_s: float, uniform: Callable[[], float]
    ) -> list[Command]:
        """What the driver shall do about `event`, in order. `uniform` draws from [0, 1)."""
        assert not self._commands, "handle was entered twice"
        self._requests.set_chance(uniform)
        match event:
            case domain.WorkerHello():
                self._on_hello(event, now_s, uniform)
            case domain.WorkerMessage():
                self._on_message(event, now_s)
            case domain.WorkerClosed():
                if worker := self._registry.current(event.worker_id, event.epoch):
                    why = f"{worker.worker_id} closed its connection"
                    self._lose(worker, why, now_s, is_crash=True)
            case domain.Submit():
                self._requests.submit(event.request, now_s)
            case domain.FirstToken():
                self._requests.first_token(event, now_s)
            case domain.Progressed():
                self._requests.progressed(event)
            case domain.Finished():
                self._on_finished(event, now_s)
            case domain.Stalled():
                self._requests.mover.stalled(event, now_s)
            case domain.SequenceFailed():
                self._requests.mover.sequence_failed(event, now_s)
            case domain.RoleOrdered():
                self._plans.order_role(event, now_s)
            case domain.ModelOrdered():
                self._plans.order_model(event, now_s)
            case domain.DrainOrdered():
                self._plans.order_drain(event, now_s)
            case domain.FleetOffered():
                self._plans.offer_fleet(event)
            case domain.StartFailed():
                self._plans.start_failed(event, now_s)
            case domain.PlannerOrdered():
                self._plans.mode = event.mode
            case domain.PlanRolledBack():
                self._plans.roll_back(event, now_s)
            case domain.ContractsSet():
                limit = self._config.contracts_max
                assert len(event.contracts) <= limit, (len(event.contracts), limit)
                self._requests.ledger.set_contracts(event.contracts, event.spent)
            case domain.ClassesSet(classes):
                self._requests.decisions.set_classes(classes)
            case domain.PolicyChanged():
                self._on_policy(event)
            case domain.SlackAssessed(model_id, slack):
                self._on_slack(model_id, slack, now_s)
            case domain.ServerDraining():
                self._requests.is_draining = True
            case domain.HostLoad(signals):
                self._requests.overload.observe(signals, now_s)
            case domain.Tick():
                self._on_tick(now_s)
        self._requests.start_waiting(now_s)
        commands = list(self._commands)
        self._commands.clear()
        return commands

    def view(self, now_s: float) -> domain.ClusterView:
        """What live pages show."""
        return domain.ClusterView(
            workers=views.workers(self._registry.workers.values(), now_s, self._config),
            requests=views.requests(
                self._requests.tracked.values(), now_s, self._config.requests_view_max
            ),
            queued_by_class=self._requests.waiting_by_class(),
            plans=tuple(self._plans.records),
            planner_mode=self._plans.mode,
        )

    @property
    def prefixes(self) -> PrefixIndex:
        """What routing believes of workers' caches; for metrics and benchmarks."""
        return self._requests.prefixes

    @property
    def calibration(self) -> TTFTCalibration:
        """How predicted TTFTs turned out; for metrics."""
        return self._requests.calibration

    def explain(self, request_id: str) -> Explanation | None:
        """Every decision about a request with its outcome; None when it is not known any more."""
        return self._requests.decisions.explain(request_id)

    def accounts(self, now_s: float) -> tuple[AccountView, ...]:
        """Every contract and where it stands."""
        return self._requests.ledger.views(now_s)

    def rates(
        self, request: domain.GenerateRequest, now_s: float
    ) -> tuple[RateView, RateView] | None:
        """Requests and tokens a minute of the request's contract; None without one."""
        return self._requests.ledger.rates(request, now_s)

    def gpu_seconds(self) -> tuple[GpuView, ...]:
        """How each worker has spent its time, and whether that adds up."""
        return self._gpu.views()

    def overload(self) -> OverloadView:
        """The rung of the overload ladder and its signals."""
        return self._requests.overload.view()

    def splits(self, now_s: float) -> tuple[SplitView, ...]:
        """Prefill and decode workers of each model, with what the forecast asks for."""
        return self._planner.splits(now_s, self._registry.workers.values())

    def preview(self, contracts: Sequence[domain.Contract]) -> tuple[Preview, ...]:
        """What these contracts would commit, model by model, were they set now."""
        before = self._requests.ledger.contracts()
        models = {contract.model_id for contract in (*before, *contracts)}
        found = [self._registry.capacity(model_id) for model_id in sorted(models)]
        return preview(before, contracts, [item for item in found if item is not None])

    def batch_level(self, model_id: str) -> int:
        """How far batch goes for the promises of a model."""
        return self._backfill.level(model_id)

    def lines_wanted(self, batches: Sequence[OpenBatch], now_s: float) -> list[Allotment]:
        """Which lines of the open batches to submit now, model by model; changes nothing."""
        found: list[Allotment] = []
        workers = list(self._registry.workers.values())
        for model_id in sorted({batch.model_id for batch in batches}):
            waiting = self._requests.batch_lines_waiting(model_id)
            lines = self._backfill.lines_wanted(model_id, workers, waiting, now_s)
            of_model = [batch for batch in batches if batch.model_id == model_id]
            found += allot(of_model, lines, is_tight=self._backfill.level(model_id) > 0)
        return found

    # --- workers ---------------------------------------------------------------------------------

    def _on_hello(
        self, event: domain.WorkerHello, now_s: float, uniform: Callable[[], float]
    ) -> None:
        hello = event.hello
        before = self._registry.workers.get(hello.resume.worker_id) if hello.resume else None
        was_live = before is not None and before.status != "lost"
        worker = self._registry.join(event, now_s, uniform)
        if isinstance(worker, protocol.Refused):
            self._commands.append(domain.Greet(event.connection_id, worker))
            return
        if was_live:  # the driver still maps the id to the older connection here
            self._commands.append(
                domain.CloseWorker(worker.worker_id, "joined again on a new connection")
            )
        self._commands.append(domain.Greet(event.connection_id, self._registry.welcome(worker)))
        if self._backfill.loose_kappa(worker.model_id):
            self._send_policy(worker)
        if worker.role != hello.role:
            self._commands.append(domain.SendRole(worker.worker_id, worker.role))
        if worker.is_drain_ordered:
            self._commands.append(domain.SendDrain(worker.worker_id))
        self._requests.joined(worker, now_s)
        self._plans.joined(worker, now_s)
        self._requests.refile(worker)

    def _on_message(self, event: domain.WorkerMessage, now_s: float) -> None:
        worker = self._registry.current(event.worker_id, event.epoch)
        if worker is None:  # fenced, or an older incarnation: it changes nothing
            return
        worker.heard_at_s = now_s
        match event.message:
            case protocol.WorkerLoad() as load:
                self._on_load(worker, load, 0.0, now_s)
            case protocol.Heartbeat() as beat:
                self._on_load(worker, beat.load, beat.busy_s, now_s)
            case protocol.ModelsChanged() as changed:
                if why := self._plans.models_changed(worker, changed, now_s):
                    self._commands.append(domain.CloseWorker(worker.worker_id, why))
                    self._lose(worker, why, now_s)
            case protocol.ModelRefused() as refused:
                self._plans.model_refused(worker, refused, now_s)
            case protocol.Drained():
                if worker.status == "draining":
                    worker.status = "drained"
                    self._requests.refile(worker)
            case protocol.Goodbye() as goodbye:
                self._lose(worker, f"{worker.worker_id} left: {goodbye.reason}", now_s)
                self._gpu.forget([worker.worker_id])
                del self._registry.workers[worker.worker_id]
                self._requests.forgotten(worker)
            case answer:
                self._requests.answered(worker, answer, now_s)

    def _on_load(
        self, worker: Worker, load: protocol.WorkerLoad, busy_s: float, now_s: float
    ) -> None:
        worker.report(load)
        self._gpu.observe(worker.worker_id, worker.model_id, load.spent, busy_s, now_s)
        self._harvest.load(worker, load)
        worker.busy_s = busy_s
        self._requests.refile(worker)
        self._planner.observe_load(now_s, worker, load)

    def _on_policy(self, event: domain.PolicyChanged) -> None:
        """For those who join from now on, and for everyone who is here."""
        rows_max = self._registry.policy.batch_rows_max  # a setting of ours, not of a class
        policy = msgspec.structs.replace(event.policy, batch_rows_max=rows_max)
        self._registry.policy = policy
        for worker in self._registry.workers.values():
            if worker.status != "lost":
                self._send_policy(worker)

    def _send_policy(self, worker: Worker) -> None:
        """What is in force, with what its model's batches need."""
        loose = self._backfill.loose_kappa(worker.model_id)
        policy = msgspec.structs.replace(self._registry.policy, loose_kappa=loose)
        self._commands.append(domain.SendPolicy(worker.worker_id, policy))

    def _on_slack(self, model_id: str, slack: float, now_s: float) -> None:
        if not self._backfill.assess(model_id, slack, now_s):
            return
        level = self._backfill.level(model_id)
        self._commands.append(domain.Escalated(model_id, level, slack))
        for worker in self._registry.workers.values():
            if worker.status != "lost" and worker.model_id == model_id:
                self._send_policy(worker)

    def _lose(self, worker: Worker, why: str, now_s: float, is_crash: bool = False) -> None:
        """From here on nothing that this incarnation says counts."""
        worker.status = "lost"
        self._requests.refile(worker)
        held = sorted(
            (self._requests.tracked[request_id] for request_id in worker.reservations),
            key=lambda item: (item.request.slo.rank, item.request.arrived_at_s, item.request_id),
        )
        if is_crash:
            self._requests.mover.strike(worker, now_s)
        for tracked in held:
            self._requests.mover.move(tracked, worker.worker_id, why, now_s)
        worker.left()

    def _on_finished(self, event: domain.Finished, now_s: float) -> None:
        tracked = self._requests.tracked.get(event.request_id)
        if tracked is not None and tracked.request.slo.is_batch and event.status == "completed":
            tokens = cost_tokens(tracked.request.prompt_tokens, event.output_tokens)
            self._harvest.ended(tracked.request.model_id, tokens)
            prompt, most = tracked.request.prompt_tokens, tracked.request.output_tokens_max
            used = prompt + event.output_tokens
            self._backfill.ended(tracked.request.model_id, used, prompt + most, now_s)
        self._requests.finished(event, now_s)

    # --- time ------------------------------------------------------------------------------------

    def _on_tick(self, now_s: float) -> None:
        if self._ticked_at_s is not None:
            gap_s = now_s - self._ticked_at_s
            if gap_s > self._config.stall_s:
                self._registry.forgive(gap_s, now_s)
        self._ticked_at_s = now_s
        for worker, why in self._registry.dead(now_s):
            self._commands.append(domain.CloseWorker(worker.worker_id, why))
            self._lose(worker, f"{worker.worker_id} was given up: {why}", now_s)
        for worker in self._registry.forget_lost(now_s):
            self._requests.forgotten(worker)
            self._gpu.forget([worker.worker_id])
        self._requests.watch_overload(now_s)
        self._requests.expire(now_s)
        self._requests.balance(now_s)
        self._requests.evacuation.step(now_s)
        self._plans.tick(now_s)
        self._commands += self._harvest.tick(
            self._registry.workers.values(), self._requests.batch_models_waiting(), now_s
        )

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Everything that is bounded: how large it is and may be."""
        config = self._config
        return {
            "workers": (len(self._registry.workers), config.workers_max),
            "GPU meters": (len(self._gpu), config.workers_max),
            **self._plans.sizes(),
            **self._requests.sizes(),
        }

    def check_integrity(self) -> None:
        """Conservation laws that hold between any two events; for tests and simulation."""
        self._requests.check_integrity()
