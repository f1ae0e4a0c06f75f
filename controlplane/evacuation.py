"""Streams leave a worker that is drained, flipped or loads another model, while it still serves
them: the client's gap is one short step and a transfer, not a prompt.

The worker itself is the prefill side of the move: all full blocks of the stream are in its prefix
cache, so it computes at most one block again and hands the KV to the worker where the stream goes
on. Where no transfer reaches, and for short contexts, the other worker computes the KV from the
ids. Rows that end soon stay. Source: algorithms.md 2h (copying costs a tenth of computing, except
below about 100 tokens).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.disagg import can_pair
from controlplane.domain import Command
from controlplane.failover import Tracked
from controlplane.moving import Mover
from controlplane.placing import Placer
from controlplane.registry import Registry, Worker


@dataclass(frozen=True, slots=True)
class _Leaving:
    why: str
    since_s: float
    is_drain: bool  # told to drain when it is done


@dataclass(slots=True)
class Evacuation:
    """Owner of the workers that are being left; at most moves_per_tick streams of each leave at a
    time, and after evacuate_s_max what is still there stays."""

    config: ControlPlaneConfig
    registry: Registry
    placer: Placer
    mover: Mover
    tracked: Mapping[str, Tracked]
    commands: list[Command]
    _leaving: dict[str, _Leaving] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._leaving)

    def begin(self, worker: Worker, why: str, is_drain: bool, now_s: float) -> None:
        """The worker gets no new work of the kind any more; a drain is told when rows have left."""
        self._leaving[worker.worker_id] = _Leaving(why, now_s, is_drain)
        self._go_on(worker, now_s)

    def step(self, now_s: float) -> None:
        """At each tick."""
        for worker_id in list(self._leaving):
            worker = self.registry.workers.get(worker_id)
            if worker is None or worker.status == "lost":
                del self._leaving[worker_id]
            else:
                self._go_on(worker, now_s)

    def _go_on(self, worker: Worker, now_s: float) -> None:
        leaving = self._leaving[worker.worker_id]
        is_late = now_s - leaving.since_s > self.config.evacuate_s_max
        rows, num_later = self._rows(worker, now_s)
        if rows and not is_late:
            for tracked in rows[: self.config.moves_per_tick]:
                if not self._move(tracked, worker, leaving.why, now_s):
                    break
            rows, num_later = self._rows(worker, now_s)
        has_others = any(
            other is not worker and other.is_accepting(now_s, self.config) and not other.is_out
            for other in self.registry.workers.values()
        )
        if (rows or num_later) and has_others and not is_late:
            return
        del self._leaving[worker.worker_id]
        if leaving.is_drain and worker.status == "draining":
            self.commands.append(domain.SendDrain(worker.worker_id))

    def _rows(self, worker: Worker, now_s: float) -> tuple[list[Tracked], int]:
        """Streams that would go on here for evacuate_left_s, longest first; and how many more
        requests are here that have not begun to decode."""
        decoding, num_later = [], 0
        for held in worker.reservations.values():
            placement = self.tracked[held.request_id].placement
            if held.is_batch or placement is None or placement.decode_worker != worker.worker_id:
                continue
            if self.tracked[held.request_id].phase != "decode" or held.is_prefilling:
                num_later += 1
            else:
                decoding.append(self.tracked[held.request_id])
        left_s = self._left_s(worker, decoding, now_s)
        rows = [item for item in decoding if left_s[item.request_id] > self.config.evacuate_left_s]
        rows.sort(key=lambda item: (-left_s[item.request_id], item.request_id))
        return rows, num_later

    def _left_s(self, worker: Worker, rows: list[Tracked], now_s: float) -> dict[str, float]:
        """Until each ends, if its output becomes as long as it may. How many ids all of them have
        follows from the context that the worker reports; each has its share by age."""
        step_s = worker.pace.beside_s or worker.pace.model.base_s
        prompts = sum(item.request.prompt_tokens for item in rows)
        made = max(0, worker.load.context_tokens_running - prompts) if worker.load else 0
        ages_s = {item.request_id: now_s - item.phase_at_s for item in rows}
        per_s = made / max(sum(ages_s.values()), 1e-9)
        return {
            item.request_id: step_s
            * (item.request.output_tokens_max - per_s * ages_s[item.request_id])
            for item in rows
        }

    def _move(self, tracked: Tracked, worker: Worker, why: str, now_s: float) -> bool:
        """False when no other worker can take it now."""
        found = self.placer.elsewhere(tracked, worker.worker_id, now_s)
        if found.placement is None:
            return False
        target = self.registry.workers[found.placement.decode_worker]
        request = tracked.request
        is_copied = (
            not worker.is_suspect(now_s, self.config)
            and can_pair(worker, target, request.model_id)
            and request.prompt_tokens >= self.config.copy_tokens_min
        )
        if is_copied:
            placement = replace(found.placement, split="handoff", prefill_worker=worker.worker_id)
            text = f"its KV is copied from {worker.worker_id}"
            tokens = worker.hello.block_tokens
            found = msgspec.structs.replace(
                found, placement=placement, split_reason=text, uncached_tokens=tokens
            )
        left = tracked.epoch
        self.mover.leave(tracked, now_s, worker.worker_id if is_copied else "")
        tracked.move_reason, tracked.cause = why, "planned"
        self.placer.start_elsewhere(tracked, found, now_s)
        assert tracked.epoch == left + 1, (tracked.epoch, left)
        self.commands.append(
            domain.MoveCounted(
                tracked.request_id, worker.worker_id, target.worker_id, tracked.epoch, is_copied
            )
        )
        return True
