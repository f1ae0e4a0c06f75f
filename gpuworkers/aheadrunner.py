"""A runner one decode step ahead of its engine, so that the device does not wait for the host.

When the ids of a step are drawn, the next step of the same sequences is launched with them before
the host has seen one. If the engine then plans it, or some of its rows, with or without others, the
logits of these rows are there or on their way; rows that ended are left out.

A step ahead writes KV of one position behind each row's newest, in a block that the row holds. If
the row ends or loses its blocks, the next owner overwrites that position before it reads it, since
all work of a device is done in the order of its launch, on one stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpuworkers.engine import RunResult
from gpuworkers.grammar import Grammars
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.runner import TorchRunner
from gpuworkers.sampler import edit, logprobs_of, sampling_table
from gpuworkers.scheduler import Plan, PlanRow
from gpuworkers.stepper import GraphStepper, LayerWritten, StepRow

FIRST_CHUNK_TOKENS_MAX = 8192  # a longer one costs its preparation when it comes


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the step ahead. The list of block ids is another one after a preemption."""

    index: int
    position: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step that was launched: its rows by the key of their sequence."""

    rows: dict[tuple[str, int], _Row]
    logits: torch.Tensor

    def index_of(self, row: PlanRow) -> int | None:
        """Of the plan's row in `logits`; None when it is another token or lies in other blocks."""
        known = self.rows.get(row.sequence.key)
        if known is None or not row.samples or (row.start, row.count) != (known.position, 1):
            return None
        return known.index if known.block_ids is row.sequence.block_ids else None


class AheadRunner(TorchRunner):
    """See engine.Runner, module. `num_ahead` counts steps launched, `num_taken` rows used."""

    def __init__(
        self, stepper: GraphStepper, kv: TorchKVCache, grammars: Grammars | None = None
    ) -> None:
        super().__init__(stepper, kv, grammars)
        self._graphs = stepper
        self._ahead: _Ahead | None = None
        self.num_ahead = 0
        self.num_taken = 0

    def prepare(self) -> None:
        """See engine.Runner. Takes a second or two on a GPU."""
        with torch.inference_mode(), self.kv.work():
            self._graphs.ops.prepare_chunks(self.model.heads, FIRST_CHUNK_TOKENS_MAX)
            self.kv.synchronize()

    def run(self, plan: Plan, layer_written: LayerWritten | None = None) -> RunResult:
        """See TorchRunner.run."""
        with torch.inference_mode(), self.kv.work():
            logits = self._logits(plan.rows, layer_written)
            sampling = [row.sequence for row in plan.rows if row.samples]
            if not sampling:
                self.kv.synchronize()
                return RunResult([])
            edited = edit(logits, sampling, self.eos_token_ids, self._grammars)
            params = self._graphs.ops.sampling_params(sampling_table(sampling))
            ids = self._graphs.ops.sample_ids(edited, params)
            read = self._start_reading(ids)
            if all(s.sampling.logprobs is None for s in sampling):  # else logits are needed yet
                self._launch_ahead(plan.rows, ids)
            token_ids = [None if token_id < 0 else token_id for token_id in read()]
            return RunResult(token_ids, logprobs_of(self.ops, logits, sampling, token_ids))

    def _logits(
        self, rows: tuple[PlanRow, ...], layer_written: LayerWritten | None
    ) -> torch.Tensor:
        """As `logits`, those of the step ahead where it has them."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self.logits(rows, layer_written)
        indices = [ahead.index_of(row) for row in rows]
        rest = tuple(row for row, index in zip(rows, indices, strict=True) if index is None)
        self.num_taken += len(rows) - len(rest)
        if not rest and indices == list(range(len(ahead.logits))):
            return ahead.logits
        if len(rest) == len(rows):
            return self.logits(rows, layer_written)
        parts = [ahead.logits]
        if rest:  # may replay the graph whose logits these are
            parts = [ahead.logits.clone(), self.logits(rest, layer_written)]
        behind = iter(range(len(ahead.logits), len(ahead.logits) + len(rest)))
        order = [
            next(behind) if index is None else index
            for row, index in zip(rows, indices, strict=True)
            if row.samples
        ]
        return torch.cat(parts).index_select(0, self._to_device(order))

    def _launch_ahead(self, rows: Sequence[PlanRow], ids: torch.Tensor) -> None:
        """The next step of the rows that go on, where all of them can."""
        if not all(row.samples for row in rows):
            return  # a prompt is not done: the next step is no decode
        block_tokens = self.kv.block_tokens
        going = [index for index, row in enumerate(rows) if _goes_on(row)]
        for index in going:
            row = rows[index]
            if (row.start + row.count) // block_tokens >= len(row.sequence.block_ids):
                return  # it gets its block when the engine plans the step
        if not going or self._graphs.bucket_for(len(going)) is None:
            return
        tables = self._tables.take([rows[index].sequence.block_ids for index in going])
        steps = [
            StepRow((), rows[index].start + rows[index].count, table, True)
            for index, table in zip(going, tables, strict=True)
        ]
        if len(going) < len(rows):
            ids = ids.index_select(0, self._to_device(going))
        logits = self._graphs.logits_behind(ids, steps)
        known = {
            rows[index].sequence.key: _Row(place, step.start, rows[index].sequence.block_ids)
            for place, (index, step) in enumerate(zip(going, steps, strict=True))
        }
        self._ahead = _Ahead(known, logits)
        self.num_ahead += 1

    def _to_device(self, numbers: list[int]) -> torch.Tensor:
        """Without waiting for the stream, as a copy from ordinary memory would."""
        is_cuda = self.kv.device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=is_cuda)
        return host.to(self.kv.device, non_blocking=True)

    def _start_reading(self, ids: torch.Tensor) -> Callable[[], list[int]]:
        """Begins the step's one copy to the host; the call waits for it and for nothing behind."""
        if self.kv.device.type != "cuda":
            return ids.tolist
        host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[int]:
            done.synchronize()
            return host.tolist()

        return read


def _goes_on(row: PlanRow) -> bool:
    """Does the sequence decode another token after the one being drawn, as far as is known now?"""
    sequence = row.sequence
    is_last = sequence.output_tokens + 1 >= sequence.sampling.output_tokens_max
    return not is_last and sequence.stage != "prefill"
