// The KV of one sequence in token order, for an attention that knows no blocks.
// Constants: HEAD_DIM, a multiple of 8; KV_HEADS, BLOCK_TOKENS.
#include "common.cuh"

constexpr int LANES = HEAD_DIM / VECTOR;

// PRECOND: grid (ceil(num_padded * LANES / blockDim.x), 2 * KV_HEADS).
extern "C" __global__ void kv_gather(
    const bf16* __restrict__ kv_layer,  // (num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    const int* __restrict__ table,      // (>= ceil(num_tokens / BLOCK_TOKENS))
    bf16* __restrict__ out,             // (2, KV_HEADS, num_padded, HEAD_DIM), written
    int num_tokens,
    int num_padded) {  // zeros from num_tokens on
    const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= static_cast<long long>(num_padded) * LANES) return;
    const int token = item / LANES, column = item % LANES * VECTOR, plane = blockIdx.y;
    uint4 vector = {0, 0, 0, 0};
    if (token < num_tokens) {
        const long long block = table[token / BLOCK_TOKENS];
        vector = load_16(kv_layer + ((block * 2 * KV_HEADS + plane) * BLOCK_TOKENS +
                                     token % BLOCK_TOKENS) * HEAD_DIM + column);
    }
    store_16(out + (static_cast<long long>(plane) * num_padded + token) * HEAD_DIM + column, vector);
}
