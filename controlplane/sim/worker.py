"""A worker with the real scheduler and block pool, whose steps take modelled time.

Ids are a function of the prompt and the output index, so a request continued on another worker must
give the same ids, and one continued at a wrong index gives others.
"""

from collections.abc import Sequence as Seq

from controlplane import protocol
from controlplane.gpuseconds import GpuMeter
from controlplane.latency import LatencyModel
from controlplane.sim import laws
from gpuworkers import blocks, scheduler
from gpuworkers.sequence import Sequence, from_assign

VOCABULARY = 50_000
Key = tuple[str, int]


def output_id(prompt_ids: Seq[int], index: int) -> int:
    """The id that any worker samples at this output index."""
    return (sum(prompt_ids) * 31 + len(prompt_ids) * 17 + index * 7919) % VOCABULARY


class ModelledWorker:
    """One engine process; knows nothing of links or of the plane."""

    def __init__(
        self,
        role: protocol.Role,
        step_model: protocol.StepModel,
        num_blocks: int,
        block: int,
        model_id: str,
        now_s: float = 0.0,
    ) -> None:
        self.role = role
        self.model_id = model_id  # empty while none is loaded
        self.model = LatencyModel(step_model)
        self.pool = blocks.BlockPool(num_blocks, block)
        self.policy = protocol.Policy()
        self.is_draining = False
        self.sequences: dict[Key, Sequence] = {}
        self.plan: scheduler.Plan | None = None  # the step in hand
        self.num_steps = 0
        self._last_s = 0.0
        self.gpu = GpuMeter()
        self._began_s = 0.0  # of the step in hand
        self._idle_s = 0.0
        self._idle_since_s: float | None = now_s
        self._told = protocol.GpuSeconds()  # at the last report

    def assign(
        self, message: protocol.Assign, now_s: float
    ) -> protocol.Accepted | protocol.Rejected:
        """Take the sequence and its blocks, or say why not."""
        sequence = from_assign(message, now_s)
        assert sequence.key not in self.sequences, f"{sequence.key} was dispatched twice"
        for key in [key for key in self.sequences if key[0] == sequence.request_id]:
            self.drop(key)  # an older epoch
        size = self.pool.block_tokens
        num_blocks = blocks.blocks_for(sequence.tokens_max, size)
        hashes: list[bytes] = []
        if sequence.stage != "decode":
            reusable = (len(sequence.token_ids) - 1) // size * size
            blocks.extend_hashes(hashes, sequence.salt, sequence.token_ids, reusable, size)
        reason = "draining" if self.is_draining else ""
        if message.model_id != self.model_id:
            reason = "unknown_model"
        if not reason and not self.pool.has_room(hashes, num_blocks):
            reason = "no_kv_room"
        if reason:
            return protocol.Rejected(*sequence.key, reason, self.pool.num_available)
        sequence.computed_tokens = size * self.pool.allocate(sequence.key, hashes, num_blocks)
        sequence.hashes = hashes
        sequence.phase = "arriving" if sequence.stage == "decode" else "running"
        self.sequences[sequence.key] = sequence
        return protocol.Accepted(*sequence.key)

    def unload(self) -> None:
        """The model and all KV are gone."""
        assert not self.sequences, self.sequences
        self.model_id = ""
        self.pool = blocks.BlockPool(self.pool.num_blocks, self.pool.block_tokens)

    def drop(self, key: Key) -> None:
        """Cancelled, abandoned or finished; unknown keys were dropped before."""
        if self.sequences.pop(key, None) is not None:
            self.pool.free(key)

    def install(self, key: Key, first_ids: Seq[int]) -> None:
        """A peer's KV is here: decode after its ids."""
        sequence = self.sequences[key]
        assert sequence.phase == "arriving", sequence.phase
        sequence.computed_tokens = len(sequence.token_ids)
        sequence.token_ids.extend(first_ids)
        sequence.phase = "running"
        self._publish(sequence, 0)

    def _publish(self, sequence: Sequence, first_block: int) -> None:
        """Full blocks can be shared from now on."""
        size = self.pool.block_tokens
        full = sequence.computed_tokens // size
        hashes = sequence.hashes
        blocks.extend_hashes(hashes, sequence.salt, sequence.token_ids, full * size, size)
        for index in range(first_block, full):
            self.pool.publish(sequence.key, index, hashes[index])

    def start_step(self, now_s: float) -> float | None:
        """Plan a step; its modelled seconds, or None with nothing to run."""
        running = [item for item in self.sequences.values() if item.phase == "running"]
        state = scheduler.SchedulerState(
            decoding=tuple(s for s in running if s.is_decoding and not s.is_batch),
            prefilling=tuple(s for s in running if not s.is_decoding and not s.is_batch),
            batch_decoding=tuple(s for s in running if s.is_decoding and s.is_batch),
            batch_prefilling=tuple(s for s in running if not s.is_decoding and s.is_batch),
        )
        plan = scheduler.plan(now_s, state, self.model, self.policy)
        self.plan = plan if plan.rows else None
        laws.check_plan(now_s, plan, state, self.model, self.policy)
        self._note_idle(now_s)
        return plan.predicted_s if plan.rows else None

    def finish_step(
        self, now_s: float, seconds: float
    ) -> tuple[list[protocol.SequenceReport], list[Key]]:
        """Record the step in hand, which took so long: reports with new ids, and prefills that wait
        for their peer."""
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.num_steps += 1
        if seconds != plan.predicted_s:  # else there is nothing to learn
            self.model.observe(plan.features, seconds)
        self._last_s = seconds
        self._charge(plan, seconds, now_s)
        reports, ready = [], []
        for row in plan.rows:
            sequence = row.sequence
            if sequence.key not in self.sequences:  # cancelled while the step ran
                continue
            first_block = sequence.computed_tokens // self.pool.block_tokens
            sequence.computed_tokens += row.count
            self._publish(sequence, first_block)
            if not row.samples:
                continue
            index = sequence.output_tokens
            token_id = output_id(sequence.token_ids[: sequence.prompt_tokens], index)
            sequence.token_ids.append(token_id)
            sequence.last_token_at_s = now_s
            reason = sequence.finish_reason(())
            reports.append(
                protocol.SequenceReport(
                    *sequence.key,
                    index,
                    [token_id],
                    reason,
                    0,
                    0,
                    sequence.computed_tokens,
                    [],
                    sequence.prefill_gpu_s,
                    sequence.decode_gpu_s,
                )
            )
            if reason is not None:
                self.drop(sequence.key)
            elif sequence.stage == "prefill":
                sequence.phase = "leased"
                self.pool.lease(sequence.key)
                ready.append(sequence.key)
        return reports, ready

    def _charge(self, plan: scheduler.Plan, seconds: float, now_s: float) -> None:
        """The step's seconds, and those for which it could not end: the process was frozen."""
        decodes = [row.sequence.is_decoding for row in plan.rows]
        rows = [(row.start, row.count) for row in plan.rows]
        model = self.model.coefficients()
        charged = self.gpu.add_step(model, rows, plan.num_online, decodes, seconds)
        self.gpu.add_host(now_s - self._began_s - seconds)
        for row, is_decode, cost_s in zip(plan.rows, decodes, charged, strict=True):
            row.sequence.decode_gpu_s += cost_s * is_decode
            row.sequence.prefill_gpu_s += cost_s * (not is_decode)

    def _note_idle(self, now_s: float) -> None:
        """An empty plan begins idle time, the next step ends it."""
        if self.plan is None:
            self._idle_since_s = now_s if self._idle_since_s is None else self._idle_since_s
            return
        self._began_s = now_s
        if self._idle_since_s is not None:
            self._idle_s += now_s - self._idle_since_s
            self._idle_since_s = None

    def spent(self, now_s: float) -> protocol.GpuSeconds:
        """How its time was spent, without the step in hand."""
        since_s = now_s if self._idle_since_s is None else self._idle_since_s
        return self.gpu.spent(self._idle_s + now_s - since_s)

    def busy_s(self, now_s: float) -> float:
        """Age of the step in hand."""
        return 0.0 if self.plan is None else now_s - self._began_s

    def live(self) -> list[protocol.LiveSequence]:
        """What it can go on with after a reconnect; a transfer in progress it cannot."""
        return [
            protocol.LiveSequence(*item.key, item.output_tokens)
            for item in self.sequences.values()
            if item.phase == "running" and item.stage != "prefill"
        ]

    def load(self, now_s: float) -> protocol.WorkerLoad:
        online = [item for item in self.sequences.values() if not item.is_batch]
        running = [item for item in online if item.phase == "running"]
        num_batch = len(self.sequences) - len(online)
        spent, told = self.spent(now_s), self._told
        self._told = spent
        return protocol.WorkerLoad(
            role=self.role,
            step_index=self.num_steps,
            predicted_s=self._last_s,
            measured_s=self._last_s,
            online_s=max(0.0, spent.online_s - told.online_s),
            batch_s=max(0.0, spent.batch_s - told.batch_s),
            idle_s=max(0.0, spent.idle_s - told.idle_s),
            rows_online=len(running),
            rows_batch=num_batch,
            running_online=len(running),
            running_batch=num_batch,
            waiting_online=0,
            waiting_batch=0,
            prefill_tokens_waiting=sum(
                item.pending_tokens for item in running if not item.is_decoding
            ),
            context_tokens_running=sum(item.computed_tokens for item in running),
            kv_blocks_total=self.pool.num_blocks,
            kv_blocks_free=self.pool.num_free,
            kv_blocks_cached=self.pool.num_cached,
            kv_blocks_held_batch=0,
            step_model=self.model.coefficients(),
            spent=spent,
        )
