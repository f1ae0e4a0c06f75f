"""A worker of a replayed workload: the real scheduler, block pool and latency model on a device
that is a table of step times.

It knows no ids, only how many there are; `ReplaySequence.left_tokens` stands for the id that ends a
sequence, and nothing that decides may read it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import ceil, inf
from typing import NamedTuple

from controlplane import protocol
from controlplane.latency import LatencyModel
from controlplane.sim.hardware import Hardware
from gpuworkers import blocks, scheduler
from gpuworkers.sequence import Sequence

Key = tuple[str, int]
GAP_MS_MAX = 1000  # longer ones count as this


@dataclass(slots=True, eq=False)
class ReplaySequence(Sequence):
    """A sequence with its true end and the facts that its client will see."""

    left_tokens: int = 0  # output ids until it ends by itself
    gap_s_max: float = 0.0  # between two ids, so far
    slow_s: float = inf
    num_slow: int = 0  # gaps above slow_s
    names: Seq[bytes] = field(default_factory=tuple)  # of the prompt's full blocks


class StepEnd(NamedTuple):
    """What one step did: sequences with their first id of this epoch, ended ones, and prompts that
    now wait for their peer."""

    started: list[ReplaySequence]
    ended: list[ReplaySequence]
    ready: list[ReplaySequence]


class ReplayWorker:
    """One engine process; knows nothing of links or of the plane."""

    def __init__(self, hardware: Hardware, hello: protocol.Hello, seed: int) -> None:
        self.role = hello.role
        self.policy = protocol.Policy()
        self.model = LatencyModel(hello.step_model)
        self.pool = blocks.BlockPool(hello.num_blocks, hello.block_tokens)
        self.held: dict[Key, ReplaySequence] = {}
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.plan: scheduler.Plan | None = None  # the step in hand
        self.started_at_s = 0.0
        self.num_steps = 0
        self.busy_s = 0.0  # of all its steps
        self.gaps = [0] * (GAP_MS_MAX + 1)  # between two ids of one request, by ms rounded up
        self._table, self._noise = hardware.table, hardware.noise(seed)
        self._predicted_s = self._measured_s = self._reported_busy_s = 0.0

    def assign(self, sequence: ReplaySequence) -> str:
        """Take the sequence and its blocks; why not, else an empty string."""
        assert sequence.key not in self.held, f"{sequence.key} was dispatched twice"
        size = self.pool.block_tokens
        num_blocks = blocks.blocks_for(sequence.tokens_max, size)
        names: Seq[bytes] = ()
        if sequence.stage != "decode":  # a transfer shares no cached block
            names = sequence.names[: (len(sequence.token_ids) - 1) // size]
        if not self.pool.has_room(names, num_blocks):
            return "no_kv_room"
        sequence.computed_tokens = size * self.pool.allocate(sequence.key, names, num_blocks)
        sequence.cached_tokens = sequence.computed_tokens
        self.held[sequence.key] = sequence
        if sequence.stage == "decode":
            sequence.phase = "arriving"
        else:
            sequence.phase = "running"
            self.prefilling.append(sequence)
        return ""

    def drop(self, key: Key) -> None:
        """Cancelled or fetched by its peer; unknown keys were dropped before."""
        sequence = self.held.get(key)
        if sequence is not None:
            for line in (self.prefilling, self.decoding):
                if sequence in line:
                    line.remove(sequence)
            self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        del self.held[sequence.key]
        self.pool.free(sequence.key)

    def install(self, key: Key, output_tokens: int, last_token_at_s: float | None) -> None:
        """A peer's KV is here, with the output ids sampled there: decode after them."""
        sequence = self.held[key]
        sequence.computed_tokens = len(sequence.token_ids)
        sequence.token_ids.extend([0] * output_tokens)
        sequence.left_tokens -= output_tokens
        sequence.last_token_at_s = last_token_at_s
        sequence.phase = "running"
        self._publish(sequence, 0)
        self.decoding.append(sequence)

    def start_step(self, now_s: float) -> float | None:
        """Plan a step; the seconds it takes on the device, or None with nothing to run."""
        if not self.decoding and not self.prefilling:
            return None
        state = scheduler.SchedulerState(tuple(self.decoding), tuple(self.prefilling))
        plan = scheduler.plan(now_s, state, self.model, self.policy)
        self.plan, self.started_at_s = plan, now_s
        features = plan.features
        chunks = [(row.start, row.count) for row in plan.rows if row.count > 1]
        context = features.context_tokens - features.chunk_context_tokens
        exact_s = self._table.step_s(chunks, features.rows - features.chunk_tokens, context)
        return exact_s if self._noise is None else self._noise.measured_s(exact_s)

    def finish_step(self, now_s: float, seconds: float) -> StepEnd:
        """Record the step in hand, which took so long."""
        plan = self.plan
        assert plan is not None
        self.plan = None
        self.num_steps += 1
        self.busy_s += seconds
        self._predicted_s, self._measured_s = plan.predicted_s, seconds
        self.model.observe(plan.features, seconds)
        end = StepEnd([], [], [])
        for sequence, start, count, samples in plan.rows:
            assert isinstance(sequence, ReplaySequence)
            if sequence.computed_tokens != start or sequence.key not in self.held:
                continue  # cancelled while the step ran
            sequence.computed_tokens = start + count
            if count > 1 or sequence.last_token_at_s is None:
                self._publish(sequence, start)
            if samples:
                self._token(sequence, now_s, end)
        if end.started or end.ended or end.ready:
            self._sort()
        return end

    def _token(self, sequence: ReplaySequence, now_s: float, end: StepEnd) -> None:
        last_s = sequence.last_token_at_s
        sequence.token_ids.append(0)
        sequence.token_came(now_s)
        sequence.left_tokens -= 1
        if last_s is None:
            end.started.append(sequence)
        else:
            gap_s = now_s - last_s
            self.gaps[min(GAP_MS_MAX, ceil(1000.0 * gap_s))] += 1
            sequence.num_slow += gap_s > sequence.slow_s
            if gap_s > sequence.gap_s_max:
                sequence.gap_s_max = gap_s
        if not sequence.left_tokens:
            end.ended.append(sequence)
            self._free(sequence)
        elif sequence.stage == "prefill":
            sequence.phase = "leased"
            self.pool.lease(sequence.key)
            end.ready.append(sequence)

    def _sort(self) -> None:
        """Sequences that have begun to decode, ended or wait for a peer leave their list."""
        held = self.held
        begun = [s for s in self.prefilling if s.is_decoding]
        if begun:
            self.prefilling = [s for s in self.prefilling if not s.is_decoding]
            self.decoding += [s for s in begun if s.phase == "running"]
        self.decoding = [s for s in self.decoding if s.key in held]

    def _publish(self, sequence: ReplaySequence, start: int) -> None:
        """Prompt blocks that have filled from `start` on may be shared from now on."""
        size = self.pool.block_tokens
        last = min(sequence.computed_tokens // size, len(sequence.names))
        for index in range(start // size, last):
            self.pool.publish(sequence.key, index, sequence.names[index])

    def busy_for_s(self, now_s: float) -> float:
        """Age of the step in hand."""
        return now_s - self.started_at_s if self.plan is not None else 0.0

    def load(self) -> protocol.WorkerLoad:
        """Its report; all of its work is online."""
        online_s = self.busy_s - self._reported_busy_s
        self._reported_busy_s = self.busy_s
        decoding = self.decoding
        return protocol.WorkerLoad(
            role=self.role,
            step_index=self.num_steps,
            predicted_s=self._predicted_s,
            measured_s=self._measured_s,
            online_s=online_s,
            batch_s=0.0,
            idle_s=0.0,
            rows_online=len(decoding),
            rows_batch=0,
            running_online=len(decoding) + len(self.prefilling),
            running_batch=0,
            waiting_online=0,
            waiting_batch=0,
            prefill_tokens_waiting=sum([s.pending_tokens for s in self.prefilling]),
            context_tokens_running=sum([s.computed_tokens for s in decoding]),
            kv_blocks_total=self.pool.num_blocks,
            kv_blocks_free=self.pool.num_free,
            kv_blocks_cached=self.pool.num_cached,
            kv_blocks_held_batch=0,
            step_model=self.model.coefficients(),
        )
