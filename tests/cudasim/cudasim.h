// Runs a CUDA kernel on a CPU, to test it: every CUDA thread is a fiber of one OS thread, blocks
// run one after the other, and a fiber gives way only where CUDA lets threads meet (barriers, warp
// operations). Fibers run in forward, reverse or shuffled order by a seed, and one warp goes on as
// far as it can before another does, so that a missing barrier shows as a wrong result. Shared
// memory starts as NaNs. Asynchronous copies arrive as late as the kernel permits or, in reverse
// order, at once. Reported, with the reason: threads that wait for ever, accesses that are
// misaligned or outside the launch's tensors, sizes a GPU refuses.
// g++ on x86-64. Not covered: memory order between warps, and time.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __x86_64__
#error "the fiber switch is written for x86-64"
#endif

#define CUDASIM 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define SHARED(type, name, count) static cudasim::Shared<type, count> name
#define DYNAMIC_SHARED(name) unsigned char* name = cudasim::dynamic_shared()

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
    unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cudasim {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned THREADS_MAX = 1024;
constexpr size_t SHARED_BYTES_MAX = 227 << 10;  // of one block on sm_90
constexpr int LANES = 32;

struct AsyncCopy {
    void* to;
    const void* from;  // nullptr: zeros
};

struct Fiber {
    void* stack_pointer = nullptr;
    dim3 index;
    int lane = 0, warp = 0;
    bool is_done = false;
    const unsigned* waits_for = nullptr;  // a counter that moves on when the wait is over
    unsigned seen = 0;
    const char* place = "start";
    std::vector<AsyncCopy> open_group;
    std::deque<std::vector<AsyncCopy>> groups;
};

// Where the lanes of one mask meet; two buffers, since a fast lane may be one meeting ahead.
struct Meeting {
    unsigned arrived = 0, count = 0, votes[2] = {0, 0};
    unsigned char values[2][LANES][32];
};

struct Range {
    const char* start;
    size_t bytes;
};

struct Machine {
    void* main_stack_pointer = nullptr;
    std::vector<Fiber> fibers;
    Fiber* running = nullptr;
    unsigned barrier_arrived = 0, barrier_count = 0;
    int barrier_votes[2] = {0, 0};
    std::vector<std::map<unsigned, Meeting>> meetings;  // per warp, by mask
    uint64_t block_serial = 0;
    size_t num_done = 0;
    bool is_copying_at_once = false;
    dim3 block_index, block_shape, grid_shape;
    std::vector<unsigned char> shared;
    size_t shared_bytes = 0;
    std::vector<Range> tensors;
    std::string error;
    void (*call)(void*) = nullptr;
    void* call_argument = nullptr;
    char* stacks = nullptr;
};
inline Machine machine;

// ---- fibers ------------------------------------------------------------------------------------

extern "C" void cudasim_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
    .text
    .weak cudasim_switch
    .type cudasim_switch, @function
cudasim_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .size cudasim_switch, .-cudasim_switch
)");

inline Fiber& self() { return *machine.running; }

// Ends the launch: the first reason counts, and this fiber is never continued.
[[noreturn]] inline void fail(const std::string& reason) {
    if (machine.error.empty()) {
        const dim3 b = machine.block_index;
        machine.error = reason + " (block " + std::to_string(b.x) + "," + std::to_string(b.y) +
                        "," + std::to_string(b.z) + ", thread " +
                        std::to_string(self().index.x) + ")";
    }
    cudasim_switch(&self().stack_pointer, machine.main_stack_pointer);
    __builtin_unreachable();
}

inline void wait_while(const unsigned& counter, unsigned seen, const char* place) {
    Fiber& fiber = self();
    while (counter == seen) {
        fiber.waits_for = &counter;
        fiber.seen = seen;
        fiber.place = place;
        cudasim_switch(&fiber.stack_pointer, machine.main_stack_pointer);
    }
    fiber.waits_for = nullptr;
}

inline void fiber_main() {
    machine.call(machine.call_argument);
    Fiber& fiber = self();
    fiber.is_done = true;
    fiber.place = "its end";
    if (!fiber.groups.empty() || !fiber.open_group.empty())
        fail("a thread ended with copies on their way");
    cudasim_switch(&fiber.stack_pointer, machine.main_stack_pointer);
}

inline void prepare(Fiber& fiber, unsigned number) {
    const dim3 shape = machine.block_shape;
    fiber = Fiber();
    fiber.index = {number % shape.x, number / shape.x % shape.y, number / (shape.x * shape.y)};
    fiber.lane = number % LANES;
    fiber.warp = number / LANES;
    void** top = reinterpret_cast<void**>(machine.stacks + STACK_BYTES * (number + 1));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
}

inline void report_deadlock() {
    std::map<std::string, std::vector<unsigned>> places;
    for (size_t i = 0; i < machine.fibers.size(); i++)
        places[machine.fibers[i].place].push_back(i);
    std::string text = "threads wait for ever:";
    for (const auto& [place, threads] : places)
        text += " " + std::to_string(threads.size()) + " at " + place + " (first " +
                std::to_string(threads[0]) + ")";
    const dim3 b = machine.block_index;
    machine.error = text + " in block " + std::to_string(b.x) + "," + std::to_string(b.y) + "," +
                    std::to_string(b.z);
}

inline std::vector<unsigned> ordered(size_t count, unsigned seed) {
    std::vector<unsigned> order(count);
    for (size_t i = 0; i < count; i++) order[i] = i;
    if (seed == 1) std::reverse(order.begin(), order.end());
    uint64_t state = seed;
    for (size_t i = count - 1; seed > 1 && i > 0; i--) {
        state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX constants
        std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
    return order;
}

// One warp goes on until all of its threads wait for others, then the next.
inline void run_block(unsigned seed) {
    const size_t num_threads = machine.fibers.size();
    machine.block_serial++;
    machine.is_copying_at_once = seed == 1;
    machine.barrier_arrived = machine.barrier_count = 0;
    machine.barrier_votes[0] = machine.barrier_votes[1] = 0;
    machine.meetings.assign((num_threads + LANES - 1) / LANES, {});
    memset(machine.shared.data(), 0xff, machine.shared.size());
    for (unsigned i = 0; i < num_threads; i++) prepare(machine.fibers[i], i);
    const size_t num_warps = machine.meetings.size();
    const std::vector<unsigned> warps = ordered(num_warps, seed), lanes = ordered(LANES, seed);
    const auto move_warp = [&](unsigned warp) {
        bool has_moved = false;
        for (unsigned lane : lanes) {
            const size_t i = warp * LANES + lane;
            if (i >= num_threads) continue;
            Fiber& fiber = machine.fibers[i];
            if (fiber.is_done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
            has_moved = true;
            machine.running = &fiber;
            cudasim_switch(&machine.main_stack_pointer, fiber.stack_pointer);
            if (!machine.error.empty()) return false;
            machine.num_done += fiber.is_done;
        }
        return has_moved;
    };
    for (machine.num_done = 0; machine.num_done < num_threads && machine.error.empty();) {
        bool has_moved = false;
        for (unsigned warp : warps)
            while (move_warp(warp)) has_moved = true;
        if (!has_moved && machine.error.empty()) report_deadlock();
    }
}

// ---- where threads meet ------------------------------------------------------------------------

// A thread that has ended never arrives: a `return` above a barrier is reported as a deadlock.
inline int barrier(int vote) {
    Machine& m = machine;
    const unsigned mine = m.barrier_count;
    m.barrier_votes[mine % 2] += vote;
    if (++m.barrier_arrived == m.fibers.size()) {
        m.barrier_arrived = 0;
        m.barrier_votes[(mine + 1) % 2] = 0;
        m.barrier_count++;
    }
    wait_while(m.barrier_count, mine, "__syncthreads");
    return m.barrier_votes[mine % 2];
}

// Everyone's value, once all lanes of the mask have come.
template <class T>
inline const unsigned char (&exchange(unsigned mask, const T& value, bool vote, unsigned& votes,
                                      const char* place))[LANES][32] {
    static_assert(sizeof(T) <= 32);
    Fiber& fiber = self();
    if (!(mask >> fiber.lane & 1)) fail("a lane takes part in a warp operation without it");
    Meeting& meeting = machine.meetings[fiber.warp][mask];
    const unsigned mine = meeting.count, buffer = mine % 2;
    if (meeting.arrived == 0) meeting.votes[buffer] = 0;
    memcpy(meeting.values[buffer][fiber.lane], &value, sizeof(T));
    meeting.votes[buffer] |= unsigned(vote) << fiber.lane;
    meeting.arrived |= 1u << fiber.lane;
    if (meeting.arrived == mask) {
        meeting.arrived = 0;
        meeting.count++;
    }
    wait_while(meeting.count, mine, place);
    votes = meeting.votes[buffer];
    return meeting.values[buffer];
}

template <class T>
inline T shuffle(unsigned mask, T value, int from) {
    unsigned votes;
    const auto& values = exchange(mask, value, false, votes, "a shuffle");
    if (!(mask >> (from & 31) & 1)) fail("a shuffle reads a lane outside its mask");
    T result;
    memcpy(&result, values[from & 31], sizeof(T));
    return result;
}

// ---- memory ------------------------------------------------------------------------------------

// A static shared array: NaNs at the start of every block, every index checked.
template <class T, size_t COUNT>
struct Shared {
    alignas(16) T values[COUNT];
    uint64_t serial = 0;
    T* start() {
        if (serial != machine.block_serial) {
            memset(values, 0xff, sizeof(values));
            serial = machine.block_serial;
        }
        return values;
    }
    T& operator[](size_t index) {
        if (index >= COUNT) fail("index " + std::to_string(index) + " of a shared array");
        return start()[index];
    }
    operator T*() { return start(); }
};

inline unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(
        (reinterpret_cast<uintptr_t>(machine.shared.data()) + 127) & ~uintptr_t(127));
}

inline bool is_shared(const void* address, size_t bytes) {
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= dynamic_shared() && at + bytes <= dynamic_shared() + machine.shared_bytes;
}

inline void check_access(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("a misaligned access");
    if (is_shared(address, bytes)) return;
    const char* at = static_cast<const char*>(address);
    for (const Range& tensor : machine.tensors)
        if (at >= tensor.start && at + bytes <= tensor.start + tensor.bytes) return;
    fail("an access outside the launch's tensors");
}

inline void arrive(const AsyncCopy& copy) {
    if (copy.from)
        memcpy(copy.to, copy.from, 16);
    else
        memset(copy.to, 0, 16);
}

inline void copy_async(void* to, const void* from, bool is_there) {
    if (!is_shared(to, 16)) fail("an asynchronous copy outside shared memory");
    check_access(to, 16);
    if (is_there) check_access(from, 16);
    self().open_group.push_back({to, is_there ? from : nullptr});
    if (machine.is_copying_at_once) arrive(self().open_group.back());
}

inline void commit_copies() {
    self().groups.push_back(std::move(self().open_group));
    self().open_group.clear();
}

inline void wait_copies(size_t num_pending) {
    for (auto& groups = self().groups; groups.size() > num_pending; groups.pop_front())
        for (const AsyncCopy& copy : groups.front())
            if (!machine.is_copying_at_once) arrive(copy);
}

// ---- bfloat16 and tensor cores -----------------------------------------------------------------

inline float bf16_value(unsigned bits) {
    const uint32_t word = bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline unsigned round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Each lane's row is read when the lane comes or, in reverse order, after all have come: a row that
// another lane has still to write, or overwrites too soon, shows either way.
inline void load_matrices(unsigned out[4], const void* row, bool is_transposed) {
    if (!is_shared(row, 16)) fail("a matrix row outside shared memory");
    check_access(row, 16);
    struct Row {
        const void* address;
        uint16_t values[8];
    } mine{row, {}};
    memcpy(mine.values, row, 16);
    unsigned votes;
    const auto& all = exchange(0xffffffffu, mine, false, votes, "ldmatrix");
    Row rows[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        memcpy(&rows[lane], all[lane], sizeof(Row));
        if (machine.is_copying_at_once) memcpy(rows[lane].values, rows[lane].address, 16);
    }
    const int g = self().lane / 4, t = self().lane % 4;
    for (int matrix = 0; matrix < 4; matrix++) {
        const Row* of = rows + 8 * matrix;
        const unsigned low = is_transposed ? of[2 * t].values[g] : of[g].values[2 * t];
        const unsigned high = is_transposed ? of[2 * t + 1].values[g] : of[g].values[2 * t + 1];
        out[matrix] = low | high << 16;
    }
}

inline void multiply_add(float sums[4], const unsigned a[4], unsigned b0, unsigned b1) {
    struct Fragments {
        unsigned a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    unsigned votes;
    const auto& all = exchange(0xffffffffu, mine, false, votes, "mma");
    const int g = self().lane / 4, t = self().lane % 4;
    const auto word = [&](int lane, int index) {
        unsigned bits;
        memcpy(&bits, all[lane] + 4 * index, 4);
        return bits;
    };
    for (int half = 0; half < 2; half++)      // columns k of a: 0-7, 8-15
        for (int pair = 0; pair < 4; pair++)  // the lane of a quad that holds columns 2·pair, +1
            for (int part = 0; part < 2; part++) {
                const int shift = 16 * part;
                const auto value = [&](int lane, int index) {
                    return bf16_value(word(lane, index) >> shift & 0xffff);
                };
                const float a_low = value(4 * g + pair, 2 * half);
                const float a_high = value(4 * g + pair, 2 * half + 1);
                for (int column = 0; column < 2; column++) {
                    const float b = value(4 * (2 * t + column) + pair, 4 + half);
                    sums[column] += a_low * b;
                    sums[2 + column] += a_high * b;
                }
            }
}

// ---- launch ------------------------------------------------------------------------------------

template <class... A, size_t... I>
inline void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

struct Launch {
    unsigned grid[3], block[3];
    size_t shared_bytes;
    unsigned seed, num_arguments, num_tensors;
    void** arguments;
    const unsigned* argument_bytes;
    const Range* tensors;
    char* error;
    size_t error_bytes;
};

template <class... A>
inline int launch(void (*kernel)(A...), const Launch& asked) {
    Machine& m = machine;
    m.error.clear();
    const unsigned sizes[] = {unsigned(sizeof(A))...};
    const unsigned num_threads = asked.block[0] * asked.block[1] * asked.block[2];
    if (asked.num_arguments != sizeof...(A)) m.error = "wrong number of arguments";
    for (unsigned i = 0; m.error.empty() && i < asked.num_arguments; i++)
        if (sizes[i] != asked.argument_bytes[i])
            m.error = "argument " + std::to_string(i) + " has " +
                      std::to_string(asked.argument_bytes[i]) + " bytes, the kernel takes " +
                      std::to_string(sizes[i]);
    if (num_threads < 1 || num_threads > THREADS_MAX || asked.shared_bytes > SHARED_BYTES_MAX)
        m.error = "no GPU launches this block";
    struct Bound {
        void (*kernel)(A...);
        void** arguments;
    } bound{kernel, asked.arguments};
    m.call = [](void* argument) {
        auto* b = static_cast<Bound*>(argument);
        call_with(b->kernel, b->arguments, std::index_sequence_for<A...>{});
    };
    m.call_argument = &bound;
    m.tensors.assign(asked.tensors, asked.tensors + asked.num_tensors);
    m.shared_bytes = asked.shared_bytes;
    m.shared.resize(asked.shared_bytes + 128);
    m.block_shape = {asked.block[0], asked.block[1], asked.block[2]};
    m.grid_shape = {asked.grid[0], asked.grid[1], asked.grid[2]};
    if (!m.stacks)
        m.stacks = static_cast<char*>(mmap(nullptr, STACK_BYTES * THREADS_MAX,
                                           PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (m.error.empty()) m.fibers.resize(num_threads);
    for (unsigned z = 0; z < asked.grid[2]; z++)
        for (unsigned y = 0; y < asked.grid[1]; y++)
            for (unsigned x = 0; x < asked.grid[0] && m.error.empty(); x++) {
                m.block_index = {x, y, z};
                run_block(asked.seed);
            }
    snprintf(asked.error, asked.error_bytes, "%s", m.error.c_str());
    return m.error.empty() ? 0 : 1;
}

}  // namespace cudasim

#define CUDASIM_EXPORT(kernel)                                               \
    extern "C" int cudasim_launch_##kernel(const cudasim::Launch* asked) { \
        return cudasim::launch(kernel, *asked);                              \
    }

// ---- CUDA's names ------------------------------------------------------------------------------

#define threadIdx (cudasim::self().index)
#define blockIdx (cudasim::machine.block_index)
#define blockDim (cudasim::machine.block_shape)
#define gridDim (cudasim::machine.grid_shape)

inline void __syncthreads() { cudasim::barrier(0); }
inline int __syncthreads_count(int vote) { return cudasim::barrier(vote != 0); }
inline int __syncthreads_or(int vote) { return cudasim::barrier(vote != 0) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    unsigned votes;
    cudasim::exchange(mask, 0, false, votes, "__syncwarp");
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from) {
    return cudasim::shuffle(mask, value, from);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return cudasim::shuffle(mask, value, cudasim::self().lane ^ bits);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const int lane = cudasim::self().lane;
    return cudasim::shuffle(mask, value, lane >= int(distance) ? lane - int(distance) : lane);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    unsigned votes;
    cudasim::exchange(mask, 0, vote != 0, votes, "a vote");
    return votes;
}

template <class T>
inline T atomicAdd(T* at, T amount) {  // no fiber gives way within it
    cudasim::check_access(at, sizeof(T));
    const T before = *at;
    *at = before + amount;
    return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
inline T __ldg(const T* from) {
    return *from;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}
template <class To, class From>
inline To cudasim_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}
inline float __uint_as_float(unsigned bits) { return cudasim_cast<float>(bits); }
inline float __int_as_float(int bits) { return cudasim_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return cudasim_cast<unsigned>(value); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
using std::max;
using std::min;
