// The recurrences at one step of one column (b, d), in the form that the kernels compute.
//
// SRU
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
// The QRNN's pooling, Bradbury et al., equations 3 to 5, with u = (u0, u1[, u2[, u3]]); P = 1 - p of zoneout p, or 0
// where a mask of it is set, else 1:
//     f = sigmoid(y u1)             y = 1 (gate "forget") or -1 ("update")
//     z = tanh(u0)                  o = 1 ("f") or sigmoid(u2)
//     G = P (1 - f)                 e = 1 - G = p + P f
//     c = e c' + i z                i = G ("f", "fo") or P sigmoid(u3) ("ifo")
//     h = o c
// Backward:
//     gc = gh o + carry             gu0 = gc i (1 - z z)        gu1 = gc (c' - z | c') y P f (1 - f)
//     carry = gc e                  gu2 = gh c o (1 - o)        gu3 = gc z i (1 - sigmoid(u3))
//
// The linear recurrence, Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets over Sequence Length", 2018:
//     c = a c' + b  |  (c' - a c') + b  |  (c' - a c') + a b        "affine" | "complement" | "blend";      h = c
// Backward:
//     gc = gh + carry               ga = gc c' | -gc c' | gc (b - c')
//     carry = gc a | gc - a gc      gb = gc | gc | gc a
//
// Every pass but the forward of SRU with weight_c is affine in what goes from step to step, so time can be split:
//     forward,  c = factor c' + summand
//         SRU without weight_c      factor f                    summand g z
//         QRNN                      e                           i z
//         linear recurrence         a | 1 - a                   b | b | a b
//     backward,  carry = factor carry' + summand, carry' being that of the step after
//         SRU                       f + A v_f                   (f + A v_f) gh m r a' + gu2 v_r
//         QRNN                      e                           e gh o
//         linear recurrence         a | 1 - a                   that times gh
// At a padded step the factor is 1 and the summand 0. Where a sequence starts the factor is 0 by choice, and not by
// multiplication: neither NaN nor infinity comes across.
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

enum Cell { SRU = 0, POOLING_F = 1, POOLING_FO = 2, POOLING_IFO = 3, AFFINE = 4, COMPLEMENT = 5, BLEND = 6 };
enum Marks { NO_MARKS = 0, PADDING = 1, STARTS = 2 };  // STARTS: and perhaps padding

// What is fixed when the kernel is compiled.
template <typename T_, int CELL_, int SKIP_, int ACTIVATION_, int CANDIDATE_, int WEIGHT_, bool ZONEOUT_, int COLUMNS_,
          bool PACKED_, int MARKS_>
struct Variant {
    using T = T_;
    using S = typename StateOf<T>::type;
    static constexpr int CELL = CELL_;
    static constexpr bool QRNN = CELL >= POOLING_F && CELL <= POOLING_IFO, LINEAR = CELL >= AFFINE;
    static constexpr int SKIP = SKIP_, ACTIVATION = ACTIVATION_, CANDIDATE = CANDIDATE_;
    static constexpr int WEIGHT = WEIGHT_;      // weight_c, or a in its place
    static constexpr bool ZONEOUT = ZONEOUT_;   // an array of it
    static constexpr int COLUMNS = COLUMNS_;    // neighbouring columns that one thread walks
    static constexpr bool PACKED = PACKED_;     // u's k values of a column lie side by side, and so do the columns
    static constexpr bool MARKED = MARKS_ > 0;  // there is a mask_pad or starts
    static constexpr bool STARTING = MARKS_ == STARTS;
    static constexpr int K = LINEAR ? 1 : QRNN ? CELL + 1 : SKIP == SKIP_PROJECTED ? 4 : 3;
    static constexpr int GATES = CELL == SRU ? 2 : 1;  // for which weight_c has a value
    static constexpr int SUMS = QRNN ? 0 : (CELL == SRU ? 2 : 0) + (WEIGHT == WEIGHT_COLUMN ? GATES : 0);  // gradients
    static constexpr bool STEP_WEIGHT = WEIGHT >= WEIGHT_STEP;
};

template <bool STATE, typename S, typename T> struct Choose {
    using type = T;
};
template <typename S, typename T> struct Choose<true, S, T> {
    using type = S;
};

// What a column keeps over all its steps. Of the linear recurrence v_f is a; of the QRNN n is y, scale p and bias_f P.
template <typename S> struct Column {
    S bias_f, bias_r, v_f, v_r, m, n, scale;
};

// One step as it was read, widened.
template <typename S> struct Step {
    S u0, u1, u2, s, v_f, v_r;  // s: the skip, or u3
    bool zoned;
};

template <typename S> struct Gate {
    S e, g;  // exp(x) and 1 - sigmoid(x)
};
template <typename S> __device__ __forceinline__ Gate<S> gate(S x) {
    S e = exponential(x);
    return {e, complement(e)};
}

// What a value is multiplied by from step to step, as keep or as 1 + keep: the one that keeps its digits.
template <typename S> struct Factor {
    S keep;
    bool whole;
    __device__ __forceinline__ S times(S x) const { return fma(keep, x, whole ? S(0) : x); }
    __device__ __forceinline__ S gone() const { return whole ? S(1) - keep : -keep; }  // 1 - factor
};
template <typename V, typename S> __device__ __forceinline__ Factor<S> factor_of_a(S a) {
    return V::CELL == AFFINE ? Factor<S>{a, true} : Factor<S>{-a, false};
}

// The QRNN's gates.
template <typename V, typename S> struct Pooled {
    S z, slope_z, i, o, q_o, moved, slope_f, slope_i;  // q_o: 1 - o; moved: 1 - e; slopes: de/du1 but for y, di/du3
    Factor<S> factor;
};
template <typename V, typename S> __device__ __forceinline__ Pooled<V, S> pool(const Column<S>& k, const Step<S>& in) {
    Pooled<V, S> p;
    tanh_and_slope(in.u0, p.z, p.slope_z);
    Gate<S> forget = gate(k.n * in.u1);
    const S f = sigmoid(forget.e, forget.g);
    const S taken = V::ZONEOUT ? S(1) : k.bias_f;
    const bool zoned = V::ZONEOUT && in.zoned;
    p.moved = zoned ? S(0) : taken * forget.g;
    p.slope_f = zoned ? S(0) : taken * (f * forget.g);
    // Where 1 - moved would keep too few of e's bits.
    p.factor.whole = p.moved > S(0.75);
    p.factor.keep = p.factor.whole ? (V::ZONEOUT ? f : fma(taken, f, k.scale)) : -p.moved;
    p.i = p.moved, p.slope_i = S(0);
    if constexpr (V::CELL == POOLING_IFO) {
        Gate<S> input = gate(in.s);
        p.i = zoned ? S(0) : taken * sigmoid(input.e, input.g);
        p.slope_i = p.i * input.g;
    }
    p.o = S(1), p.q_o = S(0);
    if constexpr (V::CELL >= POOLING_FO) {
        Gate<S> output = gate(in.u2);
        p.q_o = output.g, p.o = sigmoid(output.e, output.g);
    }
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// What is known of a step without its state.
template <typename V, typename S> struct Prepared {
    S z, s, v_f, v_r;
    S x_f, x_r;        // with weight_c: the gates' arguments but for it
    Gate<S> forget;    // without: the gates,
    S reset, weight;   // r m and w s
    Factor<S> factor;  // QRNN and linear recurrence: of c', and what is added
    S summand;
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
    if constexpr (V::LINEAR) {
        p.factor = factor_of_a<V>(in.v_f);
        p.summand = V::CELL == BLEND ? in.v_f * in.u0 : in.u0;
        return p;
    }
    if constexpr (V::QRNN) {
        Pooled<V, S> pooled = pool<V>(k, in);
        p.factor = pooled.factor, p.summand = pooled.i * pooled.z, p.reset = pooled.o;
        return p;
    }
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

// Of what the chain of states reads and arithmetic has made.
template <typename V, typename S> __device__ __forceinline__ unsigned bits_of(const Prepared<V, S>& p) {
    if constexpr (V::CELL != SRU) return bits_of(p.factor.keep) | bits_of(p.summand);
    if constexpr (V::WEIGHT != NO_WEIGHT) return bits_of(p.z) | bits_of(p.x_f);
    return bits_of(p.z) | bits_of(p.forget.e) | bits_of(p.forget.g);
}

// c' -> c = g (z - c') + c', or g (e c' + z) where f = e g < 1/4: there the first form would keep too few of f c' 's
// bits. Both are g p + rest, so that one fma follows on the gate.
template <typename S> __device__ __forceinline__ S advance(const Gate<S>& forget, S z, S c) {
    bool small = forget.e < S(1. / 3);
    return fma(forget.g, fma(small ? forget.e : S(-1), c, z), small ? S(0) : c);
}
template <typename V, typename S> __device__ __forceinline__ S advance(const Prepared<V, S>& p, S c) {
    if constexpr (V::CELL != SRU) return p.factor.times(c) + p.summand;
    if constexpr (V::WEIGHT == NO_WEIGHT) return advance(p.forget, p.z, c);
    return advance(gate(fma(p.v_f, c, p.x_f)), p.z, c);
}

// Of a forward that is affine: what c' is multiplied by, and 1 - it.
template <typename V, typename S> __device__ __forceinline__ Factor<S> factor(const Prepared<V, S>& p) {
    if constexpr (V::CELL != SRU) return p.factor;
    const bool small = p.forget.e < S(1. / 3);
    return {small ? p.forget.e * p.forget.g : -p.forget.g, small};
}
template <typename V, typename S> __device__ __forceinline__ S gone(const Prepared<V, S>& p) {
    return V::CELL == SRU ? p.forget.g : p.factor.gone();
}

template <typename V, typename S>
__device__ __forceinline__ S output(const Column<S>& k, const Prepared<V, S>& p, S c_prev, S c) {
    if constexpr (V::LINEAR || V::CELL == POOLING_F) return c;
    if constexpr (V::QRNN) return p.reset * c;
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
    Factor<S> keep;   // carry = keep gc + gu2 v_r
    S v_r;
    S g, slope_z, forget, c_prev;  // gu0 = gc g slope_z, gu1 or ga = gc forget
    S u2, skip;                    // gradients that need no carry; of pooling "ifo" gu3 = gc skip
};

template <typename V, typename S>
__device__ __forceinline__ Linear<S> linearise(const Column<S>& k, const Step<S>& in, S gh, S c_prev) {
    Linear<S> l;
    l.c_prev = c_prev, l.v_r = in.v_r;
    if constexpr (V::LINEAR) {
        l.inflow = gh, l.slope = l.slope_z = S(1);
        l.keep = factor_of_a<V>(in.v_f);
        l.g = V::CELL == BLEND ? in.v_f : S(1);
        l.forget = V::CELL == AFFINE ? c_prev : V::CELL == COMPLEMENT ? -c_prev : in.u0 - c_prev;
        return l;
    }
    if constexpr (V::QRNN) {
        Pooled<V, S> p = pool<V>(k, in);
        l.inflow = gh, l.slope = p.o;
        l.keep = p.factor;
        l.g = p.i, l.slope_z = p.slope_z;
        l.forget = k.n * ((V::CELL == POOLING_IFO ? c_prev : c_prev - p.z) * p.slope_f);
        l.u2 = gh * (p.o * p.q_o) * (p.factor.times(c_prev) + p.i * p.z);
        l.skip = p.z * p.slope_i;
        return l;
    }
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
    l.g = g;
    l.keep.whole = g > S(0.75);  // else gc - g gc keeps enough of f gc 's bits
    l.keep.keep = l.keep.whole ? f : -g;
    if constexpr (V::WEIGHT != NO_WEIGHT) l.keep.keep = fma(l.forget, in.v_f, l.keep.keep);
    return l;
}

// The carry one step back; gc is the gradient of this step's c.
template <typename V, typename S> __device__ __forceinline__ S retreat(const Linear<S>& l, S carry, S& gc) {
    gc = fma(l.inflow, l.slope, carry);
    carry = l.keep.times(gc);
    return V::CELL != SRU || V::WEIGHT == NO_WEIGHT ? carry : fma(l.u2, l.v_r, carry);
}

// Of u, by its last axis; terms: what parameter gradients are sums of, but for the weights' factor c_prev.
template <typename V, typename S> __device__ __forceinline__ void gradients(const Linear<S>& l, S gc, S (&of_u)[4]) {
    of_u[0] = gc * (l.g * l.slope_z);
    of_u[1] = gc * l.forget;
    of_u[2] = l.u2;
    of_u[3] = V::CELL == POOLING_IFO ? gc * l.skip : l.skip;
}
