"""Times the kernels on a GPU beside ceilings of the same run: `python -m kernels.bench [--json]`.

A run is timed by CUDA events after the L2 cache was overwritten; the median counts. Bytes are what
an operation must move at least, operations what it must compute; both over the time, beside a
device copy and a bf16 matrix product measured here. Attention stands beside the fastest backend of
torch's scaled_dot_product_attention on contiguous KV of the same lengths, sampling beside torch's
argmax and topk.
"""

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.ops import Heads, SamplingTable, SequenceTokens

WARMUPS = 3
REPEATS = 21
FLUSH_BYTES = 512 << 20  # several times any L2; also keeps the device busy while the host launches
COPY_BYTES = 1 << 30
GEMM_SIZE = 8192
SEED = 20261124
EPS = 1e-5

Run = Callable[[], object]
Timer = Callable[[Run], float]  # median seconds of one run
Bound = Literal["copy", "gemm"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model whose operations are timed; Llama-3.1-8B's, one layer."""

    heads: Heads = Heads(32, 8, 128)
    hidden: int = 4096
    width: int = 14_336
    vocab: int = 128_256
    block_tokens: int = 64
    long_rows: int = 16_384  # >= 64 MB moved by every row-wise operation
    short_rows: int = 64  # a decode step: microseconds count there
    decodes: tuple[tuple[int, int], ...] = (  # (batch, context)
        (1, 4096), (64, 1024), (64, 4096), (128, 4096), (256, 1024), (256, 4096), (64, 16_384),
    )  # fmt: skip
    prefills: tuple[tuple[int, int], ...] = (  # (tokens before, tokens to compute)
        (0, 1024), (0, 2048), (0, 4096), (0, 8192), (0, 16_384), (7680, 512),
    )  # fmt: skip
    sampled_rows: int = 256
    linear_rows: tuple[int, ...] = (1, 64, 128, 256, 512, 1024, 2048, 8192)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size. `rivals` are torch's ways to do the same, by name."""

    kernel: str
    size: str
    num_bytes: int
    num_flops: int
    bound: Bound
    run: Run
    rivals: dict[str, Run]


@dataclass(frozen=True, slots=True)
class Row:
    """A measured case; `share` of the ceiling that bounds it, `ratio` rival over ours."""

    kernel: str
    size: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    bound: Bound
    share: float
    rival: str | None
    rival_us: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy_gb_per_s: float  # bytes read and written
    gemm_tflop_per_s: float


class CudaTimer:
    """See Timer."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> float:
        for _ in range(WARMUPS):
            run()
        pairs = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return float(np.median([start.elapsed_time(end) for start, end in pairs])) / 1000


def ceilings(timer: Timer, device: torch.device, copy_bytes: int, gemm_size: int) -> Ceilings:
    """What the device reaches now: a copy, and a product of random bf16 matrices."""
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = timer(lambda: target.copy_(source))
    left, right = (_random((gemm_size, gemm_size), device) for _ in range(2))
    gemm_s = timer(lambda: left @ right)
    return Ceilings(2 * copy_bytes / copy_s / 1e9, 2 * gemm_size**3 / gemm_s / 1e12)


def _random(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def cases(ops: Any, device: torch.device, shape: Shape) -> Iterator[Case]:
    """Every operation at every size; arrays live until the next case is asked for. `ops` are the
    CUDA backend's."""
    torch.manual_seed(SEED)
    for rows in (shape.long_rows, shape.short_rows):
        yield from _row_wise(ops, device, shape, rows)
    for batch, context in shape.decodes:
        yield _decode(ops, device, shape, batch, context)
    for start, count in shape.prefills:
        yield _prefill(ops, device, shape, start, count)
    yield from _sampling(ops, device, shape)
    for rows in shape.linear_rows:
        yield from _linears(ops, device, shape, rows)


def _linears(ops: Any, device: torch.device, shape: Shape, rows: int) -> Iterator[Case]:
    """The matrix products of a layer, which are torch's: what a step takes beside our kernels. The
    fused gate and up stands beside its two halves."""
    heads, hidden, width = shape.heads, shape.hidden, shape.width
    q_size = heads.num_q_heads * heads.head_dim
    kv_size = heads.num_kv_heads * heads.head_dim
    sizes = {
        "qkv": (q_size + 2 * kv_size, hidden),
        "out": (hidden, q_size),
        "gate up": (2 * width, hidden),
        "down": (hidden, width),
    }
    if rows <= shape.sampled_rows:
        sizes["head"] = (shape.vocab, hidden)
    for name, (num_out, num_in) in sizes.items():
        weight, x = _random((num_out, num_in), device), _random((rows, num_in), device)
        packed = ops.pack(weight)
        rivals: dict[str, Run] = {}
        if name == "gate up":
            halves = [ops.pack(half) for half in weight.chunk(2)]
            rivals = {"two halves": lambda x=x, h=halves: [ops.linear(x, half) for half in h]}
        yield Case(
            f"linear {name}",
            f"{rows} rows",
            2 * (num_out * num_in + rows * (num_in + num_out)),
            2 * rows * num_out * num_in,
            "gemm" if rows > shape.sampled_rows else "copy",
            lambda x=x, packed=packed: ops.linear(x, packed),
            rivals,
        )


def _row_wise(ops: Any, device: torch.device, shape: Shape, rows: int) -> Iterator[Case]:
    heads, hidden, width = shape.heads, shape.hidden, shape.width
    size = f"{rows} rows"
    x, residual = _random((rows, hidden), device), _random((rows, hidden), device)
    weight = _random((hidden,), device)
    row_bytes = rows * hidden * 2
    yield Case(
        "rms_norm", size, 2 * row_bytes, 0, "copy",
        lambda: ops.rms_norm(x, weight, EPS), {},
    )  # fmt: skip
    yield Case(
        "add_rms_norm", size, 4 * row_bytes, 0, "copy",
        lambda: ops.add_rms_norm(x, residual, weight, EPS), {},
    )  # fmt: skip
    gate_up = _random((rows, 2 * width), device)
    yield Case("silu_mul", size, 3 * rows * width * 2, 0, "copy", lambda: ops.silu_mul(gate_up), {})
    dim, num_q, num_kv = heads.head_dim, heads.num_q_heads, heads.num_kv_heads
    qkv = _random((rows, (num_q + 2 * num_kv) * dim), device)
    head_weight = _random((dim,), device)
    yield Case(
        "norm_heads", size, 2 * rows * (num_q + num_kv) * dim * 2, 0, "copy",
        lambda: ops.norm_heads(qkv, head_weight, head_weight, heads, EPS), {},
    )  # fmt: skip
    angles = torch.randn(rows, dim, device=device)
    cos, sin = angles.cos(), angles.sin()
    num_blocks = -(-rows // shape.block_tokens)
    layer = _layer(num_blocks, shape, device)
    step = ops.plan_step([_sequence(0, rows, shape)], heads, shape.block_tokens)
    # All heads are read; Q is written in place, K and V to the cache; cos and sin are float32.
    moved = 2 * rows * (num_q + 2 * num_kv) * dim * 2 + 2 * rows * dim * 4
    yield Case(
        "rope_write", size, moved, 0, "copy",
        lambda: ops.rope_write(qkv, cos, sin, layer, step), {},
    )  # fmt: skip


def _layer(num_blocks: int, shape: Shape, device: torch.device) -> torch.Tensor:
    heads = shape.heads
    size = (num_blocks, 2, heads.num_kv_heads, shape.block_tokens, heads.head_dim)
    return _random(size, device)


def _sequence(start: int, count: int, shape: Shape) -> SequenceTokens:
    """One sequence over the first blocks of a layer, in shuffled order."""
    num_blocks = -(-(start + count) // shape.block_tokens)
    table = np.random.default_rng(SEED).permutation(num_blocks)
    return SequenceTokens(start, count, table)


def _decode(ops: Any, device: torch.device, shape: Shape, batch: int, context: int) -> Case:
    heads, dim = shape.heads, shape.heads.head_dim
    per_row = -(-context // shape.block_tokens)
    layer = _layer(batch * per_row, shape, device)
    order = np.random.default_rng(SEED).permutation(batch * per_row).reshape(batch, per_row)
    step = ops.decode_bucket(batch, per_row, heads, shape.block_tokens)
    ops.refill(step, [SequenceTokens(context - 1, 1, blocks) for blocks in order])
    q = _random((batch, heads.num_q_heads, dim), device)
    moved = batch * 2 * dim * 2 * (context * heads.num_kv_heads + heads.num_q_heads)
    flops = 4 * batch * heads.num_q_heads * dim * context
    keys, values = (_random((batch, heads.num_kv_heads, context, dim), device) for _ in range(2))
    return Case(
        "decode attention", f"{batch} x {context}", moved, flops, "copy",
        lambda: ops.attention(q, layer, step), _sdpa(q[:, :, None], keys, values, False),
    )  # fmt: skip


def _prefill(ops: Any, device: torch.device, shape: Shape, start: int, count: int) -> Case:
    heads, dim = shape.heads, shape.heads.head_dim
    end = start + count
    layer = _layer(-(-end // shape.block_tokens), shape, device)
    step = ops.plan_step([_sequence(start, count, shape)], heads, shape.block_tokens)
    q = _random((count, heads.num_q_heads, dim), device)
    pairs = count * start + count * (count + 1) // 2
    moved = 2 * dim * 2 * (end * heads.num_kv_heads + count * heads.num_q_heads)
    keys, values = (_random((1, heads.num_kv_heads, end, dim), device) for _ in range(2))
    rivals = {} if start else _sdpa(q.transpose(0, 1)[None].contiguous(), keys, values, True)
    return Case(
        "prefill attention", f"{count} after {start}", moved,
        4 * heads.num_q_heads * dim * pairs, "gemm",
        lambda: ops.attention(q, layer, step), rivals,
    )  # fmt: skip


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> dict[str, Run]:
    """Each fused backend that takes these arguments; q, k, v (batch, heads, tokens, dim)."""
    backends = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    )  # fmt: skip

    def with_backend(backend: SDPBackend) -> Run:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

        return run

    runs = {f"sdpa {b.name.split('_')[0].lower()}": with_backend(b) for b in backends}
    return {name: run for name, run in runs.items() if _works(run)}


def _works(run: Run) -> bool:
    try:
        run()
    except RuntimeError:  # this backend does not take these shapes, or is not on this device
        return False
    return True


def _sampling(ops: Any, device: torch.device, shape: Shape) -> Iterator[Case]:
    rows, vocab = shape.sampled_rows, shape.vocab
    logits = _random((rows, vocab), device)
    draws = np.random.default_rng(SEED).random(rows)
    num_bytes = rows * vocab * 2
    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top-k 50", 0.8, 50, 1.0),
        ("top-k 50, top-p 0.9", 0.8, 50, 0.9), ("top-p 0.9", 0.8, 0, 0.9),
    ):  # fmt: skip
        table = SamplingTable(
            temperature=np.full(rows, temperature),
            top_p=np.full(rows, top_p),
            top_k=np.full(rows, top_k, dtype=np.int64),
            min_p=np.zeros(rows),
            uniform=draws,
        )
        params = ops.sampling_params(table)
        rival: dict[str, Run] = {}
        if name == "greedy":
            rival = {"argmax": lambda: logits.argmax(1)}
        elif top_k:
            rival = {"topk": lambda k=top_k: logits.topk(k, dim=1)}
        yield Case(
            f"sample {name}", f"{rows} x {vocab}", num_bytes, 0, "copy",
            lambda params=params: ops.sample_ids(logits, params), rival,
        )  # fmt: skip


def measure(case: Case, timer: Timer, ceiling: Ceilings) -> Row:
    """Times the case and its rivals; the fastest rival counts."""
    seconds = timer(case.run)
    gb_per_s, tflop_per_s = case.num_bytes / seconds / 1e9, case.num_flops / seconds / 1e12
    shares = {
        "copy": gb_per_s / ceiling.copy_gb_per_s,
        "gemm": tflop_per_s / ceiling.gemm_tflop_per_s,
    }
    times = {name: timer(run) for name, run in case.rivals.items()}
    rival = min(times, key=lambda name: times[name]) if times else None
    rival_s = times[rival] if rival else None
    return Row(
        case.kernel, case.size, seconds * 1e6, gb_per_s, tflop_per_s, case.bound,
        shares[case.bound], rival, rival_s and rival_s * 1e6, rival_s and rival_s / seconds,
    )  # fmt: skip


def table(ceiling: Ceilings, rows: list[Row]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"copy {ceiling.copy_gb_per_s:.0f} GB/s (read + write),"
        f" bf16 GEMM {ceiling.gemm_tflop_per_s:.0f} TFLOP/s",
        f"{'kernel':28}{'size':>18}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'share':>13}  beside",
    ]
    for row in rows:
        share = f"{row.share:.0%} of {row.bound}"
        beside = (
            "" if row.rival is None else f"{row.rival} {row.rival_us:.1f} us = {row.ratio:.2f}x"
        )
        lines.append(
            f"{row.kernel:28}{row.size:>18}{row.us:10.1f}{row.gb_per_s:8.0f}"
            f"{row.tflop_per_s:9.1f}{share:>13}  {beside or ''}"
        )
    return lines


def run_all(ops: Any, device: torch.device, timer: Timer) -> tuple[Ceilings, list[Row]]:
    """All cases on the device; a line on stderr for each, since a run takes minutes."""
    ceiling = ceilings(timer, device, COPY_BYTES, GEMM_SIZE)
    rows = []
    with torch.inference_mode():
        for case in cases(ops, device, Shape()):
            rows.append(measure(case, timer, ceiling))
            print(f"measured {case.kernel} {case.size}", file=sys.stderr)
    return ceiling, rows


def refusal() -> str | None:
    """Why nothing can be measured here; None where a GPU and CuPy are there."""
    if not torch.cuda.is_available():
        return "bench kernels: no NVIDIA GPU on this machine, nothing was measured"
    if importlib.util.find_spec("cupy") is None:
        return "bench kernels: CuPy is not installed, nothing was measured"
    return None


def facts(device: torch.device) -> dict[str, Any]:
    """Where figures come from."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(argv)
    reason = refusal()
    if reason is not None:
        print(json.dumps({"error": reason}) if options.json else reason)
        return 1 if options.json else 0
    device = torch.device("cuda:0")
    ops = importlib.import_module("kernels.cuda.device").cuda_ops(device)
    ceiling, rows = run_all(ops, device, CudaTimer(device))
    if options.json:
        print(json.dumps(facts(device) | asdict(ceiling) | {"rows": [asdict(r) for r in rows]}))
    else:
        print("\n".join([str(facts(device)), *table(ceiling, rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
