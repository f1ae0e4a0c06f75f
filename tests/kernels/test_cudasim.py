"""The harness for CUDA kernels: it runs them as a GPU would, and finds what a GPU would not say."""

import numpy as np
import pytest
import torch

from kernels.cuda import source
from tests.cudasim import sim
from tests.kernels.cudakit import values

KERNELS = """
#include "common.cuh"

extern "C" __global__ void reverse(float* out) {
    SHARED(float, held, 64);
    held[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = held[63 - threadIdx.x];
}
extern "C" __global__ void reverse_without_barrier(float* out) {
    SHARED(float, held, 64);
    held[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = held[63 - threadIdx.x];
}
extern "C" __global__ void barrier_for_some(float* out) {
    if (threadIdx.x < 48) __syncthreads();
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void return_above_barrier(float* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void never_written(float* out) {
    SHARED(float, held, 64);
    DYNAMIC_SHARED(dynamic);
    out[threadIdx.x] = held[threadIdx.x] + reinterpret_cast<float*>(dynamic)[threadIdx.x];
}
extern "C" __global__ void index_too_large(float* out) {
    SHARED(float, held, 64);
    held[threadIdx.x + 1] = 0.0f;
}
extern "C" __global__ void misaligned(float* out) { store_16(out + 1, make_uint4(0, 0, 0, 0)); }
extern "C" __global__ void outside(float* out) { load_16(out + 64); }
extern "C" __global__ void copied(const float* from, float* out, int waits) {
    DYNAMIC_SHARED(dynamic);
    float* held = reinterpret_cast<float*>(dynamic);
    copy_16_async(held + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x != 1);
    commit_copies();
    if (waits) wait_copies<0>();
    __syncthreads();
    out[threadIdx.x] = held[threadIdx.x];
    if (waits < 0) wait_copies<0>();
}
extern "C" __global__ void votes(unsigned* out) {
    const int lane = threadIdx.x % WARP;
    const unsigned odd = __ballot_sync(FULL_WARP, lane & 1);
    const int below = __shfl_up_sync(FULL_WARP, lane, 3), far = __shfl_xor_sync(FULL_WARP, lane, 9);
    out[threadIdx.x] = odd ^ (below << 8) ^ far;
}
extern "C" __global__ void multiply(const bf16* a, const bf16* b, float* out) {
    DYNAMIC_SHARED(dynamic);
    bf16* held = reinterpret_cast<bf16*>(dynamic);
    for (int i = threadIdx.x; i < 64; i += WARP) {
        store_16(held + i * 8, load_16(i < 32 ? a + i * 8 : b + (i - 32) * 8));
    }
    __syncwarp();
    const int lane = threadIdx.x, matrix = lane / 8, row = lane % 8;
    unsigned left[4], right[4];
    load_matrices(left, held + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    load_matrices_transposed(right, held + 256 + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    float sums[2][4] = {};
    multiply_add(sums[0], left, right[0], right[1]);
    multiply_add(sums[1], left, right[2], right[3]);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++)
            out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
}
"""


@pytest.fixture(params=sim.ORDERS)
def launcher(request) -> sim.SimLauncher:
    return sim.SimLauncher(request.param)


def run(launcher: sim.SimLauncher, name: str, *arguments: sim.Argument, **options: int) -> None:
    threads, shared_bytes = options.get("threads", 64), options.get("shared_bytes", 1024)
    text = source.expand(KERNELS, "kernels")
    launcher.compile(text, name)((1,), (threads,), arguments, shared_bytes)


def test_a_barrier_makes_what_others_wrote_visible(launcher):
    out = torch.zeros(64)
    run(launcher, "reverse", out)
    assert out.tolist() == list(range(63, -1, -1))


def test_a_missing_barrier_leaves_values_that_were_never_written():
    seen = {}
    for order in sim.ORDERS:
        seen[order] = torch.zeros(64)
        run(sim.SimLauncher(order), "reverse_without_barrier", seen[order])
    assert seen[sim.FORWARD][:32].isnan().all() and seen[sim.REVERSE][32:].isnan().all()
    assert seen[sim.SHUFFLED].isnan().any()


def test_threads_that_do_not_all_reach_a_barrier_are_named(launcher):
    with pytest.raises(sim.LaunchFailed, match=r"48 at __syncthreads \(first 0\) 16 at its end"):
        run(launcher, "barrier_for_some", torch.zeros(64))
    with pytest.raises(sim.LaunchFailed, match=r"63 at __syncthreads \(first 0\) 1 at its end"):
        run(launcher, "return_above_barrier", torch.zeros(64))


def test_shared_memory_starts_as_no_number_in_every_launch(launcher):
    for _ in range(2):
        out = torch.zeros(64)
        run(launcher, "never_written", out)
        assert out.isnan().all()


@pytest.mark.parametrize(
    "kernel,reason",
    [
        ("index_too_large", "index 64 of a shared array .* thread 63"),
        ("misaligned", "a misaligned access"),
        ("outside", "an access outside the launch's tensors"),
    ],
)
def test_a_wrong_access_is_reported(launcher, kernel, reason):
    with pytest.raises(sim.LaunchFailed, match=reason):
        run(launcher, kernel, torch.zeros(64))


def test_a_launch_that_no_gpu_takes_is_refused(launcher):
    for options in ({"threads": 1025}, {"shared_bytes": 228 << 10}, {"threads": 0}):
        with pytest.raises(sim.LaunchFailed, match="no GPU launches this block"):
            run(launcher, "reverse", torch.zeros(64), **options)
    run(launcher, "never_written", torch.zeros(1024), threads=64, shared_bytes=227 << 10)


def test_arguments_must_have_the_kernels_number_and_sizes(launcher):
    with pytest.raises(sim.LaunchFailed, match="wrong number of arguments"):
        run(launcher, "reverse", torch.zeros(64), np.int32(1))
    with pytest.raises(sim.LaunchFailed, match="argument 2 has 8 bytes, the kernel takes 4"):
        run(launcher, "copied", torch.zeros(256), torch.zeros(64), np.int64(1))


def test_an_asynchronous_copy_arrives_by_the_wait_and_not_surely_before():
    given, late, early = torch.arange(1.0, 257.0), torch.zeros(64), torch.zeros(64)
    expected = torch.cat((given[:4], torch.zeros(4), given[8:64]))
    for order in sim.ORDERS:
        out = torch.zeros(64)
        run(sim.SimLauncher(order), "copied", given, out, np.int32(1))
        assert torch.equal(out, expected)
    with pytest.raises(sim.LaunchFailed, match="ended with copies on their way"):
        run(sim.SimLauncher(sim.FORWARD), "copied", given, late, np.int32(0))
    with pytest.raises(sim.LaunchFailed, match="ended with copies on their way"):
        run(sim.SimLauncher(sim.REVERSE), "copied", given, early, np.int32(0))
    assert late.isnan().any() and early.any() and not early.isnan().any()


def test_warp_operations_see_every_lane(launcher):
    out = torch.zeros(64, dtype=torch.int32)
    run(launcher, "votes", out)
    lanes = np.arange(64) % 32
    below = np.where(lanes >= 3, lanes - 3, lanes)
    assert np.array_equal(out.numpy().view(np.uint32), 0xAAAAAAAA ^ (below << 8) ^ (lanes ^ 9))


def test_the_tensor_core_multiplies_what_matrix_loads_bring(launcher):
    a, b, out = values(16, 16), values(16, 16, seed=1), torch.zeros(16, 16)
    run(launcher, "multiply", a, b, out, threads=32)
    assert torch.allclose(out, a.float() @ b.float(), atol=1e-5)
