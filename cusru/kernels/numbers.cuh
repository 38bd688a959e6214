// Storage types and the values they widen to; arrays and their strides; gates, candidates and activations.
#pragma once
#include "device.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Storage. float and double compute as themselves; the 16-bit types widen to float, in which the state is kept.

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

template <typename T> struct StateOf {
    using type = T;
};
template <> struct StateOf<Half> {
    using type = float;
};
template <> struct StateOf<Bfloat> {
    using type = float;
};

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(Half v) { return half_to_float(v.bits); }
__device__ __forceinline__ float widen(Bfloat v) { return bfloat_to_float(v.bits); }

template <typename T> struct Narrow;
template <> struct Narrow<double> {
    static __device__ __forceinline__ double from(double v) { return v; }
};
template <> struct Narrow<float> {
    static __device__ __forceinline__ float from(float v) { return v; }
};
template <> struct Narrow<Half> {
    static __device__ __forceinline__ Half from(float v) { return {float_to_half(v)}; }
};
template <> struct Narrow<Bfloat> {
    static __device__ __forceinline__ Bfloat from(float v) { return {float_to_bfloat(v)}; }
};

// The widest access, up to 16 bytes, of which `bytes` is a multiple.
__host__ __device__ constexpr int access_width(int bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

// N neighbouring values as they lie in memory. They widen when they are read: a value that is converted on arrival
// would make the thread wait for its load at once, and the loads of later steps could not be issued behind it.
template <typename T, int N, bool PAIRED = (sizeof(T) == 2 && N % 2 == 0)> struct Values {
    using State = typename StateOf<T>::type;
    T value[N];
    __device__ __forceinline__ State get(int i) const { return widen(value[i]); }
    __device__ __forceinline__ void set(int i, State v) { value[i] = Narrow<T>::from(v); }
    __device__ __forceinline__ void load(const char* global) {
        constexpr int WIDTH = access_width(N * sizeof(T)), STEP = WIDTH / sizeof(T);
#pragma unroll
        for (int i = 0; i < N; i += STEP) global_load<WIDTH>(value + i, global + i * sizeof(T));
    }
    __device__ __forceinline__ void store(char* global) const {
        constexpr int WIDTH = access_width(N * sizeof(T)), STEP = WIDTH / sizeof(T);
#pragma unroll
        for (int i = 0; i < N; i += STEP) global_store<WIDTH>(global + i * sizeof(T), value + i);
    }
};

// 16-bit values stay two to a register.
template <typename T, int N> struct Values<T, N, true> {
    unsigned word[N / 2];
    __device__ __forceinline__ float get(int i) const {
        return widen(T{static_cast<unsigned short>(word[i / 2] >> (16 * (i % 2)))});
    }
    __device__ __forceinline__ void set(int i, float v) {
        unsigned bits = Narrow<T>::from(v).bits;
        word[i / 2] = i % 2 ? (word[i / 2] & 0xffffu) | (bits << 16) : bits;  // even lanes are set first
    }
    __device__ __forceinline__ void load(const char* global) {
        constexpr int WIDTH = access_width(N * 2), STEP = WIDTH / 4;
#pragma unroll
        for (int i = 0; i < N / 2; i += STEP) global_load<WIDTH>(word + i, global + i * 4);
    }
    __device__ __forceinline__ void store(char* global) const {
        constexpr int WIDTH = access_width(N * 2), STEP = WIDTH / 4;
#pragma unroll
        for (int i = 0; i < N / 2; i += STEP) global_store<WIDTH>(global + i * 4, word + i);
    }
};

// An array as the host describes it: the address of its first element and byte strides (0 along an axis it lacks).
// `row` is the last axis of u (candidate, forget, reset, skip) or the gate of a parameter (forget, reset).
struct Array {
    char* data;
    long long time, batch, column, row;
    __device__ __forceinline__ char* at(long long t, long long b, long long d, long long k) const {
        return data + t * time + b * batch + d * column + k * row;
    }
};

// One value of a parameter, an initial state or a mask, which comes in u's type or in the state's.
template <typename T> __device__ __forceinline__ typename StateOf<T>::type load_one(const char* global, bool narrow) {
    using State = typename StateOf<T>::type;
    if (narrow) {
        Values<T, 1> v;
        v.load(global);
        return v.get(0);
    }
    Values<State, 1> v;
    v.load(global);
    return v.get(0);
}
template <typename T>
__device__ __forceinline__ void store_one(char* global, typename StateOf<T>::type value, bool narrow) {
    using State = typename StateOf<T>::type;
    if (narrow) {
        Values<T, 1> v;
        v.set(0, value);
        v.store(global);
    } else {
        Values<State, 1> v;
        v.set(0, value);
        v.store(global);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions. All are accurate relative to their own value, near zero and in saturation, and let a NaN through.

// The last bit of a number's digits, where a flag may lie.
__device__ __forceinline__ bool last_bit(float v) { return __float_as_uint(v) & 1; }
__device__ __forceinline__ bool last_bit(double v) { return __double_as_longlong(v) & 1; }
__device__ __forceinline__ float with_last_bit(float v, bool bit) {
    return __uint_as_float((__float_as_uint(v) & ~1u) | bit);
}
__device__ __forceinline__ double with_last_bit(double v, bool bit) {
    return __longlong_as_double((__double_as_longlong(v) & ~1ll) | bit);
}
__device__ __forceinline__ bool same_bits(float a, float b) { return __float_as_uint(a) == __float_as_uint(b); }
__device__ __forceinline__ bool same_bits(double a, double b) {
    return __double_as_longlong(a) == __double_as_longlong(b);
}

// A gate at the argument x, from e = exp(x): its complement g = 1 - sigmoid(x) = 1 / (1 + e), and sigmoid(x) = e g,
// each exact to its own last bits: 1 - sigmoid loses them all where sigmoid is near 1, and a forget gate lives there.
__device__ __forceinline__ float exponential(float x) { return ex2_approx(1.44269504f * x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float complement(float e) { return rcp_approx(1.f + e); }
__device__ __forceinline__ double complement(double e) { return 1. / (1. + e); }
// Where e is so large that g is 0, e g would be NaN. Comparisons, not fminf, which would swallow a NaN.
__device__ __forceinline__ float sigmoid(float e, float g) { return e > 0x1p125f ? 1.f : e * g; }
__device__ __forceinline__ double sigmoid(double e, double g) { return e > 0x1p1000 ? 1. : e * g; }

__device__ __forceinline__ float tanh_near_zero(
    float x) {  // |x| < 1/2, relative error 2e-8: fitted by reweighted least squares
    float y = x * x;
    float p = fmaf(fmaf(fmaf(0x1.1abcd2p-6f, y, -0x1.b29c0ap-5f), y, 0x1.10ea8cp-3f), y, -0x1.5554dap-2f);
    return fmaf(x * y, p, x);
}

// tanh(x) and its derivative 4e / (1 + e)^2, e = exp(-2|x|): 1 - tanh(x)^2 would be all rounding in saturation.
__device__ __forceinline__ void tanh_and_slope(float x, float& value, float& slope) {
    float magnitude = fabsf(x);
    float e = ex2_approx(-2.88539008f * magnitude);
    float q = rcp_approx(1.f + e);
    value = magnitude < 0.5f ? tanh_near_zero(x) : copysignf((1.f - e) * q, x);
    slope = 4.f * e * q * q;
}
__device__ __forceinline__ void tanh_and_slope(double x, double& value, double& slope) {
    double e = exp(-2. * fabs(x)), q = 1. / (1. + e);
    value = tanh(x);
    slope = 4. * e * q * q;
}

// expm1(x) and exp(x) for x <= 0. Near zero expm1(x) = tanh(x/2) (1 + e^x), which reuses the polynomial.
__device__ __forceinline__ void expm1_and_exp(float x, float& value, float& e) {
    e = ex2_approx(1.44269504f * x);
    value = x > -1.f ? tanh_near_zero(0.5f * x) * (1.f + e) : e - 1.f;
}
__device__ __forceinline__ void expm1_and_exp(double x, double& value, double& e) {
    e = exp(x);
    value = expm1(x);
}

enum Activation { IDENTITY = 0, TANH = 1, RELU = 2, SELU = 3 };

// activation(x) and activation'(x); what the caller does not use costs nothing.
template <int ACTIVATION, typename S> __device__ __forceinline__ void activate(S x, S& value, S& slope) {
    if constexpr (ACTIVATION == TANH) {
        tanh_and_slope(x, value, slope);
    } else if constexpr (ACTIVATION == RELU) {  // written so that a NaN is neither branch's zero
        value = x < S(0) ? S(0) : x;
        slope = x > S(0) ? S(1) : x == x ? S(0) : x;
    } else if constexpr (ACTIVATION == SELU) {
        constexpr S SCALE = S(1.0507009873554804934193349852946), ALPHA = S(1.6732632423543772848170429916717);
        if (x > S(0)) {
            value = SCALE * x;
            slope = SCALE;
        } else {
            S e;
            expm1_and_exp(x, value, e);
            value *= SCALE * ALPHA;
            slope = SCALE * ALPHA * e;
        }
    } else {
        value = x;
        slope = S(1);
    }
}
