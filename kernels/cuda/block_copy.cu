// Blocks of many layers between the KV arrays and one contiguous buffer, which then crosses a wire
// or the bus in one piece: single blocks of 64 KiB would move at a fifth of the bus's speed.
// Constant: BLOCK_VECTORS, 16-byte vectors of one block of one layer.
#include "common.cuh"

constexpr int IN_FLIGHT = 4;  // loads of a thread before its first store

__device__ __forceinline__ void copy_block(const uint4* __restrict__ from, uint4* __restrict__ to) {
    for (int start = threadIdx.x; start < BLOCK_VECTORS; start += IN_FLIGHT * blockDim.x) {
        uint4 held[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int vector = start + i * blockDim.x;
            if (vector < BLOCK_VECTORS) held[i] = load_16(from + vector);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int vector = start + i * blockDim.x;
            if (vector < BLOCK_VECTORS) store_16(to + vector, held[i]);
        }
    }
}

// PRECOND (both): grid (num_ids, num_layers).
extern "C" __global__ void gather_blocks(
    const long long* __restrict__ layers,  // (num_layers): address of each layer's KV array
    const int* __restrict__ block_ids,     // (num_ids)
    uint4* __restrict__ buffer) {          // (num_layers, num_ids, BLOCK_VECTORS), written
    const uint4* layer = reinterpret_cast<const uint4*>(layers[blockIdx.y]);
    const long long place = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    copy_block(layer + static_cast<long long>(block_ids[blockIdx.x]) * BLOCK_VECTORS,
               buffer + place * BLOCK_VECTORS);
}

extern "C" __global__ void scatter_blocks(
    const long long* __restrict__ layers,  // as above; the arrays are written
    const int* __restrict__ block_ids,     // (num_ids), each once
    const uint4* __restrict__ buffer) {    // (num_layers, num_ids, BLOCK_VECTORS)
    uint4* layer = reinterpret_cast<uint4*>(layers[blockIdx.y]);
    const long long place = static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x;
    copy_block(buffer + place * BLOCK_VECTORS,
               layer + static_cast<long long>(block_ids[blockIdx.x]) * BLOCK_VECTORS);
}
