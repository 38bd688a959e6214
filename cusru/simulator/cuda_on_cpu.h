// Lets g++ compile a CUDA kernel's unmodified source, and a CPU run it: each CUDA thread is a fiber.
//
// This header has what a kernel sees: CUDA's names, the approximations that are PTX on a GPU, and the helpers that all
// memory accesses pass through. The scheduler behind it is runtime.cpp, compiled once. What the simulator checks is
// what CUDA's documentation asks for, and where that leaves a choice (order of warps, error of an approximation,
// contents of fresh shared memory) it takes an unfriendly one. It knows nothing of time or of the hardware's memory
// ordering.
#pragma once
#include <stdint.h>
#include <string.h>
#ifdef CUSRU_SIMULATOR  // a kernel: C++'s math.h would take a third of the time that compiling it takes
extern "C" {
float fabsf(float) noexcept, fmaf(float, float, float) noexcept, copysignf(float, float) noexcept;
float expf(float) noexcept, expm1f(float) noexcept, tanhf(float) noexcept;
double fabs(double) noexcept, fma(double, double, double) noexcept, exp(double) noexcept, exp2(double) noexcept;
double expm1(double) noexcept, tanh(double) noexcept;
}
inline float fabs(float x) { return fabsf(x); }
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
inline float exp(float x) { return expf(x); }
inline float expm1(float x) { return expm1f(x); }
inline float tanh(float x) { return tanhf(x); }
#define HUGE_VALF __builtin_huge_valf()
#else
#include <math.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline  // no bit depends on it, but most of the time that compiling takes
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#ifndef CUSRU_SIMULATOR_STACK  // bytes of a fiber's stack, a power of two; sanitizers make frames larger
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(CUSRU_SANITIZED)
#define CUSRU_SIMULATOR_STACK (512 * 1024)
#else
#define CUSRU_SIMULATOR_STACK (64 * 1024)
#endif
#endif

namespace cusru_simulator {

struct Index {
    unsigned x, y, z;
};
struct Warp;
enum Kind { READ, WRITE, WORKSPACE_READ, WORKSPACE_WRITE, KINDS };
enum Operation { SHUFFLE, VOTE, SYNC, ARRIVE, WAIT };

struct Copy {  // on its way to shared memory
    void* shared;
    const void* global;
    unsigned bytes;
};

// What a CUDA thread knows of itself. It lies at the top of its own stack, whose size is a power of two and its
// alignment: so the frame's address alone finds it, with no thread-local variable between a kernel and its threadIdx.
struct Fiber {
    Index thread, block, block_size, grid_size;
    bool counting;             // a report is open
    unsigned tile;             // tiles that this thread has ended
    unsigned accesses[KINDS];  // ordinals within the tile
    unsigned spins;            // workspace loads so far: a thread may wait for another with these alone
    unsigned copies;           // that have not been waited for
    Copy copy[256];
    const void* polled;  // the flag last looked at, and what it said
    uint64_t polled_value;
    // The rest is the runtime's.
    Warp* warp;
    unsigned lane;
    void* stack_pointer;
    void* fake_stack;        // AddressSanitizer's
    void* tsan;              // ThreadSanitizer's
    bool fenced;             // has passed a __threadfence: see fence in runtime.cpp
    const void* atomics[8];  // the addresses of its latest ones, which a later __threadfence acquires
    unsigned atomic_count;
};

inline __attribute__((always_inline)) Fiber& fiber() {
    uintptr_t frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    uintptr_t end = (frame | (CUSRU_SIMULATOR_STACK - 1)) + 1;
    return *reinterpret_cast<Fiber*>(end - sizeof(Fiber));
}

// In runtime.cpp
#pragma GCC visibility push(default)
void barrier(int line);
void named_barrier(Operation operation, int id, int threads, int line);
uint64_t exchange(Operation operation, unsigned mask, uint64_t value, unsigned source, int line);
unsigned active_lanes();
void* shared_memory(const void* declaration, size_t bytes);
void* dynamic_shared_memory();
[[noreturn]] void too_many_copies();
void record(const void* address, unsigned bytes, Kind kind);
[[noreturn]] void bad_address(const void* address, unsigned bytes);
void fence();
void before_atomic(const void* address);
void after_atomic(const void* address, bool changed);
void poll(const void* address, uint64_t value);
#pragma GCC visibility pop

template <int BYTES> inline __attribute__((always_inline)) void access(const void* address, Kind kind) {
    static_assert(BYTES == 1 || BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "no such access on a GPU");
    uintptr_t place = reinterpret_cast<uintptr_t>(address);
    if (__builtin_expect(place % BYTES != 0 || place < 4096, 0)) bad_address(address, BYTES);  // page 0: a null pointer
    if (__builtin_expect(fiber().counting, 0)) record(address, BYTES, kind);
}

template <typename T> inline T shuffle(unsigned mask, T value, unsigned source, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(SHUFFLE, mask, bits, source, line);
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename Arithmetic = float> struct Flushes {
    static constexpr bool value = true;
};
template <> struct Flushes<double> {
    static constexpr bool value = false;
};

// A float within `bound` of `exact`, most often at that bound: which one, the argument's bits decide.
inline float disturbed(double exact, double bound, float argument) {
    uint32_t hash = (float_bits(argument) ^ 0x9e3779b9u) * 0x85ebca6bu;
    hash = (hash ^ hash >> 15) * 0xc2b2ae35u;
    double share = hash & 0x10000u ? 1.0 : (hash >> 17) * 0x1p-15;  // of the bound
    float result = static_cast<float>(hash & 0x8000u ? exact + share * bound : exact - share * bound);
    uint32_t bits = float_bits(result);
    if (fabs(result - exact) > bound) bits += fabs(result) > fabs(exact) ? -1 : 1;  // rounded past it: one step back
    return bits_float((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

}  // namespace cusru_simulator

// ---- CUDA's names ----

#define threadIdx (cusru_simulator::fiber().thread)
#define blockIdx (cusru_simulator::fiber().block)
#define blockDim (cusru_simulator::fiber().block_size)
#define gridDim (cusru_simulator::fiber().grid_size)
#define warpSize 32

// The default arguments name the caller's line.
inline void __syncthreads(int line = __builtin_LINE()) { cusru_simulator::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    cusru_simulator::exchange(cusru_simulator::SYNC, mask, 0, 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<unsigned>(cusru_simulator::exchange(cusru_simulator::VOTE, mask, predicate != 0, 0, line));
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) == mask;
}
inline unsigned __activemask() { return cusru_simulator::active_lanes(); }

// A source outside the segment leaves a lane its own value, as the programming guide says; __shfl_xor_sync may reach
// into earlier segments.
template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = threadIdx.x % 32, segment = lane & ~(width - 1u);
    return cusru_simulator::shuffle(mask, value, segment | (source & (width - 1u)), line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = threadIdx.x % 32;
    return cusru_simulator::shuffle(mask, value, lane % width < delta ? lane : lane - delta, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = threadIdx.x % 32;
    return cusru_simulator::shuffle(mask, value, lane % width + delta >= unsigned(width) ? lane : lane + delta, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
    unsigned lane = threadIdx.x % 32, source = (lane ^ lanes) % 32;
    return cusru_simulator::shuffle(mask, value, source / width > lane / width ? lane : source, line);
}

// Atomics are relaxed, as on a GPU; __threadfence orders them. Each is a point where another thread may run.
template <typename T> T atomicAdd(T* address, T value) {
    static_assert(T(0.5) == T(0), "floating-point atomics would make results depend on the order of threads");
    cusru_simulator::access<sizeof(T)>(address, cusru_simulator::WORKSPACE_WRITE);
    cusru_simulator::before_atomic(address);
    T old = __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
    cusru_simulator::after_atomic(address, value != 0);
    return old;
}
inline void __threadfence() { cusru_simulator::fence(); }

inline unsigned __float_as_uint(float value) { return cusru_simulator::float_bits(value); }
inline float __uint_as_float(unsigned bits) { return cusru_simulator::bits_float(bits); }
inline long long __double_as_longlong(double value) {
    long long bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

// ---- cusru's names: device.cuh has the PTX versions ----

// Every thread of a block gets the same memory from the same declaration. It is full of NaNs at first. The static
// variable identifies the declaration, one per instantiation of a template as on a GPU.
#define CUSRU_SHARED(type, name, count)       \
    static const char name##_declaration = 0; \
    type* const name = static_cast<type*>(cusru_simulator::shared_memory(&name##_declaration, sizeof(type) * (count)))

#define CUSRU_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(cusru_simulator::dynamic_shared_memory())

template <int BYTES> __forceinline__ void copy(void* destination, const void* source) {
    if (reinterpret_cast<uintptr_t>(source) % BYTES != 0) cusru_simulator::bad_address(source, BYTES);
    memcpy(destination, source, BYTES);
}

template <int BYTES> __forceinline__ void global_load(void* destination, const void* global) {
    cusru_simulator::access<BYTES>(global, cusru_simulator::READ);
    memcpy(destination, global, BYTES);
}

// What is copied arrives as late as may be: at async_wait(). Until then there are NaNs.
template <int BYTES> __forceinline__ void async_load(void* shared, const void* global) {
    cusru_simulator::access<BYTES>(global, cusru_simulator::READ);
    if (reinterpret_cast<uintptr_t>(shared) % BYTES != 0) cusru_simulator::bad_address(shared, BYTES);
    cusru_simulator::Fiber& fiber = cusru_simulator::fiber();
    if (fiber.copies == sizeof fiber.copy / sizeof fiber.copy[0]) cusru_simulator::too_many_copies();
    memset(shared, 0xff, BYTES);
    fiber.copy[fiber.copies++] = {shared, global, BYTES};
}
inline void async_wait() {
    cusru_simulator::Fiber& fiber = cusru_simulator::fiber();
    for (unsigned i = 0; i < fiber.copies; ++i) memcpy(fiber.copy[i].shared, fiber.copy[i].global, fiber.copy[i].bytes);
    fiber.copies = 0;
}

template <int BYTES> __forceinline__ void global_store(void* global, const void* source) {
    cusru_simulator::access<BYTES>(global, cusru_simulator::WRITE);
    memcpy(global, source, BYTES);
}

template <int BYTES> __forceinline__ void workspace_load(void* destination, const void* global) {
    cusru_simulator::access<BYTES>(global, cusru_simulator::WORKSPACE_READ);
    memcpy(destination, global, BYTES);
    // A thread that waits with these alone would wait forever for one that never gets to run.
    if (__builtin_expect(++cusru_simulator::fiber().spins % 256 == 0, 0)) cusru_simulator::poll(global, 0);
}
template <int BYTES> __forceinline__ void workspace_load_if(bool wanted, void* destination, const void* global) {
    if (wanted) workspace_load<BYTES>(destination, global);
}

template <int BYTES> __forceinline__ void workspace_store(void* global, const void* source) {
    cusru_simulator::access<BYTES>(global, cusru_simulator::WORKSPACE_WRITE);
    memcpy(global, source, BYTES);
}

// Flags between blocks. A load lets others run first, so a loop around it may wait.
template <typename T> T load_acquire(const T* address) {
    cusru_simulator::access<sizeof(T)>(address, cusru_simulator::WORKSPACE_READ);
    cusru_simulator::poll(address, static_cast<uint64_t>(__atomic_load_n(address, __ATOMIC_RELAXED)));
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
template <typename T> T load_relaxed(const T* address) {
    cusru_simulator::access<sizeof(T)>(address, cusru_simulator::WORKSPACE_READ);
    cusru_simulator::poll(address, static_cast<uint64_t>(__atomic_load_n(address, __ATOMIC_RELAXED)));
    T value = __atomic_load_n(address, __ATOMIC_RELAXED);
    cusru_simulator::after_atomic(address, false);
    return value;
}
template <typename T> void store_release(T* address, T value) {
    cusru_simulator::access<sizeof(T)>(address, cusru_simulator::WORKSPACE_WRITE);
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
    cusru_simulator::after_atomic(address, true);
}
template <typename T> void store_relaxed(T* address, T value) {
    cusru_simulator::access<sizeof(T)>(address, cusru_simulator::WORKSPACE_WRITE);
    cusru_simulator::before_atomic(address);
    __atomic_store_n(address, value, __ATOMIC_RELAXED);
    cusru_simulator::after_atomic(address, true);
}

inline unsigned add_acquire_release(unsigned* counter) {
    cusru_simulator::access<sizeof(unsigned)>(counter, cusru_simulator::WORKSPACE_WRITE);
    unsigned before = __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
    cusru_simulator::after_atomic(counter, true);
    return before;
}

inline int held(int value) { return value; }
inline unsigned zero(unsigned) { return 0; }
template <typename Value> unsigned bits_of(Value) { return 0; }

// Barriers between some of a block's warps.
inline void barrier_arrive(int id, int threads, int line = __builtin_LINE()) {
    cusru_simulator::named_barrier(cusru_simulator::ARRIVE, id, threads, line);
}
inline void barrier_wait(int id, int threads, int line = __builtin_LINE()) {
    cusru_simulator::named_barrier(cusru_simulator::WAIT, id, threads, line);
}

// Ends the tile that the statistics of this thread's warp count sectors in.
__forceinline__ void tile_boundary() {
    cusru_simulator::Fiber& fiber = cusru_simulator::fiber();
    if (__builtin_expect(fiber.counting, 0)) {
        ++fiber.tile;
        memset(fiber.accesses, 0, sizeof fiber.accesses);
    }
}

// ex2.approx.ftz.f32: relative error up to 2^-22; the PTX manual's table has 2^0 = 1 exactly, subnormal arguments
// included.
inline float ex2_approx(float x) {
    if (x != x) return x;
    if (fabsf(x) < 0x1p-126f) return 1.0f;
    if (x >= 128.0f) return HUGE_VALF;
    if (x < -127.0f) return 0.0f;
    double exact = exp2(static_cast<double>(x));
    return cusru_simulator::disturbed(exact, exact * 0x1p-22, x);
}

// rcp.approx.ftz.f32: up to 1 ulp.
inline float rcp_approx(float x) {
    if (x != x) return x;
    if (fabsf(x) < 0x1p-126f) return copysignf(HUGE_VALF, x);
    if (fabsf(x) > 0x1.fffffep+127f) return copysignf(0.0f, x);
    double exact = 1.0 / static_cast<double>(x);
    uint64_t bits;
    memcpy(&bits, &exact, sizeof bits);
    bits = (bits & 0x7ff0000000000000u) - (23ull << 52);  // the power of two 2^-23 below: 1 ulp
    double ulp;
    memcpy(&ulp, &bits, sizeof ulp);
    return cusru_simulator::disturbed(exact, ulp, x);
}

// IEEE binary16, in integers: a fiber's FTZ and DAZ must not touch its subnormal numbers.
inline float half_to_float(unsigned short half) {
    uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return cusru_simulator::bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return cusru_simulator::bits_float(sign | ((magnitude << 13) + (112u << 23)));
    return cusru_simulator::bits_float(sign | cusru_simulator::float_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

inline unsigned short float_to_half(float value) {
    uint32_t bits = cusru_simulator::float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<unsigned short>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // from 65520 on
    if (magnitude < 0x38800000u) {  // a subnormal half: adding 0.5, whose ulp is 2^-24, rounds to a multiple of that
        float shifted = cusru_simulator::bits_float(magnitude) + 0.5f;
        return static_cast<unsigned short>(sign | (cusru_simulator::float_bits(shifted) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);  // round to nearest, ties to even
    return static_cast<unsigned short>(sign | (magnitude - (112u << 23)) >> 13);
}

inline float bfloat_to_float(unsigned short bfloat) { return cusru_simulator::bits_float(uint32_t(bfloat) << 16); }

inline unsigned short float_to_bfloat(float value) {
    uint32_t bits = cusru_simulator::float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<unsigned short>(bits >> 16 | 0x0040u);
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// What Python looks up: the size of the argument structure, one thread's run of the kernel, and whether subnormals
// flush to zero in it. On a GPU those of float do, as with -ftz=true, and those of double never; a CPU knows only both
// or none. So a kernel says which type it computes in.
#define CUSRU_SIMULATED_KERNEL(name, Args, ...)                                                       \
    extern "C" __attribute__((visibility("default"))) const uint64_t name##_args_size = sizeof(Args); \
    extern "C" __attribute__((visibility("default"))) const bool name##_flushes =                     \
        cusru_simulator::Flushes<__VA_ARGS__>::value;                                                 \
    extern "C" __attribute__((visibility("default"))) void name##_thread(const void* args) {          \
        name(*static_cast<const Args*>(args));                                                        \
    }
