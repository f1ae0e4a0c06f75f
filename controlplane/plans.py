"""Changes of who does what: roles, models, and how many workers run. Carried out, or in shadow mode
only recorded; each as a plan record that says by whom and why.

A worker changes its model in steps: it gets nothing new and finishes what it has (`emptying`), or
its sequences move after a while; then it frees the old model and loads the new one. What does not
work out brings it back to the model it had.
"""

from collections import deque

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.domain import Command, PlanChanged
from controlplane.fleetsize import Drain, FleetSizer, Start
from controlplane.planner import Flip, Planner, Shift
from controlplane.registry import Registry, Swap, Worker
from controlplane.requests import Requests

PLANNER = "planner"


class Plans:
    """Owner of the plan records; appends to `commands`."""

    def __init__(
        self,
        config: ControlPlaneConfig,
        registry: Registry,
        planner: Planner,
        requests: Requests,
        commands: list[Command],
    ) -> None:
        self._config = config
        self._registry = registry
        self._planner = planner
        self._requests = requests
        self._commands = commands
        self._sizer = FleetSizer(config)
        self.mode: domain.PlannerMode = "auto"
        self.records: deque[PlanChanged] = deque(maxlen=config.plans_max)  # newest first

    # --- orders

    def order_role(self, event: domain.RoleOrdered, now_s: float) -> None:
        worker = self._registry.workers.get(event.worker_id)
        if worker is None or worker.role == event.role:
            return
        if event.role == "prefill" and worker.hello.handoff_address is None:
            return  # peers could not fetch its KV
        worker.held_until_s = now_s + self._config.operator_hold_s
        self._change_role(worker, event.role, event.by, f"ordered by {event.by}", now_s)

    def order_model(self, event: domain.ModelOrdered, now_s: float) -> None:
        worker = self._registry.workers.get(event.worker_id)
        if worker is None or not worker.can_load(event.model_id):
            return
        worker.held_until_s = now_s + self._config.operator_hold_s
        self._change_model(worker, event.model_id, event.by, f"ordered by {event.by}", now_s)

    def order_drain(self, event: domain.DrainOrdered, now_s: float) -> None:
        worker = self._registry.workers.get(event.worker_id)
        if worker is not None and worker.status in ("live", "suspect", "loading"):
            self._drain(worker, f"drained by {event.by}", now_s)

    def offer_fleet(self, event: domain.FleetOffered) -> None:
        """Who starts workers for us, within which numbers."""
        self._sizer.offer(event)

    def start_failed(self, event: domain.StartFailed, now_s: float) -> None:
        self._sizer.failed(event.name, now_s)

    def roll_back(self, event: domain.PlanRolledBack, now_s: float) -> None:
        """The planner leaves the worker alone for as long as after any operator's order."""
        for plan in self.records:
            worker = self._registry.workers.get(plan.worker_id)
            if plan.by != PLANNER or plan.is_shadow or worker is None:
                continue
            reason = f"rolled back by {event.by}: {plan.reason}"
            if plan.kind == "role" and worker.role == plan.role_after:
                worker.held_until_s = now_s + self._config.operator_hold_s
                self._change_role(worker, plan.role_before, event.by, reason, now_s)
                return
            if plan.kind == "model" and worker.can_load(plan.model_before):
                worker.held_until_s = now_s + self._config.operator_hold_s
                self._change_model(worker, plan.model_before, event.by, reason, now_s)
                return

    # --- what the planner wants

    def tick(self, now_s: float) -> None:
        workers = list(self._registry.workers.values())
        for worker in workers:
            if worker.swap is not None:
                self._go_on(worker, worker.swap, now_s)
        for name in self._sizer.to_stop(self._registry.workers.values(), now_s):
            self._commands.append(domain.StopWorker(name))
        if not self._planner.is_due(now_s):
            return
        moves = self._planner.plan(now_s, workers)
        for move in moves:
            self._move(move, now_s)
        if not moves:  # a plan moves who is there first: seconds, against a cold start
            for change in self._sizer.plan(now_s, workers, self._planner.loads(now_s)):
                self._resize(change, now_s)

    def _move(self, move: Flip | Shift, now_s: float) -> None:
        worker = move.worker
        if self.mode == "shadow":
            is_role = isinstance(move, Flip)
            self._shadow(
                PlanChanged(
                    worker.worker_id,
                    worker.role,
                    move.role if isinstance(move, Flip) else worker.role,
                    PLANNER,
                    move.reason,
                    kind="role" if is_role else "model",
                    model_before="" if is_role else worker.model_id,
                    model_after=move.model_id if isinstance(move, Shift) else "",
                )
            )
        elif isinstance(move, Flip):
            self._change_role(worker, move.role, PLANNER, move.reason, now_s)
        else:
            self._change_model(worker, move.model_id, PLANNER, move.reason, now_s)

    def _resize(self, change: Start | Drain, now_s: float) -> None:
        if isinstance(change, Start):
            record = PlanChanged(
                change.name,
                change.role,
                change.role,
                PLANNER,
                change.reason,
                kind="start",
                model_after=change.model_id,
            )
        else:
            worker = change.worker
            record = PlanChanged(
                worker.worker_id,
                worker.role,
                worker.role,
                PLANNER,
                change.reason,
                kind="drain",
                model_before=worker.model_id,
            )
        if self.mode == "shadow":
            self._shadow(record)
            return
        self._record(record)
        if isinstance(change, Start):
            self._sizer.started(change, now_s)
            self._commands.append(domain.StartWorker(change.name, change.role, change.model_id))
        else:
            self._sizer.draining(change.worker)
            self._commands.append(domain.DrainWorker(change.worker.hello.name))
            self._drain(change.worker, f"{change.worker.worker_id} is drained", now_s)

    def _shadow(self, plan: PlanChanged) -> None:
        """Record what the planner would do; the same wish is recorded once."""
        reason = f"shadow: {plan.reason}"
        if self.records and self.records[0].is_shadow:
            newest = self.records[0]
            if _wish(newest) == _wish(plan):
                return
        self._record(
            PlanChanged(
                plan.worker_id, plan.role_before, plan.role_after, plan.by, reason, True,
                plan.kind, plan.model_before, plan.model_after,
            )
        )  # fmt: skip

    def _record(self, plan: PlanChanged) -> None:
        self.records.appendleft(plan)
        self._commands.append(plan)

    # --- carrying it out

    def _change_role(
        self, worker: Worker, role: protocol.Role, by: str, reason: str, now_s: float
    ) -> None:
        """An admission mask changes at once; what is in hand goes on, but streams leave a worker
        that shall compute prompts only."""
        changed = PlanChanged(worker.worker_id, worker.role, role, by, reason)
        worker.role, worker.role_since_s = role, now_s
        self._requests.refile(worker)
        if worker.status != "lost":
            self._commands.append(domain.SendRole(worker.worker_id, role))
        self._record(changed)
        if role == "prefill" and worker.status == "live":
            why = f"{worker.worker_id} computes prompts now"
            self._requests.evacuation.begin(worker, why, is_drain=False, now_s=now_s)

    def _change_model(
        self, worker: Worker, model_id: str, by: str, reason: str, now_s: float
    ) -> None:
        before = worker.model_id
        worker.status = "loading"
        worker.swap = Swap(model_id, before, "emptying", now_s)
        worker.role_since_s = now_s
        self._requests.refile(worker)
        self._record(
            PlanChanged(
                worker.worker_id,
                worker.role,
                worker.role,
                by,
                reason,
                kind="model",
                model_before=before,
                model_after=model_id,
            )
        )
        self._go_on(worker, worker.swap, now_s)

    def _drain(self, worker: Worker, why: str, now_s: float) -> None:
        """It gets nothing new; its streams leave, then it is told."""
        worker.is_drain_ordered = True
        worker.status, worker.swap = "draining", None
        self._requests.refile(worker)
        self._requests.evacuation.begin(worker, why, is_drain=True, now_s=now_s)

    # --- a worker changes its model

    def _go_on(self, worker: Worker, swap: Swap, now_s: float) -> None:
        """The next step of a swap, when it is time."""
        if worker.status != "loading" or swap.stage != "emptying":
            return
        if worker.reservations:
            if now_s - swap.since_s >= self._config.swap_move_s:
                why = f"{worker.worker_id} is to serve {swap.model_id}"
                self._requests.mover.vacate(worker, why, now_s)
            return
        if now_s < swap.retry_at_s:
            return
        if swap.before:
            swap.stage = "unloading"
            self._commands.append(domain.SendUnload(worker.worker_id, swap.before))
        else:
            self._load(worker, swap)

    def _load(self, worker: Worker, swap: Swap) -> None:
        swap.stage = "loading"
        self._commands.append(domain.SendLoad(worker.worker_id, swap.model_id))

    def models_changed(self, worker: Worker, message: protocol.ModelsChanged, now_s: float) -> str:
        """Why the worker cannot be a member any more, else an empty string."""
        if refused := self._registry.refused_models(message, worker.worker_id):
            return refused
        worker.serves(message)
        self._requests.models_changed(worker)
        swap = worker.swap
        if swap is None or worker.status != "loading":
            return ""
        if worker.has_model(swap.model_id):
            self._planner.observe_swap(message.seconds)
            worker.status, worker.swap = "live", None
            worker.role_since_s = now_s
            self._requests.refile(worker)
        elif not message.models:
            self._load(worker, swap)
        return ""

    def model_refused(self, worker: Worker, message: protocol.ModelRefused, now_s: float) -> None:
        """A busy worker is asked again; one that cannot load goes back, or out of use."""
        swap = worker.swap
        if swap is None or worker.status != "loading":
            return
        if swap.stage == "unloading":
            swap.stage, swap.retry_at_s = "emptying", now_s + self._config.swap_retry_s
            return
        reason = f"{message.model_id} was not loaded: {message.reason}"
        failed = PlanChanged(
            worker.worker_id,
            worker.role,
            worker.role,
            PLANNER,
            reason,
            kind="model",
            model_before=message.model_id,
            model_after="" if swap.is_return else swap.before,
        )
        self._record(failed)
        worker.held_until_s = now_s + self._config.operator_hold_s
        if swap.is_return or not swap.before:
            self._drain(worker, f"{worker.worker_id} cannot load a model", now_s)
            return
        worker.swap = Swap(swap.before, "", "emptying", now_s, is_return=True)
        self._go_on(worker, worker.swap, now_s)

    def joined(self, worker: Worker, now_s: float) -> None:
        """A new member, or one that is back: a swap goes on with what it serves now."""
        self._sizer.joined(worker, now_s)
        swap = worker.swap
        if worker.status == "live" and not worker.hello.models:
            target = swap.model_id if swap else worker.hello.loadable[0]
            worker.status = "loading"
            worker.swap = Swap(target, swap.before if swap else "", "loading", now_s)
            self._commands.append(domain.SendLoad(worker.worker_id, target))
        elif swap is not None:
            worker.swap = None

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"plans": (len(self.records), self._config.plans_max), **self._sizer.sizes()}


def _wish(plan: PlanChanged) -> tuple[str, str, str, str]:
    name = "" if plan.kind == "start" else plan.worker_id
    return (plan.kind, name, plan.role_after, plan.model_after)
