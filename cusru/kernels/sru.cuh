// The SRU recurrence, forward and backward, in the form that the kernels compute.
// Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", EMNLP 2018, equations 3 to 6;
// with candidate = tanh and no skip it is fo-pooling of Bradbury et al., "Quasi-Recurrent Neural Networks", ICLR 2017.
//
// One column (b, d) at one step, with u = (u0, u1, u2[, u3]):
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
#pragma once
#include "numbers.cuh"

enum Skip { NO_SKIP = 0, SKIP_X = 1, SKIP_PROJECTED = 2 };
enum Weight {
    NO_WEIGHT = 0,
    WEIGHT_COLUMN = 1,
    WEIGHT_STEP = 2,
    WEIGHT_STEP_STATE = 3
};  // STEP_STATE: in the state's type

enum Flag {  // uniform over the launch
    NARROW_BIAS = 1,
    NARROW_WEIGHT = 2,
    NARROW_C0 = 4,
    NARROW_MASK = 8,
    NARROW_SCALE = 16,
    NARROW_GRAD_C_LAST = 32,
    BIDIRECTIONAL = 64,
    MASK_GATE = 128,
    GRAD_U_PACKED = 256,
    UNWANTED = 512,  // some gradient of a step is
};

struct Args {  // arguments.ARRAYS has a row for each array; an absent one has data == nullptr
    Array u, x, bias, weight_c, c0, mask_c, mask_pad, scale_x;
    Array h, c, c_last;
    Array grad_h, grad_c_last, grad_u, grad_x, grad_bias, grad_weight_c, grad_c0;
    char* partials;     // [rows][sums][D] in the state's type: parameter gradients summed over time and `group` batches
    char* checkpoints;  // [tile][B][D] in the state's type: states inside a saved block longer than a tile
    long long length, batch, width, save_every;
    long long group, rows, sums;  // batches a thread walks, threads along the batch, parameter gradients per column
    double scale;
    long long flags;
};

// What is fixed when the kernel is compiled.
template <typename T_, int SKIP_, int ACTIVATION_, int CANDIDATE_, int WEIGHT_, int COLUMNS_, bool PACKED_>
struct Variant {
    using T = T_;
    using S = typename StateOf<T>::type;
    static constexpr int SKIP = SKIP_, ACTIVATION = ACTIVATION_, CANDIDATE = CANDIDATE_, WEIGHT = WEIGHT_;
    static constexpr int COLUMNS = COLUMNS_;  // neighbouring columns that one thread walks
    static constexpr bool PACKED = PACKED_;   // u's k values of a column lie side by side, and so do the columns
    static constexpr int K = SKIP == SKIP_PROJECTED ? 4 : 3;
    static constexpr bool STEP_WEIGHT = WEIGHT >= WEIGHT_STEP;
};
template <bool STATE, typename S, typename T> struct Choose {
    using type = T;
};
template <typename S, typename T> struct Choose<true, S, T> {
    using type = S;
};
template <typename V>
using WeightType = typename Choose<V::WEIGHT == WEIGHT_STEP_STATE, typename V::S, typename V::T>::type;

// The u of one step: K values of each column.
template <typename V> struct Projection {
    static constexpr int K = V::K, N = V::COLUMNS;
    Values<typename V::T, V::PACKED ? K * N : N> part[V::PACKED ? 1 : K];
    __device__ __forceinline__ typename V::S get(int k, int i) const {
        return V::PACKED ? part[0].get(i * K + k) : part[V::PACKED ? 0 : k].get(i);
    }
    __device__ __forceinline__ void load(const char* global, long long row) {
#pragma unroll
        for (int k = 0; k < (V::PACKED ? 1 : K); ++k) part[k].load(global + k * row);
    }
};

// Weights of one step: forget and reset side by side, column after column.
template <typename V> struct StepWeight {
    static constexpr int N = V::COLUMNS;
    using W = WeightType<V>;
    Values<W, N == 1 ? 1 : 2 * N> part[N == 1 ? 2 : 1];
    __device__ __forceinline__ typename V::S get(int gate, int i) const {
        return N == 1 ? part[N == 1 ? gate : 0].get(0) : part[0].get(2 * i + gate);
    }
    __device__ __forceinline__ void set(int gate, int i, typename V::S v) {
        N == 1 ? part[N == 1 ? gate : 0].set(0, v) : part[0].set(2 * i + gate, v);
    }
    __device__ __forceinline__ void load(const char* global, long long row) {
#pragma unroll
        for (int k = 0; k < (N == 1 ? 2 : 1); ++k) part[k].load(global + k * row);
    }
    __device__ __forceinline__ void store(char* global, long long row) const {
#pragma unroll
        for (int k = 0; k < (N == 1 ? 2 : 1); ++k) part[k].store(global + k * row);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The mathematics, for one column at one step.

// What a column keeps over all its steps.
template <typename S> struct Column {
    S bias_f, bias_r, v_f, v_r, m, n, scale;
};

// Whether f is so small that c' + g (z - c') would keep too few of f c' 's bits.
template <typename S> __device__ __forceinline__ bool forgets(S f) { return f < S(0.25); }

// c' -> c; f, g and z are left for the backward.
template <typename V, typename S>
__device__ __forceinline__ S advance(S u0, S u1, S v_f, S bias_f, S c_prev, S& f, S& g, S& z, S& slope_z) {
    S x = u1 + bias_f;
    if constexpr (V::WEIGHT != NO_WEIGHT) x = fma(v_f, c_prev, x);
    sigmoid(x, f, g);
    activate<V::CANDIDATE>(u0, z, slope_z);
    return forgets(f) ? fma(f, c_prev, g * z) : fma(g, z - c_prev, c_prev);
}

template <typename V, typename S>
__device__ __forceinline__ void reset_gate(S u2, S v_r, S bias_r, S c_prev, S& r, S& q) {
    S x = u2 + bias_r;
    if constexpr (V::WEIGHT != NO_WEIGHT) x = fma(v_r, c_prev, x);
    sigmoid(x, r, q);
}

// w = 1 - n r, exact to its own last bits.
template <typename S> __device__ __forceinline__ S skip_weight(S n, S r, S q) { return fma(S(1) - n, r, q); }

template <typename V, typename S> __device__ __forceinline__ S output(const Column<S>& k, S c, S r, S q, S s) {
    S a, slope;
    activate<V::ACTIVATION>(c, a, slope);
    S h = r * k.m * a;
    return V::SKIP == NO_SKIP ? h : fma(skip_weight(k.n, r, q), s, h);
}

template <typename S> struct Gradient {
    S u0, u1, u2, skip;  // skip: of s
};

template <typename V, typename S>
__device__ __forceinline__ Gradient<S> retreat(const Column<S>& k, S u0, S u1, S u2, S s, S v_f, S v_r, S c_prev, S c,
                                               S gh, S& carry) {
    S f, g, z, slope_z, r, q, a, slope;
    advance<V>(u0, u1, v_f, k.bias_f, c_prev, f, g, z, slope_z);
    reset_gate<V>(u2, v_r, k.bias_r, c_prev, r, q);
    activate<V::ACTIVATION>(c, a, slope);
    Gradient<S> grad;
    S difference = V::SKIP == NO_SKIP ? k.m * a : fma(k.m, a, -(k.n * s));
    S gc = fma(gh * (k.m * r), slope, carry);
    S forget = (c_prev - z) * (f * g);
    grad.skip = gh * skip_weight(k.n, r, q);
    grad.u2 = gh * (r * q) * difference;  // a saturated gate's 0 first: gh * difference may overflow
    grad.u1 = gc * forget;
    grad.u0 = gc * g * slope_z;
    S keep = forgets(f) ? f : -g;  // carry = keep gc + base
    S base = forgets(f) ? S(0) : gc;
    if constexpr (V::WEIGHT == NO_WEIGHT)
        carry = fma(keep, gc, base);
    else
        carry = fma(grad.u2, v_r, fma(fma(forget, v_f, keep), gc, base));
    return grad;
}

// ---------------------------------------------------------------------------------------------------------------------
// Walking over time.

// Calls use(inputs) for each of `count` steps, with the loads of the next AHEAD steps in flight: a double buffer in
// registers, since every index is a constant once the loops are unrolled. All loads of a buffer wait on one scoreboard
// (ptxas gives them no more), so they are issued together, before the first use of the buffer that has arrived.
template <int AHEAD, typename Inputs, typename Load, typename Use>
__device__ __forceinline__ void walk(long long count, Load load, Use use) {
    Inputs next[AHEAD], now[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < count) load(next[i]);
    for (long long left = count; left > 0; left -= AHEAD) {
        tile_boundary();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            now[i] = next[i];
            if (i + AHEAD < left) load(next[i]);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (i >= left) return;
            use(now[i]);
        }
    }
}

// An array of the time loop, seen from one thread: where its next access falls, and how far the one after is.
struct Cursor {
    char* at;
    long long step;
    __device__ __forceinline__ Cursor(const Array& a, long long t, long long b, long long d, bool backward_in_time)
        : at(a.data ? a.at(t, b, d, 0) : nullptr), step(backward_in_time ? -a.time : a.time) {}
    __device__ __forceinline__ char* next() {
        char* now = at;
        at += step;
        return now;
    }
};

// A sum of a parameter gradient, with Kahan's compensation: the error stays at a few ulps of the sum of magnitudes
// however long it grows, and there is arithmetic to spare.
template <typename S> struct Sum {
    S total = 0, lost = 0;
    __device__ __forceinline__ void add(S v) {
        S y = v - lost, t = total + y;
        lost = t - t == S(0) ? (t - total) - y : S(0);  // once infinite the sum stays so, and is not inf - inf
        total = t;
    }
};

template <typename V> struct Thread {  // which columns a thread walks, and what stays fixed over time
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    const Args& args;
    long long b, d;
    bool reversed;
    Column<S> column[N];

    __device__ __forceinline__ Thread(const Args& args, long long b, long long d) : args(args), b(b), d(d) {
        reversed = (args.flags & BIDIRECTIONAL) && d >= args.width / 2;
        S scale = S(args.scale);
        if (args.scale_x.data) scale = one(args.scale_x, 0, 0, 0, NARROW_SCALE);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Column<S>& k = column[i];
            k.bias_f = args.bias.data ? one(args.bias, 0, d + i, 0, NARROW_BIAS) : S(0);
            k.bias_r = args.bias.data ? one(args.bias, 0, d + i, 1, NARROW_BIAS) : S(0);
            k.v_f = V::WEIGHT == WEIGHT_COLUMN ? one(args.weight_c, 0, d + i, 0, NARROW_WEIGHT) : S(0);
            k.v_r = V::WEIGHT == WEIGHT_COLUMN ? one(args.weight_c, 0, d + i, 1, NARROW_WEIGHT) : S(0);
            k.scale = scale;
        }
        to_batch(b);
    }
    __device__ __forceinline__ void to_batch(long long batch) {  // what differs from one batch to the next
        b = batch;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            column[i].m = args.mask_c.data ? one(args.mask_c, b, d + i, 0, NARROW_MASK) : S(1);
            column[i].n = (args.flags & MASK_GATE) ? column[i].m : S(1);
        }
    }
    __device__ __forceinline__ S one(const Array& a, long long batch, long long column_, long long row,
                                     int narrow) const {
        return load_one<typename V::T>(a.at(0, batch, column_, row), (args.flags & narrow) != 0);
    }
    __device__ __forceinline__ S initial(int i) const {
        return args.c0.data ? one(args.c0, b, d + i, 0, NARROW_C0) : S(0);
    }
    // The time of the step that is processed as number p.
    __device__ __forceinline__ long long time(long long p) const { return reversed ? args.length - 1 - p : p; }
    __device__ __forceinline__ Cursor cursor(const Array& a, long long p, bool against = false) const {
        return Cursor(a, time(p), b, d, reversed != against);
    }
};

// Inputs of one step. What a variant or a pass does not use is never loaded, and costs no register.
template <typename V> struct StateInputs {  // what the state needs
    Projection<V> u;
    StepWeight<V> weight;
    unsigned char pad;
};

template <typename V> struct StateLoader {
    Cursor u, weight, pad;
    long long row_u, row_weight;
    __device__ __forceinline__ StateLoader(const Thread<V>& thread, long long p, bool against = false)
        : u(thread.cursor(thread.args.u, p, against)),
          weight(thread.cursor(thread.args.weight_c, p, against)),
          pad(thread.cursor(thread.args.mask_pad, p, against)),
          row_u(thread.args.u.row),
          row_weight(thread.args.weight_c.row) {}
    __device__ __forceinline__ void gates(StateInputs<V>& in) {  // everything but u
        if constexpr (V::STEP_WEIGHT) in.weight.load(weight.next(), row_weight);
        in.pad = 0;
        const char* at = pad.next();  // stays null where there is no padding
        if (at) global_load<1>(&in.pad, at);
    }
    __device__ __forceinline__ void operator()(StateInputs<V>& in) {
        in.u.load(u.next(), row_u);
        gates(in);
    }
};

template <typename V>
__device__ __forceinline__ typename V::S weight_of(const StateInputs<V>& in, const Column<typename V::S>& k, int gate,
                                                   int i) {
    if constexpr (V::STEP_WEIGHT) return in.weight.get(gate, i);
    return gate ? k.v_r : k.v_f;
}

// The state after one step of column i, all that a recomputation needs.
template <typename V>
__device__ __forceinline__ typename V::S next_state(const StateInputs<V>& in, const Column<typename V::S>& k, int i,
                                                    typename V::S c_prev) {
    typename V::S f, g, z, slope_z;
    return in.pad ? c_prev
                  : advance<V>(in.u.get(0, i), in.u.get(1, i), weight_of<V>(in, k, 0, i), k.bias_f, c_prev, f, g, z,
                               slope_z);
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward. A thread walks COLUMNS neighbouring columns; threads that follow one another hold columns that do.

template <typename V> struct ForwardInputs : StateInputs<V> {
    Values<typename V::T, V::COLUMNS> x;
};

template <typename V, int AHEAD, int THREADS> __device__ __forceinline__ void forward(const Args& args) {
    using T = typename V::T;
    using S = typename V::S;
    constexpr int N = V::COLUMNS;
    long long per_row = args.width / N, index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= args.batch * per_row) return;
    Thread<V> thread(args, index / per_row, index % per_row * N);

    S c[N];
#pragma unroll
    for (int i = 0; i < N; ++i) c[i] = thread.initial(i);

    // Steps until the next state is saved. A forward column ends its blocks at multiples of save_every and at the last
    // step, a reversed one begins with the block that may be short.
    long long S_ = args.save_every, blocks = args.c.data ? (args.length + S_ - 1) / S_ : 0;
    long long until = blocks == 0       ? 0
                      : thread.reversed ? args.length - (blocks - 1) * S_
                                        : S_;  // from 0 it never comes to 0
    Cursor h = thread.cursor(args.h, 0),
           saved(args.c, thread.reversed ? blocks - 1 : 0, thread.b, thread.d, thread.reversed);
    auto save = [&] {
        Values<S, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.set(i, c[i]);
        out.store(saved.next());
    };

    StateLoader<V> state(thread, 0);
    Cursor x = thread.cursor(args.x, 0);
    auto load = [&](ForwardInputs<V>& in) {
        state(in);
        if constexpr (V::SKIP == SKIP_X) in.x.load(x.next());
    };
    auto use = [&](const ForwardInputs<V>& in) {
        Values<T, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Column<S>& k = thread.column[i];
            S f, g, z, slope_z, r, q;
            S next =
                advance<V>(in.u.get(0, i), in.u.get(1, i), weight_of<V>(in, k, 0, i), k.bias_f, c[i], f, g, z, slope_z);
            reset_gate<V>(in.u.get(2, i), weight_of<V>(in, k, 1, i), k.bias_r, c[i], r, q);
            S s = 0;
            if constexpr (V::SKIP == SKIP_X) s = k.scale * in.x.get(i);
            if constexpr (V::SKIP == SKIP_PROJECTED) s = in.u.get(3, i);
            out.set(i, in.pad ? S(0) : output<V>(k, next, r, q, s));
            c[i] = in.pad ? c[i] : next;
        }
        out.store(h.next());
        if (--until == 0) {
            save();
            until = S_;
        }
    };
    walk<AHEAD, ForwardInputs<V>>(args.length, load, use);
    if (blocks && until != S_) save();  // a forward column's last block, cut short by the end

#pragma unroll
    for (int i = 0; i < N; ++i) store_one<T>(args.c_last.at(0, thread.b, thread.d + i, 0), c[i], false);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. A thread walks its columns against their direction, over `group` batches one after another, and leaves the
// sums over them for reduce().

template <typename V> struct BackwardInputs : StateInputs<V> {
    Values<typename V::T, V::COLUMNS> x, gh;
    Values<typename V::S, V::COLUMNS> c_prev;
};

// One thread's gradients: the carry, the parameter sums, and where the results go.
template <typename V> struct Gradients {
    using T = typename V::T;
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, K = V::K;
    S carry[N];
    Sum<S> bias_f[N], bias_r[N], v_f[N], v_r[N];

    // All of one step: x and the inputs as loaded, u as given by `u(k, i)`, the states around it. Where `all`, no
    // gradient is unwanted. It is a constant in each of two copies of the loop: a test at every step costs up to a
    // tenth of the time.
    template <typename U>
    __device__ __forceinline__ void step(const Thread<V>& thread, const StateInputs<V>& in, U u, const Values<T, N>& x,
                                         const Values<T, N>& gh, const S (&c_prev)[N], const S (&c)[N], Cursor& grad_u,
                                         Cursor& grad_x, Cursor& grad_weight, bool all) {
        const Args& args = thread.args;
        S gu[K][N];
        Values<T, N> gx;
        StepWeight<V> gw;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Column<S>& k = thread.column[i];
            Gradient<S> grad = {S(0), S(0), S(0), S(0)};
            S w_f = 0, w_r = 0;
            if (!in.pad) {
                S s = 0;
                if constexpr (V::SKIP == SKIP_X) s = k.scale * x.get(i);
                if constexpr (V::SKIP == SKIP_PROJECTED) s = u(3, i);
                grad = retreat<V>(k, u(0, i), u(1, i), u(2, i), s, weight_of<V>(in, k, 0, i), weight_of<V>(in, k, 1, i),
                                  c_prev[i], c[i], gh.get(i), carry[i]);
                if constexpr (V::SKIP == SKIP_X) grad.skip *= k.scale;
                w_f = grad.u1 * c_prev[i];
                w_r = grad.u2 * c_prev[i];
            }
            bias_f[i].add(grad.u1);
            bias_r[i].add(grad.u2);
            if constexpr (V::WEIGHT == WEIGHT_COLUMN) {
                v_f[i].add(w_f);
                v_r[i].add(w_r);
            }
            if constexpr (V::STEP_WEIGHT) {
                gw.set(0, i, w_f);
                gw.set(1, i, w_r);
            }
            gu[0][i] = grad.u0;
            gu[1][i] = grad.u1;
            gu[2][i] = grad.u2;
            if constexpr (V::SKIP == SKIP_PROJECTED) gu[3][i] = grad.skip;
            if constexpr (V::SKIP == SKIP_X) gx.set(i, grad.skip);
        }
        char *at = grad_u.next(), *at_x = grad_x.next(), *at_weight = grad_weight.next();
        if constexpr (V::STEP_WEIGHT)
            if (all || at_weight) gw.store(at_weight, args.grad_weight_c.row);
        if constexpr (V::SKIP == SKIP_X)
            if (all || at_x) gx.store(at_x);
        if (args.flags & GRAD_U_PACKED) {
            Values<T, K * N> out;
#pragma unroll
            for (int i = 0; i < K * N; ++i) out.set(i, gu[i % K][i / K]);
            out.store(at);
        } else if (all || at) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                Values<T, N> out;
#pragma unroll
                for (int i = 0; i < N; ++i) out.set(i, gu[k][i]);
                out.store(at + k * args.grad_u.row);
            }
        }
    }

    __device__ __forceinline__ void begin(const Thread<V>& thread) {
        const Args& args = thread.args;
#pragma unroll
        for (int i = 0; i < N; ++i)
            carry[i] = args.grad_c_last.data
                           ? thread.one(args.grad_c_last, thread.b, thread.d + i, 0, NARROW_GRAD_C_LAST)
                           : S(0);
    }
    __device__ __forceinline__ void end(const Thread<V>& thread) {
        const Args& args = thread.args;
        if (!args.grad_c0.data) return;
#pragma unroll
        for (int i = 0; i < N; ++i)
            store_one<T>(args.grad_c0.at(0, thread.b, thread.d + i, 0), carry[i], (args.flags & NARROW_C0) != 0);
    }
    // The parameter sums, for reduce(); where one thread has walked all batches they are the gradients.
    __device__ __forceinline__ void leave_sums(const Thread<V>& thread, long long row) {
        const Args& args = thread.args;
        S* partials = reinterpret_cast<S*>(args.partials);
        long long place = row * args.sums * args.width + thread.d;
        auto put = [&](const Sum<S>(&sum)[N], const Array& gradient, int gate, int narrow) {
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (args.rows > 1)
                    workspace_store<sizeof(S)>(partials + place + i, &sum[i].total);
                else  // 0 +: as reduce() begins, which takes the sign from a -0
                    store_one<T>(gradient.at(0, 0, thread.d + i, gate), S(0) + sum[i].total,
                                 (args.flags & narrow) != 0);
            place += args.width;
        };
        if (args.grad_bias.data) {
            put(bias_f, args.grad_bias, 0, NARROW_BIAS);
            put(bias_r, args.grad_bias, 1, NARROW_BIAS);
        }
        if constexpr (V::WEIGHT == WEIGHT_COLUMN)
            if (args.grad_weight_c.data) {
                put(v_f, args.grad_weight_c, 0, NARROW_WEIGHT);
                put(v_r, args.grad_weight_c, 1, NARROW_WEIGHT);
            }
    }
};

// Every state was saved: c[t] and c[t - 1] come from one read of c.
template <typename V, int AHEAD>
__device__ __forceinline__ void backward_saved(const Thread<V>& thread, Gradients<V>& gradients, bool all) {
    using S = typename V::S;
    constexpr int N = V::COLUMNS;
    const Args& args = thread.args;
    long long last = args.length - 1;
    if (last < 0) return;
    S c[N], first[N];
    Cursor saved = thread.cursor(args.c, last, true);
    {
        Values<S, N> in;
        in.load(saved.at);
#pragma unroll
        for (int i = 0; i < N; ++i) c[i] = in.get(i), first[i] = thread.initial(i);
    }
    StateLoader<V> state(thread, last, true);
    Cursor x = thread.cursor(args.x, last, true), gh = thread.cursor(args.grad_h, last, true);
    Cursor grad_u = thread.cursor(args.grad_u, last, true), grad_x = thread.cursor(args.grad_x, last, true);
    Cursor grad_weight = thread.cursor(args.grad_weight_c, last, true);
    long long to_load = args.length, to_use = args.length;
    auto load = [&](BackwardInputs<V>& in) {
        state(in);
        if constexpr (V::SKIP == SKIP_X) in.x.load(x.next());
        in.gh.load(gh.next());
        // The first step loads in vain, once more what it has: were the load left out there, all would pay with moves.
        if (--to_load) saved.next();
        in.c_prev.load(saved.at);
    };
    auto use = [&](const BackwardInputs<V>& in) {
        S c_prev[N];
#pragma unroll
        for (int i = 0; i < N; ++i) c_prev[i] = to_use > 1 ? in.c_prev.get(i) : first[i];
        --to_use;
        gradients.step(
            thread, in, [&](int k, int i) { return in.u.get(k, i); }, in.x, in.gh, c_prev, c, grad_u, grad_x,
            grad_weight, all);
#pragma unroll
        for (int i = 0; i < N; ++i) c[i] = c_prev[i];
    };
    walk<AHEAD, BackwardInputs<V>>(args.length, load, use);
}

// States were saved every save_every steps: each block is walked twice in tiles of TILE steps, forward to recompute the
// states, then backward. The tile's states and u wait in shared memory, in slots that only their own thread touches, so
// each byte of u is read from global memory once, and no barrier is needed. In a block longer than a tile all tiles but
// the last are walked forward once more, first, for the states between them, which go to `checkpoints`.
template <typename V, int AHEAD, int TILE, int THREADS>
__device__ __forceinline__ void backward_recomputed(const Thread<V>& thread, Gradients<V>& gradients) {
    using S = typename V::S;
    constexpr int N = V::COLUMNS, K = V::K, SLOTS = (K + 1) * N;
    CUSRU_SHARED(S, stash, TILE * SLOTS * THREADS);
    auto slot = [&](long long step, int k, int i) -> S& {
        return stash[((step * (K + 1) + k) * N + i) * THREADS + threadIdx.x];
    };
    const Args& args = thread.args;
    long long every = args.save_every, blocks = (args.length + every - 1) / every, plane = args.batch * args.width;
    S* checkpoint = reinterpret_cast<S*>(args.checkpoints) + thread.b * args.width + thread.d;

    for (long long block = blocks - 1; block >= 0; --block) {  // blocks in the order of processing, from the last
        // A reversed column's first block is the one that may be short.
        long long in_time = thread.reversed ? blocks - 1 - block : block, first_time = in_time * every;
        long long count = args.length - first_time < every ? args.length - first_time : every;
        long long first =
            thread.reversed ? args.length - first_time - count : first_time;  // processing number of its first step
        S start[N];
        if (block) {
            Values<S, N> in;
            in.load(args.c.at(thread.reversed ? in_time + 1 : in_time - 1, thread.b, thread.d, 0));
#pragma unroll
            for (int i = 0; i < N; ++i) start[i] = in.get(i);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) start[i] = thread.initial(i);
        }

        // Tiles in turn: 0 .. tiles-1 to find the states between them, the last of these already backward too, then
        // down.
        long long tiles = (count + TILE - 1) / TILE;
        S c[N];
        for (long long turn = 0; turn < 2 * tiles - 1; ++turn) {
            long long tile = turn < tiles ? turn : 2 * tiles - 2 - turn;
            long long begin = first + tile * TILE, steps = count - tile * TILE < TILE ? count - tile * TILE : TILE;
            S* between = checkpoint + (tile - 1) * plane;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (tile == 0)
                    c[i] = start[i];
                else if (turn < tiles)
                    workspace_store<sizeof(S)>(between + i, &c[i]);
                else
                    workspace_load<sizeof(S)>(&c[i], between + i);
            }
            StateLoader<V> load(thread, begin);
            long long step = 0;
            walk<AHEAD, StateInputs<V>>(steps, load, [&](const StateInputs<V>& in) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
#pragma unroll
                    for (int k = 0; k < K; ++k) slot(step, k, i) = in.u.get(k, i);
                    slot(step, K, i) = c[i];
                    c[i] = next_state<V>(in, thread.column[i], i, c[i]);
                }
                ++step;
            });
            if (turn < tiles - 1) continue;

            long long last = begin + steps - 1;
            StateLoader<V> state(thread, last, true);
            Cursor x = thread.cursor(args.x, last, true), gh = thread.cursor(args.grad_h, last, true);
            Cursor grad_u = thread.cursor(args.grad_u, last, true), grad_x = thread.cursor(args.grad_x, last, true);
            Cursor grad_weight = thread.cursor(args.grad_weight_c, last, true);
            auto load_back = [&](BackwardInputs<V>& in) {
                state.gates(in);
                if constexpr (V::SKIP == SKIP_X) in.x.load(x.next());
                in.gh.load(gh.next());
            };
            auto use = [&](const BackwardInputs<V>& in, bool all) {
                --step;
                S c_prev[N];
#pragma unroll
                for (int i = 0; i < N; ++i) c_prev[i] = slot(step, K, i);
                gradients.step(
                    thread, in, [&](int k, int i) { return slot(step, k, i); }, in.x, in.gh, c_prev, c, grad_u, grad_x,
                    grad_weight, all);
#pragma unroll
                for (int i = 0; i < N; ++i) c[i] = c_prev[i];
            };
            constexpr int FEWER = sizeof(S) < 8 ? AHEAD : V::STEP_WEIGHT ? 1 : AHEAD / 2;  // as in backward()
            if (args.flags & UNWANTED)
                walk<FEWER, BackwardInputs<V>>(steps, load_back, [&](const BackwardInputs<V>& in) { use(in, false); });
            else
                walk<AHEAD, BackwardInputs<V>>(steps, load_back, [&](const BackwardInputs<V>& in) { use(in, true); });
        }
    }
}

template <typename V, int AHEAD, int TILE, int THREADS>
__device__ __forceinline__ void backward(const Args& args) {  // TILE 0: every state was saved
    constexpr int N = V::COLUMNS;
    long long per_row = args.width / N, index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= args.rows * per_row) return;
    long long row = index / per_row, first = row * args.group;
    long long end = first + args.group < args.batch ? first + args.group : args.batch;
    Thread<V> thread(args, first, index % per_row * N);
    Gradients<V> gradients;
    // With as many steps ahead as the other copy of the loop this rarer one makes ptxas spill.
    constexpr int FEWER = V::STEP_WEIGHT || AHEAD == 1 ? 1 : AHEAD / 2;
    for (long long b = first; b < end; ++b) {
        if (b != first) thread.to_batch(b);
        gradients.begin(thread);
        if constexpr (TILE != 0)
            backward_recomputed<V, AHEAD, TILE, THREADS>(thread, gradients);
        else if (args.flags & UNWANTED)
            backward_saved<V, FEWER>(thread, gradients, false);
        else
            backward_saved<V, AHEAD>(thread, gradients, true);
        gradients.end(thread);
    }
    gradients.leave_sums(thread, row);
}

// ---------------------------------------------------------------------------------------------------------------------
// The parameter gradients: sums over the rows of `partials`, in an order that only the number of rows decides. A block
// takes 32 neighbouring sums, each of its WARPS warps every WARPS-th row; then the first warp adds up the warps.

template <typename T, int WARPS> __device__ __forceinline__ void reduce(const Args& args) {
    using S = typename StateOf<T>::type;
    CUSRU_SHARED(S, of_warp, WARPS * 32);
    long long width = args.sums * args.width;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long index = static_cast<long long>(blockIdx.x) * 32 + lane;
    const S* partial = reinterpret_cast<const S*>(args.partials) + index;
    Sum<S> sum;
    if (index < width)
#pragma unroll 4
        for (long long row = warp; row < args.rows; row += WARPS) {
            S v;
            workspace_load<sizeof(S)>(&v, partial + row * width);
            sum.add(v);
        }
    of_warp[warp * 32 + lane] = sum.total;
    __syncthreads();
    if (warp || index >= width) return;
    Sum<S> all;
    for (int w = 0; w < WARPS; ++w) { all.add(of_warp[w * 32 + lane]); }
    long long gate = index / args.width, d = index % args.width;
    if (args.grad_bias.data) {
        if (gate < 2) {
            store_one<T>(args.grad_bias.at(0, 0, d, gate), all.total, (args.flags & NARROW_BIAS) != 0);
            return;
        }
        gate -= 2;
    }
    store_one<T>(args.grad_weight_c.at(0, 0, d, gate), all.total, (args.flags & NARROW_WEIGHT) != 0);
}
