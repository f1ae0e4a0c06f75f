"""A peer on the same work: aggregated workers behind round robin, as NVIDIA Dynamo 1.6.1 replays
them offline (its vLLM-like engine: running sequences first, then waiting ones first come first
served, prompts in chunks, prefixes shared).

Round robin gives every worker its arrivals in advance, so that one worker after the other is
simulated. While it only decodes, whole runs of steps are added up in closed form.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from controlplane.sim.hardware import StepTimes
from controlplane.sim.outcomes import ITL_S, Gaps, Outcome
from controlplane.sim.peerblocks import PeerBlocks
from controlplane.sim.steadysteps import SteadySteps
from controlplane.sim.traces import HASH_TOKENS, TraceRequest

STEP_TOKENS_MAX = 8_192
SEQUENCES_MAX = 256
NUM_BLOCKS = 1_600  # of HASH_TOKENS on one worker


@dataclass(slots=True, eq=False)
class _Sequence:
    at_s: float
    prompt_tokens: int
    names: Sequence[int]  # of the prompt's full blocks
    left_tokens: int  # of the output
    known_tokens: int  # prompt and output so far
    computed_tokens: int = 0
    num_named: int = 0  # its first blocks, which others may share
    num_blocks: int = 0
    first_s: float | None = None
    last_s: float = 0.0
    gaps_before: int = 0  # of the worker's slow steps, when its run of tokens began
    slow_gaps: int = 0  # in runs before this one
    num_output: int = 0
    is_running_on: bool = False  # had a token in the worker's last step


@dataclass(slots=True)
class PeerWorker:
    """One engine. `run` plays its arrivals, in order of time, to the end."""

    timing: StepTimes
    num_blocks: int = NUM_BLOCKS
    gaps: Gaps = field(default_factory=Gaps)
    cached_tokens: int = 0
    num_preempted: int = 0
    _now_s: float = 0.0
    _slow_steps: int = 0
    _blocks: PeerBlocks = field(init=False)
    _waiting: deque[_Sequence] = field(default_factory=deque)
    _running: list[_Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._blocks = PeerBlocks(self.num_blocks)

    def run(self, rows: Iterable[TraceRequest]) -> Iterator[Outcome]:
        """Outcomes in order of their end."""
        arrivals = iter(rows)
        row = next(arrivals, None)
        while row is not None or self._waiting or self._running:
            if row is not None and not self._waiting and not self._running:
                self._now_s = max(self._now_s, row.at_s)
            while row is not None and row.at_s <= self._now_s:
                self._waiting.append(self._arrived(row))
                row = next(arrivals, None)
            yield from self._advance(row.at_s if row is not None else inf)

    def _arrived(self, row: TraceRequest) -> _Sequence:
        blocks = ceil((row.prompt_tokens + row.output_tokens) / HASH_TOKENS)
        if blocks > self.num_blocks:
            raise ValueError(f"a request of {blocks} blocks, a worker has {self.num_blocks}")
        names = row.hash_ids[: row.prompt_tokens // HASH_TOKENS]
        return _Sequence(row.at_s, row.prompt_tokens, names, row.output_tokens, row.prompt_tokens)

    def _advance(self, until_s: float) -> list[Outcome]:
        """One step, or a run of equal ones until something changes or somebody arrives."""
        is_steady = not self._waiting and all(
            s.is_running_on and s.known_tokens - s.computed_tokens == 1 for s in self._running
        )
        if is_steady and self._blocks.num_available >= len(self._running):
            return self._decode_run(until_s)
        return self._mixed_step()

    # --- one step

    def _mixed_step(self) -> list[Outcome]:
        chunks: list[tuple[int, int]] = []
        budget = STEP_TOKENS_MAX
        was_preempted = False
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            count = min(budget, sequence.known_tokens - sequence.computed_tokens)
            if not self._has_room(sequence, count):
                was_preempted = True
                self._preempt()
                continue  # this one again, if it was not the one to go
            budget -= count
            self._compute(sequence, count, chunks)
            index += 1
        while not was_preempted and self._waiting and budget > 0:
            if len(self._running) >= SEQUENCES_MAX:
                break
            sequence = self._waiting[0]
            shareable = sequence.names[: (sequence.known_tokens - 1) // HASH_TOKENS]
            cached = self._blocks.cached(shareable)
            # A prompt may not begin before all of it has room: the peer's admission rule.
            blocks = ceil(sequence.known_tokens / HASH_TOKENS)
            if blocks - self._blocks.num_shared(shareable[:cached]) > self._blocks.num_available:
                break
            self._waiting.popleft()
            self._running.append(sequence)
            self._blocks.use(shareable[:cached])
            sequence.num_named = sequence.num_blocks = cached
            sequence.computed_tokens = cached * HASH_TOKENS
            self.cached_tokens += sequence.computed_tokens
            count = min(budget, sequence.known_tokens - sequence.computed_tokens)
            budget -= count
            self._compute(sequence, count, chunks)
        ready = [s for s in self._running if s.computed_tokens == s.known_tokens]
        kv_tokens = sum([s.known_tokens for s in ready])
        seconds = self.timing.step_s(chunks, len(ready), kv_tokens)
        self._now_s += seconds
        return self._emit(ready, seconds)

    def _has_room(self, sequence: _Sequence, count: int) -> bool:
        blocks = ceil((sequence.computed_tokens + count) / HASH_TOKENS) - sequence.num_blocks
        return blocks <= self._blocks.num_available

    def _preempt(self) -> None:
        """The newest one loses its KV and waits again, at the front."""
        sequence = self._running.pop()
        self._blocks.free(
            sequence.names[: sequence.num_named], sequence.num_blocks - sequence.num_named
        )
        if sequence.is_running_on:
            sequence.slow_gaps += self._slow_steps - sequence.gaps_before
        sequence.is_running_on = False
        sequence.computed_tokens = sequence.num_named = sequence.num_blocks = 0
        self._waiting.appendleft(sequence)
        self.num_preempted += 1

    def _compute(self, sequence: _Sequence, count: int, chunks: list[tuple[int, int]]) -> None:
        start, end = sequence.computed_tokens, sequence.computed_tokens + count
        if start < sequence.prompt_tokens:
            chunks.append((start, min(end, sequence.prompt_tokens) - start))
        sequence.computed_tokens = end
        blocks = ceil(end / HASH_TOKENS)
        self._blocks.use((), blocks - sequence.num_blocks)
        sequence.num_blocks = blocks
        named = min(end // HASH_TOKENS, len(sequence.names))
        if named > sequence.num_named:
            self._blocks.name(sequence.names[sequence.num_named : named])
            sequence.num_named = named

    def _emit(self, ready: Sequence[_Sequence], seconds: float) -> list[Outcome]:
        now_s, num_gaps = self._now_s, 0
        if ready and seconds > ITL_S:
            self._slow_steps += 1
        for sequence in ready:
            if sequence.is_running_on:
                num_gaps += 1
            else:
                if sequence.first_s is None:
                    sequence.first_s = now_s
                else:  # back after a preemption
                    self.gaps.add(now_s - sequence.last_s)
                    sequence.slow_gaps += now_s - sequence.last_s > ITL_S
                sequence.gaps_before = self._slow_steps
                sequence.is_running_on = True
            sequence.num_output += 1
            sequence.known_tokens += 1
            sequence.left_tokens -= 1
            sequence.last_s = now_s
        self.gaps.add(seconds, num_gaps)
        return self._end_finished()

    def _end_finished(self) -> list[Outcome]:
        outcomes = []
        for sequence in self._running:
            if sequence.left_tokens:
                continue
            assert sequence.first_s is not None
            self._blocks.free(
                sequence.names[: sequence.num_named], sequence.num_blocks - sequence.num_named
            )
            slow = sequence.slow_gaps + self._slow_steps - sequence.gaps_before
            ttft_s, last_s = sequence.first_s - sequence.at_s, sequence.last_s
            outcomes.append(
                Outcome(ttft_s, last_s - sequence.first_s, sequence.num_output - 1, slow)
            )
        if outcomes:
            self._running = [s for s in self._running if s.left_tokens]
        return outcomes

    # --- many steps

    def _decode_run(self, until_s: float) -> list[Outcome]:
        """Decode steps alone until a sequence ends or needs a block, the table bends, or a step
        ends at or after until_s."""
        running, timing = self._running, self.timing
        for sequence in running:
            self._compute_token(sequence)
        num, kv_tokens = len(running), sum([s.known_tokens for s in running])
        most = min(
            min([s.left_tokens for s in running]),
            min([s.num_blocks * HASH_TOKENS - s.computed_tokens for s in running]) + 1,
            timing.steps_in_cell(num, kv_tokens),
        )
        shown = [timing.step_s((), num, kv_tokens + i * num) for i in range(min(most, 3))]
        steps = SteadySteps.through(shown)
        count = steps.until(until_s - self._now_s, most)
        seconds = steps.total_s(count)
        self._now_s += seconds
        self._slow_steps += steps.num_slower(ITL_S, count)
        self.gaps.add(seconds / count, count * num)
        for sequence in running:
            sequence.computed_tokens += count - 1
            sequence.num_output += count
            sequence.known_tokens += count
            sequence.left_tokens -= count
            sequence.last_s = self._now_s
        return self._end_finished()

    def _compute_token(self, sequence: _Sequence) -> None:
        """The newest token; a full block is followed by one without a name."""
        sequence.computed_tokens += 1
        if sequence.computed_tokens > sequence.num_blocks * HASH_TOKENS:
            self._blocks.use((), 1)
            sequence.num_blocks += 1
