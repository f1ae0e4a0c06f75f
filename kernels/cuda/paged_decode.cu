// One new token per sequence attends over its KV blocks. The contexts of all sequences are cut into
// pieces of nearly equal length; a block of threads takes one (piece, KV head) after the other, so
// the work is even however the lengths differ, and the grid does not depend on them. Within a piece
// each warp streams its own tiles of 16 tokens through a ring in shared memory; the query heads of
// one KV head are the rows of one tensor-core tile, so KV is read once for all of them.
// Source: online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867; split over KV as in
// Dao et al. 2023, Flash-Decoding.
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

// PRECOND: block WARPS * 32, dynamic shared memory WARPS * RING * 2 bytes, any grid (x).
extern "C" __global__ void __launch_bounds__(WARPS * WARP) paged_decode(
    const bf16* __restrict__ q,         // (rows, Q_HEADS, HEAD_DIM), rows q_stride values apart
    const bf16* __restrict__ kv_layer,  // (num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    const int* __restrict__ tables,     // (tables, table_stride) block ids in token order
    const int* __restrict__ pieces,     // (>= num_pieces, 5): row, table, first token (a multiple
                                        // of 16), end token, place in `partial` or -1
    const int* __restrict__ num_pieces,  // (1)
    bf16* __restrict__ out,             // (rows, Q_HEADS, HEAD_DIM), of pieces with place -1
    float* __restrict__ partial,        // (places, Q_HEADS, HEAD_DIM): sum of weight * value
    float* __restrict__ softmax,        // (places, Q_HEADS, 2): maximum in log 2, sum of weights
    long long q_stride,
    int table_stride,
    float scale) {  // of scores, times log2(e)
    DYNAMIC_SHARED(shared);
    SHARED(float, maxima, WARPS * GROUP);
    SHARED(float, sums, WARPS * GROUP);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    bf16* ring = reinterpret_cast<bf16*>(shared) + warp * RING;
    const int num_items = *num_pieces * KV_HEADS;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        const int* piece = pieces + item / KV_HEADS * 5;
        const int kv_head = item % KV_HEADS, row = piece[0], end = piece[3];
        const int* table = tables + static_cast<long long>(piece[1]) * table_stride;
        const int first_tile = piece[2] / TILE + warp;
        const int num_tiles = max(0, ((end + TILE - 1) / TILE - first_tile + WARPS - 1) / WARPS);

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

        int blocks = 0;  // of lane's tile in a run of 32 tiles
        const auto fetch = [&](int number) {
            if (number < num_tiles) {
                if (number % WARP == 0 && number + lane < num_tiles)
                    blocks = table[(first_tile + (number + lane) * WARPS) * TILE / BLOCK_TOKENS];
                const int block = __shfl_sync(FULL_WARP, blocks, number % WARP);
                fetch_tile(ring + number % STAGES * 2 * PLANE, kv_layer, block, kv_head,
                           (first_tile + number * WARPS) * TILE, end, lane);
            }
            commit_copies();
        };
#pragma unroll
        for (int number = 0; number < STAGES - 1; number++) fetch(number);
        unsigned queries[STEPS][4];
        load_queries(queries, q + row * q_stride + kv_head * GROUP * HEAD_DIM, lane);
        for (int number = 0; number < num_tiles; number++) {
            __syncwarp();  // the stage to be overwritten has been read by all lanes
            fetch(number + STAGES - 1);
            wait_copies<STAGES - 1>();
            __syncwarp();  // the other lanes' copies have arrived too
            const int first = (first_tile + number * WARPS) * TILE;
            add_tile(run, queries, ring + number % STAGES * 2 * PLANE, end - first, scale, lane);
        }
        wait_copies<0>();
        __syncwarp();

        // Every warp leaves its sums in its own ring; then all warps' are added.
        float* own = reinterpret_cast<float*>(ring);
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
                const bf16* its_ring = reinterpret_cast<bf16*>(shared) + w * RING;
                total += share * reinterpret_cast<const float*>(its_ring)[index];
            }
            const long long q_head = kv_head * GROUP + head;
            const int target = piece[4], column = index % HEAD_DIM;
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
        __syncthreads();  // the rings are free for the next piece
    }
}

// Adds up the pieces of each row that has several. PRECOND: grid (rows, ceil(Q_HEADS / WARPS)),
// block WARPS * 32: one warp per row and head.
extern "C" __global__ void __launch_bounds__(WARPS * WARP) combine_pieces(
    const int* __restrict__ places,     // (rows, 3): row of `out`, first place, number of places
    const float* __restrict__ partial,  // (places, Q_HEADS, HEAD_DIM)
    const float* __restrict__ softmax,  // (places, Q_HEADS, 2)
    bf16* __restrict__ out) {           // (rows, Q_HEADS, HEAD_DIM), of rows with places
    const int head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const long long row = places[blockIdx.x * 3];
    const int first = places[blockIdx.x * 3 + 1], count = places[blockIdx.x * 3 + 2];
    if (count == 0 || head >= Q_HEADS) return;
    float largest = MINUS_INFINITY;
    for (int i = lane; i < count; i += WARP)
        largest = fmaxf(largest, softmax[((first + i) * Q_HEADS + head) * 2]);
    largest = warp_max(largest);
    float sum = 0.0f, total[(HEAD_DIM + WARP - 1) / WARP] = {};
    for (int i = 0; i < count; i++) {
        const long long piece = static_cast<long long>(first + i) * Q_HEADS + head;
        const float share = exp2f(softmax[piece * 2] - largest);
        sum += share * softmax[piece * 2 + 1];
#pragma unroll
        for (int column = lane, j = 0; column < HEAD_DIM; column += WARP, j++)
            total[j] += share * partial[piece * HEAD_DIM + column];
    }
#pragma unroll
    for (int column = lane, j = 0; column < HEAD_DIM; column += WARP, j++)
        out[(row * Q_HEADS + head) * HEAD_DIM + column] =
            static_cast<bf16>(pack_bf16(total[j] / sum, 0.0f));
}
