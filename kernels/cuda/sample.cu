// Draws one id per row of logits. Every filter keeps a head of the ids in order of likeliness (of
// equal ones the lowest id first), so each cut is a search for the key of one element: how many
// ids, with how much mass, have at least this key? Nothing is sorted. Two passes over the row: one
// finds the largest logit and the largest of each of many small groups of ids; at least k ids are
// as large as the k-th largest of those, so the second pass lists all that are. The searches run
// over the list; only where the head does not end within it, over the whole row.
// Lists and sums have one fixed order: the same logits and the same draw give the same id.
// Semantics: kernels.ops.SamplingTable. Weights of listed ids in float64, of a whole row in
// float32; sums in float64.
// Constants: THREADS, a multiple of 32; IS_BF16: logits are bfloat16, else float32.
#include "common.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int STREAMS = 3;  // vectors that a thread loads before it looks at the first
constexpr int LISTED_MAX = 4096;
constexpr int SEGMENT = LISTED_MAX / WARPS;  // of the list, filled and read by one warp
constexpr int GROUP_RANK_MAX = THREADS * STREAMS * 3 / 4;  // lists about twice as many ids
constexpr int KEY_BIT_MIN = IS_BF16 ? 16 : 0;  // bits below carry nothing
constexpr unsigned KEY_STEP = 1u << KEY_BIT_MIN;
constexpr unsigned long long NONE = ~0ull;
constexpr int UNDECIDED = -2;  // what sample_wide leaves in `ids`
enum Column { TEMPERATURE, TOP_P, TOP_K, MIN_P, UNIFORM, NUM_COLUMNS };

#if IS_BF16
typedef bf16 Logit;
#else
typedef float Logit;
#endif

// Unsigned integers in the order of the floats; -0 counts as 0.
__device__ __forceinline__ unsigned key_of(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A value whose key agrees with `key` in the bits that count.
__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float((key & 0x80000000u ? key & 0x7fffffffu : ~key) & ~(KEY_STEP - 1));
}

// f(values, id of the first, stream, is there?) for every vector of [first, end): those at
// `offset` and every `stride` further. All threads call f equally often; an absent vector is minus
// infinity.
template <typename F>
__device__ __forceinline__ void each_vector(const Logit* logits, int first, int end, int offset,
                                            int stride, F f) {
    constexpr int PARTS = IS_BF16 ? 1 : 2;
    for (int base = first; base < end; base += STREAMS * stride) {
        uint4 raw[STREAMS][PARTS];
#pragma unroll
        for (int stream = 0; stream < STREAMS; stream++) {
            const int start = base + stream * stride + offset;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                if (start < end) raw[stream][part] = load_16(logits + start + part * 4);
        }
#pragma unroll
        for (int stream = 0; stream < STREAMS; stream++) {
            const int start = base + stream * stride + offset;
            float values[VECTOR];
#if IS_BF16
            unpack_8(raw[stream][0], values);
#else
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const uint4 words = raw[stream][part];
                values[4 * part] = __uint_as_float(words.x);
                values[4 * part + 1] = __uint_as_float(words.y);
                values[4 * part + 2] = __uint_as_float(words.z);
                values[4 * part + 3] = __uint_as_float(words.w);
            }
#endif
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                if (start >= end) values[i] = MINUS_INFINITY;
            f(values, start, stream, start < end);
        }
    }
}

struct Head {
    int count;
    double mass;
};

// A head is enough by any of these.
struct Wanted {
    int count = 0x7fffffff;  // at least
    double mass = 1e300;     // at least
    double beyond = 1e300;   // more than
};

// The largest key whose head is enough, that head, and the one without the elements of this key.
struct Found {
    unsigned key;
    Head at, above;
};

struct Scratch {
    Head heads[2][WARP];  // two, so that one barrier lies between a use and the next of the same
    unsigned long long bests[WARP];
};

// What all threads of the block know of the row at hand.
struct Row {
    const Logit* logits;
    int vocab;
    float largest;
    double temperature;
    Scratch* scratch;
    int turn;  // which of the scratch's two
    bool is_listed;
    const double* weights;  // this warp's segment of the list
    const float* values;
    const int* ids;
    int num_listed;  // in this segment
    Head all;        // of the list, or of the row
    unsigned smallest_key;

    // Below the largest, in natural logarithms of weight.
    __device__ float depth(float value) const {
        return (largest - value) / static_cast<float>(temperature);
    }

    __device__ __noinline__ double weight(float value) const {
        if (is_listed) return exp((double(value) - largest) / temperature);
        return expf(-depth(value));
    }

    // The sum over all threads, in all of them.
    __device__ Head total(Head mine) {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        turn ^= 1;
        mine = {warp_sum(mine.count), warp_sum(mine.mass)};
        if (lane == 0) scratch->heads[turn][warp] = mine;
        __syncthreads();
        const Head part = lane < WARPS ? scratch->heads[turn][lane] : Head{0, 0.0};
        return {warp_sum(part.count), warp_sum(part.mass)};
    }

    // f(value, id) for this thread's share of the list, or of the row.
    template <typename F>
    __device__ __forceinline__ void each(F f) const {
        if (is_listed) {
            for (int i = threadIdx.x % WARP; i < num_listed; i += WARP) f(values[i], ids[i]);
            return;
        }
        each_vector(logits, 0, vocab, threadIdx.x * VECTOR, THREADS * VECTOR,
                    [&](const float* vector, int start, int, bool is_there) {
#pragma unroll
                        for (int i = 0; i < VECTOR; i++)
                            if (is_there) f(vector[i], start + i);
                    });
    }

    // The elements whose key is at least `key`.
    __device__ __noinline__ Head from_key(unsigned key) {
        Head head = {0, 0.0};
        if (is_listed) {
            for (int i = threadIdx.x % WARP; i < num_listed; i += WARP) {
                const bool is_in = key_of(values[i]) >= key;
                head.count += is_in;
                head.mass += is_in ? weights[i] : 0.0;
            }
        } else {
            each([&](float value, int) {
                const bool is_in = key_of(value) >= key;
                head.count += is_in;
                head.mass += is_in ? expf(-depth(value)) : 0.0f;
            });
        }
        return total(head);
    }

    // Bit by bit below those that all keys share.
    __device__ __noinline__ Found find(Wanted wanted) {
        const unsigned largest_key = key_of(largest);
        const int num_shared = __clz((largest_key ^ smallest_key) | KEY_STEP);
        const unsigned shared = num_shared ? ~(0xffffffffu >> num_shared) : 0;
        Found found = {largest_key & shared, all, {0, 0.0}};
        for (int bit = 31 - num_shared; bit >= KEY_BIT_MIN; bit--) {
            const unsigned tried = found.key | 1u << bit;
            const Head head = from_key(tried);
            if (head.count >= wanted.count || head.mass >= wanted.mass ||
                head.mass > wanted.beyond) {
                found.key = tried;
                found.at = head;
            } else {
                found.above = head;
            }
        }
        return found;
    }

    // The id of rank `rank` by id among the elements of this key.
    __device__ __noinline__ int id_at(unsigned key, int rank) {
        int id = 0;
        for (int bit = 31 - __clz(vocab); bit >= 0; bit--) {
            const int tried = id | 1 << bit;
            Head below = {0, 0.0};
            each([&](float value, int its_id) {
                below.count += key_of(value) >> KEY_BIT_MIN == key >> KEY_BIT_MIN && its_id < tried;
            });
            if (total(below).count <= rank) id = tried;
        }
        return id;
    }
};

// Key of the largest value, above the complement of its lowest id; NONE where a value is NaN or
// plus infinity or none is finite. Leaves the keys of this thread's groups.
__device__ __noinline__ unsigned long long survey(const Row& row, unsigned group_keys[STREAMS]) {
    float tops[STREAMS];
    int ids[STREAMS];
    bool is_bad = false;
#pragma unroll
    for (int i = 0; i < STREAMS; i++) {
        tops[i] = MINUS_INFINITY;
        ids[i] = 0;
    }
    each_vector(row.logits, 0, row.vocab, threadIdx.x * VECTOR, THREADS * VECTOR,
                [&](const float* values, int start, int stream, bool) {
                    float top = values[0];
#pragma unroll
                    for (int i = 1; i < VECTOR; i++) top = larger_or_nan(top, values[i]);
                    is_bad |= !(top < -MINUS_INFINITY);
                    if (!(top <= tops[stream])) {
                        tops[stream] = top;
#pragma unroll
                        for (int i = VECTOR - 1; i >= 0; i--)
                            if (values[i] == top) ids[stream] = start + i;
                    }
                });
    unsigned long long best = 0;
#pragma unroll
    for (int i = 0; i < STREAMS; i++) {
        group_keys[i] = key_of(tops[i]);
        best = max(best, static_cast<unsigned long long>(group_keys[i]) << 32 | unsigned(~ids[i]));
    }
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        best = max(best, __shfl_xor_sync(FULL_WARP, best, distance));
    if (threadIdx.x % WARP == 0) row.scratch->bests[threadIdx.x / WARP] = best;
    const bool has_bad = __syncthreads_or(is_bad);
    for (int warp = 0; warp < WARPS; warp++) best = max(best, row.scratch->bests[warp]);
    return has_bad || best >> 32 == key_of(MINUS_INFINITY) ? NONE : best;
}

// Nothing is cut: the ids in their own order. Each warp has one stretch of the row.
__device__ __noinline__ void draw_plain(const Row& row, double uniform, int* out) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    constexpr int STRIDE = WARP * VECTOR;
    const int stretch = (row.vocab + STRIDE * WARPS - 1) / (STRIDE * WARPS) * STRIDE;
    const int first = warp * stretch, end = min(row.vocab, first + stretch);
    double mass = 0.0;
    each_vector(row.logits, first, end, lane * VECTOR, STRIDE,
                [&](const float* values, int, int, bool) {
                    float part = 0.0f;
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) part += expf(-row.depth(values[i]));
                    mass += part;
                });
    mass = warp_sum(mass);
    Head* heads = row.scratch->heads[0];
    if (lane == 0) heads[warp].mass = mass;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < WARPS; i++) total += heads[i].mass;
    const double target = uniform * total;
    double before = 0.0, passed = 0.0;
    int chosen = 0;  // the first stretch that goes beyond the target, or the last with any mass
    for (int i = 0; i < WARPS && passed <= target; i++) {
        if (heads[i].mass > 0.0) {
            chosen = i;
            before = passed;
        }
        passed += heads[i].mass;
    }
    if (warp != chosen) return;  // no barrier follows
    int drawn = -1;  // the last id seen with any weight: rounding must not pass it
    bool is_found = false;
    each_vector(row.logits, first, end, lane * VECTOR, STRIDE,
                [&](const float* values, int start, int, bool) {
                    if (is_found) return;  // all lanes alike
                    float weights[VECTOR], own = 0.0f;
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) {
                        weights[i] = expf(-row.depth(values[i]));
                        own += weights[i];
                    }
                    double upto = own;
#pragma unroll
                    for (int distance = 1; distance < WARP; distance *= 2) {
                        const double lower = __shfl_up_sync(FULL_WARP, upto, distance);
                        if (lane >= distance) upto += lower;
                    }
                    double reached = before + (upto - own);
                    int found = -1, last = -1;
#pragma unroll
                    for (int i = 0; i < VECTOR; i++) {
                        reached += weights[i];
                        if (weights[i] > 0.0f) {
                            last = start + i;
                            if (found < 0 && reached > target) found = start + i;
                        }
                    }
                    const unsigned finders = __ballot_sync(FULL_WARP, found >= 0);
                    const unsigned holders = __ballot_sync(FULL_WARP, last >= 0);
                    is_found = finders != 0;
                    if (is_found)
                        drawn = __shfl_sync(FULL_WARP, found, __ffs(finders) - 1);
                    else if (holders != 0)
                        drawn = __shfl_sync(FULL_WARP, last, 31 - __clz(holders));
                    before += __shfl_sync(FULL_WARP, upto, WARP - 1);
                });
    if (lane == 0) *out = drawn;
}

// The largest key that `wanted` of the groups reach; 0 where there are not so many.
__device__ __noinline__ unsigned group_key(Row& row, const unsigned keys[STREAMS], int wanted) {
    unsigned key = 0;
    for (int bit = 31; bit >= KEY_BIT_MIN; bit--) {
        Head reached = {0, 0.0};
#pragma unroll
        for (int i = 0; i < STREAMS; i++) reached.count += keys[i] >= (key | 1u << bit);
        if (row.total(reached).count >= wanted) key |= 1u << bit;
    }
    return key;
}

// Lists the elements from `key` on, each warp those it meets; false where a segment is too small.
// Also sums up the row where `has_mass`. `weights`, `values`, `ids`: this warp's segment.
__device__ __noinline__ bool fill_list(Row& row, unsigned key, bool has_mass, double* weights,
                                       float* values, int* ids) {
    const unsigned lanes_below = (1u << threadIdx.x % WARP) - 1;
    Head mine = {0, 0.0};  // listed by the warp; mass of this thread
    each_vector(
        row.logits, 0, row.vocab, threadIdx.x * VECTOR, THREADS * VECTOR,
        [&](const float* vector, int start, int, bool is_there) {
            float top = vector[0], mass = 0.0f;
#pragma unroll
            for (int i = 1; i < VECTOR; i++) top = fmaxf(top, vector[i]);
            if (has_mass) {
#pragma unroll
                for (int i = 0; i < VECTOR; i++) mass += expf(-row.depth(vector[i]));
                mine.mass += mass;
            }
            if (__ballot_sync(FULL_WARP, is_there && key_of(top) >= key) == 0) return;
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const bool is_in = is_there && key_of(vector[i]) >= key;
                const unsigned lanes = __ballot_sync(FULL_WARP, is_in);
                const int slot = mine.count + __popc(lanes & lanes_below);
                if (is_in && slot < SEGMENT) {
                    weights[slot] = exp((double(vector[i]) - row.largest) / row.temperature);
                    values[slot] = vector[i];
                    ids[slot] = start + i;
                }
                mine.count += __popc(lanes);
            }
        });
    row.num_listed = mine.count;
    row.all.mass = row.total({0, mine.mass}).mass;
    return !__syncthreads_or(mine.count > SEGMENT);
}

// Is the end of the head among the listed, whose keys are at least `key`?
__device__ bool is_head_listed(Row& row, const double* params, unsigned key, double mass) {
    const double top_p = params[TOP_P], top_k = params[TOP_K], min_p = params[MIN_P];
    if (row.all.count == row.vocab) return true;
    if (top_k > 0.0 && row.all.count >= top_k) return true;
    if (top_k > 0.0 && top_p < 1.0) return false;  // a share of a mass that is not known
    if (min_p > 0.0 && row.weight(value_of(key)) < min_p) return true;
    return top_k == 0.0 && top_p < 1.0 && row.all.mass >= top_p * mass;
}

// The ids from the likeliest on, as far as top_k, top_p and min_p all keep them. mass: of the row.
__device__ __noinline__ int draw_cut(Row& row, const double* params, double mass) {
    const double top_p = params[TOP_P], min_p = params[MIN_P];
    const int top_k = int(min(params[TOP_K], double(row.vocab)));
    int kept = row.all.count;
    Found last = {0, row.all, row.all};  // the key of the last that is kept; 0: not known
    if (top_k > 0 && top_k <= row.all.count) {
        kept = top_k;
        last = row.find({.count = top_k});
        mass = last.above.mass + (top_k - last.above.count) * row.weight(value_of(last.key));
    }
    if (top_p < 1.0 && row.all.mass >= top_p * mass) {
        const Found reached = row.find({.mass = top_p * mass});
        const double weight = row.weight(value_of(reached.key));
        const double missing = (top_p * mass - reached.above.mass) / weight;
        const int of_key = reached.at.count - reached.above.count;
        const int more = weight > 0.0 ? int(min(ceil(missing), double(of_key))) : 1;
        if (reached.above.count + max(more, 1) < kept) {
            kept = reached.above.count + max(more, 1);
            last = reached;
        }
    }
    if (min_p > 0.0) {
        Head likely = {0, 0.0};
        row.each([&](float value, int) { likely.count += row.weight(value) >= min_p; });
        const int num_likely = max(row.total(likely).count, 1);
        if (num_likely < kept) {
            kept = num_likely;
            last.key = 0;
        }
    }
    if (last.key == 0) last = row.find({.count = kept});
    const double last_weight = row.weight(value_of(last.key));
    const double kept_mass = last.above.mass + (kept - last.above.count) * last_weight;
    const double target = params[UNIFORM] * kept_mass;
    // Rounding must not pass what has weight: all of the last key's mass is always enough.
    const Found drawn = row.find({.mass = last.at.mass, .beyond = target});
    const int of_key = (drawn.key == last.key ? kept : drawn.at.count) - drawn.above.count;
    const double rank = floor((target - drawn.above.mass) / row.weight(value_of(drawn.key)));
    return row.id_at(drawn.key, int(min(max(rank, 0.0), double(of_key - 1))));
}

// PRECOND: grid (rows), block THREADS, dynamic shared memory LISTED_MAX * 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 384 && IS_BF16 ? 2 : 1) sample(
    const Logit* __restrict__ logits,   // (rows, vocab); vocab is a multiple of 8
    const double* __restrict__ params,  // (rows, NUM_COLUMNS); temperature 0 is greedy
    int* __restrict__ ids,              // (rows), written; -1 where a logit is no number
    int vocab,
    int is_rest) {  // only rows whose id is UNDECIDED
    DYNAMIC_SHARED(shared);
    SHARED(Scratch, scratch, 1);
    if (is_rest && ids[blockIdx.x] != UNDECIDED) return;  // the whole block leaves
    const double* mine = params + blockIdx.x * NUM_COLUMNS;
    const int segment = threadIdx.x / WARP * SEGMENT;
    double* weights = reinterpret_cast<double*>(shared);
    float* values = reinterpret_cast<float*>(weights + LISTED_MAX);
    int* listed_ids = reinterpret_cast<int*>(values + LISTED_MAX) + segment;
    weights += segment;
    values += segment;
    Row row = {.logits = logits + static_cast<long long>(blockIdx.x) * vocab,
               .vocab = vocab,
               .largest = 0.0f,
               .temperature = mine[TEMPERATURE],
               .scratch = scratch,
               .turn = 0,
               .is_listed = false,
               .weights = weights,
               .values = values,
               .ids = listed_ids,
               .num_listed = 0,
               .all = {vocab, 0.0},
               .smallest_key = 0};
    unsigned group_keys[STREAMS];
    const unsigned long long best = survey(row, group_keys);
    if (best == NONE || row.temperature <= 0.0) {
        if (threadIdx.x == 0) ids[blockIdx.x] = best == NONE ? -1 : int(~unsigned(best));
        return;  // the whole block leaves
    }
    row.largest = value_of(static_cast<unsigned>(best >> 32));
    const double top_p = mine[TOP_P], top_k = mine[TOP_K];
    if (top_p >= 1.0 && top_k == 0.0 && mine[MIN_P] == 0.0) {
        draw_plain(row, mine[UNIFORM], ids + blockIdx.x);
        return;  // the whole block leaves
    }
    const int wanted = top_k > 0.0 ? int(min(top_k, double(GROUP_RANK_MAX))) : GROUP_RANK_MAX;
    const unsigned key = group_key(row, group_keys, wanted);
    const bool fits = fill_list(row, key, top_k == 0.0 && top_p < 1.0, weights, values, listed_ids);
    const double mass = row.all.mass;
    row.is_listed = fits;
    row.smallest_key = fits ? key : 0;
    row.all = row.from_key(0);
    if (fits && !is_head_listed(row, mine, key, mass)) {
        row.is_listed = false;
        row.smallest_key = 0;
        row.all = row.from_key(0);
    }
    const int drawn = draw_cut(row, mine, row.is_listed ? mass : row.all.mass);
    if (threadIdx.x == 0) ids[blockIdx.x] = drawn;
}
