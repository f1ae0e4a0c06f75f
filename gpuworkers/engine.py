"""The engine of one worker: takes assignments, and per step schedules, runs and records.

It owns sequences and blocks; arrays live behind the two seams `Runner` and `KVStore`, each with two
implementations (runner.py and kvcache.py on torch, fake.py modelled). One thread calls it. A
request has at most one epoch here: a newer one replaces the older. Ids that end a sequence (eos,
stop ids) are reported like any other id; the gateway leaves them out of the text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers import blocks, scheduler
from gpuworkers.handofflayers import LayerListener, layer_hook
from gpuworkers.kvstore import KVStore
from gpuworkers.load import LoadMeter
from gpuworkers.reports import EndedSequences, Key, report
from gpuworkers.reservation import KVCounts, Reservations
from gpuworkers.sequence import Sequence, from_assign

SEQUENCES_MAX = 256  # online sequences in hand, and as many batch sequences
FINISHED_KEPT_MAX = 256  # ended sequences whose ids can still be sent again
BATCH_RESERVE_RATIO = 0.125  # share of the blocks that batch leaves to online arrivals
HOST_BLOCKS_RATIO = 1.0  # blocks of batch sequences kept in host memory, per block of the pool


@dataclass(frozen=True, slots=True)
class RunResult:
    """`token_ids`: one per plan row with `samples`, in plan order; None where no id could be drawn
    (logits not finite). `logprobs`: beside each id, or none at all. `modelled_s` stands for the
    measured time when set."""

    token_ids: list[int | None]
    logprobs: list[protocol.TokenLogprobs | None] = field(default_factory=list)
    modelled_s: float | None = None


class Runner(Protocol):
    """Computes a plan: writes KV of every row's tokens and draws the ids."""

    kv: KVStore
    eos_token_ids: frozenset[int]

    @property
    def can_guide(self) -> bool:
        """Whether it knows the text of ids, so that a grammar can choose among them."""
        ...

    def prepare(self) -> None:
        """Called once in the thread that runs the steps, before the first of them."""
        ...

    def run(
        self, plan: scheduler.Plan, layer_written: Callable[[int], None] | None = None
    ) -> RunResult:
        """Calls layer_written with each layer's number once a read that begins then sees the KV of
        all rows in it."""
        ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and policy of one engine."""

    policy: protocol.Policy = protocol.Policy()
    sequences_max: int = SEQUENCES_MAX
    finished_kept_max: int = FINISHED_KEPT_MAX
    batch_reserve_ratio: float = BATCH_RESERVE_RATIO
    host_blocks_ratio: float = HOST_BLOCKS_RATIO


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did. `ready`: prefills whose KV now waits for its peer."""

    sequences: list[protocol.SequenceReport]
    ready: list[Key]
    measured_s: float  # 0 when nothing was computed


class Engine:
    """See module. Methods that name an unknown (request_id, epoch) do nothing: it was cancelled."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        step_model: LatencyModel,
        model: protocol.ModelFacts,
        role: protocol.Role,
    ) -> None:
        self.config = config
        self.role = role
        self.is_draining = False
        self._place(runner, step_model, model)
        self._sequences: dict[Key, Sequence] = {}  # online in order of arrival, batch in turn
        self._epochs: dict[str, int] = {}
        self._ended = EndedSequences(config.finished_kept_max)
        self._reports: list[protocol.SequenceReport] = []  # to go with the next step
        self._meter = LoadMeter()
        self._online_arrival_s = -math.inf
        self.layer_listener: LayerListener | None = None  # set once by the worker

    # --- models

    def _place(
        self, runner: Runner, step_model: LatencyModel, model: protocol.ModelFacts | None
    ) -> None:
        self.runner = runner
        self.step_model = step_model
        self.model = model
        host_blocks_max = int(runner.kv.num_blocks * self.config.host_blocks_ratio)
        self._kv = Reservations(runner.kv, self.config.batch_reserve_ratio, host_blocks_max)
        self.pool = self._kv.pool

    def change_model(
        self, runner: Runner, step_model: LatencyModel, model: protocol.ModelFacts | None
    ) -> str:
        """Serve another model, or none; why that cannot be now, else an empty string. What the
        former runner held is free when its caller holds it no more."""
        if self._sequences or self._reports:
            return f"{len(self._sequences)} sequences are in hand"
        self._kv.check_integrity(())
        self._place(runner, step_model, model)
        runner.prepare()
        return ""

    # --- assignments

    def assign(
        self, message: protocol.Assign, now_s: float
    ) -> protocol.Accepted | protocol.Rejected:
        """Take a sequence and reserve its KV (batch: when its turn comes), or say why not."""
        key = (message.request_id, message.epoch)
        if key in self._sequences or key in self._ended:
            return protocol.Accepted(*key)
        older = self._epochs.get(message.request_id)
        if older is not None and older > message.epoch:
            return self._rejected(key, "stale_epoch")
        if older is not None:
            self.abandon(message.request_id, older)
        sequence = from_assign(message, now_s)
        reason = self._refusal(message, sequence)
        if reason is None and not (sequence.is_batch and sequence.stage != "decode"):
            if self._kv.make_room(sequence, self._sequences.values()):
                self._kv.start(sequence)
            else:
                reason = "no_kv_room"
        if reason is not None:
            return self._rejected(key, reason)
        self._sequences[key] = sequence
        if not sequence.is_batch:
            self._online_arrival_s = now_s
        self._epochs[sequence.request_id] = sequence.epoch
        finish_reason = sequence.finish_reason(self.runner.eos_token_ids)
        if finish_reason is not None:  # the ids already delivered end it; only the news was lost
            self._end(sequence, finish_reason)
        return protocol.Accepted(*key)

    def _rejected(self, key: Key, reason: str) -> protocol.Rejected:
        return protocol.Rejected(*key, reason, self.pool.num_available)

    def _refusal(self, message: protocol.Assign, sequence: Sequence) -> str | None:
        if self.is_draining:
            return "draining"
        if self.model is None or message.model_id != self.model.model_id:
            return "unknown_model"
        if message.sampling.grammar and not self.runner.can_guide:
            return "no_grammar"
        ids = sequence.token_ids
        if not message.prompt_ids or not 0 <= min(ids) <= max(ids) < self.model.vocab_size:
            return "bad_token_ids"
        total = sequence.prompt_tokens + sequence.sampling.output_tokens_max
        if total > self.model.max_model_len or sequence.sampling.output_tokens_max < 1:
            return "too_long"
        if not self._kv.can_ever_fit(sequence):
            return "too_long"
        same = sum(other.is_batch == sequence.is_batch for other in self._sequences.values())
        return "queue_full" if same >= self.config.sequences_max else None

    # --- what the link tells

    def cancel(self, request_id: str, epoch: int) -> None:
        """Stop a sequence and free its blocks."""
        self.abandon(request_id, epoch)

    def abandon(self, request_id: str, epoch: int) -> None:
        """Forget a sequence, its blocks, and the ids kept for Resend."""
        key = (request_id, epoch)
        self._ended.forget(key)
        if key in self._sequences:
            self._drop(self._sequences[key])

    def preempt(self, request_id: str, epoch: int) -> None:
        """Take the blocks of a running batch sequence now, as an online arrival would."""
        sequence = self._sequences.get((request_id, epoch))
        if sequence is not None and sequence.is_batch and sequence.phase == "running":
            self._kv.preempt(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._kv.free(sequence)
        del self._sequences[sequence.key]
        del self._epochs[sequence.request_id]

    def installed(self, request_id: str, epoch: int, first_ids: list[int], now_s: float) -> None:
        """The peer's KV is in our blocks: the sequence goes on after `first_ids`, which the peer
        has reported."""
        sequence = self._sequences.get((request_id, epoch))
        if sequence is None or sequence.phase != "arriving":
            return
        sequence.computed_tokens = len(sequence.token_ids)
        sequence.token_ids.extend(first_ids)
        sequence.last_token_at_s = now_s
        sequence.phase = "running"
        self._kv.publish(sequence, 0)
        finish_reason = sequence.finish_reason(self.runner.eos_token_ids)
        if finish_reason is not None:
            self._end(sequence, finish_reason)

    def handed_off(self, request_id: str, epoch: int) -> None:
        """The peer holds the KV: free it; the next report says `handed_off`."""
        sequence = self._sequences.get((request_id, epoch))
        if sequence is not None and sequence.phase == "leased":
            self._end(sequence, "handed_off")

    def blocks_of(self, request_id: str, epoch: int) -> list[int]:
        """Blocks of the prompt (and delivered ids), in token order; empty when unknown."""
        sequence = self._sequences.get((request_id, epoch))
        if sequence is None:
            return []
        count = blocks.blocks_for(sequence.handoff_tokens, self.pool.block_tokens)
        return sequence.block_ids[:count]

    def first_ids(self, request_id: str, epoch: int) -> list[int]:
        """Ids sampled at the end of a prefill; empty when unknown or not yet there."""
        sequence = self._sequences.get((request_id, epoch))
        return [] if sequence is None else sequence.output_ids[sequence.delivered_tokens :]

    def resend(self, request_id: str, epoch: int, seq: int) -> protocol.SequenceReport | None:
        """Output ids from index `seq` on, of a sequence in hand or lately ended."""
        key = (request_id, epoch)
        sequence = self._sequences.get(key)
        if sequence is None:
            return self._ended.resend(key, seq)
        num_ids = sequence.output_tokens - seq
        return report(sequence, num_ids) if num_ids >= 0 else None

    def set_role(self, role: protocol.Role) -> None:
        """Roles guide the console's router; an engine runs every stage in any role."""
        self.role = role

    def drain(self) -> None:
        """Take nothing new; what is in hand goes on."""
        self.is_draining = True

    # --- questions

    @property
    def kv_counts(self) -> KVCounts:
        """Preemptions, and what they cost, since the start."""
        return self._kv.counts

    def has_work(self) -> bool:
        """Would `step` do anything now?"""
        if self._reports or any(s.phase == "running" for s in self._sequences.values()):
            return True
        return self._next_batch() is not None

    def is_idle(self) -> bool:
        """Nothing in hand and nothing to report."""
        return not self._sequences and not self._reports

    def live_sequences(self) -> list[protocol.LiveSequence]:
        """What this engine can go on with, or send again, after a reconnect."""
        running = self._sequences.values()
        live = [protocol.LiveSequence(*s.key, s.output_tokens) for s in running]
        return live + self._ended.live()

    def charge_host(self, seconds: float) -> None:
        """Time of the last turn beyond its measured step: what ran in the step pays for it."""
        self._meter.add_host(seconds)

    def load(self, idle_s: float) -> protocol.WorkerLoad:
        """State for a report; the sums of seconds start again at 0."""
        return self._meter.take(
            idle_s, self.role, list(self._sequences.values()), self.pool, self.step_model
        )

    def check_integrity(self) -> None:
        """Assert that blocks are conserved and belong to sequences in hand."""
        self._kv.check_integrity(self._sequences.values())
        assert self._epochs == {s.request_id: s.epoch for s in self._sequences.values()}

    # --- the step

    def step(self, now_s: float, clock: Callable[[], float]) -> StepResult:
        """Schedule, run, record. `clock` measures the run; now_s is the same clock's time."""
        self._kv.grow(self._sequences.values())
        self._start_batch()
        plan = scheduler.plan(now_s, self._state(now_s), self.step_model, self.config.policy)
        ready: list[Key] = []
        measured_s = 0.0
        if plan.rows:
            started_at_s = clock()
            self.step_model.observe_host(max(0.0, started_at_s - now_s))
            result = self.runner.run(plan, self._layer_hook(plan))
            elapsed_s = clock() - started_at_s
            measured_s = elapsed_s if result.modelled_s is None else result.modelled_s
            self.step_model.observe(plan.features, measured_s)
            self._meter.add_step(plan, self.step_model, measured_s)
            ready = self._record(plan, result, now_s + measured_s)
        if plan.rows and not self._sequences:  # idle: what does not add up is found here
            self.check_integrity()
        reports, self._reports = self._reports, []
        return StepResult(reports, ready, measured_s)

    def _layer_hook(self, plan: scheduler.Plan) -> Callable[[int], None] | None:
        num_layers = self.runner.kv.num_layers
        return layer_hook(plan, self.pool.block_tokens, num_layers, self.layer_listener)

    def _next_batch(self) -> Sequence | None:
        """The oldest waiting batch sequence, when it may get its blocks now."""
        batch = [s for s in self._sequences.values() if s.is_batch]
        waiting = [s for s in batch if s.phase == "waiting"]
        if not waiting or len(batch) - len(waiting) >= self.config.policy.batch_rows_max:
            return None
        oldest = min(waiting, key=lambda s: (s.arrived_at_s, s.key))
        return oldest if self._kv.has_room(oldest, self._sequences.values()) else None

    def _start_batch(self) -> None:
        """Give blocks to waiting batch sequences while the reserve for online ones stays free."""
        while (sequence := self._next_batch()) is not None:
            self._kv.start(sequence)

    def _state(self, now_s: float) -> scheduler.SchedulerState:
        kinds: tuple[list[Sequence], ...] = ([], [], [], [])
        for sequence in self._sequences.values():  # hundreds, while the device waits
            if sequence.phase == "running":
                kinds[2 * sequence.is_batch + (not sequence.is_decoding)].append(sequence)
        quiet_s = now_s - self._online_arrival_s
        return scheduler.SchedulerState(*(tuple(kind) for kind in kinds), quiet_s=quiet_s)

    def _record(self, plan: scheduler.Plan, result: RunResult, at_s: float) -> list[Key]:
        """Take the ids in, publish full blocks, end what has ended; returns ready prefills."""
        ready: list[Key] = []
        token_ids = iter(result.token_ids)
        logprobs = iter(result.logprobs or [None] * len(result.token_ids))
        for row in plan.rows:
            sequence = row.sequence
            first_block = sequence.computed_tokens // self.pool.block_tokens
            prefill_tokens = max(0, min(row.start + row.count, sequence.prompt_tokens) - row.start)
            sequence.computed_tokens += row.count
            self._kv.publish(sequence, first_block)
            if sequence.is_batch and row.samples:  # its next turn is after all others
                self._sequences[sequence.key] = self._sequences.pop(sequence.key)
            if not row.samples:
                self._reports.append(report(sequence, 0, None, prefill_tokens))
                continue
            token_id, logprob = next(token_ids), next(logprobs)
            if token_id is None:
                self._end(sequence, "error", 0, prefill_tokens)
                continue
            sequence.append(token_id, logprob)
            sequence.token_came(at_s)
            finish_reason = sequence.finish_reason(self.runner.eos_token_ids)
            if finish_reason is not None:
                self._end(sequence, finish_reason, 1, prefill_tokens)
                continue
            self._reports.append(report(sequence, 1, None, prefill_tokens))
            if sequence.stage == "prefill":
                sequence.phase = "leased"
                self.pool.lease(sequence.key)
                ready.append(sequence.key)
        return ready

    def _end(
        self,
        sequence: Sequence,
        finish_reason: protocol.FinishReason,
        num_ids: int = 0,
        prefill_tokens: int = 0,
    ) -> None:
        """Report the end, free the blocks, keep the ids for a while."""
        self._reports.append(report(sequence, num_ids, finish_reason, prefill_tokens))
        if sequence.is_batch and finish_reason in ("stop", "length"):
            self._kv.lengths.add(sequence.output_tokens)
        self._drop(sequence)
        self._ended.add(sequence, finish_reason)
