"""Turns a plan into one forward pass and sampled ids; loads and calibrates a model on CPUs.

`load` reads the model folder, chooses dtype and exact paddings by probing this machine, and
measures the step model that the scheduler plans with. cudarunner.py does the same for a GPU.
"""

import time
from pathlib import Path

import torch

from controlplane import protocol
from controlplane.errors import ConfigError
from controlplane.latency import LatencyModel, StepFeatures
from gpuworkers.calibration import faster_dtype, fit_step_model, memory_bytes, processor_name
from gpuworkers.engine import RunResult
from gpuworkers.grammar import Grammars
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import LlamaConfig, read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.sampler import edit, logprobs_of, sampling_table
from gpuworkers.scheduler import Plan, PlanRow
from gpuworkers.sequence import Sequence
from gpuworkers.stepper import BlockTables, GraphStepper, LayerWritten, Stepper, StepRow
from gpuworkers.weights import WeightFiles
from kernels.torchops import backend, linear

BLOCK_TOKENS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUMERICS = ("exact", "fast")
KV_TOKENS_DEFAULT = 16_384  # where memory allows it
KV_MEMORY_SHARE = 1 / 16  # of physical memory, for the default
Shapes = tuple[tuple[int, int, int], ...]  # (sequences, tokens before, tokens to compute)
CALIBRATION_STEPS: Shapes = (
    (1, 64, 1),
    (4, 64, 1),
    (4, 256, 1),
    (16, 64, 1),
    (1, 0, 64),
    (1, 0, 192),
)
CALIBRATION_REPEATS = 2


class TorchRunner:
    """See engine.Runner. Not thread safe: one engine thread."""

    def __init__(
        self, stepper: Stepper | GraphStepper, kv: TorchKVCache, grammars: Grammars | None = None
    ) -> None:
        self.stepper = stepper
        self.model = stepper.model
        self.ops = stepper.ops
        self.kv = kv
        self.eos_token_ids = self.model.config.eos_token_ids
        self._tables = BlockTables()
        self._grammars = grammars

    @property
    def can_guide(self) -> bool:
        """See engine.Runner."""
        return self._grammars is not None

    def prepare(self) -> None:
        """See engine.Runner; nothing to do."""

    def run(self, plan: Plan, layer_written: LayerWritten | None = None) -> RunResult:
        """Compute the plan's rows and draw the ids of those that sample. Raises DeviceFailed."""
        with torch.inference_mode(), self.kv.work():
            logits = self.logits(plan.rows, layer_written)
            sampling = [row.sequence for row in plan.rows if row.samples]
            if not sampling:
                self.kv.synchronize()
                return RunResult([])
            edited = edit(logits, sampling, self.eos_token_ids, self._grammars)
            token_ids = self.ops.sample(edited, sampling_table(sampling))
            return RunResult(token_ids, logprobs_of(self.ops, logits, sampling, token_ids))

    def logits(
        self, rows: tuple[PlanRow, ...], layer_written: LayerWritten | None = None
    ) -> torch.Tensor:
        """Logits of the rows that sample, in their order; writes KV of all rows."""
        tables = self._tables.take([row.sequence.block_ids for row in rows])
        return self.stepper.logits(
            [
                StepRow(
                    row.sequence.token_ids[row.start : row.start + row.count],
                    row.start,
                    table,
                    row.samples,
                )
                for row, table in zip(rows, tables, strict=True)
            ],
            layer_written,
        )


def load(
    model_dir: str | Path,
    model_id: str,
    dtype: str = "auto",
    numerics: str = "exact",
    kv_tokens: int = 0,
    threads: int = 1,
) -> tuple[TorchRunner, protocol.ModelFacts, protocol.DeviceFacts, LatencyModel]:
    """A runner for the model folder, and the facts that a worker tells about itself.

    kv_tokens 0 takes KV_TOKENS_DEFAULT, or less on a machine with little memory.
    Raises ConfigError for an impossible option and ModelError for an unusable folder."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    if numerics not in NUMERICS:
        raise ConfigError(f"numerics={numerics!r}: expected one of {', '.join(NUMERICS)}")
    folder = Path(model_dir)
    config = read_config(folder)
    if 0 < kv_tokens < BLOCK_TOKENS or kv_tokens < 0 or threads < 1:
        raise ConfigError(f"kv_tokens={kv_tokens}, threads={threads}: too small")
    torch.set_num_threads(threads)
    with torch.no_grad():  # not inference mode: handoff writes into the KV arrays later
        chosen = (
            faster_dtype(config.hidden_size, config.intermediate_size)
            if dtype == "auto"
            else DTYPES[dtype]
        )
        ops = backend.TorchOps(_layout(chosen, numerics))
        files = WeightFiles(folder)
        num_blocks = (kv_tokens or _default_kv_tokens(config, chosen)) // BLOCK_TOKENS
        max_model_len = min(config.max_model_len, num_blocks * BLOCK_TOKENS)
        model = load_llama(config, files, chosen, ops, max_model_len)
        if numerics == "exact":
            ops = backend.exact(ops, model.packed_shapes(), chosen, model.heads)
        kv = TorchKVCache(config.num_layers, num_blocks, BLOCK_TOKENS, model.heads, chosen)
    grammars = Grammars.of_folder(folder, config.vocab_size, config.eos_token_ids)
    runner = TorchRunner(Stepper(model, ops, kv.layers, BLOCK_TOKENS), kv, grammars)
    bytes_per_token = kv.layer_block_bytes * config.num_layers // BLOCK_TOKENS
    facts = protocol.ModelFacts(
        model_id, files.sha256(), max_model_len, config.vocab_size, bytes_per_token
    )
    return runner, facts, device_facts(kv.dtype_name), LatencyModel(calibrate(runner))


def _default_kv_tokens(config: LlamaConfig, dtype: torch.dtype) -> int:
    heads = config.num_layers * config.num_kv_heads
    token_bytes = 2 * heads * config.head_dim * dtype.itemsize
    affordable = int(memory_bytes() * KV_MEMORY_SHARE) // token_bytes
    return max(BLOCK_TOKENS, min(KV_TOKENS_DEFAULT, affordable))


def _layout(dtype: torch.dtype, numerics: str) -> linear.Layout:
    """How weights lie: for equal rows, or for the fastest single row."""
    if numerics == "fast" and dtype == torch.float32:
        return "transposed"
    return "packed" if linear.has_packing(dtype) else "plain"


def device_facts(dtype_name: str) -> protocol.DeviceFacts:
    """This machine's processor; num_sms counts the threads that torch uses."""
    return protocol.DeviceFacts(
        "cpu", processor_name(), memory_bytes(), torch.get_num_threads(), dtype_name
    )


def calibrate(
    runner: TorchRunner, steps: Shapes = CALIBRATION_STEPS, repeats: int = CALIBRATION_REPEATS
) -> protocol.StepModel:
    """Measure a few step shapes (the best of `repeats`) and fit the step model."""
    observed = []
    for num_sequences, start, count in steps:
        rows = _calibration_rows(runner, num_sequences, start, count)
        if rows is None:
            continue
        features = StepFeatures()
        for row in rows:
            features = features.with_tokens(row.start, row.count)
        plan = Plan(rows, len(rows), features, 0.0, 0.0, 0.0)
        best_s = float("inf")
        for _ in range(repeats):
            started_at_s = time.perf_counter()
            runner.run(plan)
            best_s = min(best_s, time.perf_counter() - started_at_s)
        observed.append((features, best_s))
    return fit_step_model(observed)


def _calibration_rows(
    runner: TorchRunner, num_sequences: int, start: int, count: int
) -> tuple[PlanRow, ...] | None:
    """Rows of made-up sequences over the first blocks; None where the KV cache is too small."""
    length = start + count
    num_blocks = -(-length // runner.kv.block_tokens)
    if num_sequences * num_blocks > runner.kv.num_blocks:
        return None
    if length > runner.model.config.max_model_len:
        return None
    rows = []
    for index in range(num_sequences):
        sequence = Sequence(
            request_id=f"calibration-{index}",
            epoch=0,
            stage="full",
            salt=b"",
            sampling=protocol.Sampling(output_tokens_max=1),
            targets=protocol.ClassTargets("calibration", 0, 1.0, 1.0),
            token_ids=[i % runner.model.config.vocab_size for i in range(length)],
            prompt_tokens=length,
            delivered_tokens=0,
            arrived_at_s=0.0,
            computed_tokens=start,
            block_ids=list(range(index * num_blocks, (index + 1) * num_blocks)),
        )
        rows.append(PlanRow(sequence, start, count, True))
    return tuple(rows)
