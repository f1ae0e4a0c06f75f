// Draws ids from rows of bfloat16 logits whose head may be long: top_p or min_p without a small
// top_k. A bfloat16 has 65,536 values, so one pass counts how often each stands in the row; counts
// do not depend on the order of the threads, and a count times a weight is the mass of a value. All
// cuts are then searches over these counts, in order of likeliness; two more looks at the row find
// the id. A row with more than 65,535 equal logits is left to `sample`.
// Semantics: kernels.ops.SamplingTable. Weights and masses in float64, summed in one fixed order.
// Constants: THREADS, 1024; TOP_K_MAX: rows with a top_k up to it are left to `sample`.
#include "common.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int KEYS = 1 << 16;
constexpr int SEGMENTS = THREADS;                    // of the keys, the largest first
constexpr int SEGMENT_WORDS = KEYS / SEGMENTS / 2;   // a lane each; two counts in a word
constexpr int STREAMS = 4;                           // vectors that a thread loads at a time
constexpr int CHUNK = WARP * VECTOR;                 // ids that a warp looks at together
constexpr int UNDECIDED = -2;
constexpr unsigned KEY_MINUS_INFINITY = 0x007f, KEY_INFINITY = 0xff80;
enum Column { TEMPERATURE, TOP_P, TOP_K, MIN_P, UNIFORM, NUM_COLUMNS };
static_assert(SEGMENT_WORDS == WARP, "a lane has one word of a segment");

// Unsigned integers in the order of the values; -0 counts as 0.
__device__ __forceinline__ unsigned key_of(unsigned bits) {
    if (bits == 0x8000u) bits = 0;
    return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
    return to_float(static_cast<bf16>(key & 0x8000u ? key & 0x7fffu : ~key & 0xffffu));
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

    __device__ bool is_met(Head head) const {
        return head.count >= count || head.mass >= mass || head.mass > beyond;
    }
};

// The largest key whose head is enough, that head, and the one without the elements of this key.
struct Found {
    unsigned key;
    Head at, above;
};

__device__ __forceinline__ Head sum_upto(Head mine) {  // over the lanes up to this one
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int count = __shfl_up_sync(FULL_WARP, mine.count, distance);
        const double mass = __shfl_up_sync(FULL_WARP, mine.mass, distance);
        if (lane >= distance) mine = {mine.count + count, mine.mass + mass};
    }
    return mine;
}

// What all threads know of the row at hand; arrays in shared memory.
struct Row {
    const unsigned* counts;  // (KEYS / 2): key 2i in the low half of word i
    const Head* upto;        // (SEGMENTS): elements of the segments up to this one
    int* votes;              // (2, WARPS)
    float largest;
    double temperature;
    int turn;  // which of the two votes

    __device__ double weight(unsigned key) const {
        return exp((double(value_of(key)) - largest) / temperature);
    }

    __device__ int count_of(unsigned key) const {
        return counts[key / 2] >> key % 2 * 16 & 0xffffu;
    }

    // Key of the larger of this lane's two keys of a segment.
    __device__ unsigned lane_key(int segment) const {
        return KEYS - 1 - 2 * (segment * SEGMENT_WORDS + threadIdx.x % WARP);
    }

    // The elements of this lane's two keys: the larger one, the smaller one.
    __device__ void read(int segment, Head pair[2]) const {
        const unsigned key = lane_key(segment);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int count = count_of(key - i);
            pair[i] = {count, count ? count * weight(key - i) : 0.0};
        }
    }

    // PRECOND: some element is wanted at most. All threads call it and get the same.
    __device__ __noinline__ Found find(Wanted wanted) {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const Head none = {0, 0.0};
        const Head before = threadIdx.x ? upto[threadIdx.x - 1] : none;
        const bool has_any = upto[threadIdx.x].count > before.count;
        const unsigned met = __ballot_sync(FULL_WARP, has_any && wanted.is_met(upto[threadIdx.x]));
        const unsigned any = __ballot_sync(FULL_WARP, has_any);
        turn ^= 1;
        if (lane == 0)  // the first that is enough; else the last with any, behind all of those
            votes[turn * WARPS + warp] = met   ? warp * WARP + __ffs(met) - 1
                                         : any ? 2 * SEGMENTS - (warp * WARP + 31 - __clz(any))
                                               : 2 * SEGMENTS + 1;
        __syncthreads();
        int first = votes[turn * WARPS];
        for (int i = 1; i < WARPS; i++) first = min(first, votes[turn * WARPS + i]);
        const int segment = first < SEGMENTS ? first : 2 * SEGMENTS - first;

        const Head start = segment ? upto[segment - 1] : none;
        Head pair[2];
        read(segment, pair);
        const Head both = {pair[0].count + pair[1].count, pair[0].mass + pair[1].mass};
        const Head last = sum_upto(both);
        const Head end = {start.count + last.count, start.mass + last.mass};
        Head above = {end.count - both.count, __shfl_up_sync(FULL_WARP, end.mass, 1)};
        if (lane == 0) above.mass = start.mass;
        const Head middle = {above.count + pair[0].count, above.mass + pair[0].mass};
        const bool is_larger = pair[0].count > 0 && (wanted.is_met(middle) || pair[1].count == 0);
        const bool is_met = both.count > 0 && (wanted.is_met(end) || wanted.is_met(middle));
        const unsigned lanes_met = __ballot_sync(FULL_WARP, is_met);
        const unsigned lanes_any = __ballot_sync(FULL_WARP, both.count > 0);
        const int chosen = lanes_met ? __ffs(lanes_met) - 1 : 31 - __clz(lanes_any);
        Found found = {lane_key(segment) - !is_larger, end, above};
        if (is_larger)
            found.at = middle;
        else
            found.above = middle;
        found.key = __shfl_sync(FULL_WARP, found.key, chosen);
        found.at.count = __shfl_sync(FULL_WARP, found.at.count, chosen);
        found.at.mass = __shfl_sync(FULL_WARP, found.at.mass, chosen);
        found.above.count = __shfl_sync(FULL_WARP, found.above.count, chosen);
        found.above.mass = __shfl_sync(FULL_WARP, found.above.mass, chosen);
        return found;
    }
};

// f(vector, id of its first) for each of this thread's vectors; an absent one is not seen.
template <typename F>
__device__ __forceinline__ void each_vector(const bf16* logits, int vocab, F f) {
    for (int base = threadIdx.x * VECTOR; base < vocab; base += STREAMS * THREADS * VECTOR) {
        uint4 raw[STREAMS];
#pragma unroll
        for (int stream = 0; stream < STREAMS; stream++) {
            const int start = base + stream * THREADS * VECTOR;
            if (start < vocab) raw[stream] = load_16(logits + start);
        }
#pragma unroll
        for (int stream = 0; stream < STREAMS; stream++) {
            const int start = base + stream * THREADS * VECTOR;
            if (start < vocab) f(raw[stream], start);
        }
    }
}

__device__ __forceinline__ unsigned bits_of(const uint4& raw, int index) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    return words[index / 2] >> index % 2 * 16 & 0xffffu;
}

// How many of the 8 logits have this key.
__device__ __forceinline__ int matches(const uint4& raw, unsigned key) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) count += key_of(bits_of(raw, i)) == key;
    return count;
}

// In the first warp: the id of rank `rank` by id among the elements of this key. in_chunk: shared,
// (ceil(vocab / CHUNK)).
__device__ __noinline__ int id_at(const bf16* logits, int vocab, unsigned key, int rank,
                                  int* in_chunk) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int num_chunks = (vocab + CHUNK - 1) / CHUNK;
    for (int chunk = threadIdx.x; chunk < num_chunks; chunk += THREADS) in_chunk[chunk] = 0;
    __syncthreads();
    each_vector(logits, vocab, [&](const uint4& raw, int start) {
        const int count = matches(raw, key);
        if (count) atomicAdd(in_chunk + start / CHUNK, count);
    });
    __syncthreads();
    if (warp > 0) return -1;  // no barrier follows
    int before = 0, chunk = 0;  // elements of the chunks before
    for (int base = 0; base < num_chunks; base += WARP) {
        const int mine = base + lane < num_chunks ? in_chunk[base + lane] : 0;
        const int upto = before + sum_upto({mine, 0.0}).count;
        const unsigned beyond = __ballot_sync(FULL_WARP, upto > rank);
        if (beyond) {
            const int place = __ffs(beyond) - 1;
            chunk = base + place;
            before = __shfl_sync(FULL_WARP, upto - mine, place);
            break;
        }
        before = __shfl_sync(FULL_WARP, upto, WARP - 1);
    }
    const int start = chunk * CHUNK + lane * VECTOR;
    uint4 raw = {0, 0, 0, 0};
    int count = 0;
    if (start < vocab) {
        raw = load_16(logits + start);
        count = matches(raw, key);
    }
    int left = rank - before - (sum_upto({count, 0.0}).count - count);  // to be passed in the vector
    int id = -1;
#pragma unroll
    for (int i = 0; i < VECTOR; i++)
        if (start < vocab && key_of(bits_of(raw, i)) == key && left-- == 0) id = start + i;
    const unsigned finders = __ballot_sync(FULL_WARP, id >= 0);
    return __shfl_sync(FULL_WARP, id, __ffs(finders) - 1);
}

// PRECOND: grid (rows), block THREADS, dynamic shared memory KEYS * 2 bytes; vocab / 256 < KEYS / 2.
extern "C" __global__ void __launch_bounds__(THREADS) sample_wide(
    const bf16* __restrict__ logits,    // (rows, vocab); vocab is a multiple of 8
    const double* __restrict__ params,  // (rows, NUM_COLUMNS); temperature 0 is greedy
    int* __restrict__ ids,              // (rows), written; UNDECIDED where the row is not for us
    int vocab) {
    DYNAMIC_SHARED(shared);
    SHARED(Head, upto, SEGMENTS);
    SHARED(int, votes, 2 * WARPS);
    SHARED(Head, heads, WARPS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const double* mine = params + blockIdx.x * NUM_COLUMNS;
    const double top_p = mine[TOP_P], top_k = mine[TOP_K], min_p = mine[MIN_P];
    const bool is_cut = top_p < 1.0 || min_p > 0.0 || top_k > 0.0;
    if (mine[TEMPERATURE] <= 0.0 || !is_cut || (top_k > 0.0 && top_k <= TOP_K_MAX)) {
        if (threadIdx.x == 0) ids[blockIdx.x] = UNDECIDED;
        return;  // the whole block leaves
    }
    logits += static_cast<long long>(blockIdx.x) * vocab;
    unsigned* counts = reinterpret_cast<unsigned*>(shared);
    for (int word = threadIdx.x; word < KEYS / 2; word += THREADS) counts[word] = 0;
    __syncthreads();
    unsigned largest_key = 0;
    each_vector(logits, vocab, [&](const uint4& raw, int) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const unsigned key = key_of(bits_of(raw, i));
            largest_key = max(largest_key, key);
            atomicAdd(counts + key / 2, 1u << key % 2 * 16);
        }
    });
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        largest_key = max(largest_key, __shfl_xor_sync(FULL_WARP, largest_key, distance));
    if (lane == 0) votes[warp] = largest_key;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) largest_key = max(largest_key, unsigned(votes[i]));
    Row row = {counts, upto, votes, value_of(largest_key), mine[TEMPERATURE], 0};
    const bool is_number = largest_key > KEY_MINUS_INFINITY && largest_key < KEY_INFINITY;

    // Each warp sums up its segments, then their sums are added up in order of likeliness.
    for (int segment = warp; segment < SEGMENTS; segment += WARPS) {
        Head head = {0, 0.0};
        if (is_number) {
            Head pair[2];
            row.read(segment, pair);
            head = {pair[0].count + pair[1].count, pair[0].mass + pair[1].mass};
        }
        head = {warp_sum(head.count), warp_sum(head.mass)};
        if (lane == 0) upto[segment] = head;
    }
    __syncthreads();
    Head head = sum_upto(upto[threadIdx.x]);
    if (lane == WARP - 1) heads[warp] = head;
    __syncthreads();
    for (int i = 0; i < warp; i++) head = {head.count + heads[i].count, head.mass + heads[i].mass};
    upto[threadIdx.x] = head;
    // NaNs with a sign have keys below minus infinity's, which is in the last segment but one.
    const int num_infinite = row.count_of(KEY_MINUS_INFINITY);
    __syncthreads();
    const Head all = upto[SEGMENTS - 1];
    const int num_low = all.count - upto[SEGMENTS - 3].count - num_infinite;
    if (!is_number || num_low > 0 || all.count != vocab) {
        // More equal logits than a count can tell look like a row of another length.
        if (threadIdx.x == 0) ids[blockIdx.x] = is_number && num_low <= 0 ? UNDECIDED : -1;
        return;  // the whole block leaves
    }

    int kept = all.count;
    double mass = all.mass;
    Found last = {0, all, all};  // the key of the last that is kept; 0: not known
    if (top_k > 0.0 && top_k <= kept) {
        kept = int(top_k);
        last = row.find({.count = kept});
        mass = last.above.mass + (kept - last.above.count) * row.weight(last.key);
    }
    if (top_p < 1.0) {
        const Found reached = row.find({.mass = top_p * mass});
        const double weight = row.weight(reached.key);
        const double missing = (top_p * mass - reached.above.mass) / weight;
        const int of_key = reached.at.count - reached.above.count;
        const int more = weight > 0.0 ? int(min(ceil(missing), double(of_key))) : 1;
        if (reached.above.count + max(more, 1) < kept) {
            kept = reached.above.count + max(more, 1);
            last = reached;
        }
    }
    if (min_p > 0.0) {
        int likely = 0;
        for (int segment = warp; segment < SEGMENTS; segment += WARPS) {
            const unsigned key = row.lane_key(segment);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int count = row.count_of(key - i);
                if (count && row.weight(key - i) >= min_p) likely += count;
            }
        }
        likely = warp_sum(likely);
        if (lane == 0) heads[warp].count = likely;
        __syncthreads();
        likely = 0;
        for (int i = 0; i < WARPS; i++) likely += heads[i].count;
        if (max(likely, 1) < kept) {
            kept = max(likely, 1);
            last.key = 0;
        }
    }
    if (last.key == 0) last = row.find({.count = kept});
    const double last_weight = row.weight(last.key);
    const double kept_mass = last.above.mass + (kept - last.above.count) * last_weight;
    const double target = mine[UNIFORM] * kept_mass;
    Found drawn = row.find({.mass = last.at.mass, .beyond = target});
    if (drawn.key < last.key) drawn = last;  // rounding must not pass what is kept
    const int of_key = (drawn.key == last.key ? kept : drawn.at.count) - drawn.above.count;
    const double rank = floor((target - drawn.above.mass) / row.weight(drawn.key));
    const int wanted = int(min(max(rank, 0.0), double(of_key - 1)));
    __syncthreads();  // all have read the counts, whose place the chunks take
    const int id = id_at(logits, vocab, drawn.key, wanted, reinterpret_cast<int*>(shared));
    if (threadIdx.x == 0) ids[blockIdx.x] = id;
}
