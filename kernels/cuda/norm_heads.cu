// A head is normed by HEAD_DIM / 8 neighbouring lanes, each with one 16-byte vector, in place.
// Constants: HEAD_DIM, 8 times a power of two up to 32; Q_HEADS, KV_HEADS.
#include "common.cuh"

constexpr int LANES = HEAD_DIM / VECTOR;
constexpr int HEADS = Q_HEADS + KV_HEADS;  // values are not normed

// PRECOND: grid (ceil(rows * HEADS * LANES / blockDim.x)); blockDim.x is a multiple of 32.
extern "C" __global__ void norm_heads(
    bf16* __restrict__ qkv,             // (rows, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM), written
    const bf16* __restrict__ q_weight,  // (HEAD_DIM)
    const bf16* __restrict__ k_weight,  // (HEAD_DIM)
    int rows,
    float eps) {
    const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long head_item = item / LANES;
    const int column = item % LANES * VECTOR;
    const bool is_there = head_item < static_cast<long long>(rows) * HEADS;
    const long long row = is_there ? head_item / HEADS : 0;
    const int head = head_item % HEADS;
    bf16* place = qkv + (row * (HEADS + KV_HEADS) + head) * HEAD_DIM + column;
    float values[VECTOR], weights[VECTOR], squares = 0.0f;
    unpack_8(load_16(place), values);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) squares += values[i] * values[i];
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(FULL_WARP, squares, distance);
    const float scale = rsqrtf(squares / HEAD_DIM + eps);
    unpack_8(load_16((head < Q_HEADS ? q_weight : k_weight) + column), weights);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) values[i] *= scale * weights[i];
    if (is_there) store_16(place, pack_8(values));
}
