"""One worker in virtual time that serves interactive arrivals beside an endless batch queue.

Scheduler, block pool and latency model are the real ones; the device is a table of step times.
What does not fit into the KV room is refused: an arrival preempts batch rows, or waits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from controlplane import protocol
from controlplane.latency import Bucket, LatencyModel
from controlplane.sim.events import Events
from controlplane.sim.steptable import StepTable
from controlplane.sim.workload import Arrival, Noise
from gpuworkers import blocks, scheduler
from gpuworkers.sequence import Sequence

BLOCK_TOKENS = 64
BATCH_PROMPT_TOKENS, BATCH_OUTPUT_TOKENS = 1000, 250
BATCH_PROMPTS = 4  # given blocks and not yet computed
BATCH_RESERVE = 0.125  # share of the blocks that batch leaves to arrivals
OUTPUT_WORK = 2.2  # an output token in prompt tokens, 8B at 1k context: algorithms.md 2g
BATCH_TARGETS = protocol.ClassTargets("batch", 9, 86_400.0, 86_400.0, is_batch=True)

Planner = Callable[[float, scheduler.SchedulerState], scheduler.Plan]


class SeenStep(NamedTuple):
    """An executed step, and what was predicted of it before."""

    bucket: Bucket
    mean_s: float
    p99_s: float
    measured_s: float


@dataclass(slots=True)
class Outcome:
    """What a run measured after its warm-up."""

    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    gaps: int = 0
    gaps_missed: int = 0
    gap_s_max: float = 0.0
    batch_prompt_tokens: int = 0
    batch_output_tokens: int = 0
    steps: int = 0
    preempted: int = 0

    @property
    def batch_work(self) -> float:
        """In prompt tokens."""
        return self.batch_prompt_tokens + OUTPUT_WORK * self.batch_output_tokens


class Station:
    """The worker. `observe` is False where nothing reads the learned model."""

    def __init__(
        self,
        table: StepTable,
        planner: Planner,
        model: LatencyModel,
        targets: protocol.ClassTargets,
        kv_tokens: int,
        noise: Noise | None,
        has_batch: bool,
        observe: bool = True,
    ) -> None:
        self.table, self.planner, self.model = table, planner, model
        self.targets, self.noise, self.has_batch, self.observe = targets, noise, has_batch, observe
        self.pool = blocks.BlockPool(kv_tokens // BLOCK_TOKENS, BLOCK_TOKENS)
        self.reserve = int(BATCH_RESERVE * self.pool.num_blocks)
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.batch_decoding: list[Sequence] = []
        self.batch_prefilling: list[Sequence] = []
        self.waiting: list[Sequence] = []  # for KV
        self.outcome = Outcome()
        self.seen: list[SeenStep] = []
        self._events = Events(0)
        self._is_busy = False
        self._warm_at_s = 0.0
        self._num_batch = 0

    def run(self, work: list[Arrival], seconds: float, warm_s: float) -> Outcome:
        """Serve the arrivals; what happens after warm_s is measured."""
        self._warm_at_s = warm_s
        for index, arrival in enumerate(work):
            sequence = self._sequence(f"r{index}", arrival, self.targets)
            self._events.at(arrival.at_s, lambda s=sequence: self._arrive(s))  # type: ignore[misc]
        self._events.at(0.0, self._start)
        self._events.run(seconds)
        self.pool.check_integrity()
        self.outcome.seconds = seconds - warm_s
        return self.outcome

    def _sequence(self, name: str, arrival: Arrival, targets: protocol.ClassTargets) -> Sequence:
        return Sequence(
            request_id=name,
            epoch=1,
            stage="full",
            salt=b"",
            sampling=protocol.Sampling(arrival.output_tokens),
            targets=targets,
            token_ids=[0] * arrival.prompt_tokens,
            prompt_tokens=arrival.prompt_tokens,
            delivered_tokens=0,
            arrived_at_s=arrival.at_s,
            phase="running",
        )

    # --- KV

    def _arrive(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        if not self._is_busy:  # else at the end of the step, whose rows must keep their KV
            self._start()

    def _admit(self) -> None:
        """Blocks for arrivals in their order, taken from batch rows where it must be."""
        while self.waiting:
            sequence = self.waiting[0]
            needed = blocks.blocks_for(sequence.tokens_max, BLOCK_TOKENS)
            while not self.pool.has_room([], needed) and self.batch_decoding:
                self._preempt(self.batch_decoding.pop())
            if not self.pool.has_room([], needed):
                return
            self.pool.allocate(sequence.key, [], needed)
            self.prefilling.append(self.waiting.pop(0))

    def _preempt(self, sequence: Sequence) -> None:
        """Its KV goes; it starts again when there is room."""
        self.pool.free(sequence.key)
        self.outcome.preempted += 1

    def _refill(self) -> None:
        """The batch queue is never empty: next prompts wait whenever their KV has room."""
        while self.has_batch and len(self.batch_prefilling) < BATCH_PROMPTS:
            arrival = Arrival(self._events.now_s, BATCH_PROMPT_TOKENS, BATCH_OUTPUT_TOKENS)
            sequence = self._sequence(f"b{self._num_batch}", arrival, BATCH_TARGETS)
            needed = blocks.blocks_for(sequence.tokens_max, BLOCK_TOKENS)
            if not self.pool.has_room([], needed, self.reserve):
                return
            self.pool.allocate(sequence.key, [], needed)
            self.batch_prefilling.append(sequence)
            self._num_batch += 1

    # --- steps

    def _start(self) -> None:
        self._admit()
        self._refill()
        state = scheduler.SchedulerState(
            tuple(self.decoding),
            tuple(self.prefilling),
            tuple(self.batch_decoding),
            tuple(self.batch_prefilling),
        )
        now_s = self._events.now_s
        if not self.has_batch and not self.prefilling and self.decoding:
            self._decode_on(now_s)
            return
        plan = self.planner(now_s, state)
        self._is_busy = bool(plan.rows)
        if not plan.rows:
            return
        features = plan.features
        chunks = [(row.start, row.count) for row in plan.rows if row.count > 1]
        context = features.context_tokens - features.chunk_context_tokens
        step_s = self.table.step_s(chunks, features.rows - features.chunk_tokens, context)
        if self.noise is not None:
            step_s = self.noise.measured_s(step_s)
        if self.observe:
            mean_s, p99_s = self.model.predict_s(features), self.model.p99_s(features)
            self.seen.append(SeenStep(features.bucket, mean_s, p99_s, step_s))
            self.model.observe(features, step_s)
        self._events.at(now_s + step_s, lambda: self._finish(plan))

    def _decode_on(self, now_s: float) -> None:
        """Decode steps up to the next event, all rows alike: nothing else could be planned."""
        self._is_busy = True
        rows = len(self.decoding)
        context = sum(sequence.computed_tokens + 1 for sequence in self.decoding)
        steps_max = min(s.sampling.output_tokens_max - s.output_tokens for s in self.decoding)
        until_s = self._events.next_at_s
        ends_s: list[float] = []
        while len(ends_s) < steps_max and now_s < until_s:
            step_s = self.table.step_s((), rows, context)
            now_s += step_s if self.noise is None else self.noise.measured_s(step_s)
            context += rows
            ends_s.append(now_s)
        self._events.at(now_s, lambda: self._finish_decodes(ends_s))

    def _finish_decodes(self, ends_s: list[float]) -> None:
        for sequence in self.decoding:
            for end_s in ends_s:
                self._token(sequence, end_s)
            sequence.computed_tokens += len(ends_s)
        self.outcome.steps += len(ends_s)
        self.decoding = [s for s in self.decoding if not self._is_done(s)]
        self._start()

    def _finish(self, plan: scheduler.Plan) -> None:
        now_s = self._events.now_s
        self.outcome.steps += 1
        started = 0
        for row in plan.rows[: plan.num_online]:
            sequence = row.sequence
            sequence.computed_tokens += row.count
            if row.samples:
                started += sequence.last_token_at_s is None
                self._token(sequence, now_s)
        if started:
            self.decoding += [s for s in self.prefilling if s.is_decoding]
            self.prefilling = [s for s in self.prefilling if not s.is_decoding]
        self.decoding = [s for s in self.decoding if not self._is_done(s)]
        self._finish_batch(plan)
        self._start()

    def _token(self, sequence: Sequence, at_s: float) -> None:
        outcome, last_s = self.outcome, sequence.last_token_at_s
        sequence.token_ids.append(0)
        sequence.last_token_at_s = at_s
        if sequence.arrived_at_s < self._warm_at_s:
            return
        if last_s is None:
            outcome.ttft_s.append(at_s - sequence.arrived_at_s)
            return
        outcome.gaps += 1
        outcome.gaps_missed += at_s - last_s > self.targets.itl_s
        outcome.gap_s_max = max(outcome.gap_s_max, at_s - last_s)

    def _is_done(self, sequence: Sequence) -> bool:
        if sequence.output_tokens < sequence.sampling.output_tokens_max:
            return False
        self.pool.free(sequence.key)
        return True

    def _finish_batch(self, plan: scheduler.Plan) -> None:
        rows = plan.rows[plan.num_online :]
        if not rows:
            return
        prompt_tokens = output_tokens = num_decodes = 0
        tokens_max = BATCH_PROMPT_TOKENS + BATCH_OUTPUT_TOKENS
        ended = set()
        for sequence, start, count, samples in rows:
            sequence.computed_tokens = start + count
            if start < BATCH_PROMPT_TOKENS:
                prompt_tokens += count
            else:
                num_decodes += 1
            if samples:
                output_tokens += 1
                sequence.token_ids.append(0)
                if len(sequence.token_ids) == tokens_max:
                    self.pool.free(sequence.key)
                    ended.add(sequence)
        if num_decodes < len(self.batch_decoding):  # the others are next
            self.batch_decoding = (
                self.batch_decoding[num_decodes:] + self.batch_decoding[:num_decodes]
            )
        if ended:
            self.batch_decoding = [s for s in self.batch_decoding if s not in ended]
        while self.batch_prefilling and self.batch_prefilling[0].is_decoding:
            self.batch_decoding.append(self.batch_prefilling.pop(0))
        if self._events.now_s >= self._warm_at_s:
            self.outcome.batch_prompt_tokens += prompt_tokens
            self.outcome.batch_output_tokens += output_tokens
