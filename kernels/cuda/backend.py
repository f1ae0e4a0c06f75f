"""The operations on an NVIDIA GPU: our kernels, and torch for the matrix products.

Knows shapes and launch geometry; docs/kernels.md has the reasons and the bytes. Everything runs on
torch's current stream. Between `plan_step` and the ids of `sample` nothing waits for the device,
and with a step of `decode_bucket` every grid and address stays, so a forward pass can be captured
as a CUDA graph. bfloat16 only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kernels import checks
from kernels.cuda import plan
from kernels.cuda.bucket import BucketStep, DecodeBucket
from kernels.cuda.launcher import Argument, Constants, Launcher
from kernels.cuda.plan import CudaStep, Layout, LongChunk, StepShape
from kernels.ops import Heads, SamplingTable, SequenceTokens, TokenLogprobs
from kernels.torchops import sampling

VECTOR_BYTES = 16  # of one access
VECTOR = 8  # values of one access
WARP = 32
THREADS = 256  # of a block, where a kernel has no reason for another number
NORM_THREADS_MAX = 1024
DECODE_WARPS = 4
DECODE_STAGES = 3
DECODE_TILE_TOKENS = 16
PREFILL_TILE_TOKENS = 64
PREFILL_THREADS = 128
SAMPLE_THREADS = 384  # two blocks on a multiprocessor, at 80 registers a thread
SAMPLE_LISTED_BYTES = 16  # weight, value, id
SAMPLE_LISTED_MAX = 4096  # LISTED_MAX in sample.cu
# Blocks of paged_decode that a multiprocessor holds at a time, by head_dim: 96 KiB of shared memory
# each at 128; below, the registers of 128 threads allow three.
DECODE_BLOCKS_PER_SM = {16: 3, 32: 3, 64: 3, 128: 2}
DECODE_GROUP_MAX = 16  # query heads of a KV head: rows of one tensor-core tile
GRID_YZ_MAX = 65_535
TEMPERATURE_MIN = 1e-30  # below it a float32 division would meet 0 / 0


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight (out, in) as torch's matrix product takes it."""

    data: torch.Tensor
    bias: torch.Tensor | None

    @property
    def num_out(self) -> int:
        return self.data.shape[0]

    @property
    def num_in(self) -> int:
        return self.data.shape[1]


class CudaOps:
    """See kernels.ops.Ops. `num_sms`: multiprocessors of the device."""

    def __init__(
        self, launcher: Launcher, device: torch.device, num_sms: int, sample_threads: int = 0
    ) -> None:
        self._launcher = launcher
        self._device = device
        self._num_sms = num_sms
        self._sample_threads = sample_threads or SAMPLE_THREADS

    # --- weights and rows ------------------------------------------------------------------------

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> DeviceWeight:
        on_device = weight.to(self._device).contiguous()
        return DeviceWeight(on_device, None if bias is None else bias.to(self._device))

    def linear(self, x: torch.Tensor, packed: DeviceWeight) -> torch.Tensor:
        return F.linear(x, packed.data, packed.bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm("rms_norm", [x], weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        checks.shape("residual", residual, tuple(x.shape))
        return self._norm("add_rms_norm", [x, residual], weight, eps)

    def _norm(
        self, kernel: str, inputs: list[torch.Tensor], weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        rows, hidden = inputs[0].shape
        checks.shape("weight", weight, (hidden,))
        _check_values(*inputs, weight)
        out = torch.empty_like(inputs[0])
        constants = norm_constants(hidden)
        if rows:
            arguments = [*inputs, weight, out, np.float32(eps)]
            self._launch("rmsnorm", kernel, constants, (rows,), constants[1][1], arguments)
        return out

    def norm_heads(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        heads: Heads,
        eps: float,
    ) -> None:
        rows = len(qkv)
        checks.shape("qkv", qkv, (rows, _qkv_width(heads)))
        checks.shape("q_weight", q_weight, (heads.head_dim,))
        checks.shape("k_weight", k_weight, (heads.head_dim,))
        _check_values(qkv, q_weight, k_weight)
        items = rows * (heads.num_q_heads + heads.num_kv_heads) * heads.head_dim // VECTOR
        arguments = [qkv, q_weight, k_weight, np.int32(rows), np.float32(eps)]
        constants = head_constants(heads)
        self._launch("norm_heads", "norm_heads", constants, _blocks(items), THREADS, arguments)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = len(gate_up), gate_up.shape[1] // 2
        _check_values(gate_up)
        if width % VECTOR or rows > GRID_YZ_MAX:
            raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}: width or rows impossible")
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        grid = (*_blocks(width // VECTOR), rows)
        self._launch("silu_mul", "silu_mul", (), grid, THREADS, [gate_up, out, np.int32(width)])
        return out

    # --- steps -----------------------------------------------------------------------------------

    def plan_step(
        self, sequences: list[SequenceTokens], heads: Heads, block_tokens: int
    ) -> CudaStep:
        _check_heads(heads, block_tokens)
        blocks = self._decode_blocks(heads)
        layout = plan.lay_out(sequences, heads, block_tokens, blocks)
        return plan.upload(layout, heads, block_tokens, self._device)

    def decode_bucket(
        self, rows: int, blocks_max: int, heads: Heads, block_tokens: int
    ) -> BucketStep:
        """An empty step for up to `rows` decoding sequences of up to blocks_max blocks each.

        `refill` lays the next step's numbers into the same arrays, which a CUDA graph captured
        with this step then reads. Rows without a sequence write no KV; what attention and sampling
        give for them means nothing."""
        _check_heads(heads, block_tokens)
        blocks = self._decode_blocks(heads)
        shape = StepShape.of_bucket(rows, blocks_max, plan.pieces_max(rows, blocks, heads))
        bucket = DecodeBucket(shape, self._device.type == "cuda")
        layout = Layout(shape, bucket.numbers, ())
        step = plan.upload(layout, heads, block_tokens, self._device)
        return BucketStep.of(step, bucket)

    def refill(self, step: BucketStep, sequences: list[SequenceTokens]) -> None:
        """The numbers of these decoding sequences, in the bucket's arrays; one copy, no waiting.

        The step that read them before must be over. See DecodeBucket.fill for what it raises."""
        lanes = self._decode_blocks(step.heads) // step.heads.num_kv_heads
        step.bucket.fill(sequences, step.block_tokens, lanes)
        step.bucket.copy_to(step.numbers)

    def _decode_blocks(self, heads: Heads) -> int:
        """Blocks of threads that decode at the same time: as many as fit all multiprocessors."""
        return self._num_sms * DECODE_BLOCKS_PER_SM[heads.head_dim]

    # --- attention -------------------------------------------------------------------------------

    def rope_write(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_layer: torch.Tensor,
        step: CudaStep,
    ) -> torch.Tensor:
        heads, rows = step.heads, step.shape.rows
        checks.shape("qkv", qkv, (rows, _qkv_width(heads)))
        for name, table in (("cos", cos), ("sin", sin)):
            checks.shape(name, table, (rows, heads.head_dim))
            checks.dtype(name, table, torch.float32)
            checks.contiguous(name, table)
        _check_values(qkv)
        self._check_kv(kv_layer, step)
        items = rows * _qkv_width(heads) // (2 * VECTOR)
        constants = (*head_constants(heads), ("BLOCK_TOKENS", step.block_tokens))
        arguments = [qkv, cos, sin, step.slots, kv_layer, np.int32(rows)]
        self._launch(
            "rope_kv_write", "rope_kv_write", constants, _blocks(items), THREADS, arguments
        )
        return qkv.view(rows, -1, heads.head_dim)[:, : heads.num_q_heads]

    def attention(self, q: torch.Tensor, kv_layer: torch.Tensor, step: CudaStep) -> torch.Tensor:
        heads, shape = step.heads, step.shape
        checks.shape("q", q, (shape.rows, heads.num_q_heads, heads.head_dim))
        checks.dtype("q", q, torch.bfloat16)
        if q.stride()[1:] != (heads.head_dim, 1) or q.stride(0) % VECTOR:
            raise ValueError(f"q has strides {q.stride()}, expected contiguous heads")
        self._check_kv(kv_layer, step)
        width = heads.num_q_heads * heads.head_dim
        out = torch.empty(shape.rows, width, dtype=q.dtype, device=q.device)
        if shape.decode_rows:
            self._decode(q, kv_layer, step, out)
        if shape.tiles:
            self._prefill(q, kv_layer, step, out)
        for chunk in step.long_chunks:
            self._long_chunk(q, kv_layer, step, chunk, out)
        return out

    def _decode(
        self, q: torch.Tensor, kv_layer: torch.Tensor, step: CudaStep, out: torch.Tensor
    ) -> None:
        heads, shape = step.heads, step.shape
        constants = decode_constants(heads, step.block_tokens)
        arguments = [
            *(q, kv_layer, step.tables, step.pieces, step.num_pieces),
            *(out, step.partial, step.softmax),
            np.int64(q.stride(0)),
            np.int32(shape.blocks_max),
            _scale(heads),
        ]
        grid = (min(self._decode_blocks(heads), shape.pieces * heads.num_kv_heads),)
        threads = DECODE_WARPS * WARP
        self._launch(
            "paged_decode",
            "paged_decode",
            constants,
            grid,
            threads,
            arguments,
            decode_shared_bytes(heads),
        )
        if shape.pieces > shape.decode_rows:
            grid = (shape.decode_rows, -(-heads.num_q_heads // DECODE_WARPS))
            arguments = [step.places, step.partial, step.softmax, out]
            self._launch("paged_decode", "combine_pieces", constants, grid, threads, arguments)

    def _prefill(
        self, q: torch.Tensor, kv_layer: torch.Tensor, step: CudaStep, out: torch.Tensor
    ) -> None:
        heads, shape = step.heads, step.shape
        self._launch(
            "chunked_prefill",
            "chunked_prefill",
            prefill_constants(heads, step.block_tokens),
            (shape.tiles, heads.num_kv_heads),
            PREFILL_THREADS,
            [
                *(q, kv_layer, step.tables, step.tiles, out),
                np.int64(q.stride(0)),
                np.int32(shape.blocks_max),
                _scale(heads),
            ],
            prefill_shared_bytes(heads),
        )

    def _long_chunk(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        step: CudaStep,
        chunk: LongChunk,
        out: torch.Tensor,
    ) -> None:
        """The chunk's context gathered in token order, then torch's attention."""
        heads, num_tokens = step.heads, chunk.start + chunk.count
        kv = torch.empty(
            (2, 1, heads.num_kv_heads, num_tokens, heads.head_dim), dtype=q.dtype, device=q.device
        )
        grid = (*_blocks(num_tokens * heads.head_dim // VECTOR), 2 * heads.num_kv_heads)
        arguments = [kv_layer, step.tables[chunk.table], kv, np.int32(num_tokens)]
        constants = gather_constants(heads, step.block_tokens)
        self._launch("kv_gather", "kv_gather", constants, grid, THREADS, arguments)
        rows = slice(chunk.row, chunk.row + chunk.count)
        queries = q[rows].transpose(0, 1)[None]
        if chunk.start == 0:
            made = F.scaled_dot_product_attention(
                queries, kv[0], kv[1], is_causal=True, enable_gqa=True
            )
        else:
            mask = causal_lower_right(chunk.count, num_tokens)
            made = F.scaled_dot_product_attention(queries, kv[0], kv[1], mask, enable_gqa=True)
        out[rows] = made[0].transpose(0, 1).reshape(chunk.count, -1)

    # --- sampling --------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        ids = self.sample_ids(logits, self.sampling_params(table)).tolist()
        return [None if token_id < 0 else token_id for token_id in ids]

    def sampling_params(self, table: SamplingTable) -> torch.Tensor:
        """The table on the device: (rows, 5) float64 in the order of Column in sample.cu."""
        temperature = np.where(
            table.temperature > 0.0, np.maximum(table.temperature, TEMPERATURE_MIN), 0.0
        )
        columns = (temperature, table.top_p, table.top_k, table.min_p, table.uniform)
        params = torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))
        if self._device.type == "cuda":
            params = params.pin_memory()  # from other memory the copy would wait for the stream
        return params.to(self._device, non_blocking=True)

    def sample_ids(self, logits: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """As `sample`, without waiting: (rows,) int32 on the device, -1 for None.

        logits (rows, vocab) bfloat16 or float32; params from `sampling_params`."""
        rows = len(logits)
        checks.shape("logits", logits, (len(params), None))
        checks.dtype("logits", logits, torch.bfloat16, torch.float32)
        padded = F.pad(logits, (0, -logits.shape[1] % VECTOR), value=-math.inf).contiguous()
        ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
        constants = sample_constants(logits.dtype, self._sample_threads)
        arguments = [padded, params, ids, np.int32(padded.shape[1])]
        if rows:
            shared_bytes = SAMPLE_LISTED_MAX * SAMPLE_LISTED_BYTES
            self._launch(
                "sample", "sample", constants, (rows,), constants[0][1], arguments, shared_bytes
            )
        return ids

    def logprobs(
        self, logits: torch.Tensor, token_ids: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        return sampling.logprobs(logits, token_ids, num_top)

    # --- launching -------------------------------------------------------------------------------

    def _check_kv(self, kv_layer: torch.Tensor, step: CudaStep) -> None:
        heads = step.heads
        expected = (None, 2, heads.num_kv_heads, step.block_tokens, heads.head_dim)
        checks.shape("kv_layer", kv_layer, expected)
        _check_values(kv_layer)

    def _launch(
        self,
        file: str,
        kernel: str,
        constants: Constants,
        grid: tuple[int, ...],
        threads: int,
        arguments: Sequence[Argument],
        shared_bytes: int = 0,
    ) -> None:
        function = self._launcher.function(file, kernel, constants)
        function(grid, (threads,), arguments, shared_bytes)


# --- constants of the kernels --------------------------------------------------------------------


def norm_constants(hidden: int) -> Constants:
    """Two vectors a thread where a row is long enough: both loads are in flight together."""
    if hidden % VECTOR or hidden > VECTOR * 4 * NORM_THREADS_MAX:
        raise ValueError(f"hidden size {hidden}: expected a multiple of {VECTOR}, at most 32768")
    warps = -(-hidden // (2 * VECTOR * WARP))
    return (("HIDDEN", hidden), ("THREADS", min(warps * WARP, NORM_THREADS_MAX)))


def head_constants(heads: Heads) -> Constants:
    return (
        ("HEAD_DIM", heads.head_dim),
        ("Q_HEADS", heads.num_q_heads),
        ("KV_HEADS", heads.num_kv_heads),
    )


def gather_constants(heads: Heads, block_tokens: int) -> Constants:
    return (
        ("HEAD_DIM", heads.head_dim),
        ("KV_HEADS", heads.num_kv_heads),
        ("BLOCK_TOKENS", block_tokens),
    )


def prefill_constants(heads: Heads, block_tokens: int) -> Constants:
    return (("GROUP", heads.group), *gather_constants(heads, block_tokens))


def decode_constants(heads: Heads, block_tokens: int) -> Constants:
    shared = prefill_constants(heads, block_tokens)
    return (*shared, ("WARPS", DECODE_WARPS), ("STAGES", DECODE_STAGES))


def decode_shared_bytes(heads: Heads) -> int:
    """K and V of DECODE_STAGES tiles for each warp."""
    return DECODE_WARPS * DECODE_STAGES * 2 * DECODE_TILE_TOKENS * heads.head_dim * 2


def prefill_shared_bytes(heads: Heads) -> int:
    """Two stages of K and V."""
    return 2 * 2 * PREFILL_TILE_TOKENS * heads.head_dim * 2


def sample_constants(dtype: torch.dtype, threads: int) -> Constants:
    return (("THREADS", threads), ("IS_BF16", int(dtype == torch.bfloat16)))


def _check_heads(heads: Heads, block_tokens: int) -> None:
    if heads.head_dim not in DECODE_BLOCKS_PER_SM:
        raise ValueError(f"head_dim {heads.head_dim}: expected one of {[*DECODE_BLOCKS_PER_SM]}")
    if heads.group > DECODE_GROUP_MAX or heads.num_q_heads % heads.num_kv_heads:
        raise ValueError(f"{heads}: expected 1 to {DECODE_GROUP_MAX} query heads per KV head")
    if block_tokens % DECODE_TILE_TOKENS:
        raise ValueError(f"blocks of {block_tokens} tokens: expected a multiple of 16")


def _check_values(*tensors: torch.Tensor) -> None:
    """A misaligned address would end the CUDA context, and the worker with it."""
    for tensor in tensors:
        checks.dtype("a tensor", tensor, torch.bfloat16)
        checks.contiguous("a tensor", tensor)
        if tensor.data_ptr() % VECTOR_BYTES:
            raise ValueError(f"a tensor starts at {tensor.data_ptr():#x}, not a multiple of 16")


def _qkv_width(heads: Heads) -> int:
    return (heads.num_q_heads + 2 * heads.num_kv_heads) * heads.head_dim


def _scale(heads: Heads) -> np.float32:
    """Of scores, for exponentials to the base 2."""
    return np.float32(math.log2(math.e) / math.sqrt(heads.head_dim))


def _blocks(items: int) -> tuple[int]:
    """A grid with one thread per item."""
    return (-(-items // THREADS),)
