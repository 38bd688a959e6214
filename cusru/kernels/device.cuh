// What the kernels ask of the machine, and nothing else: global memory, barriers between some of a block's warps,
// 16-bit conversions, the two special functions. Every access to global memory passes through here, so that vector
// width, cache policy, alignment checks and the simulator's counters have one place. `cuda_on_cpu.h` is this file's
// twin: the same names, for a CPU.
#pragma once

#ifdef CUSRU_SIMULATOR
#include "cuda_on_cpu.h"
#else

#define CUSRU_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define CUSRU_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]  // of as many bytes as the launch says
#define CUSRU_SIMULATED_KERNEL(kernel, arguments, ...)

template <int BYTES> struct Word;
template <> struct Word<1> {
    using type = unsigned char;
};
template <> struct Word<2> {
    using type = unsigned short;
};
template <> struct Word<4> {
    using type = unsigned int;
};
template <> struct Word<8> {
    using type = uint2;
};
template <> struct Word<16> {
    using type = uint4;
};

// Between registers and shared memory, as one access.
template <int BYTES> __device__ __forceinline__ void copy(void* destination, const void* source) {
    using word = typename Word<BYTES>::type;
    *static_cast<word*>(destination) = *static_cast<const word*>(source);
}

// Inputs, which no kernel of the launch writes: through the read-only cache. L1 keeps the line, since a scalar read of
// a packed u takes its k values in k requests.
template <int BYTES> __device__ __forceinline__ void global_load(void* destination, const void* global) {
    using word = typename Word<BYTES>::type;
    *static_cast<word*>(destination) = __ldg(static_cast<const word*>(global));
}

// An input on its way to shared memory, past the registers: there when async_wait() has returned, for the thread
// itself. What is older than sm_80, and values of less than 4 bytes, go through a register, and are waited for at once.
template <int BYTES> __device__ __forceinline__ void async_load(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    if constexpr (BYTES >= 4) {
        unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared));
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :
                     : "r"(destination), "l"(global), "n"(BYTES)
                     : "memory");
        return;
    }
#endif
    global_load<BYTES>(shared, global);
}
__device__ __forceinline__ void async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// Results, which this launch does not read again: evict-first, so that they do not push inputs out of L2.
template <int BYTES> __device__ __forceinline__ void global_store(void* global, const void* source) {
    using word = typename Word<BYTES>::type;
    __stcs(static_cast<word*>(global), *static_cast<const word*>(source));
}

// Scratch memory that a kernel writes and reads: coherent, default cache policy.
template <int BYTES> __device__ __forceinline__ void workspace_load(void* destination, const void* global) {
    using word = typename Word<BYTES>::type;
    *static_cast<word*>(destination) = *static_cast<const word*>(global);
}
// Some together, of which not all are wanted: without a branch, at which the compiler would wait for the one before.
template <int BYTES>
__device__ __forceinline__ void workspace_load_if(bool wanted, void* destination, const void* global) {
    static_assert(BYTES == 8 || BYTES == 16, "two words or four");
    unsigned* const to = static_cast<unsigned*>(destination);
    if constexpr (BYTES == 8)
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.v2.u32 {%0, %1}, [%2]; }"
                     : "=r"(to[0]), "=r"(to[1])
                     : "l"(global), "r"(static_cast<unsigned>(wanted))
                     : "memory");
    else
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "l"(global), "r"(static_cast<unsigned>(wanted))
                     : "memory");
}
template <int BYTES> __device__ __forceinline__ void workspace_store(void* global, const void* source) {
    using word = typename Word<BYTES>::type;
    *static_cast<word*>(global) = *static_cast<const word*>(source);
}

// Flags between blocks, in scratch memory: whoever has read one with acquire sees what was written before it was stored
// with release, by its thread and by those that it had met at a barrier.
__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}

// One more; how many there were. Whoever counts after another has seen what that one's block wrote before, of which all
// threads had met at a barrier.
__device__ __forceinline__ unsigned add_acquire_release(unsigned* counter) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// A number to be kept in a register, and not worked out again where a chain of steps waits for it.
__device__ __forceinline__ int held(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// 0, since blocks have one row, but the compiler does not know: what comes after it waits for `bits`. (It moves
// arithmetic behind a barrier, where a chain of steps would wait for it.)
__device__ __forceinline__ unsigned zero(unsigned bits) { return bits & threadIdx.y; }
__device__ __forceinline__ unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ unsigned bits_of(double value) { return static_cast<unsigned>(__double2hiint(value)); }

// The end of a group of loads that were issued together; the simulator counts sectors between two of them.
__device__ __forceinline__ void tile_boundary() {}

// A hand-over between warps through shared memory: what the giver wrote before it arrives, the taker reads after it has
// waited. Only the taker waits. `threads` are those of both, 32 for each warp; a warp comes whole, and once a phase;
// the barrier is free again when all have come. Ids are 1 to 15, since 0 is __syncthreads's. The clobber keeps the
// compiler from moving memory accesses across.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_wait(int id, int threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// 2^x to a relative error of 2^-22 and 1/x to 1 ulp, one special-function operation each, no slow path.
__device__ __forceinline__ float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ float bfloat_to_float(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
__device__ __forceinline__ unsigned short float_to_bfloat(float value) {
#if __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else  // round to nearest, ties to even; a NaN keeps a set mantissa bit
    unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<unsigned short>((bits >> 16) | 0x40);
    return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
#endif
