// Q is turned in place, K on its way into the cache, V copied there: all of QKV is read once. A
// thread has the vectors i and i + HEAD_DIM / 2 of a head, the pairs that turn together.
// Source: Su et al. 2021, arXiv:2104.09864, in Llama's pairing. In float32, rounded once.
// Constants: HEAD_DIM, a multiple of 16; Q_HEADS, KV_HEADS, BLOCK_TOKENS.
#include "common.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int LANES = HALF / VECTOR;
constexpr int HEADS = Q_HEADS + 2 * KV_HEADS;

__device__ __forceinline__ void load_floats(const float* from, float values[VECTOR]) {
    const uint4 low = load_16(from), high = load_16(from + 4);
    const unsigned words[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < VECTOR; i++) values[i] = __uint_as_float(words[i]);
}

// PRECOND: grid (ceil(rows * HEADS * LANES / blockDim.x)).
extern "C" __global__ void rope_kv_write(
    bf16* __restrict__ qkv,         // (rows, HEADS * HEAD_DIM): Q (written), K, V
    const float* __restrict__ cos,  // (rows, HEAD_DIM): the cosines twice
    const float* __restrict__ sin,  // (rows, HEAD_DIM): negated sines, then sines
    const int* __restrict__ slots,  // (rows): block * BLOCK_TOKENS + place in it; -1: no KV
    bf16* __restrict__ kv_layer,    // (num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM), written
    int rows) {
    const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= static_cast<long long>(rows) * HEADS * LANES) return;
    const int column = item % LANES * VECTOR;
    const int head = item / LANES % HEADS;
    const long long row = item / LANES / HEADS;
    bf16* source = qkv + (row * HEADS + head) * HEAD_DIM + column;
    uint4 low = load_16(source), high = load_16(source + HALF);
    if (head < Q_HEADS + KV_HEADS) {
        float lows[VECTOR], highs[VECTOR], turn[VECTOR], swap[VECTOR];
        unpack_8(low, lows);
        unpack_8(high, highs);
        load_floats(cos + row * HEAD_DIM + column, turn);
        load_floats(sin + row * HEAD_DIM + HALF + column, swap);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const float turned = lows[i] * turn[i] - highs[i] * swap[i];
            highs[i] = highs[i] * turn[i] + lows[i] * swap[i];
            lows[i] = turned;
        }
        low = pack_8(lows);
        high = pack_8(highs);
    }
    bf16* target = source;
    if (head >= Q_HEADS) {
        if (slots[row] < 0) return;
        const int block = slots[row] / BLOCK_TOKENS, place = slots[row] % BLOCK_TOKENS;
        const int plane = head - Q_HEADS;  // K heads, then V heads
        target = kv_layer + (static_cast<long long>(block) * 2 * KV_HEADS + plane) * BLOCK_TOKENS *
                                HEAD_DIM + place * HEAD_DIM + column;
    }
    store_16(target, low);
    store_16(target + HALF, high);
}
