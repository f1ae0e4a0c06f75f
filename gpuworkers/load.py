"""What a worker tells about its load: sums of step seconds since the last report, and its state."""

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers.blocks import BlockPool
from gpuworkers.scheduler import Plan
from gpuworkers.sequence import Sequence


class LoadMeter:
    """Sums of executed steps; step seconds are charged to rows by their share of tokens."""

    def __init__(self) -> None:
        self._step_index = 0
        self._predicted_s = self._measured_s = 0.0
        self._rows_online = self._rows_batch = 0
        self._online_s = self._batch_s = 0.0

    def add_step(self, plan: Plan, measured_s: float) -> None:
        """Record an executed step."""
        self._step_index += 1
        self._predicted_s, self._measured_s = plan.predicted_s, measured_s
        self._rows_online = sum(row.count for row in plan.rows[: plan.num_online])
        self._rows_batch = plan.features.rows - self._rows_online
        self._online_s += measured_s * self._rows_online / plan.features.rows
        self._batch_s += measured_s * self._rows_batch / plan.features.rows

    def take(
        self,
        idle_s: float,
        role: protocol.Role,
        sequences: list[Sequence],
        pool: BlockPool,
        step_model: LatencyModel,
    ) -> protocol.WorkerLoad:
        """The load now; sums of seconds start again at 0."""
        online = [s for s in sequences if not s.is_batch]
        batch = [s for s in sequences if s.is_batch]
        decoding = [s for s in sequences if s.phase == "running" and s.is_decoding]
        decoding_batch = sum(s.is_batch for s in decoding)
        prefilling = [s for s in online if s.phase == "running" and not s.is_decoding]
        waiting_phases = ("waiting", "running")  # arriving and leased ones wait for a peer
        waiting_batch = sum(s.phase in waiting_phases for s in batch) - decoding_batch
        load = protocol.WorkerLoad(
            role=role,
            step_index=self._step_index,
            predicted_s=self._predicted_s,
            measured_s=self._measured_s,
            online_s=self._online_s,
            batch_s=self._batch_s,
            idle_s=idle_s,
            rows_online=self._rows_online,
            rows_batch=self._rows_batch,
            running_online=len(decoding) - decoding_batch,
            running_batch=decoding_batch,
            waiting_online=len(prefilling),
            waiting_batch=waiting_batch,
            prefill_tokens_waiting=sum(s.pending_tokens for s in prefilling),
            context_tokens_running=sum(s.computed_tokens for s in decoding),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_free=pool.num_free,
            kv_blocks_cached=pool.num_cached,
            kv_blocks_held_batch=sum(len(s.block_ids) for s in batch),
            step_model=step_model.coefficients(),
        )
        self._online_s = self._batch_s = 0.0
        return load
