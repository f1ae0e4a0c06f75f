"""The tests of the CUDA kernels are worth their time: each planted fault makes one of them fail.

The list of faults is printed at the end of a run, each with what caught it.
"""

from collections.abc import Callable

import pytest
import torch

from kernels.cuda import plan
from kernels.ops import Heads
from tests.cudasim import sim
from tests.kernels import (
    test_cuda_attention,
    test_cuda_pointwise,
    test_cuda_sampling,
)
from tests.kernels.cudakit import Kit

SMOL = Heads(6, 2, 64)


def long_chunk(kit: Kit) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SDPA_TOKENS_MIN", 48)
        test_cuda_attention.assert_attention(kit, [(37, 50)], SMOL)


def norm(kit: Kit) -> None:
    test_cuda_pointwise.test_rms_norm_agrees_with_the_reference(kit, 5, 576)


def add_norm(kit: Kit) -> None:
    test_cuda_pointwise.test_add_rms_norm_norms_what_it_leaves_in_the_residual(kit)


def silu(kit: Kit) -> None:
    test_cuda_pointwise.test_silu_mul_agrees_with_the_reference(kit, 3, 2056)


def head_norm(kit: Kit) -> None:
    test_cuda_pointwise.test_query_and_key_heads_are_normed_and_values_are_not(kit, SMOL)


def rope(kit: Kit) -> None:
    test_cuda_pointwise.test_rope_turns_queries_and_writes_every_token_into_its_slot(kit, SMOL)


def decode(kit: Kit) -> None:
    test_cuda_attention.test_decoding_agrees_at_every_boundary_of_block_tile_and_piece(kit)


def pieces(kit: Kit) -> None:
    test_cuda_attention.test_a_long_context_is_cut_into_pieces_and_added_up_again(kit)


def prefill(kit: Kit) -> None:
    test_cuda_attention.test_a_step_mixes_chunks_and_decoding_in_any_order(kit)
    test_cuda_attention.test_a_chunk_agrees_with_the_reference(kit, 150, 21)


def draws(kit: Kit) -> None:
    test_cuda_sampling.test_rows_of_every_kind_are_drawn_as_by_the_torch_backend(
        kit, 3.0, torch.bfloat16
    )


# (check, file, kind of fault, right, wrong)
FAULTS: list[tuple[Callable[[Kit], None], str, str, str, str]] = [
    (
        norm,
        "rmsnorm",
        "missing barrier in block_sum",
        "scratch[warp] = value;\n    __syncthreads();",
        "scratch[warp] = value;",
    ),
    (
        add_norm,
        "rmsnorm",
        "sum not kept in the residual",
        "store_16(residual + row_start + vector * VECTOR, packed[i]);",
        "",
    ),
    (silu, "silu_mul", "wrong row stride", "(blockIdx.y) * 2 * width", "(blockIdx.y) * width"),
    (
        head_norm,
        "norm_heads",
        "wrong row stride",
        "row * (HEADS + KV_HEADS) + head",
        "row * HEADS + head",
    ),
    (
        rope,
        "rope_kv_write",
        "off by one block",
        "const int block = slots[row] / BLOCK_TOKENS",
        "const int block = slots[row] / BLOCK_TOKENS ^ 1",
    ),
    (
        rope,
        "rope_kv_write",
        "sine of the wrong sign",
        "lows[i] * turn[i] - highs",
        "lows[i] * turn[i] + highs",
    ),
    (
        long_chunk,
        "kv_gather",
        "off by one block",
        "table[token / BLOCK_TOKENS]",
        "table[(token + 1) / BLOCK_TOKENS]",
    ),
    (
        decode,
        "paged_decode",
        "off by one block",
        "* WARPS) * TILE / BLOCK_TOKENS]",
        "* WARPS) * TILE / BLOCK_TOKENS + 1]",
    ),
    (
        decode,
        "paged_decode",
        "lanes not awaited",
        "__syncwarp();  // the other lanes' copies have arrived too",
        "",
    ),
    (
        decode,
        "paged_decode",
        "copies not awaited",
        "wait_copies<STAGES - 1>();",
        "wait_copies<STAGES>();",
    ),
    (
        decode,
        "paged_decode",
        "one token too many",
        "score = token < num_tokens",
        "score = token <= num_tokens",
    ),
    (
        decode,
        "paged_decode",
        "sums overwritten before they are read",
        "__syncthreads();  // the sums have been read: the next piece may leave its own",
        "",
    ),
    (
        pieces,
        "paged_decode",
        "last piece not added",
        "weights[i] = first + i < count ?",
        "weights[i] = first + i < count - 1 ?",
    ),
    (
        prefill,
        "chunked_prefill",
        "missing barrier before reading",
        "__syncthreads();  // everyone's part of this tile has arrived",
        "",
    ),
    (
        prefill,
        "chunked_prefill",
        "missing barrier before overwriting",
        "__syncthreads();  // the stage may be overwritten",
        "",
    ),
    (
        prefill,
        "chunked_prefill",
        "mask off by one",
        "token > limits[half]",
        "token > limits[half] + 1",
    ),
    (
        draws,
        "sample",
        "key itself left out",
        "key_of(values[i]) >= key;",
        "key_of(values[i]) > key;",
    ),
    (
        draws,
        "sample",
        "sums read without a barrier",
        "scratch->heads[turn][warp] = mine;\n        __syncthreads();",
        "scratch->heads[turn][warp] = mine;",
    ),
    (
        draws,
        "sample_wide",
        "largest key read without a barrier",
        "votes[warp] = largest_key;\n    __syncthreads();",
        "votes[warp] = largest_key;",
    ),
    (
        draws,
        "sample_wide",
        "sum of one key too many",
        "found.above = middle;",
        "found.above = end;",
    ),
]


def test_every_kernel_file_has_a_planted_fault():
    assert {file for _, file, *_ in FAULTS} == set(sim.source.names())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[1]}-{f[2].replace(' ', '-')}")
def test_a_planted_fault_is_caught(fault, record_property):
    check, file, kind, right, wrong = fault
    for order in sim.ORDERS:
        try:
            check(Kit(sim.SimLauncher(order, [(file, right, wrong)]), torch.device("cpu")))
        except (AssertionError, sim.LaunchFailed) as caught:
            reason = str(caught).splitlines()[0][:90]
            record_property("summary", f"caught {file}.cu: {kind}: {reason}")
            return
    pytest.fail(f"{file}.cu: {kind} is not caught in any order of threads")
