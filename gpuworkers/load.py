"""What a worker tells about its load: how it spent its time, and its state."""

from controlplane import protocol
from controlplane.gpuseconds import GpuMeter
from controlplane.latency import LatencyModel
from gpuworkers.blocks import BlockPool
from gpuworkers.scheduler import Plan
from gpuworkers.sequence import Sequence


class LoadMeter:
    """Counts executed steps and charges their seconds to lanes and sequences."""

    def __init__(self) -> None:
        self._step_index = 0
        self._predicted_s = self._measured_s = 0.0
        self._rows_online = self._rows_batch = 0
        self._gpu = GpuMeter()
        self._idle_s = 0.0  # of all reports
        self._told = protocol.GpuSeconds()  # at the last report

    def add_step(self, plan: Plan, step_model: LatencyModel, measured_s: float) -> None:
        """Record an executed step, before its sequences move on."""
        self._step_index += 1
        self._predicted_s, self._measured_s = plan.predicted_s, measured_s
        self._rows_online = sum(row.count for row in plan.rows[: plan.num_online])
        self._rows_batch = plan.features.rows - self._rows_online
        decodes = [row.sequence.is_decoding for row in plan.rows]
        rows = [(row.start, row.count) for row in plan.rows]
        model = step_model.coefficients()
        charged = self._gpu.add_step(model, rows, plan.num_online, decodes, measured_s)
        for row, is_decode, seconds in zip(plan.rows, decodes, charged, strict=True):
            if is_decode:
                row.sequence.decode_gpu_s += seconds
            else:
                row.sequence.prefill_gpu_s += seconds

    def add_host(self, seconds: float) -> None:
        """Host time around the last step; see GpuMeter."""
        self._gpu.add_host(seconds)

    def take(
        self,
        idle_s: float,
        role: protocol.Role,
        sequences: list[Sequence],
        pool: BlockPool,
        step_model: LatencyModel,
    ) -> protocol.WorkerLoad:
        """The load now. `idle_s` was measured since the last call; deltas start again at 0."""
        self._idle_s += idle_s
        spent, told = self._gpu.spent(self._idle_s), self._told
        self._told = spent
        online = [s for s in sequences if not s.is_batch]
        batch = [s for s in sequences if s.is_batch]
        decoding = [s for s in sequences if s.phase == "running" and s.is_decoding]
        decoding_batch = sum(s.is_batch for s in decoding)
        prefilling = [s for s in online if s.phase == "running" and not s.is_decoding]
        waiting_phases = ("waiting", "running")  # arriving and leased ones wait for a peer
        waiting_batch = sum(s.phase in waiting_phases for s in batch) - decoding_batch
        return protocol.WorkerLoad(
            role=role,
            step_index=self._step_index,
            predicted_s=self._predicted_s,
            measured_s=self._measured_s,
            online_s=spent.online_s - told.online_s,
            batch_s=spent.batch_s - told.batch_s,
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
            spent=spent,
        )
