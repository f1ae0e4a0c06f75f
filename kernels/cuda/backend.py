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
SAMPLE_STREAMS = 3  # STREAMS in sample.cu
SAMPLE_LISTED_BYTES = 16  # weight, value, id
SAMPLE_LISTED_MAX = 4096  # LISTED_MAX in sample.cu
WIDE_THREADS = 1024
WIDE_KEYS = 1 << 16  # a count of 2 bytes for each value of a bfloat16
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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """A sampling table on the device. `is_wide`: some row's cut may keep many ids."""

    rows: torch.Tensor  # (rows, 5) float64 in the order of Column in sample.cu
    is_wide: bool


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
        layout = plan.lay_out(sequences, heads, block_tokens, self._lanes(heads))
        return plan.upload(layout, heads, block_tokens, self._device)

    def decode_bucket(
        self, rows: int, blocks_max: int, heads: Heads, block_tokens: int
    ) -> BucketStep:
        """An empty step for up to `rows` decoding sequences of up to blocks_max blocks each.

        `refill` lays the next step's numbers into the same arrays, which a CUDA graph captured
        with this step then reads. Rows without a sequence write no KV; what attention and sampling
        give for them means nothing."""
        _check_heads(heads, block_tokens)
        shape = StepShape.of_bucket(rows, blocks_max, self._lanes(heads))
        bucket = DecodeBucket(shape, self._device.type == "cuda")
        layout = Layout(shape, bucket.numbers, ())
        step = plan.upload(layout, heads, block_tokens, self._device)
        return BucketStep.of(step, bucket)

    def refill(self, step: BucketStep, sequences: list[SequenceTokens]) -> None:
        """The numbers of these decoding sequences, in the bucket's arrays; one copy, no waiting.

        The step that read them before must be over. See DecodeBucket.fill for what it raises."""
        step.bucket.fill(sequences, step.block_tokens)
        step.bucket.copy_to(step.numbers)

    def _lanes(self, heads: Heads) -> int:
        """Blocks of threads of a KV head that decode at the same time: of all heads, as many as
        fit all multiprocessors."""
        blocks = self._num_sms * DECODE_BLOCKS_PER_SM[heads.head_dim]
        return max(1, blocks // heads.num_kv_heads)

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
        if len(step.long_chunks) == 1 and step.long_chunks[0].count == shape.rows:
            return self._long_chunk(q, kv_layer, step, step.long_chunks[0])
        out = torch.empty(shape.rows, width, dtype=q.dtype, device=q.device)
        if shape.decode_rows:
            self._decode(q, kv_layer, step, out)
        if shape.tiles:
            self._prefill(q, kv_layer, step, out)
        for chunk in step.long_chunks:
            made = self._long_chunk(q, kv_layer, step, chunk)
            out[chunk.row : chunk.row + chunk.count] = made
        return out

    def _decode(
        self, q: torch.Tensor, kv_layer: torch.Tensor, step: CudaStep, out: torch.Tensor
    ) -> None:
        heads, shape = step.heads, step.shape
        constants = decode_constants(heads, step.block_tokens)
        arguments = [
            *(q, kv_layer, step.tables, step.pieces, step.lane_first),
            *(out, step.partial, step.softmax, step.arrivals),
            np.int64(q.stride(0)),
            np.int32(shape.blocks_max),
            _scale(heads),
        ]
        grid = (shape.lanes * heads.num_kv_heads,)
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
    ) -> torch.Tensor:
        """The chunk's context gathered in token order, then torch's attention; (count, width)."""
        heads, num_tokens = step.heads, chunk.start + chunk.count
        padded = num_tokens if chunk.start else plan.padded_tokens(num_tokens)
        kv = torch.empty(
            (2, 1, heads.num_kv_heads, padded, heads.head_dim), dtype=q.dtype, device=q.device
        )
        grid = (*_blocks(padded * heads.head_dim // VECTOR), 2 * heads.num_kv_heads)
        arguments = [
            *(kv_layer, step.tables[chunk.table], kv, np.int32(num_tokens), np.int32(padded))
        ]
        constants = gather_constants(heads, step.block_tokens)
        self._launch("kv_gather", "kv_gather", constants, grid, THREADS, arguments)
        queries = q[chunk.row : chunk.row + chunk.count]
        if padded > num_tokens:  # what the rows behind the chunk hold reaches no other row
            wider = torch.empty((padded, *queries.shape[1:]), dtype=q.dtype, device=q.device)
            wider[: chunk.count] = queries
            queries = wider
        made = _long_attention(queries, kv, chunk.start)
        # torch's fused kernels write heads of a token side by side: the reshape copies nothing.
        return made[0].transpose(0, 1)[: chunk.count].reshape(chunk.count, -1)

    def prepare_chunks(self, heads: Heads, tokens_max: int) -> None:
        """Let torch's attention meet every number of tokens that `attention` gives it for first
        chunks up to tokens_max, padded or as they lie beside K and V: cuDNN prepares for each,
        once in a thread."""
        sizes = {plan.padded_tokens(n) for n in range(plan.SDPA_TOKENS_MIN, tokens_max + 1)}
        for size in sorted(sizes):
            kv_shape = (2, 1, heads.num_kv_heads, size, heads.head_dim)
            kv = torch.zeros(kv_shape, dtype=torch.bfloat16, device=self._device)
            qkv = torch.zeros((size, _qkv_width(heads)), dtype=torch.bfloat16, device=self._device)
            beside = qkv.view(size, -1, heads.head_dim)[:, : heads.num_q_heads]
            for queries in (beside.contiguous(), beside):
                _long_attention(queries, kv, 0)

    # --- sampling --------------------------------------------------------------------------------

    def sample(self, logits: torch.Tensor, table: SamplingTable) -> list[int | None]:
        ids = self.sample_ids(logits, self.sampling_params(table)).tolist()
        return [None if token_id < 0 else token_id for token_id in ids]

    def sampling_params(self, table: SamplingTable) -> SamplingParams:
        """The table on the device, without waiting."""
        temperature = np.where(
            table.temperature > 0.0, np.maximum(table.temperature, TEMPERATURE_MIN), 0.0
        )
        columns = (temperature, table.top_p, table.top_k, table.min_p, table.uniform)
        params = torch.from_numpy(np.stack(columns, axis=1).astype(np.float64))
        if self._device.type == "cuda":
            params = params.pin_memory()  # from other memory the copy would wait for the stream
        is_short = (table.top_k > 0) & (table.top_k <= sample_ranks(self._sample_threads))
        is_cut = (table.top_p < 1.0) | (table.min_p > 0.0) | (table.top_k > 0)
        is_wide = bool((is_cut & ~is_short & (temperature > 0.0)).any())
        return SamplingParams(params.to(self._device, non_blocking=True), is_wide)

    def sample_ids(self, logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """As `sample`, without waiting: (rows,) int32 on the device, -1 for None.

        logits (rows, vocab) bfloat16 or float32; params from `sampling_params`."""
        rows = len(logits)
        checks.shape("logits", logits, (len(params.rows), None))
        checks.dtype("logits", logits, torch.bfloat16, torch.float32)
        padded = logits.contiguous()
        if missing := -logits.shape[1] % VECTOR:  # even an empty pad would copy all logits
            padded = F.pad(padded, (0, missing), value=-math.inf)
        ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
        if not rows:
            return ids
        threads, vocab = self._sample_threads, np.int32(padded.shape[1])
        arguments = [padded, params.rows, ids, vocab]
        is_wide = params.is_wide and logits.dtype == torch.bfloat16
        if is_wide:
            constants = wide_constants(threads)
            shared_bytes = WIDE_KEYS * 2
            self._launch(
                "sample_wide", "sample_wide", constants, (rows,), WIDE_THREADS, arguments,
                shared_bytes,
            )  # fmt: skip
        constants = sample_constants(logits.dtype, threads)
        shared_bytes = SAMPLE_LISTED_MAX * SAMPLE_LISTED_BYTES
        arguments.append(np.int32(is_wide))
        self._launch("sample", "sample", constants, (rows,), threads, arguments, shared_bytes)
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


def _long_attention(queries: torch.Tensor, kv: torch.Tensor, start: int) -> torch.Tensor:
    """torch's attention of (tokens, heads, dim) queries from token `start` on, over all of kv
    (2, 1, kv_heads, start + tokens, dim); (1, heads, tokens, dim)."""
    by_head = queries.transpose(0, 1)[None]
    if start == 0:
        return F.scaled_dot_product_attention(by_head, *kv, is_causal=True, enable_gqa=True)
    mask = causal_lower_right(len(queries), kv.shape[3])
    return F.scaled_dot_product_attention(by_head, *kv, mask, enable_gqa=True)


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
    return (*shared, ("WARPS", DECODE_WARPS), ("STAGES", decode_stages(heads)))


def decode_stages(heads: Heads) -> int:
    """Tiles of a ring: as many as leave room for the sums and for another block beside."""
    return DECODE_STAGES if heads.group <= DECODE_GROUP_MAX // 2 else DECODE_STAGES - 1


def decode_shared_bytes(heads: Heads) -> int:
    """For each warp K and V of the ring's tiles, and the sums of its heads in float32."""
    ring = decode_stages(heads) * 2 * DECODE_TILE_TOKENS * heads.head_dim * 2
    return DECODE_WARPS * (ring + heads.group * heads.head_dim * 4)


def prefill_shared_bytes(heads: Heads) -> int:
    """Two stages of K and V."""
    return 2 * 2 * PREFILL_TILE_TOKENS * heads.head_dim * 2


def sample_constants(dtype: torch.dtype, threads: int) -> Constants:
    return (("THREADS", threads), ("IS_BF16", int(dtype == torch.bfloat16)))


def sample_ranks(threads: int) -> int:
    """GROUP_RANK_MAX in sample.cu: heads up to it are always found in the list."""
    return threads * SAMPLE_STREAMS * 3 // 4


def wide_constants(sample_threads: int) -> Constants:
    return (("THREADS", WIDE_THREADS), ("TOP_K_MAX", sample_ranks(sample_threads)))


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
