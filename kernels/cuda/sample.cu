// Draws one id per row of logits. Every filter keeps a head of the ids in order of likeliness (ties:
// lowest id first), so each cut is a search for the key of one element: how many ids, with how much
// mass, have at least this key? Nothing is sorted. The searches run over a list of the likeliest
// ids in shared memory where the head ends within it, else over the whole row.
// Sums are taken in one fixed order, so the same logits and the same draw give the same id.
// Semantics: kernels.ops.SamplingTable. Weights of listed ids in float64, of a whole row in float32;
// sums in float64.
// Constants: THREADS, a multiple of 32; IS_BF16: logits are bfloat16, else float32.
#include "common.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int LISTED_MAX = 4096;
constexpr int KEY_BIT_MIN = IS_BF16 ? 16 : 0;  // bits below carry nothing
constexpr int REACHES = 8;
constexpr unsigned long long NONE = ~0ull;
enum Column { TEMPERATURE, TOP_P, TOP_K, MIN_P, UNIFORM, NUM_COLUMNS };

#if IS_BF16
typedef bf16 Logit;
#else
typedef float Logit;
#endif

// How far below the largest logit a list may reach, in natural logarithms of weight.
__device__ __forceinline__ float reach(int index) {
    constexpr float reaches[REACHES] = {0.5f, 1.0f, 2.0f, 4.0f, 6.0f, 9.0f, 14.0f, 22.0f};
    return reaches[index];
}

// Unsigned integers in the order of the floats; -0 counts as 0.
__device__ __forceinline__ unsigned key_of(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A value whose key agrees with `key` in the bits that count.
__device__ __forceinline__ float value_of(unsigned key) {
    constexpr unsigned low = (1ull << KEY_BIT_MIN) - 1;
    return __uint_as_float(key & 0x80000000u ? key & ~0x80000000u & ~low : ~key & ~low);
}

__device__ __forceinline__ void load_logits(const Logit* from, float values[VECTOR]) {
#if IS_BF16
    unpack_8(load_16(from), values);
#else
    const uint4 low = load_16(from), high = load_16(from + 4);
    const unsigned words[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < VECTOR; i++) values[i] = __uint_as_float(words[i]);
#endif
}

struct Scratch {
    double sums[WARP];
    int counts[WARP];
    unsigned long long bests[WARP];
};

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

// What all threads of the block know of the row at hand.
struct Row {
    const Logit* logits;
    int vocab;
    float largest;
    double temperature;
    const double* listed_weights;  // nullptr: elements are those of the whole row
    const float* listed_values;
    const int* listed_ids;
    int num_listed;
    Scratch* scratch;

    // Below the largest, in natural logarithms of weight.
    __device__ float depth(float value) const {
        return (largest - value) / static_cast<float>(temperature);
    }

    __device__ double weight(float value) const {
        if (listed_weights != nullptr) return exp((double(value) - largest) / temperature);
        return expf(-depth(value));
    }

    // f(value, id) for this thread's share of the elements, always in the same order.
    template <typename F>
    __device__ __forceinline__ void each(F f) const {
        if (listed_weights != nullptr) {
            for (int i = threadIdx.x; i < num_listed; i += THREADS)
                f(listed_values[i], listed_ids[i]);
            return;
        }
        for (int start = threadIdx.x * VECTOR; start < vocab; start += THREADS * VECTOR) {
            float values[VECTOR];
            load_logits(logits + start, values);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) f(values[i], start + i);
        }
    }

    __device__ Head total(Head mine) const {
        return {block_sum(mine.count, scratch->counts), block_sum(mine.mass, scratch->sums)};
    }

    // The elements whose key is at least `key`.
    __device__ __noinline__ Head from_key(unsigned key) const {
        Head head = {0, 0.0};
        if (listed_weights != nullptr) {
            for (int i = threadIdx.x; i < num_listed; i += THREADS) {
                const bool is_in = key_of(listed_values[i]) >= key;
                head.count += is_in;
                head.mass += is_in ? listed_weights[i] : 0.0;
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

    // The largest key whose head is enough; the smallest of all keys where none is.
    __device__ __noinline__ unsigned find_key(Wanted wanted) const {
        unsigned key = 0;
        for (int bit = 31; bit >= KEY_BIT_MIN; bit--) {
            const unsigned tried = key | 1u << bit;
            const Head head = from_key(tried);
            if (head.count >= wanted.count || head.mass >= wanted.mass || head.mass > wanted.beyond)
                key = tried;
        }
        return key;
    }

    // The elements likelier than those of `key`.
    __device__ Head above(unsigned key) const {
        return from_key(key + (1u << KEY_BIT_MIN));  // keys of numbers are far from the largest
    }

    // Mass of the first `count` elements, whose last has this key.
    __device__ double mass_of(int count, unsigned key) const {
        const Head likelier = above(key);
        return likelier.mass + (count - likelier.count) * weight(value_of(key));
    }

    // The id of rank `rank` by id among the elements of this key.
    __device__ int id_at(unsigned key, int rank) const {
        int id = 0;
        for (int bit = 30 - __clz(vocab | 1) + 1; bit >= 0; bit--) {
            const int tried = id | 1 << bit;
            int count = 0;
            each([&](float value, int its_id) {
                count += key_of(value) >> KEY_BIT_MIN == key >> KEY_BIT_MIN && its_id < tried;
            });
            if (block_sum(count, scratch->counts) <= rank) id = tried;
        }
        return id;
    }
};

// Largest value and its lowest id; NONE where a value is NaN or plus infinity or none is finite.
__device__ unsigned long long best_of(const Row& row) {
    unsigned long long best = 0;
    row.each([&](float value, int id) {
        const bool is_number = value < -MINUS_INFINITY;  // false for NaN
        const unsigned long long found =
            is_number ? static_cast<unsigned long long>(key_of(value)) << 32 | unsigned(~id) : NONE;
        best = max(best, found);
    });
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        best = max(best, __shfl_xor_sync(FULL_WARP, best, distance));
    unsigned long long* bests = row.scratch->bests;
    if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = best;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) best = max(best, bests[warp]);
    return best >> 32 == key_of(MINUS_INFINITY) ? NONE : best;
}

// Nothing is cut: the ids in their own order. Each warp has one stretch of the row.
__device__ void draw_plain(const Row& row, double uniform, int* out) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    constexpr int STRIDE = WARP * VECTOR;
    const int stretch = (row.vocab + STRIDE * WARPS - 1) / (STRIDE * WARPS) * STRIDE;
    const int end = min(row.vocab, (warp + 1) * stretch);
    double mass = 0.0;
    for (int start = warp * stretch + lane * VECTOR; start < end; start += STRIDE) {
        float values[VECTOR];
        load_logits(row.logits + start, values);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) mass += expf(-row.depth(values[i]));
    }
    mass = warp_sum(mass);
    if (lane == 0) row.scratch->sums[warp] = mass;
    __syncthreads();
    double total = 0.0;
    for (int i = 0; i < WARPS; i++) total += row.scratch->sums[i];
    const double target = uniform * total;
    double before = 0.0, passed = 0.0;
    int chosen = 0;  // the first stretch that goes beyond the target, or the last with any mass
    for (int i = 0; i < WARPS && passed <= target; i++) {
        const double sum = row.scratch->sums[i];
        if (sum > 0.0) {
            chosen = i;
            before = passed;
        }
        passed += sum;
    }
    if (warp != chosen) return;  // no barrier follows
    int last = -1;  // the last id seen with any weight: rounding must not pass it
    for (int start = warp * stretch; start < end; start += STRIDE) {
        const int mine = start + lane * VECTOR;
        double weights[VECTOR], own = 0.0;
        float values[VECTOR];
        if (mine < end) load_logits(row.logits + mine, values);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            weights[i] = mine < end ? expf(-row.depth(values[i])) : 0.0f;
            own += weights[i];
        }
        double upto = own;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const double lower = __shfl_up_sync(FULL_WARP, upto, distance);
            if (lane >= distance) upto += lower;
        }
        double reached = before + (upto - own);
        int found = -1, own_last = -1;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            reached += weights[i];
            if (weights[i] > 0.0) {
                own_last = mine + i;
                if (found < 0 && reached > target) found = mine + i;
            }
        }
        const unsigned finders = __ballot_sync(FULL_WARP, found >= 0);
        const unsigned holders = __ballot_sync(FULL_WARP, own_last >= 0);
        if (finders != 0) {
            last = __shfl_sync(FULL_WARP, found, __ffs(finders) - 1);
            break;
        }
        if (holders != 0) last = __shfl_sync(FULL_WARP, own_last, 31 - __clz(holders));
        before += __shfl_sync(FULL_WARP, upto, WARP - 1);
    }
    if (lane == 0) *out = last;
}

// How far the list must reach below the largest logit for the whole head to be in it, and how many
// ids that is; REACHES where none of the tried will do. Also the mass of the row.
__device__ int choose_reach(const Row& row, const double* params, Head* all, int* num_listed) {
    Head heads[REACHES];
#pragma unroll
    for (int i = 0; i < REACHES; i++) heads[i] = {0, 0.0};
    double mass = 0.0;
    row.each([&](float value, int) {
        const float depth = row.depth(value), weight = expf(-depth);
        mass += weight;
#pragma unroll
        for (int i = 0; i < REACHES; i++)
            if (depth <= reach(i)) {
                heads[i].count++;
                heads[i].mass += weight;
            }
    });
    *all = {row.vocab, block_sum(mass, row.scratch->sums)};
    const double top_p = params[TOP_P], top_k = params[TOP_K], min_p = params[MIN_P];
    for (int i = 0; i < REACHES; i++) {
        const Head head = row.total(heads[i]);
        const bool holds_k = top_k > 0.0 && head.count >= top_k;
        const bool holds_p = top_k == 0.0 && top_p < 1.0 && head.mass >= top_p * all->mass;
        const bool holds_min = min_p > 0.0 && expf(-reach(i)) < 0.999 * min_p &&
                               (top_p >= 1.0 || top_k == 0.0);
        if (holds_k || holds_p || holds_min) {
            *num_listed = head.count;
            return head.count <= LISTED_MAX ? i : REACHES;
        }
    }
    return REACHES;
}

// The elements within the reach, in the order (thread, its share).
__device__ void fill_list(const Row& row, int reach_index, double* weights, float* values,
                          int* ids) {
    int count = 0;
    const auto is_near = [&](float value) { return row.depth(value) <= reach(reach_index); };
    row.each([&](float value, int) { count += is_near(value); });
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int upto = count;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int lower = __shfl_up_sync(FULL_WARP, upto, distance);
        if (lane >= distance) upto += lower;
    }
    __syncthreads();  // the scratch may still be read
    if (lane == WARP - 1) row.scratch->counts[warp] = upto;
    __syncthreads();
    int place = upto - count;
    for (int i = 0; i < warp; i++) place += row.scratch->counts[i];
    row.each([&](float value, int id) {
        if (is_near(value)) {
            weights[place] = exp((double(value) - row.largest) / row.temperature);
            values[place] = value;
            ids[place++] = id;
        }
    });
    __syncthreads();
}

// The ids from the likeliest on, as far as top_k, top_p and min_p all keep them.
__device__ int draw_cut(const Row& row, const double* params, Head all) {
    const double top_p = params[TOP_P], min_p = params[MIN_P];
    const Head listed = row.from_key(0);
    int kept = listed.count;
    double mass = all.mass;
    if (params[TOP_K] > 0.0 && params[TOP_K] < all.count) {
        const int top_k = int(params[TOP_K]);
        if (top_k < kept) kept = top_k;
        if (top_k <= listed.count)
            mass = row.mass_of(top_k, row.find_key({.count = top_k}));
    }
    if (top_p < 1.0 && listed.mass >= top_p * mass) {
        const double wanted = top_p * mass;
        const unsigned key = row.find_key({.mass = wanted});
        const Head likelier = row.above(key);
        const double weight = row.weight(value_of(key));
        int more = weight > 0.0 ? int(min(ceil((wanted - likelier.mass) / weight), 1e9)) : 1;
        kept = min(kept, likelier.count + max(more, 1));
    }
    if (min_p > 0.0) {
        Head likely = {0, 0.0};
        row.each([&](float value, int) { likely.count += row.weight(value) >= min_p; });
        kept = min(kept, max(row.total(likely).count, 1));
    }
    const unsigned last_key = row.find_key({.count = kept});
    const double kept_mass = row.mass_of(kept, last_key);
    const double target = params[UNIFORM] * kept_mass;
    const double reachable = row.from_key(last_key).mass;  // rounding must not pass what has weight
    const unsigned key = row.find_key({.mass = reachable, .beyond = target});
    const Head likelier = row.above(key);
    const int of_key = (key == last_key ? kept : row.from_key(key).count) - likelier.count;
    const double rank = floor((target - likelier.mass) / row.weight(value_of(key)));
    return row.id_at(key, int(min(max(rank, 0.0), double(of_key - 1))));
}

// PRECOND: grid (rows), block THREADS, dynamic shared memory LISTED_MAX * 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(
    const Logit* __restrict__ logits,   // (rows, vocab); vocab is a multiple of 8
    const double* __restrict__ params,  // (rows, NUM_COLUMNS); temperature 0 is greedy
    int* __restrict__ ids,              // (rows), written; -1 where a logit is no number
    int vocab) {
    DYNAMIC_SHARED(shared);
    SHARED(Scratch, scratch, 1);
    const double* mine = params + blockIdx.x * NUM_COLUMNS;
    Row row = {.logits = logits + static_cast<long long>(blockIdx.x) * vocab,
               .vocab = vocab,
               .largest = 0.0f,
               .temperature = 1.0,
               .listed_weights = nullptr,
               .listed_values = nullptr,
               .listed_ids = nullptr,
               .num_listed = 0,
               .scratch = scratch};
    const unsigned long long best = best_of(row);
    const bool is_greedy = mine[TEMPERATURE] <= 0.0;
    if (best == NONE || is_greedy) {
        if (threadIdx.x == 0) ids[blockIdx.x] = best == NONE ? -1 : int(~unsigned(best));
        return;  // the whole block leaves
    }
    row.largest = value_of(static_cast<unsigned>(best >> 32));
    row.temperature = mine[TEMPERATURE];
    if (mine[TOP_P] >= 1.0 && mine[TOP_K] == 0.0 && mine[MIN_P] == 0.0) {
        draw_plain(row, mine[UNIFORM], ids + blockIdx.x);
        return;  // the whole block leaves
    }
    Head all;
    int num_listed = 0;
    const int reach_index = choose_reach(row, mine, &all, &num_listed);
    if (reach_index < REACHES) {
        double* weights = reinterpret_cast<double*>(shared);
        float* values = reinterpret_cast<float*>(weights + LISTED_MAX);
        int* listed_ids = reinterpret_cast<int*>(values + LISTED_MAX);
        fill_list(row, reach_index, weights, values, listed_ids);
        row.listed_weights = weights;
        row.listed_values = values;
        row.listed_ids = listed_ids;
        row.num_listed = num_listed;
    }
    const int drawn = draw_cut(row, mine, all);
    if (threadIdx.x == 0) ids[blockIdx.x] = drawn;
}
