// A row stays in registers between its sum of squares and its scaling, so it is read once.
// Source: Zhang and Sennrich 2019, arXiv:1910.07467. In float32, rounded once at the end.
// Constants: HIDDEN, a multiple of 8; THREADS of a block, a multiple of 32.
#include "common.cuh"

constexpr int NUM_VECTORS = HIDDEN / VECTOR;
constexpr int PER_THREAD = (NUM_VECTORS + THREADS - 1) / THREADS;

// out = row / sqrt(mean(row²) + eps) * weight; `packed` holds the thread's vectors of the row.
__device__ __forceinline__ void norm_row(const uint4 packed[PER_THREAD],
                                         const bf16* __restrict__ weight, bf16* out_row, float eps,
                                         float* scratch) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        float values[VECTOR];
        unpack_8(packed[i], values);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) squares += values[j] * values[j];
    }
    const float scale = rsqrtf(block_sum(squares, scratch) / HIDDEN + eps);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int vector = threadIdx.x + i * THREADS;
        if (vector < NUM_VECTORS) {
            float values[VECTOR], weights[VECTOR];
            unpack_8(packed[i], values);
            unpack_8(load_16(weight + vector * VECTOR), weights);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) values[j] *= scale * weights[j];
            store_16(out_row + vector * VECTOR, pack_8(values));
        }
    }
}

// PRECOND: grid (rows), block THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const bf16* __restrict__ x,       // (rows, HIDDEN) contiguous
    const bf16* __restrict__ weight,  // (HIDDEN)
    bf16* __restrict__ out,           // as x
    float eps) {
    SHARED(float, scratch, WARP);
    const long long row_start = static_cast<long long>(blockIdx.x) * HIDDEN;
    uint4 packed[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int vector = threadIdx.x + i * THREADS;
        packed[i] = vector < NUM_VECTORS ? load_16(x + row_start + vector * VECTOR)
                                         : make_uint4(0, 0, 0, 0);
    }
    norm_row(packed, weight, out + row_start, eps, scratch);
}

// residual += x, rounded to bfloat16, and the norm of that. PRECOND: grid (rows), block THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm(
    const bf16* __restrict__ x,       // (rows, HIDDEN) contiguous
    bf16* __restrict__ residual,      // as x, written
    const bf16* __restrict__ weight,  // (HIDDEN)
    bf16* __restrict__ out,           // as x
    float eps) {
    SHARED(float, scratch, WARP);
    const long long row_start = static_cast<long long>(blockIdx.x) * HIDDEN;
    uint4 packed[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        const int vector = threadIdx.x + i * THREADS;
        packed[i] = make_uint4(0, 0, 0, 0);
        if (vector < NUM_VECTORS) {
            float added[VECTOR], values[VECTOR];
            unpack_8(load_16(x + row_start + vector * VECTOR), added);
            unpack_8(load_16(residual + row_start + vector * VECTOR), values);
#pragma unroll
            for (int j = 0; j < VECTOR; j++) values[j] += added[j];
            packed[i] = pack_8(values);
            store_16(residual + row_start + vector * VECTOR, packed[i]);
        }
    }
    norm_row(packed, weight, out + row_start, eps, scratch);
}
