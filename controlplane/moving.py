"""Requests leave workers: that died, went silent, failed them or refused them; and who is to blame.

What moves waits in front of all new work, see waiting.py, and goes on from the ids that its client
has. Two deaths or two errors in a row that only one request can explain end that request, and its
prompt is quarantined.
"""

from collections.abc import Callable, Mapping

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.domain import Command, Rejected
from controlplane.ejection import Ejector
from controlplane.failover import Tracked, start_by_s
from controlplane.placing import Placer
from controlplane.quarantine import Quarantine
from controlplane.registry import Registry, Worker
from controlplane.scorers import prompt_work_s

Reject = Callable[[Tracked, Rejected, float], None]


class Mover:
    """Takes requests off workers; `reject` ends one for good."""

    def __init__(
        self,
        config: ControlPlaneConfig,
        registry: Registry,
        placer: Placer,
        ejector: Ejector,
        tracked: Mapping[str, Tracked],
        commands: list[Command],
        reject: Reject,
    ) -> None:
        self._config = config
        self._registry = registry
        self._placer = placer
        self._ejector = ejector
        self._tracked = tracked
        self._commands = commands
        self._reject = reject
        self.quarantine = Quarantine(config)

    def goes_on(self, tracked: Tracked) -> None:
        """It has got an id from where it is now."""
        tracked.num_strikes, tracked.is_lost = 0, False
        tracked.failed_on.clear()
        self._placer.recoveries.ended(tracked.request_id)
        for worker_id in tracked.workers():
            self._registry.workers[worker_id].first_token(tracked.request_id)

    def leave(self, tracked: Tracked, now_s: float, without: str = "") -> None:
        """Release what the current epoch holds, cancelling it everywhere but on `without`."""
        self._placer.recoveries.ended(tracked.request_id)
        for worker_id in tracked.workers():
            worker = self._registry.workers.get(worker_id)
            if worker is None or not worker.release(tracked.request_id):
                continue
            self._placer.pools.refile(worker)
            if worker_id != without and worker.status != "lost":
                placement = tracked.placement
                is_first = placement is not None and worker_id == placement.prefill_worker
                if is_first and not tracked.has_first_token:
                    tracked.left_worker, tracked.left_at_s = worker_id, now_s
                self._commands.append(
                    domain.CancelSequence(worker_id, tracked.request_id, tracked.epoch)
                )

    def vacate(self, worker: Worker, why: str, now_s: float) -> None:
        """Everything that it holds goes on elsewhere, from the ids that are out."""
        for request_id in list(worker.reservations):
            self.move(self._tracked[request_id], worker.worker_id, why, now_s)

    def move(self, tracked: Tracked, lost: str, why: str, now_s: float) -> None:
        """Its worker (or its handoff) failed: it waits, in front of all new work, for another."""
        is_alone = not tracked.is_split_open
        worker = self._registry.workers.get(lost)
        is_gone = worker is not None and worker.status == "lost"
        recompute_s = self._recompute_s(tracked)
        self.leave(tracked, now_s, lost if is_gone else "")
        tracked.resumable_on = lost if is_gone and is_alone else ""
        tracked.lost_worker, tracked.move_reason, tracked.is_lost = lost, why, True
        tracked.cause = "failover" if lost else "handoff_failed"
        tracked.num_moves += 1
        tracked.handoff_ready_at_s = None
        tracked.enter_phase("orphaned", now_s)
        if tracked.is_blamed or tracked.num_strikes >= self._config.strikes_max:
            text = f"{tracked.num_strikes} workers died with it before it went on; {why}"
            self.quarantine.add(tracked.request, now_s)
            self._reject(tracked, Rejected("poison_request", text, None), now_s)
            return
        if tracked.num_moves > self._config.moves_max:
            text = f"lost its worker {tracked.num_moves} times, at most {self._config.moves_max}"
            self._reject(tracked, Rejected("retries_exhausted", f"{text}; {why}", None), now_s)
            return
        start_s = start_by_s(tracked, recompute_s, now_s)
        self._placer.room.enter_moving(tracked.request, start_s, now_s)

    def refused(self, tracked: Tracked, worker: Worker, why: str, now_s: float) -> None:
        """The worker did not take it: ask the next candidate. Nothing is lost with that."""
        recompute_s = self._recompute_s(tracked)
        self.leave(tracked, now_s, worker.worker_id)
        tracked.move_reason, tracked.cause = why, "refused"
        tracked.enter_phase("queued", now_s)
        start_s = start_by_s(tracked, recompute_s, now_s)
        self._placer.room.enter_moving(tracked.request, start_s, now_s)

    def _recompute_s(self, tracked: Tracked) -> float:
        """Its prompt on the worker that it leaves."""
        placement = tracked.placement
        worker = self._registry.workers.get(placement.decode_worker) if placement else None
        return prompt_work_s(worker.pace, 0, tracked.request.prompt_tokens) if worker else 0.0

    def strike(self, worker: Worker, now_s: float) -> None:
        """The worker died. Each request that it had given no id of yet may be why: from now on it
        is tried alone until it goes on, so that a second death points at one request.

        A poison request costs two workers; one that kills while it decodes costs one more, since
        it is no suspect before it has been moved."""
        unproven = [key for key, held in worker.reservations.items() if held.is_prefilling]
        for request_id in unproven:
            tracked = self._tracked[request_id]
            tracked.num_strikes += 1
            tracked.is_blamed = tracked.num_strikes > 1 and len(unproven) == 1
        for tracked in self._tracked.values():  # our cancellation may have come too late
            is_recent = now_s - tracked.left_at_s <= self._config.left_s_max
            if tracked.left_worker == worker.worker_id and is_recent:
                tracked.num_strikes += not tracked.has_first_token
                tracked.left_worker = ""

    def stalled(self, event: domain.Stalled, now_s: float) -> None:
        tracked = self._tracked.get(event.request_id)
        if tracked is None or tracked.epoch != event.epoch or not tracked.workers():
            return
        worker_id = tracked.workers()[-1]
        self._ejector.failed(self._registry.workers[worker_id])
        tracked.refused_by(worker_id, False, now_s, self._config)
        self.move(tracked, worker_id, f"ids from {worker_id} stopped arriving", now_s)

    def sequence_failed(self, event: domain.SequenceFailed, now_s: float) -> None:
        """One worker is to blame, and is taken out; two in a row are not: the request is."""
        tracked, name = self._tracked.get(event.request_id), event.worker_id
        if tracked is None or tracked.epoch != event.epoch or name not in tracked.workers():
            return
        worker = self._registry.workers[name]
        why = f"{name} ended it with an error"
        tracked.failed_on.append(name)
        if len(tracked.failed_on) >= self._config.errors_max:
            self.leave(tracked, now_s)
            for other in tracked.failed_on:
                if (innocent := self._registry.workers.get(other)) is not None:
                    innocent.set_trial(False)
            self.quarantine.add(tracked.request, now_s)
            text = f"workers ended it with an error: {', '.join(tracked.failed_on)}"
            self._reject(tracked, Rejected("worker_error", text, None), now_s)
            return
        model_id = tracked.request.model_id
        pool = [item for item in self._registry.workers.values() if item.has_model(model_id)]
        self._ejector.quarantine(worker, pool, f"a sequence of {model_id} failed on it", now_s)
        worker.is_out = worker.is_ejected(now_s)
        tracked.refused_by(name, False, now_s, self._config)
        self.move(tracked, name, why, now_s)
