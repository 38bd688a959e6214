// How a block walks time: its warps take turns. A block has 32 threads' columns; time is cut into tiles of T steps, of
// which each warp takes the one after the last warp's. A warp's loads are in flight, and what needs no state is
// computed, while others have their turns; when its own comes it takes the state (forward) or the carry (backward) from
// the warp before, walks the chain through its tile, which is short by then, hands it to the next, and stores what
// follows. So the order of operations along a column is that of a single thread, whatever the number of warps, and so
// are the bits.
#pragma once
#include "step.cuh"

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
    STRAIGHT = 512,  // whole tiles need no question: no gradient unwanted, ... (plan.py)
    REVERSE = 1024,
    GATE_UPDATE = 2048,
    SUMS_OF_BATCHES = 4096,  // each batch has parameter gradients of its own. By turns a row is one, and needs no sum
};

// arguments.ARRAYS has them in this order; an absent one has data == nullptr. Of the linear recurrence u is b, weight_c
// is a.
struct Args {
    Array u, x, bias, weight_c, c0, mask_c, mask_pad, starts, zoneout, scale_x;
    Array h, c, c_last;
    Array grad_h, grad_c_last, grad_u, grad_x, grad_bias, grad_weight_c, grad_c0;
    // [rows][sums][D] in the state's type: parameter gradients summed over time and `group` batches. Where time is
    // split a row is a batch of a span, summed over the span alone; with SUMS_OF_BATCHES a span, [rows][B][D].
    char* partials;
    char* checkpoints;  // [unit][B][D] in the state's type: states inside a saved block longer than two units, or,
                        // where time is guessed, [span][slice][B][D], the last of each slice
    char* signals;      // where time is split (split.cuh, guess.cuh): counters and flags
    char* words;        // and what spans tell one another
    long long length, batch, width, save_every;
    long long group, rows, sums;          // batches a thread walks, rows of partials, parameter gradients per column
    long long spans, log_anchor, groups;  // of time; spans from one anchor to the next, 2 to this; groups of columns
    long long chunks, units;  // of a span, one after the other; of a chunk: tiles forward, saved blocks backward
    long long slice, lead;    // forward: tiles; steps that a reversed column's first slice is short
    double scale;             // scale_x or zoneout, where it is a number
    long long flags;
};

#ifdef CUSRU_WHOLE_TILES  // to count what a step of the common path takes (benchmarks/resources.py)
constexpr bool GENERAL = false;
#else
constexpr bool GENERAL = true;
#endif

template <bool B> struct Bool {
    static constexpr bool value = B;
    __device__ __forceinline__ constexpr operator bool() const { return B; }
};

// Which columns a thread has: those of `rows` rows, COLUMNS of them at a time, first the first half of a bidirectional
// call. A block's all run the same way, for its warps stay together. Where it has too many threads they walk the last
// columns once more, and store nothing.
struct Lane {
    bool reversed, active, all_active;
    long long row, column;
    long long first_row, last_row;  // of the block
    int chunk, columns;  // where there are so few columns that lanes are left, these have chunks of time: which
    // `group` of `groups`: which 32 threads' columns. `of_thread`: columns that each has.
    __device__ __forceinline__ Lane(const Args& args, long long rows, int of_thread, unsigned group, unsigned groups,
                                    int chunks = 1) {
        const int lane = threadIdx.x % 32;
        const bool two = args.flags & BIDIRECTIONAL;
        const long long width = (two ? args.width / 2 : args.width) / of_thread, count = rows * width;
        const unsigned of_one = two ? groups / 2 : groups;
        const bool second = group >= of_one;
        reversed = second != ((args.flags & REVERSE) != 0);
        const long long first = static_cast<long long>(group - (second ? of_one : 0)) * 32;
        chunk = 0, columns = 32;
        long long index = first + lane;
        all_active = first + 32 <= count;
        active = index < count;
        if (chunks > 1) {
            columns = static_cast<int>(count);
            all_active = columns * chunks == 32, active = lane < columns * chunks;
            chunk = active ? lane / columns : chunks - 1, index = active ? lane % columns : count;
        }
        if (index >= count) index = count - 1;
        row = index / width;
        first_row = first / width, last_row = (first + 32 <= count ? first + 31 : count - 1) / width;
        column = (index % width + (second ? width : 0)) * of_thread;
    }
};

// What is handed from warp to warp: a value of each column, and whose turn it is. A block of one warp keeps it.
template <typename S, int N, bool ALONE, int BARRIER> struct Relay {
    S* slots;           // [warp][column of a thread][lane]
    bool kept = false;  // what is to be taken comes from this warp itself
    S own[N];
    __device__ __forceinline__ Relay(char*& room, int warps) : slots(reinterpret_cast<S*>(room)) {
        if (!ALONE) room += warps * 32 * N * sizeof(S);
    }
    __device__ __forceinline__ S& slot(int warp, int i) const { return slots[(warp * N + i) * 32 + threadIdx.x % 32]; }
    __device__ __forceinline__ void give(int to, const S (&value)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) (ALONE ? own[i] : slot(to, i)) = value[i];
        if (ALONE) return;
        if (to == threadIdx.x / 32)
            kept = true;
        else
            barrier_arrive(BARRIER + to, 64);
    }
    // A turn without a value, for which the warp waits all the same.
    __device__ __forceinline__ void call(int to) const { barrier_arrive(BARRIER + to, 64); }
    // `known`: bits of all that is to be worked out before the warp waits.
    __device__ __forceinline__ void take(S (&value)[N], unsigned known = 0) {
        const int warp = threadIdx.x / 32;
        if (!ALONE && !kept) barrier_wait(BARRIER + warp + zero(known), 64);
        kept = false;
#pragma unroll
        for (int i = 0; i < N; ++i) value[i] = ALONE ? own[i] : slot(warp, i);
    }
};

// An array along time, seen from one thread's tile: `at` is its first step.
struct Cursor {
    char* at;
    long long step;
    // Of a straight tile the steps' offsets need 32 bits: one multiplication and addition each.
    template <typename Straight> __device__ __forceinline__ char* operator()(Straight, int i) const {
        return at + (Straight::value ? static_cast<long long>(static_cast<int>(step)) * i : step * i);
    }
    template <typename Straight> __device__ __forceinline__ void move(Straight, long long steps) {
        at += Straight::value ? static_cast<long long>(static_cast<int>(step)) * static_cast<int>(steps) : step * steps;
    }
};

// A sum of a parameter gradient, with Kahan's compensation: the error stays at a few ulps of the sum of magnitudes
// however long it grows.
template <typename S> struct Sum {
    S total = 0, lost = 0;
    __device__ __forceinline__ void add(S v) {
        S y = v - lost, t = total + y;
        lost = t - t == S(0) ? (t - total) - y : S(0);  // once infinite the sum stays so, and is not inf - inf
        total = t;
    }
};

template <typename V>
using WeightType = typename Choose<V::WEIGHT == WEIGHT_STEP_STATE, typename V::S, typename V::T>::type;

// What waits in shared memory is a record for each step, with a slot for each thread's values of each array. One
// array's part of a record, which begins OFFSET bytes within it; neighbouring threads' slots lie side by side.
template <typename Stored, int OFFSET> struct Field {
    static constexpr int WIDTH = access_width(sizeof(Stored)), PIECES = sizeof(Stored) / WIDTH;
    static constexpr int END = OFFSET + sizeof(Stored) * 32;
    static __device__ __forceinline__ char* slot(char* record, int piece) {
        return record + OFFSET + piece * 32 * WIDTH + threadIdx.x % 32 * WIDTH;
    }
    static __device__ __forceinline__ void load(char* record, const char* global) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) async_load<WIDTH>(slot(record, i), global + i * WIDTH);
    }
    static __device__ __forceinline__ void set(char* record, const Stored& value) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i)
            copy<WIDTH>(slot(record, i), reinterpret_cast<const char*>(&value) + i * WIDTH);
    }
    static __device__ __forceinline__ Stored get(char* record) {
        Stored value;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) copy<WIDTH>(reinterpret_cast<char*>(&value) + i * WIDTH, slot(record, i));
        return value;
    }
};

// Of a mask, each column's.
template <int N> struct alignas(N) Bytes {
    unsigned char value[N];
    __device__ __forceinline__ void load(const char* global) { global_load<N>(value, global); }
};

// Gradients of a step's weights: forget and reset side by side, column after column.
template <typename V> struct StepWeight {
    static constexpr int N = V::COLUMNS;
    static constexpr int GATES = V::GATES, PARTS = N == 1 ? GATES : 1;
    Values<WeightType<V>, N == 1 ? 1 : GATES * N> part[PARTS];
    __device__ __forceinline__ void set(int gate, int i, typename V::S v) {
        N == 1 ? part[N == 1 ? gate : 0].set(0, v) : part[0].set(GATES * i + gate, v);
    }
    __device__ __forceinline__ void store(char* global, long long row) const {
#pragma unroll
        for (int k = 0; k < PARTS; ++k) part[k].store(global + k * row);
    }
};

template <typename V> struct Thread {  // which columns a thread walks, and what stays fixed over time
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    const Args& args;
    long long b, d;
    int warp, warps;
    bool reversed;
    Column<S> column[N];

    // Parameters are read by the first warp, and reach the others through `room`.
    __device__ __forceinline__ Thread(const Args& args, const Lane& lane, long long b, char* room)
        : args(args), b(b), d(lane.column), warp(threadIdx.x / 32), warps(blockDim.x / 32), reversed(lane.reversed) {
        S* const slots = reinterpret_cast<S*>(room) + threadIdx.x % 32;
        if (warp == 0) {
            S scale = S(args.scale);
            if (V::CELL == SRU && args.scale_x.data) scale = one(args.scale_x, 0, 0, 0, NARROW_SCALE);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                Column<S>& k = column[i];
                const bool biased = V::CELL == SRU && args.bias.data;
                k.bias_f = biased ? one(args.bias, 0, d + i, 0, NARROW_BIAS) : S(0);
                if (V::QRNN) k.bias_f = S(1. - args.scale);  // before it is rounded: p may be near 1
                k.bias_r = biased ? one(args.bias, 0, d + i, 1, NARROW_BIAS) : S(0);
                k.v_f = V::WEIGHT == WEIGHT_COLUMN ? one(args.weight_c, b, d + i, 0, NARROW_WEIGHT) : S(0);
                k.v_r =
                    V::WEIGHT == WEIGHT_COLUMN && V::GATES == 2 ? one(args.weight_c, b, d + i, 1, NARROW_WEIGHT) : S(0);
                k.scale = scale;
            }
            to_batch(b);
        }
        if (warps == 1) return;
        each([&](S& value, int i) {
            if (warp == 0) slots[32 * i] = value;
        });
        __syncthreads();
        each([&](S& value, int i) {
            if (warp) value = slots[32 * i];
        });
        __syncthreads();
    }
    template <typename Action> __device__ __forceinline__ void each(Action action) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Column<S>& k = column[i];
            action(k.bias_f, 7 * i), action(k.bias_r, 7 * i + 1), action(k.v_f, 7 * i + 2), action(k.v_r, 7 * i + 3);
            action(k.m, 7 * i + 4), action(k.n, 7 * i + 5), action(k.scale, 7 * i + 6);
        }
    }
    __device__ __forceinline__ void to_batch(long long batch) {  // what differs from one batch to the next
        b = batch;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            column[i].m = V::CELL == SRU && args.mask_c.data ? one(args.mask_c, b, d + i, 0, NARROW_MASK) : S(1);
            column[i].n = (args.flags & MASK_GATE) ? column[i].m : S(1);
            if (V::QRNN) column[i].n = (args.flags & GATE_UPDATE) ? S(-1) : S(1);
        }
    }
    __device__ __forceinline__ S one(const Array& a, long long batch, long long column_, long long row,
                                     int narrow) const {
        return load_one<typename V::T>(a.at(0, batch, column_, row), (args.flags & narrow) != 0);
    }
    __device__ __forceinline__ void initial(S (&c)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) c[i] = args.c0.data ? one(args.c0, b, d + i, 0, NARROW_C0) : S(0);
    }
    // The time of the step that is processed as number p.
    __device__ __forceinline__ long long time(long long p) const { return reversed ? args.length - 1 - p : p; }
    __device__ __forceinline__ Cursor cursor(const Array& a, long long p, long long batch) const {
        return {a.data ? a.at(time(p), batch, d, 0) : nullptr, reversed ? -a.time : a.time};
    }
    __device__ __forceinline__ Cursor cursor(const Array& a, long long p) const { return cursor(a, p, b); }
};

// The inputs of a pass. What a variant or a pass does not use is never loaded, and takes no room.
template <typename V, bool BACKWARD, bool RECOMPUTE = false> struct Inputs {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, K = V::K, GATES = V::GATES;
    // The gradients of two forms of the linear recurrence do not depend on b.
    static constexpr bool OF_U = !BACKWARD || RECOMPUTE || !(V::CELL == AFFINE || V::CELL == COMPLEMENT);
    static constexpr int PARTS = V::PACKED ? 1 : K;
    static constexpr int WEIGHT_PARTS = V::STEP_WEIGHT ? (N == 1 ? GATES : 1) : 0;
    using Row = Values<typename V::T, N>;
    using State = Values<S, N>;
    using Projection = Values<typename V::T, V::PACKED ? K * N : N>;
    using Weights = Values<WeightType<V>, N == 1 ? 1 : GATES * N>;  // the gates' side by side, column after column
    template <int PART> using U = Field<Projection, PART * sizeof(Projection) * 32>;
    static constexpr int AFTER_U = OF_U ? U<PARTS - 1>::END : 0;
    template <int PART> using W = Field<Weights, AFTER_U + PART * sizeof(Weights) * 32>;
    static constexpr int AFTER_W = AFTER_U + WEIGHT_PARTS * sizeof(Weights) * 32;
    using X = Field<Row, AFTER_W>;
    using H = Field<Row, V::SKIP == SKIP_X ? X::END : AFTER_W>;                           // the gradient of h
    using C = Field<State, H::END>;                                                       // the state before the step
    using Z = Field<Bytes<N>, BACKWARD ? C::END : V::SKIP == SKIP_X ? X::END : AFTER_W>;  // zoneout
    static constexpr int BYTES = Z::END - (V::ZONEOUT ? 0 : N * 32);

    Cursor u, weight, x, zoneout, gh, c;
    long long place;  // step at which the cursors are
    __device__ __forceinline__ void point(const Thread<V>& thread, long long p, long long b) {
        const Args& args = thread.args;
        place = p;
        u = thread.cursor(args.u, p, b), weight = thread.cursor(args.weight_c, p, b), x = thread.cursor(args.x, p, b);
        if constexpr (V::ZONEOUT) zoneout = thread.cursor(args.zoneout, p, b);
        if constexpr (BACKWARD) gh = thread.cursor(args.grad_h, p, b), c = thread.cursor(args.c, p, b);
    }
    template <typename Straight> __device__ __forceinline__ void move(Straight straight, long long p) {
        const long long steps = p - place;
        place = p;
        u.move(straight, steps), weight.move(straight, steps), x.move(straight, steps);
        if constexpr (V::ZONEOUT) zoneout.move(straight, steps);
        if constexpr (BACKWARD) gh.move(straight, steps), c.move(straight, steps);
    }
    // The step t after where the cursors are.
    template <typename Straight>
    __device__ __forceinline__ void load(const Thread<V>& thread, Straight straight, char* record, int t) const {
        const Args& args = thread.args;
        const char *values = u(straight, t), *weights = weight(straight, t);
        if constexpr (OF_U) U<0>::load(record, values);
        if constexpr (OF_U && PARTS > 1) U<1>::load(record, values + args.u.row);
        if constexpr (OF_U && PARTS > 2) U<2>::load(record, values + 2 * args.u.row);
        if constexpr (OF_U && PARTS > 3) U<3>::load(record, values + 3 * args.u.row);
        if constexpr (WEIGHT_PARTS > 0) W<0>::load(record, weights);
        if constexpr (WEIGHT_PARTS > 1) W<1>::load(record, weights + args.weight_c.row);
        if constexpr (V::SKIP == SKIP_X) X::load(record, x(straight, t));
        if constexpr (BACKWARD) H::load(record, gh(straight, t));
    }
    // Single bytes wait in registers, those of a tile's steps together, and reach their records by zone().
    template <int T, typename Straight>
    __device__ __forceinline__ void load_zone(Straight straight, int left, Bytes<N> (&bytes)[T]) const {
#pragma unroll
        for (int t = 0; t < T; ++t)
            if (straight || t < left) bytes[t].load(zoneout(straight, t));
    }
    // Of all columns of the thread.
    static __device__ __forceinline__ void get(const Column<S> (&column)[N], char* record, Step<S> (&step)[N]) {
        Projection values[PARTS];
        if constexpr (OF_U) values[0] = U<0>::get(record);
        if constexpr (OF_U && PARTS > 1) values[1] = U<1>::get(record);
        if constexpr (OF_U && PARTS > 2) values[2] = U<2>::get(record);
        if constexpr (OF_U && PARTS > 3) values[3] = U<3>::get(record);
        auto one = [&](int k, int i) {
            return OF_U && k < K ? values[V::PACKED ? 0 : k].get(V::PACKED ? i * K + k : i) : S(0);
        };
        Weights weights[WEIGHT_PARTS ? WEIGHT_PARTS : 1];
        if constexpr (WEIGHT_PARTS > 0) weights[0] = W<0>::get(record);
        if constexpr (WEIGHT_PARTS > 1) weights[1] = W<1>::get(record);
        Row skip;
        if constexpr (V::SKIP == SKIP_X) skip = X::get(record);
        Bytes<N> zones;
        if constexpr (V::ZONEOUT) zones = Z::get(record);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            step[i] = {one(0, i), one(1, i), one(2, i), S(0), column[i].v_f, column[i].v_r, false};
            if constexpr (V::SKIP == SKIP_X) step[i].s = column[i].scale * skip.get(i);
            if constexpr (K == 4) step[i].s = one(3, i);
            if constexpr (V::STEP_WEIGHT) step[i].v_f = weights[0].get(N == 1 ? 0 : GATES * i);
            if constexpr (V::STEP_WEIGHT && GATES == 2)
                step[i].v_r = N == 1 ? weights[WEIGHT_PARTS - 1].get(0) : weights[0].get(2 * i + 1);
            if constexpr (V::ZONEOUT) step[i].zoned = zones.value[i] != 0;
        }
    }
};

// Which of a tile's steps are padding, a bit each; those beyond the `left` that there are count as such. And where a
// column begins anew: of a reversed one at the step after which, in time, the next sequence starts. Without marks a
// straight tile has neither bits nor a test of them.
struct Bits {
    unsigned pads, starts;
};
template <int T, typename V, typename Straight>
__device__ __forceinline__ unsigned marked(const Thread<V>& thread, const Array& mask, Straight straight, long long p,
                                           int left, int later) {
    const Cursor at = thread.cursor(mask, p);
    unsigned bits = 0;
    unsigned char mark[T];
#pragma unroll
    for (int i = 0; i < T; ++i) {
        mark[i] = 0;
        if ((straight || i < left) && !(later && i == 0 && p == 0))
            global_load<1>(&mark[i], at(straight, i) + later * mask.time);
    }
#pragma unroll
    for (int i = 0; i < T; ++i)
        if (mark[i]) bits |= 1u << i;
    return bits;
}
template <int T, typename V, typename Straight>
__device__ __forceinline__ Bits marks(const Thread<V>& thread, Straight straight, long long p, int left) {
    Bits bits = {straight || left >= T ? 0 : ~0u << left, 0};
    if constexpr (V::MARKED)
        if (!V::STARTING || thread.args.mask_pad.data)
            bits.pads |= marked<T>(thread, thread.args.mask_pad, straight, p, left, 0);
    if constexpr (V::STARTING) bits.starts = marked<T>(thread, thread.args.starts, straight, p, left, thread.reversed);
    return bits;
}
template <typename V, typename Straight>
__device__ __forceinline__ bool skips(Straight straight, const Bits& bits, int t) {
    return (V::MARKED || !straight) && bits.pads >> t & 1;
}
// What comes from the step before, or is handed to it.
template <typename V, typename S> __device__ __forceinline__ S across(const Bits& bits, int t, S value) {
    return V::STARTING && bits.starts >> t & 1 ? S(0) : value;
}
