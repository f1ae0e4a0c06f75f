// Consecutive tokens of one sequence attend over its KV blocks, causally. A block of threads has
// ROWS rows (token, query head) of one KV head, so KV is read once for all heads of the group; each
// warp has 16 rows. Tiles of 64 tokens of K and V arrive in one of two stages while the other is
// multiplied.
// Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 1, on paged KV.
// Constants: HEAD_DIM 16, 32, 64 or 128; GROUP query heads of a KV head, up to 64; KV_HEADS;
// BLOCK_TOKENS.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = WARPS * 16;
constexpr int TILE = 64;  // tokens of K and V
constexpr int Q_HEADS = GROUP * KV_HEADS;
constexpr int CHUNKS = HEAD_DIM / VECTOR;
constexpr int SWIZZLE = CHUNKS < 8 ? CHUNKS - 1 : 7;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int PLANE = TILE * HEAD_DIM;
constexpr int BLOCK_PLANE = BLOCK_TOKENS * HEAD_DIM;

__device__ __forceinline__ int place(int token, int chunk) {
    return token * HEAD_DIM + (chunk ^ token & SWIZZLE) * VECTOR;
}

// K and V of tokens [first, first + TILE), those below `end`, into one stage; by all threads.
__device__ __forceinline__ void fetch_tile(bf16* stage, const bf16* kv_layer, const int* table,
                                           int kv_head, int first, int end) {
#pragma unroll
    for (int item = threadIdx.x; item < TILE * CHUNKS; item += WARPS * WARP) {
        const int token = item / CHUNKS, chunk = item % CHUNKS, at = first + token;
        const bool is_there = at < end;
        const long long block = is_there ? table[at / BLOCK_TOKENS] : 0;
        const bf16* keys = kv_layer + (block * 2 * KV_HEADS + kv_head) * BLOCK_PLANE +
                           at % BLOCK_TOKENS * HEAD_DIM + chunk * VECTOR;
        copy_16_async(stage + place(token, chunk), keys, is_there);
        copy_16_async(stage + PLANE + place(token, chunk), keys + KV_HEADS * BLOCK_PLANE, is_there);
    }
}

// PRECOND: grid (num_tiles, KV_HEADS), block 128, dynamic shared memory 4 * PLANE * 2 bytes.
extern "C" __global__ void __launch_bounds__(128) chunked_prefill(
    const bf16* __restrict__ q,         // (rows, Q_HEADS, HEAD_DIM), rows q_stride values apart
    const bf16* __restrict__ kv_layer,  // (num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    const int* __restrict__ tables,     // (tables, table_stride) block ids in token order
    const int* __restrict__ tiles,      // (num_tiles, 4): row, table, position of that row's
                                        // token, tokens (at most ROWS / GROUP)
    bf16* __restrict__ out,             // (rows, Q_HEADS, HEAD_DIM), of the tiles' rows
    long long q_stride,
    int table_stride,
    float scale) {  // of scores, times log2(e)
    DYNAMIC_SHARED(shared);
    bf16* stages = reinterpret_cast<bf16*>(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int* tile = tiles + blockIdx.x * 4;
    const int kv_head = blockIdx.y, first_row = tile[0], start = tile[2];
    const int num_rows = tile[3] * GROUP, end = start + tile[3];
    const int* table = tables + static_cast<long long>(tile[1]) * table_stride;
    const int num_tiles = (end + TILE - 1) / TILE;

    fetch_tile(stages, kv_layer, table, kv_head, 0, end);
    commit_copies();
    int rows[2], limits[2];  // this lane's rows g and g + 8, and the last token that each sees
#pragma unroll
    for (int half = 0; half < 2; half++) {
        rows[half] = warp * 16 + lane / 4 + half * 8;
        limits[half] = rows[half] < num_rows ? start + rows[half] / GROUP : end - 1;
    }
    unsigned queries[STEPS][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = rows[i % 2], head = kv_head * GROUP + row % GROUP;
        const bf16* from = q + (first_row + row / GROUP) * q_stride + head * HEAD_DIM +
                           i / 2 * 8 + 2 * (lane % 4);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            queries[step][i] =
                row < num_rows ? *reinterpret_cast<const unsigned*>(from + step * 16) : 0;
    }
    float maximum[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {}, result[HEAD_DIM / 8][4] = {};

    for (int number = 0; number < num_tiles; number++) {
        const int first = number * TILE;
        if (number + 1 < num_tiles)
            fetch_tile(stages + (number + 1) % 2 * 2 * PLANE, kv_layer, table, kv_head,
                       first + TILE, end);
        commit_copies();
        wait_copies<1>();
        __syncthreads();  // everyone's part of this tile has arrived
        const bf16* keys = stages + number % 2 * 2 * PLANE;
        const bf16* values = keys + PLANE;
        const int matrix = lane / 8, row = lane % 8;

        float scores[TILE / 8][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int pair = 0; pair < TILE / 16; pair++) {
                unsigned b[4];
                load_matrices(b, keys + place(pair * 16 + matrix / 2 * 8 + row,
                                              2 * step + matrix % 2));
                multiply_add(scores[2 * pair], queries[step], b[0], b[1]);
                multiply_add(scores[2 * pair + 1], queries[step], b[2], b[3]);
            }
        const bool is_masked = first + TILE > start;  // some row may not see the whole tile
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = maximum[half];
#pragma unroll
            for (int i = 0; i < TILE / 8; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = scores[i][2 * half + j];
                    const int token = first + i * 8 + 2 * (lane % 4) + j;
                    score = is_masked && token > limits[half] ? MINUS_INFINITY : score * scale;
                    largest = fmaxf(largest, score);
                }
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
            const float shrink = exp2f(maximum[half] - largest);  // token 0 is seen: not infinite
            maximum[half] = largest;
            sum[half] *= shrink;
#pragma unroll
            for (int i = 0; i < TILE / 8; i++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float& score = scores[i][2 * half + j];
                    score = exp2f(score - largest);
                    sum[half] += score;
                }
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) {
                result[i][2 * half] *= shrink;
                result[i][2 * half + 1] *= shrink;
            }
        }
#pragma unroll
        for (int pair = 0; pair < TILE / 16; pair++) {
            const unsigned weights[4] = {
                pack_bf16(scores[2 * pair][0], scores[2 * pair][1]),
                pack_bf16(scores[2 * pair][2], scores[2 * pair][3]),
                pack_bf16(scores[2 * pair + 1][0], scores[2 * pair + 1][1]),
                pack_bf16(scores[2 * pair + 1][2], scores[2 * pair + 1][3])};
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                unsigned b[4];
                load_matrices_transposed(b, values + place(pair * 16 + matrix % 2 * 8 + row,
                                                           2 * step + matrix / 2));
                multiply_add(result[2 * step], weights, b[0], b[1]);
                multiply_add(result[2 * step + 1], weights, b[2], b[3]);
            }
        }
        __syncthreads();  // the stage may be overwritten
    }
    wait_copies<0>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 2);
        if (rows[half] < num_rows) {
            const int head = kv_head * GROUP + rows[half] % GROUP;
            const long long row = first_row + rows[half] / GROUP;
            bf16* to = out + (row * Q_HEADS + head) * HEAD_DIM + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++)
                *reinterpret_cast<unsigned*>(to + i * 8) =
                    pack_bf16(result[i][2 * half] / sum[half], result[i][2 * half + 1] / sum[half]);
        }
    }
}
