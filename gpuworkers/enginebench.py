"""Times the steps of a model on a GPU as a worker runs them: decodes, prompts, the host's share.

A step is everything from token ids on the host to sampled ids on the host. `wall_s` is one step
after the other, as an engine does them; `device_s` the same work queued without waiting, so the
difference is time in which the device waits for the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpuworkers.gpumodel import BLOCK_TOKENS
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.stepper import GraphStepper, StepRow
from kernels.ops import SamplingTable

DECODES = (  # (batch, tokens of context)
    (1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (1, 4096), (8, 4096), (32, 4096),
    (64, 4096), (128, 4096), (192, 4096), (256, 1024), (256, 2048),
)  # fmt: skip
PREFILLS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
IDLE_PROMPT_TOKENS = 512
IDLE_S = 0.2  # without work before a first token is timed
WARMUPS, REPEATS = 3, 20
PREFILL_REPEATS = 5
MIXED_REPEATS = 3

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Medians of one shape of step."""

    kind: str  # decode | prefill | first token
    batch: int
    tokens: int  # of context or prompt, each
    wall_s: float
    device_s: float

    @property
    def host_share(self) -> float:
        """Of the step, with nothing running on the device."""
        return max(0.0, 1.0 - self.device_s / self.wall_s)


def kv_tokens_for(decodes: Sequence[tuple[int, int]], prefills: Sequence[int]) -> int:
    """KV that the largest shape needs."""
    shapes = [*decodes, *((1, tokens) for tokens in prefills)]
    return max(batch * -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS for batch, tokens in shapes)


class EngineBench:
    """Steps of one placed model, on the operations of the CUDA backend."""

    def __init__(
        self, stepper: GraphStepper, kv: TorchKVCache, clock: Clock, sleep: Callable[[float], None]
    ) -> None:
        self._stepper = stepper
        self._kv = kv
        self._clock = clock
        self._sleep = sleep
        for layer in kv.layers:
            layer.normal_()  # products of zeros run faster than they would

    def decode(self, batch: int, context: int) -> StepTime:
        """One id for each of `batch` sequences of `context` tokens, the new one counted."""
        rows = [StepRow([i], context - 1, self._table(i, context), True) for i in range(batch)]
        return self._times("decode", batch, context, rows, REPEATS)

    def prefill(self, tokens: int) -> StepTime:
        """A whole prompt in one step, with its first id."""
        row = StepRow(self._prompt(tokens), 0, self._table(0, tokens), True)
        return self._times("prefill", 1, tokens, [row], PREFILL_REPEATS)

    def mixed(self, tokens: int, start: int, batch: int, context: int) -> float:
        """Seconds of a step with tokens [start, start + tokens) of one prompt and `batch` decodes
        of `context` tokens each."""
        num_blocks = -(-(start + tokens) // BLOCK_TOKENS)
        chunk = StepRow(self._prompt(tokens), start, self._table(0, start + tokens), True)
        decodes = [
            StepRow([i], context - 1, num_blocks + self._table(i, context), True)
            for i in range(batch)
        ]
        walls = [self._wall_s([*decodes, chunk]) for _ in range(1 + MIXED_REPEATS)]
        return float(np.median(walls[1:]))

    def first_token(self, tokens: int) -> StepTime:
        """As prefill, but each time after the device had nothing to do for a while."""
        row = StepRow(self._prompt(tokens), 0, self._table(0, tokens), True)
        walls = []
        for _ in range(PREFILL_REPEATS):
            self._sleep(IDLE_S)
            walls.append(self._wall_s([row]))
        wall_s = float(np.median(walls))
        return StepTime("first token", 1, tokens, wall_s, wall_s)

    def _prompt(self, tokens: int) -> list[int]:
        return [i % self._stepper.model.config.vocab_size for i in range(tokens)]

    def _table(self, index: int, tokens: int) -> np.ndarray:
        """Blocks of sequence `index` of a batch of equal ones, the last block first."""
        count = -(-tokens // BLOCK_TOKENS)
        return np.arange(index * count, (index + 1) * count)[::-1].copy()

    def _times(
        self, kind: str, batch: int, tokens: int, rows: list[StepRow], repeats: int
    ) -> StepTime:
        for _ in range(WARMUPS):
            self._wall_s(rows)
        wall_s = float(np.median([self._wall_s(rows) for _ in range(repeats)]))
        return StepTime(kind, batch, tokens, wall_s, self._device_s(rows, repeats))

    def _wall_s(self, rows: list[StepRow]) -> float:
        started_at_s = self._clock()
        with torch.inference_mode():
            logits = self._stepper.logits(rows)
            self._stepper.ops.sample(logits, greedy_table(len(rows)))
        return self._clock() - started_at_s

    def _device_s(self, rows: list[StepRow], repeats: int) -> float:
        """Steps queued one behind the other; the host is ahead of the device all the time."""
        ops = self._stepper.ops
        with torch.inference_mode():
            params = ops.sampling_params(greedy_table(len(rows)))
            self._kv.synchronize()
            started_at_s = self._clock()
            for _ in range(repeats):
                ops.sample_ids(self._stepper.logits(rows), params)
            self._kv.synchronize()
        return (self._clock() - started_at_s) / repeats


def greedy_table(rows: int) -> SamplingTable:
    return SamplingTable(
        np.zeros(rows), np.ones(rows), np.zeros(rows, dtype=np.int64), np.zeros(rows),
        np.zeros(rows),
    )  # fmt: skip


def run_all(
    bench: EngineBench, decodes: Sequence[tuple[int, int]], prefills: Sequence[int]
) -> Iterator[StepTime]:
    yield bench.first_token(IDLE_PROMPT_TOKENS)
    for batch, context in decodes:
        yield bench.decode(batch, context)
    for tokens in prefills:
        yield bench.prefill(tokens)
