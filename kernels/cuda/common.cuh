// What the kernels share: 16-byte accesses, bfloat16, reductions, and the instructions of the
// tensor cores and of asynchronous copies. Inline PTX stands in this file only; each such wrapper
// has a body for the CPU harness (CUDASIM). NVRTC compiles a kernel from this text, no header.
// Instructions: PTX ISA 8.7, sections cp.async, ldmatrix, mma (m16n8k16), cvt, max, ld, fence.
#ifndef CUDASIM
#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

typedef unsigned short bf16;  // the bits of a bfloat16

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;
constexpr int VECTOR = 8;  // bfloat16 values of one 16-byte access
constexpr float LOG2_E = 1.4426950408889634f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// ---- memory ------------------------------------------------------------------------------------

// Global or shared memory; the address must be a multiple of 16.
__device__ __forceinline__ uint4 load_16(const void* from) {
#ifdef CUDASIM
    cudasim::check_access(from, 16);
#endif
    return *reinterpret_cast<const uint4*>(from);
}

__device__ __forceinline__ void store_16(void* to, uint4 value) {
#ifdef CUDASIM
    cudasim::check_access(to, 16);
#endif
    *reinterpret_cast<uint4*>(to) = value;
}

// What other blocks wrote in this launch, before share_writes on both sides and a sign between them.
__device__ __forceinline__ float load_fresh(const float* from) {
#ifdef CUDASIM
    cudasim::check_access(from, 4);
    return *from;
#else
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
    return value;
#endif
}

// This thread's writes so far are seen by other blocks before what it writes from here on.
__device__ __forceinline__ void share_writes() {
#ifndef CUDASIM
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

#ifndef CUDASIM
__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
#endif

// 16 bytes from global to shared memory, zeros where `is_there` is false (then `from` is not read).
// They are visible to the thread after wait_copies, to others after a barrier behind it.
__device__ __forceinline__ void copy_16_async(void* shared, const void* from, bool is_there) {
#ifdef CUDASIM
    cudasim::copy_async(shared, from, is_there);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef CUDASIM
    cudasim::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of the thread's newest groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
#ifdef CUDASIM
    cudasim::wait_copies(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- bfloat16 ----------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(bf16 value) {
    return __uint_as_float(static_cast<unsigned>(value) << 16);
}
__device__ __forceinline__ float low_float(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(unsigned pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// Two values rounded to nearest even, `low` in the low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#ifdef CUDASIM
    return cudasim::round_bf16(low) | cudasim::round_bf16(high) << 16;
#else
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

__device__ __forceinline__ void unpack_8(uint4 packed, float values[VECTOR]) {
    const unsigned pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = low_float(pairs[i]);
        values[2 * i + 1] = high_float(pairs[i]);
    }
}

__device__ __forceinline__ uint4 pack_8(const float values[VECTOR]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                      pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

// The larger of two, NaN where one is.
__device__ __forceinline__ float larger_or_nan(float a, float b) {
#ifdef CUDASIM
    return a != a || b != b ? a + b : fmaxf(a, b);
#else
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#endif
}

// ---- reductions --------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

// The sum over all threads of the block, in all of them, always added in the same order.
// PRECOND: every thread calls it, blockDim.x is a multiple of 32, `scratch` is 32 shared values.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    value = warp_sum(value);
    __syncthreads();  // the scratch may still be read from the call before
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? scratch[lane] : T(0));
}

// ---- tensor cores ------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit values from shared memory; lane i gives the address of row i % 8 of
// matrix i / 8 and gets, of every matrix, row lane / 4, columns 2 * (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(unsigned out[4], const void* row) {
#ifdef CUDASIM
    cudasim::load_matrices(out, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(unsigned out[4], const void* row) {
#ifdef CUDASIM
    cudasim::load_matrices(out, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// sums (16x8, float) += a (16x16, bfloat16, rows) * b (16x8, bfloat16, columns), one warp.
// With g = lane / 4, t = lane % 4: sums[0..1] is row g, columns 2t, 2t+1; sums[2..3] row g + 8.
__device__ __forceinline__ void multiply_add(float sums[4], const unsigned a[4], unsigned b0,
                                             unsigned b1) {
#ifdef CUDASIM
    cudasim::multiply_add(sums, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
