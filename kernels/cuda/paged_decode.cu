// One new token per sequence attends over its KV blocks. The contexts of all sequences are one
// stream, cut into stretches of equal work (plan.cut); a block of threads has one stretch of one KV
// head, so the work is even however the lengths differ, and the grid does not depend on them. Each
// warp has its own tiles of 16 tokens of the stretch and streams them through a ring in shared
// memory, which goes on from one sequence to the next; the query heads of one KV head are the rows
// of one tensor-core tile, so KV is read once for all of them.
// Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; split over KV as in
// Dao et al. 2023, Flash-Decoding; equal stretches as in Osama et al. 2023, Stream-K,
// arXiv:2301.03598.
// Constants: HEAD_DIM 16, 32, 64 or 128; GROUP query heads of a KV head, up to 16; KV_HEADS;
// BLOCK_TOKENS, a multiple of 16; WARPS of a block; STAGES of a warp's ring.
#include "common.cuh"

constexpr int TILE = 16;                      // tokens
constexpr int Q_HEADS = GROUP * KV_HEADS;
constexpr int CHUNKS = HEAD_DIM / VECTOR;     // 16-byte vectors of one token and head
constexpr int SWIZZLE = CHUNKS < 8 ? CHUNKS - 1 : 7;
constexpr int STEPS = HEAD_DIM / 16;          // tensor-core steps along a head
constexpr int PLANE = TILE * HEAD_DIM;        // values of the K, or V, of a tile
constexpr int RING = STAGES * 2 * PLANE;      // of one warp
constexpr int BLOCK_PLANE = BLOCK_TOKENS * HEAD_DIM;
constexpr int PIECE = 7;                      // numbers of a piece
constexpr int IN_FLIGHT = 8;                  // pieces of a row whose sums are loaded together

// Where vector `chunk` of a token lies in a tile: rows of a matrix load then hit different banks.
__device__ __forceinline__ int place(int token, int chunk) {
    return token * HEAD_DIM + (chunk ^ token & SWIZZLE) * VECTOR;
}

// K and V of tokens [first, first + TILE) of a block, those below `end`, into one stage.
__device__ __forceinline__ void fetch_tile(bf16* stage, const bf16* kv_layer, int block,
                                           int kv_head, int first, int end, int lane) {
    const bf16* keys = kv_layer +
                       (static_cast<long long>(block) * 2 * KV_HEADS + kv_head) * BLOCK_PLANE +
                       first % BLOCK_TOKENS * HEAD_DIM;
    const bf16* values = keys + KV_HEADS * BLOCK_PLANE;
#pragma unroll
    for (int item = lane; item < TILE * CHUNKS; item += WARP) {
        const int token = item / CHUNKS, chunk = item % CHUNKS;
        const int from = token * HEAD_DIM + chunk * VECTOR, to = place(token, chunk);
        copy_16_async(stage + to, keys + from, first + token < end);
        copy_16_async(stage + PLANE + to, values + from, first + token < end);
    }
}

// The softmax of the tokens seen so far, of one warp: rows g and g + 8 are in lanes 4g .. 4g + 3.
struct Running {
    float maximum[2];  // of the scores in units of log 2
    float sum[2];      // of this lane's columns
    float out[HEAD_DIM / 8][4];
};

__device__ __forceinline__ void add_tile(Running& run, const unsigned q[STEPS][4],
                                         const bf16* stage, int num_tokens, float scale,
                                         int lane) {
    const int matrix = lane / 8, row = lane % 8;
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned keys[4];
        load_matrices(keys, stage + place(matrix / 2 * 8 + row, 2 * step + matrix % 2));
        multiply_add(scores[0], q[step], keys[0], keys[1]);
        multiply_add(scores[1], q[step], keys[2], keys[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = run.maximum[half];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& score = scores[i / 2][2 * half + i % 2];
            const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
            score = token < num_tokens ? score * scale : MINUS_INFINITY;
            largest = fmaxf(largest, score);
        }
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
        const float shrink = exp2f(run.maximum[half] - largest);
        run.maximum[half] = largest;
        run.sum[half] *= shrink;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& score = scores[i / 2][2 * half + i % 2];
            score = exp2f(score - largest);
            run.sum[half] += score;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++) {
            run.out[i][2 * half] *= shrink;
            run.out[i][2 * half + 1] *= shrink;
        }
    }
    const unsigned weights[4] = {
        pack_bf16(scores[0][0], scores[0][1]), pack_bf16(scores[0][2], scores[0][3]),
        pack_bf16(scores[1][0], scores[1][1]), pack_bf16(scores[1][2], scores[1][3])};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        unsigned values[4];
        load_matrices_transposed(
            values, stage + PLANE + place(matrix % 2 * 8 + row, 2 * step + matrix / 2));
        multiply_add(run.out[2 * step], weights, values[0], values[1]);
        multiply_add(run.out[2 * step + 1], weights, values[2], values[3]);
    }
}

// The query heads of one KV head as rows of a tensor-core tile; rows from GROUP on are zero.
__device__ __forceinline__ void load_queries(unsigned q[STEPS][4], const bf16* heads, int lane) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i % 2 * 8;
            const int column = step * 16 + i / 2 * 8 + 2 * (lane % 4);
            q[step][i] = row < GROUP ? *reinterpret_cast<const unsigned*>(
                                           heads + row * HEAD_DIM + column)
                                     : 0;
        }
}

// Where a warp is in the pieces of its block: its next tile to be fetched.
struct Cursor {
    const int* piece;
    const int* table;
    int first_tile, num_tiles, end;  // the warp's of this piece; token behind the piece
    int number;                      // of the next tile
    int blocks;                      // of lane's tile in a run of 32 tiles
};

__device__ __forceinline__ void enter(Cursor& at, const int* piece, const int* tables,
                                      int table_stride, int warp) {
    at.piece = piece;
    at.table = tables + static_cast<long long>(piece[1]) * table_stride;
    at.first_tile = piece[2] / TILE + warp;
    at.end = piece[3];
    at.num_tiles = max(0, ((at.end + TILE - 1) / TILE - at.first_tile + WARPS - 1) / WARPS);
    at.number = 0;
}

// The sums of all pieces of a row, added up in their order: GROUP heads, by the whole block.
__device__ __forceinline__ void add_pieces(const float* partial, const float* softmax, bf16* out,
                                           int kv_head, int count) {
    for (int index = threadIdx.x; index < GROUP * HEAD_DIM; index += WARPS * WARP) {
        const int head = kv_head * GROUP + index / HEAD_DIM, column = index % HEAD_DIM;
        float largest = MINUS_INFINITY, sum = 0.0f, total = 0.0f;
        for (int first = 0; first < count; first += IN_FLIGHT) {
            float maxima[IN_FLIGHT], weights[IN_FLIGHT], values[IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                const int place = (min(first + i, count - 1)) * Q_HEADS + head;
                maxima[i] = load_fresh(softmax + place * 2);
                weights[i] = first + i < count ? load_fresh(softmax + place * 2 + 1) : 0.0f;
                values[i] = load_fresh(partial + place * HEAD_DIM + column);
                if (first + i >= count) values[i] = 0.0f;
            }
            const float before = largest;
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) largest = fmaxf(largest, maxima[i]);
            const float shrink = exp2f(before - largest);
            sum *= shrink;
            total *= shrink;
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                const float share = exp2f(maxima[i] - largest);
                sum += share * weights[i];
                total += share * values[i];
            }
        }
        out[head * HEAD_DIM + column] = static_cast<bf16>(pack_bf16(total / sum, 0.0f));
    }
}

// PRECOND: grid lanes * KV_HEADS, block WARPS * 32, dynamic shared memory
// WARPS * (RING * 2 + GROUP * HEAD_DIM * 4) bytes.
extern "C" __global__ void __launch_bounds__(WARPS * WARP) paged_decode(
    const bf16* __restrict__ q,         // (rows, Q_HEADS, HEAD_DIM), rows q_stride values apart
    const bf16* __restrict__ kv_layer,  // (num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    const int* __restrict__ tables,     // (tables, table_stride) block ids in token order
    const int* __restrict__ pieces,     // (pieces, 7): row, table, first token (a multiple of
                                        // 16), end token, place in `partial` or -1, first place
                                        // and number of places of the row
    const int* __restrict__ lane_first,  // (lanes + 1): pieces of lane i are [i] to [i + 1]
    bf16* __restrict__ out,             // (rows, Q_HEADS, HEAD_DIM), written
    float* partial,                     // (places, Q_HEADS, HEAD_DIM): sum of weight * value
    float* softmax,                     // (places, Q_HEADS, 2): maximum in log 2, sum of weights
    int* arrivals,                      // (places, KV_HEADS): zeros, before and after
    long long q_stride,
    int table_stride,
    float scale) {  // of scores, times log2(e)
    DYNAMIC_SHARED(shared);
    SHARED(float, maxima, WARPS * GROUP);
    SHARED(float, sums, WARPS * GROUP);
    SHARED(int, num_arrived, 1);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    bf16* ring = reinterpret_cast<bf16*>(shared) + warp * RING;
    float* totals = reinterpret_cast<float*>(reinterpret_cast<bf16*>(shared) + WARPS * RING);
    const int kv_head = blockIdx.x % KV_HEADS;
    const int* piece = pieces + lane_first[blockIdx.x / KV_HEADS] * PIECE;
    const int* last = pieces + lane_first[blockIdx.x / KV_HEADS + 1] * PIECE;
    if (piece == last) return;  // the whole block leaves

    Cursor next;
    next.blocks = 0;
    enter(next, piece, tables, table_stride, warp);
    int fetched = 0, taken = 0;  // stages of the ring
    const auto fetch = [&]() {
        while (next.number == next.num_tiles && next.piece + PIECE < last)
            enter(next, next.piece + PIECE, tables, table_stride, warp);
        if (next.number < next.num_tiles) {
            if (next.number % WARP == 0 && next.number + lane < next.num_tiles)
                next.blocks =
                    next.table[(next.first_tile + (next.number + lane) * WARPS) * TILE / BLOCK_TOKENS];
            const int block = __shfl_sync(FULL_WARP, next.blocks, next.number % WARP);
            fetch_tile(ring + fetched * 2 * PLANE, kv_layer, block, kv_head,
                       (next.first_tile + next.number * WARPS) * TILE, next.end, lane);
            next.number++;
        }
        fetched = fetched + 1 == STAGES ? 0 : fetched + 1;
        commit_copies();
    };
#pragma unroll
    for (int number = 0; number < STAGES - 1; number++) fetch();

    for (; piece < last; piece += PIECE) {
        const int row = piece[0], end = piece[3], target = piece[4];
        const int first_tile = piece[2] / TILE + warp, tile_end = (end + TILE - 1) / TILE;
        unsigned queries[STEPS][4];
        load_queries(queries, q + row * q_stride + kv_head * GROUP * HEAD_DIM, lane);
        Running run;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            run.maximum[half] = MINUS_INFINITY;
            run.sum[half] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) run.out[i][j] = 0.0f;

        for (int tile = first_tile; tile < tile_end; tile += WARPS) {
            __syncwarp();  // the stage to be overwritten has been read by all lanes
            fetch();
            wait_copies<STAGES - 1>();
            __syncwarp();  // the other lanes' copies have arrived too
            add_tile(run, queries, ring + taken * 2 * PLANE, end - tile * TILE, scale, lane);
            taken = taken + 1 == STAGES ? 0 : taken + 1;
        }

        // Every warp leaves its sums, then all warps' are added; the next tiles are on their way.
        float* own = totals + warp * GROUP * HEAD_DIM;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            run.sum[half] += __shfl_xor_sync(FULL_WARP, run.sum[half], 1);
            run.sum[half] += __shfl_xor_sync(FULL_WARP, run.sum[half], 2);
            const int head = lane / 4 + half * 8;
            if (head < GROUP) {
                if (lane % 4 == 0) {
                    maxima[warp * GROUP + head] = run.maximum[half];
                    sums[warp * GROUP + head] = run.sum[half];
                }
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 8; i++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        own[head * HEAD_DIM + i * 8 + 2 * (lane % 4) + j] =
                            run.out[i][2 * half + j];
            }
        }
        __syncthreads();
        for (int index = threadIdx.x; index < GROUP * HEAD_DIM; index += WARPS * WARP) {
            const int head = index / HEAD_DIM;
            float largest = MINUS_INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, maxima[w * GROUP + head]);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float share = exp2f(maxima[w * GROUP + head] - largest);
                sum += share * sums[w * GROUP + head];
                total += share * totals[w * GROUP * HEAD_DIM + index];
            }
            const long long q_head = kv_head * GROUP + head;
            const int column = index % HEAD_DIM;
            if (target < 0) {
                const unsigned rounded = pack_bf16(total / sum, 0.0f);
                out[(row * Q_HEADS + q_head) * HEAD_DIM + column] = static_cast<bf16>(rounded);
            } else {
                partial[(target * Q_HEADS + q_head) * HEAD_DIM + column] = total;
                if (column == 0) {
                    softmax[(target * Q_HEADS + q_head) * 2] = largest;
                    softmax[(target * Q_HEADS + q_head) * 2 + 1] = sum;
                }
            }
        }
        if (target >= 0) {  // whoever comes last adds up the row
            share_writes();
            __syncthreads();
            int* arrived = arrivals + piece[5] * KV_HEADS + kv_head;
            if (threadIdx.x == 0) num_arrived[0] = atomicAdd(arrived, 1) + 1;
            __syncthreads();
            if (num_arrived[0] == piece[6]) {
                share_writes();
                add_pieces(partial + static_cast<long long>(piece[5]) * Q_HEADS * HEAD_DIM,
                           softmax + piece[5] * Q_HEADS * 2,
                           out + static_cast<long long>(row) * Q_HEADS * HEAD_DIM, kv_head,
                           piece[6]);
                if (threadIdx.x == 0) *arrived = 0;
            }
        }
        __syncthreads();  // the sums have been read: the next piece may leave its own
    }
    wait_copies<0>();
}
