// The SRU recurrence at one step of one column (b, d), in the form that the kernels compute.
// Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, equations 3 to 6;
// with candidate = tanh and no skip it is fo-pooling of Bradbury et al., "Quasi-Recurrent Neural Networks", ICLR 2017.
//
// With u = (u0, u1, u2[, u3]):
//     f = sigmoid(u1 + b_f + v_f c')        g = 1 - f            c' the state before, c the state after the step
//     r = sigmoid(u2 + b_r + v_r c')        q = 1 - r
//     c = c' + g (z - c')                   z = candidate(u0)    = f c' + g z, without the rounding of an f near 1
//     h = r m a + w s                       a = activation(c)    s = scale_x x | u3 | 0
//     w = q + (1 - n) r                     n = 1 (mask_target "state") or m ("gate"): w = 1 - n r
// Backward, with the carry that arrives from the step after:
//     gc = gh m r a' + carry                A = (c' - z) f g             gs = gh w
//     gu1 = gc A                            gu0 = gc g z'                gu2 = gh r q (m a - n s)
//     carry = gc + (A v_f - g) gc + gu2 v_r                      = f gc + ..., again without the rounding of f
// Where f is small the plain forms are used, since there the others lose f: in both, each term keeps its own last bits.
//
// Each pass is cut in three, for only the middle waits for the step before: what is known without the state (forward)
// or the carry (backward), the chain from step to step, and what follows from it.
#pragma once
#include "numbers.cuh"

enum Skip { NO_SKIP = 0, SKIP_X = 1, SKIP_PROJECTED = 2 };
enum Weight {
    NO_WEIGHT = 0,
    WEIGHT_COLUMN = 1,
    WEIGHT_STEP = 2,
    WEIGHT_STEP_STATE = 3
};  // STEP_STATE: in the state's type

// What is fixed when the kernel is compiled.
template <typename T_, int SKIP_, int ACTIVATION_, int CANDIDATE_, int WEIGHT_, int COLUMNS_, bool PACKED_,
          bool PADDED_>
struct Variant {
    using T = T_;
    using S = typename StateOf<T>::type;
    static constexpr int SKIP = SKIP_, ACTIVATION = ACTIVATION_, CANDIDATE = CANDIDATE_, WEIGHT = WEIGHT_;
    static constexpr int COLUMNS = COLUMNS_;  // neighbouring columns that one thread walks
    static constexpr bool PACKED = PACKED_;   // u's k values of a column lie side by side, and so do the columns
    static constexpr bool PADDED = PADDED_;   // there is a mask_pad
    static constexpr int K = SKIP == SKIP_PROJECTED ? 4 : 3;
    static constexpr bool STEP_WEIGHT = WEIGHT >= WEIGHT_STEP;
};

template <bool STATE, typename S, typename T> struct Choose {
    using type = T;
};
template <typename S, typename T> struct Choose<true, S, T> {
    using type = S;
};

// What a column keeps over all its steps.
template <typename S> struct Column {
    S bias_f, bias_r, v_f, v_r, m, n, scale;
};

// One step as it was read, widened.
template <typename S> struct Step {
    S u0, u1, u2, s, v_f, v_r;
};

template <typename S> struct Gate {
    S e, g;  // exp(x) and 1 - sigmoid(x)
};
template <typename S> __device__ __forceinline__ Gate<S> gate(S x) {
    S e = exponential(x);
    return {e, complement(e)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// What is known of a step without its state.
template <typename V, typename S> struct Prepared {
    S z, s, v_f, v_r;
    S x_f, x_r;       // with weight_c: the gates' arguments but for it
    Gate<S> forget;   // without: the gates,
    S reset, weight;  // r m and w s
};

template <typename V, typename S> __device__ __forceinline__ void reset(const Column<S>& k, S x, S& r, S& q, S& w) {
    Gate<S> gate_r = gate(x);
    q = gate_r.g;
    r = sigmoid(gate_r.e, q);
    w = fma(S(1) - k.n, r, q);  // 1 - n r, exact to its own last bits
}

template <typename V, typename S>
__device__ __forceinline__ Prepared<V, S> prepare(const Column<S>& k, const Step<S>& in) {
    Prepared<V, S> p;
    S slope;
    activate<V::CANDIDATE>(in.u0, p.z, slope);
    p.x_f = in.u1 + k.bias_f;
    p.x_r = in.u2 + k.bias_r;
    p.s = in.s, p.v_f = in.v_f, p.v_r = in.v_r;
    if constexpr (V::WEIGHT == NO_WEIGHT) {
        p.forget = gate(p.x_f);
        S r, q, w;
        reset<V>(k, p.x_r, r, q, w);
        p.reset = r * k.m, p.weight = w * in.s;
    }
    return p;
}

// c' -> c = g (z - c') + c', or g (e c' + z) where f = e g < 1/4: there the first form would keep too few of f c' 's
// bits. Both are g p + rest, so that one fma follows on the gate.
template <typename S> __device__ __forceinline__ S advance(const Gate<S>& forget, S z, S c) {
    bool small = forget.e < S(1. / 3);
    return fma(forget.g, fma(small ? forget.e : S(-1), c, z), small ? S(0) : c);
}
template <typename V, typename S> __device__ __forceinline__ S advance(const Prepared<V, S>& p, S c) {
    if constexpr (V::WEIGHT == NO_WEIGHT) return advance(p.forget, p.z, c);
    return advance(gate(fma(p.v_f, c, p.x_f)), p.z, c);
}

template <typename V, typename S>
__device__ __forceinline__ S output(const Column<S>& k, const Prepared<V, S>& p, S c_prev, S c) {
    S a, slope, rm = p.reset, ws = p.weight;
    activate<V::ACTIVATION>(c, a, slope);
    if constexpr (V::WEIGHT != NO_WEIGHT) {
        S r, q, w;
        reset<V>(k, fma(p.v_r, c_prev, p.x_r), r, q, w);
        rm = r * k.m, ws = w * p.s;
    }
    return V::SKIP == NO_SKIP ? rm * a : fma(rm, a, ws);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// What is known of a step without its carry.
template <typename S> struct Linear {
    S inflow, slope;  // gc = inflow slope + carry
    S keep, v_r;      // carry = keep gc [+ gc] + gu2 v_r
    S g, slope_z, forget, c_prev;
    S u2, skip;  // gradients that need no carry
    // Whether f is so small that gc - g gc would keep too few of f gc 's bits.
    __device__ __forceinline__ bool forgets() const { return g > S(0.75); }
};

template <typename V, typename S>
__device__ __forceinline__ Linear<S> linearise(const Column<S>& k, const Step<S>& in, S gh, S c_prev) {
    Linear<S> l;
    S z, a, r, q, w;
    S x_f = in.u1 + k.bias_f, x_r = in.u2 + k.bias_r;
    if constexpr (V::WEIGHT != NO_WEIGHT) x_f = fma(in.v_f, c_prev, x_f), x_r = fma(in.v_r, c_prev, x_r);
    Gate<S> forget = gate(x_f);
    S g = forget.g, f = sigmoid(forget.e, g);
    reset<V>(k, x_r, r, q, w);
    activate<V::CANDIDATE>(in.u0, z, l.slope_z);
    activate<V::ACTIVATION>(advance(forget, z, c_prev), a, l.slope);
    S difference = V::SKIP == NO_SKIP ? k.m * a : fma(k.m, a, -(k.n * in.s));
    l.inflow = gh * (k.m * r);
    l.skip = gh * w;
    l.u2 = gh * (r * q) * difference;  // a saturated gate's 0 first: gh * difference may overflow
    l.forget = (c_prev - z) * (f * g);
    l.g = g, l.c_prev = c_prev, l.v_r = in.v_r;
    l.keep = l.forgets() ? f : -g;
    if constexpr (V::WEIGHT != NO_WEIGHT) l.keep = fma(l.forget, in.v_f, l.keep);
    return l;
}

// The carry one step back; gc is the gradient of this step's c.
template <typename V, typename S> __device__ __forceinline__ S retreat(const Linear<S>& l, S carry, S& gc) {
    gc = fma(l.inflow, l.slope, carry);
    carry = fma(l.keep, gc, l.forgets() ? S(0) : gc);
    return V::WEIGHT == NO_WEIGHT ? carry : fma(l.u2, l.v_r, carry);
}
