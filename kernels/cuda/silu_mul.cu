// One thread turns eight gates and eight values into eight results: two 16-byte loads, one store.
#include "common.cuh"

// PRECOND: grid (ceil(width / 8 / blockDim.x), rows); width is a multiple of 8.
extern "C" __global__ void silu_mul(
    const bf16* __restrict__ gate_up,  // (rows, 2 * width): gates, then values
    bf16* __restrict__ out,            // (rows, width)
    int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (column >= width) return;
    const bf16* row = gate_up + static_cast<long long>(blockIdx.y) * 2 * width;
    float gates[VECTOR], values[VECTOR];
    unpack_8(load_16(row + column), gates);
    unpack_8(load_16(row + width + column), values);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) values[i] *= gates[i] / (1.0f + __expf(-gates[i]));
    store_16(out + static_cast<long long>(blockIdx.y) * width + column, pack_8(values));
}
