// The kernels: forward, backward, and the sum of the parameter gradients' parts. step.cuh has the mathematics,
// relay.cuh how time is walked.
#pragma once
#include "relay.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Forward. A thread has COLUMNS neighbouring columns; lanes that follow one another hold columns that do.

// Where states are saved: after the last time of each block of `every`, which of a reversed column is its first step.
template <typename V> struct Saver {
    static constexpr int N = V::COLUMNS;
    using S = typename V::S;
    long long every, blocks, until;  // until: steps from a tile's first to the next that is saved
    bool cut;                        // a forward column's last block is, by the end
    Cursor at;
    __device__ __forceinline__ explicit Saver(const Thread<V>& thread) : every(thread.args.save_every) {
        const Args& args = thread.args;
        blocks = args.c.data ? (args.length + every - 1) / every : 0;
        at = {thread.reversed ? args.c.at(blocks - 1, thread.b, thread.d, 0) : args.c.at(0, thread.b, thread.d, 0),
              thread.reversed ? -args.c.time : args.c.time};
        cut = blocks && !thread.reversed && args.length % every;
        until = (thread.reversed ? args.length - (blocks - 1) * every : every) - 1;
    }
    __device__ __forceinline__ void move(long long steps) {
        if (!blocks) return;
        if (every == 1) return at.move(Bool<false>(), steps);
        for (until -= steps; until < 0; until += every) at.move(Bool<false>(), 1);
    }
    // To a tile's first step, where the first saved block is `lead` steps short.
    __device__ __forceinline__ void to(const Thread<V>& thread, long long first, long long lead) {
        const long long p = first + lead % every;
        long long block = p;
        if (every > 1)  // a division of 64 bits is a long way
            block = p >> 31 ? p / every : static_cast<unsigned>(p) / static_cast<unsigned>(every);
        until = every - 1 - (p - block * every);
        at.at = thread.args.c.at(thread.reversed ? blocks - 1 - block : block, thread.b, thread.d, 0);
    }
    static __device__ __forceinline__ void save(char* at, const S (&state)[N]) {
        Values<S, N> out;
#pragma unroll
        for (int i = 0; i < N; ++i) out.set(i, state[i]);
        out.store(at);
    }
    // The states of a tile's first `left` steps.
    template <int T, typename Straight>
    __device__ __forceinline__ void operator()(Straight straight, int left, const S (&state)[T + 1][N]) {
        if (!blocks) return;
        if (every == 1) {
#pragma unroll
            for (int t = 0; t < T; ++t)
                if (straight || t < left) save(at(straight, t), state[t + 1]);
        } else if (until < T) {
            const int one = static_cast<int>(until);  // of a straight tile there is no other
#pragma unroll
            for (int t = 0; t < T; ++t)
                if (straight ? t == one : t < left && t >= one && (t - one) % every == 0)
                    save(straight ? at.at : at(straight, static_cast<int>((t - one) / every)), state[t + 1]);
        }
    }
};

// What is done with a tile, T steps of the warp's columns from `first` on, but for what comes from the tile before.
template <typename V, int T> struct ForwardTile {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    const Args& args;
    const Lane lane;
    const Thread<V> thread;
    const bool plain;
    long long first;
    char* const records;  // the warp's
    Inputs<V, false> in;
    Cursor h;
    Saver<V> saver;

    __device__ __forceinline__ ForwardTile(const Args& args, const Lane& lane, long long first, char* shared,
                                           char* records)
        : args(args),
          lane(lane),
          thread(args, lane, lane.row, shared),
          plain((args.flags & STRAIGHT) && lane.all_active),
          first(first),
          records(records + threadIdx.x / 32 * T * Inputs<V, false>::BYTES),
          h(thread.cursor(args.h, first)),
          saver(thread) {
        in.point(thread, first, thread.b);
    }
    __device__ __forceinline__ char* record(int t) const { return records + t * Inputs<V, false>::BYTES; }

    template <typename Straight> __device__ __forceinline__ void load_tile(Straight straight, long long left) {
        tile_boundary();
        Bytes<N> zones[T];
        if constexpr (V::ZONEOUT) in.load_zone(straight, left < T ? static_cast<int>(left) : T, zones);
#pragma unroll
        for (int t = 0; t < T; ++t)
            if (straight || t < left) in.load(thread, straight, record(t), t);
        if constexpr (V::ZONEOUT)
#pragma unroll
            for (int t = 0; t < T; ++t)
                if (straight || t < left) Inputs<V, false>::Z::set(record(t), zones[t]);
    }
    __device__ __forceinline__ void load(long long left) {
        if (plain && left >= T)
            load_tile(Bool<true>(), T);
        else if (GENERAL)
            load_tile(Bool<false>(), left);
    }
    // What is known without the state.
    __device__ __forceinline__ void prepare_all(Prepared<V, S> (&prepared)[T][N]) const {
        async_wait();
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Step<S> step[N];
            in.get(thread.column, record(t), step);
#pragma unroll
            for (int i = 0; i < N; ++i) prepared[t][i] = prepare<V>(thread.column[i], step[i]);
        }
    }
    // The chain, from state[0] on.
    template <typename Straight>
    __device__ __forceinline__ void follow(Straight straight, const Bits& bits, const Prepared<V, S> (&prepared)[T][N],
                                           S (&state)[T + 1][N]) const {
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const S before = across<V>(bits, t, state[t][i]);
                state[t + 1][i] = advance<V>(prepared[t][i], before);
                if (skips<V>(straight, bits, t)) state[t + 1][i] = before;
            }
    }
    // The outputs, and states that are saved.
    template <typename Straight>
    __device__ __forceinline__ void store(Straight straight, int left, const Bits& bits,
                                          const Prepared<V, S> (&prepared)[T][N], const S (&state)[T + 1][N]) {
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Values<typename V::T, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const S before = across<V>(bits, t, state[t][i]);
                S value = output<V>(thread.column[i], prepared[t][i], before, state[t + 1][i]);
                out.set(i, skips<V>(straight, bits, t) ? S(0) : value);
            }
            if (straight || (t < left && lane.active)) out.store(h(straight, t));
        }
        if (straight || lane.active) saver.template operator()<T>(straight, left, state);
    }
    __device__ __forceinline__ void end(const S (&c)[N]) {
        if (!lane.active) return;
#pragma unroll
        for (int i = 0; i < N; ++i) store_one<typename V::T>(args.c_last.at(0, thread.b, thread.d + i, 0), c[i], false);
        // A forward column's last block, cut short by the end
        if (saver.cut) saver.save(args.c.at(saver.blocks - 1, thread.b, thread.d, 0), c);
    }
};

template <typename V, int T, bool ALONE> struct Forward : ForwardTile<V, T> {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    using Tile = ForwardTile<V, T>;
    using Tile::args, Tile::first, Tile::thread, Tile::in, Tile::h, Tile::saver, Tile::plain;
    const long long turn;  // steps
    Relay<S, N, ALONE, 1> relay;

    __device__ __forceinline__ Forward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.batch, N, blockIdx.x, gridDim.x), static_cast<long long>(threadIdx.x / 32) * T,
               shared, shared + (ALONE ? 0 : blockDim.x * N * sizeof(S))),
          turn(static_cast<long long>(thread.warps) * T),
          relay(shared, thread.warps) {
        saver.move(first);
    }

    template <typename Straight> __device__ __forceinline__ void tile(Straight straight) {
        const long long rest = args.length - first;
        const int left = straight || rest > T ? T : static_cast<int>(rest);
        const Bits bits = marks<T>(thread, straight, first, left);
        Prepared<V, S> prepared[T][N];
        this->prepare_all(prepared);
        in.move(straight, first + turn);
        this->load(rest - turn);

        S state[T + 1][N];
        if (first)
            relay.take(state[0]);
        else
            thread.initial(state[0]);
        this->follow(straight, bits, prepared, state);
        if (rest > T)
            relay.give(thread.warp + 1 < thread.warps ? thread.warp + 1 : 0, state[T]);
        else
            this->end(state[T]);
        this->store(straight, left, bits, prepared, state);
        h.move(straight, turn), saver.move(turn), first += turn;
    }

    __device__ __forceinline__ void run() {
        if (args.length == 0 && thread.warp == 0) {
            S c[N];
            thread.initial(c);
            this->end(c);
        }
        this->load(args.length - first);
        while (first < args.length)
            if (plain && args.length - first >= T)
                tile(Bool<true>());
            else if (GENERAL)
                tile(Bool<false>());
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward. A block walks its columns against their direction, over `group` batches one after another, unit by unit:
// the steps whose inputs are in shared memory together. The tiles of a unit belong to the warps in turn. Where not
// every state was saved a unit is a saved block, and is walked twice: first forward, for the states, tile by tile, each
// warp handing the state to the next; then backward. Of a block longer than UNIT steps the units but the last are
// walked forward once more, before, for the states between them, which go to `checkpoints`.

// Where a block is, the same for all its threads.
struct Place {
    int b;                   // batch, of those of a row
    long long block, first;  // saved block, in the order of processing; the unit's first step, likewise
    int unit, steps;         // of the block; of the unit
    bool last;               // unit of its block
};

// What is done with a tile of a unit, but for what comes from others.
template <typename V, int T, int UNIT, bool RECOMPUTE> struct BackwardTile {
    using Type = typename V::T;
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, K = V::K;
    static constexpr int SUMS = V::SUMS;  // parameter gradients: bias_f, bias_r, v_f, v_r, or a
    static constexpr int TERMS = SUMS ? N * SUMS : 1;
    // Steps, from a multiple of it on, that are added up plainly; only their sum is with compensation.
    static constexpr int GROUP = T < 4 ? T : 4;
    using In = Inputs<V, true, RECOMPUTE>;
    const Args& args;
    const Lane lane;
    const long long first_batch;  // of the row
    Thread<V> thread;
    const bool plain;
    const long long every, blocks;  // steps of a saved block, or what is walked as one
    char* const records;
    In in;
    Cursor grad_u, grad_x, grad_weight;
    int in_batch, out_batch;  // where the cursors are
    long long out;            // likewise, the step
    bool active;              // whether what is walked is to be stored

    // `stride`: steps of a unit, where every state was saved.
    __device__ __forceinline__ BackwardTile(const Args& args, const Lane& lane, int stride, char* shared, char* records)
        : args(args),
          lane(lane),
          first_batch(lane.row * args.group),
          thread(args, lane, first_batch, shared),
          plain((args.flags & STRAIGHT) && lane.all_active && (lane.last_row + 1) * args.group <= args.batch),
          every(RECOMPUTE ? args.save_every : stride),
          blocks((args.length + every - 1) / every),
          records(records) {}

    __device__ __forceinline__ void enter(Place& place) const {  // the last unit of place.block
        if (!RECOMPUTE) {
            place.first = place.block * every;
            place.steps = static_cast<int>(args.length - place.first < every ? args.length - place.first : every);
            return;
        }
        // Saved blocks begin at multiples of save_every in time: a reversed column's first is the one that may be
        // short.
        const long long time = (lane.reversed ? blocks - 1 - place.block : place.block) * every;
        const long long steps = args.length - time < every ? args.length - time : every;
        place.first = lane.reversed ? args.length - time - steps : time;
        place.unit = steps > UNIT ? static_cast<int>((steps - 1) / UNIT) : 0;
        place.first += static_cast<long long>(place.unit) * UNIT;
        place.steps = static_cast<int>(steps - static_cast<long long>(place.unit) * UNIT);
        place.last = true;
    }
    // Its batch. Rows may differ by some: where another in the block has more, the last is walked again, as if it were
    // padding.
    __device__ __forceinline__ bool present(int b) const { return first_batch + b < args.batch; }
    __device__ __forceinline__ long long batch(int b) const { return present(b) ? first_batch + b : args.batch - 1; }
    __device__ __forceinline__ char* record(int row) const { return records + row * In::BYTES; }

    template <typename Straight>
    __device__ __forceinline__ void load(Straight straight, const Place& place, int row, int left, char* at) {
        tile_boundary();
        Bytes<N> zones[T];
        if constexpr (V::ZONEOUT) in.load_zone(straight, left, zones);
#pragma unroll
        for (int t = 0; t < T; ++t)
            if (straight || t < left) {
                in.load(thread, straight, at + t * In::BYTES, t);
                // The state before the step; before the first of all there is none.
                if constexpr (!RECOMPUTE)
                    In::C::load(at + t * In::BYTES, t || in.place ? in.c(straight, t) - in.c.step : in.c.at);
            }
        if constexpr (V::ZONEOUT)
#pragma unroll
            for (int t = 0; t < T; ++t)
                if (straight || t < left) In::Z::set(at + t * In::BYTES, zones[t]);
        if (RECOMPUTE && row == 0 && place.unit == 0 && place.block) {  // before the block
            const long long time = thread.reversed ? blocks - place.block : place.block - 1;
            In::C::load(at, args.c.at(time, batch(place.b), thread.d, 0));
        }
    }
    // A tile, at which the cursors are, to `at`.
    __device__ __forceinline__ void load(const Place& place, int row, char* at) {
        const int left = place.steps - row;
        if (plain && left >= T)
            load(Bool<true>(), place, row, T, at);
        else if (GENERAL)
            load(Bool<false>(), place, row, left, at);
    }
    __device__ __forceinline__ void point_in(const Place& place, int row) {
        in_batch = place.b;
        in.point(thread, place.first + row, batch(place.b));
    }
    // What the states of some steps take, but for the state before. Returns bits of it all: no turn is to be waited for
    // before it is there.
    template <int STEPS>
    __device__ __forceinline__ unsigned prepare_steps(char* at, Prepared<V, S> (&prepared)[STEPS][N]) const {
        unsigned known = 0;
#pragma unroll
        for (int t = 0; t < STEPS; ++t) {
            Step<S> step[N];
            In::get(thread.column, at + t * In::BYTES, step);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                prepared[t][i] = prepare<V>(thread.column[i], step[i]);
                known |= bits_of(prepared[t][i]);
            }
        }
        return known;
    }
    // A tile's, from `state` on, and the state before each step.
    template <typename Straight>
    __device__ __forceinline__ void follow_states(Straight straight, const Bits& bits,
                                                  const Prepared<V, S> (*prepared)[N], S (&state)[N],
                                                  Values<S, N>* before) const {
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                state[i] = across<V>(bits, t, state[i]);
                before[t].set(i, state[i]);
                const S next = advance<V>(prepared[t][i], state[i]);
                state[i] = skips<V>(straight, bits, t) ? state[i] : next;
            }
    }
    template <int STEPS>
    __device__ __forceinline__ void keep_states(char* at, const Values<S, N> (&before)[STEPS]) const {
#pragma unroll
        for (int t = 0; t < STEPS; ++t) In::C::set(at + t * In::BYTES, before[t]);
    }
    // What is known without the carry; what the skip input's gradient is, is stored.
    template <typename Straight>
    __device__ __forceinline__ void linearise_all(Straight straight, char* at, long long p, int left, const Bits& bits,
                                                  Linear<S> (&linear)[T][N]) const {
        S state[N];  // before the step
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Step<S> step[N];
            In::get(thread.column, at + t * In::BYTES, step);
            const Values<S, N> before = In::C::get(at + t * In::BYTES);
            const Values<Type, N> of_h = In::H::get(at + t * In::BYTES);
#pragma unroll
            for (int i = 0; i < N; ++i) state[i] = before.get(i);
            if (!RECOMPUTE && t == 0 && p == 0) thread.initial(state);
#pragma unroll
            for (int i = 0; i < N; ++i) state[i] = across<V>(bits, t, state[i]);
            Values<Type, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Column<S>& k = thread.column[i];
                linear[t][i] = linearise<V>(k, step[i], of_h.get(i), state[i]);
                if constexpr (V::SKIP == SKIP_X)
                    out.set(i, skips<V>(straight, bits, t) ? S(0) : linear[t][i].skip * k.scale);
            }
            if constexpr (V::SKIP == SKIP_X)
                if (straight || (t < left && grad_x.at && active)) out.store(grad_x(straight, t));
        }
    }
    template <typename Straight>
    __device__ __forceinline__ void store_gradients(Straight straight, int left, const Bits& bits,
                                                    const Linear<S> (&linear)[T][N], const S (&gc)[T][N],
                                                    S (&terms)[T][TERMS]) {
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Values<Type, K * N> packed;
            Values<Type, N> rows[K];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Linear<S>& l = linear[t][i];
                S values[4];
                gradients<V>(l, gc[t][i], values);
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    S value = skips<V>(straight, bits, t) ? S(0) : values[k];
                    packed.set(i * K + k, value);
                    rows[k].set(i, value);
                    if (V::CELL == SRU && (k == 1 || k == 2)) terms[t][i * SUMS + k - 1] = value;
                }
            }
            if (straight || (t < left && grad_u.at && active)) {
                char* at = grad_u(straight, t);
                if (straight ? V::PACKED : (args.flags & GRAD_U_PACKED) != 0) {
                    packed.store(at);
                } else {
#pragma unroll
                    for (int k = 0; k < K; ++k) rows[k].store(at + k * args.grad_u.row);
                }
            }
        }
        if constexpr (V::WEIGHT != NO_WEIGHT)
#pragma unroll
            for (int t = 0; t < T; ++t) {
                StepWeight<V> weights;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const Linear<S>& l = linear[t][i];
                    S values[4];
                    gradients<V>(l, gc[t][i], values);
#pragma unroll
                    for (int gate = 0; gate < V::GATES; ++gate) {
                        S value = V::LINEAR ? values[1] : values[1 + gate] * l.c_prev;
                        if (skips<V>(straight, bits, t)) value = S(0);
                        if constexpr (V::STEP_WEIGHT)
                            weights.set(gate, i, value);
                        else
                            terms[t][i * SUMS + SUMS - V::GATES + gate] = value;
                    }
                }
                if constexpr (V::STEP_WEIGHT)
                    if (straight || (t < left && grad_weight.at && active))
                        weights.store(grad_weight(straight, t), args.grad_weight_c.row);
            }
    }

    __device__ __forceinline__ void begin(S (&carry)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            carry[i] = args.grad_c_last.data
                           ? thread.one(args.grad_c_last, thread.b, thread.d + i, 0, NARROW_GRAD_C_LAST)
                           : S(0);
    }
    __device__ __forceinline__ void end(const S (&carry)[N]) {
        if (!args.grad_c0.data || !active) return;
#pragma unroll
        for (int i = 0; i < N; ++i)
            store_one<Type>(args.grad_c0.at(0, thread.b, thread.d + i, 0), carry[i], (args.flags & NARROW_C0) != 0);
    }

    template <typename Straight>
    __device__ __forceinline__ void out_to(Straight straight, const Place& place, long long p) {
        if (place.b == out_batch) {
            const long long steps = p - out;
            grad_u.move(straight, steps), grad_x.move(straight, steps), grad_weight.move(straight, steps);
        } else if (GENERAL) {
            const long long b = batch(place.b);
            grad_u = thread.cursor(args.grad_u, p, b), grad_x = thread.cursor(args.grad_x, p, b);
            grad_weight = thread.cursor(args.grad_weight_c, p, b);
            out_batch = place.b;
        }
        out = p;
    }
    // The parameters' sums, each with what it has lost. They are a row of several, which reduce() adds up, or the
    // gradients.
    __device__ __forceinline__ void leave(const S (&sum)[TERMS * 2], long long row, bool of_several) const {
        if (!lane.active) return;
        int place = 0;
        auto one = [&](const Array& gradient, int which, int gate, int narrow) {
            S* partial = reinterpret_cast<S*>(args.partials) + (row * args.sums + place++) * args.width + thread.d;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const S total = sum[2 * (i * SUMS + which)];
                if (of_several)
                    workspace_store<sizeof(S)>(partial + i, &total);
                else  // 0 +: as reduce() begins, which takes the sign from a -0
                    store_one<Type>(gradient.at(0, lane.row, thread.d + i, gate), S(0) + total,
                                    (args.flags & narrow) != 0);
            }
        };
        if constexpr (V::CELL == SRU)
            if (args.grad_bias.data) {
                one(args.grad_bias, 0, 0, NARROW_BIAS);
                one(args.grad_bias, 1, 1, NARROW_BIAS);
            }
        if constexpr (V::WEIGHT == WEIGHT_COLUMN)
            if (args.grad_weight_c.data)
                for (int gate = 0; gate < V::GATES; ++gate)
                    one(args.grad_weight_c, SUMS - V::GATES + gate, gate, NARROW_WEIGHT);
    }
};

template <typename V, int T, int UNIT, int WARPS, bool RECOMPUTE, bool ALONE>
struct Backward : BackwardTile<V, T, UNIT, RECOMPUTE> {
    using Tile = BackwardTile<V, T, UNIT, RECOMPUTE>;
    using In = typename Tile::In;
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, SUMS = V::SUMS, TERMS = Tile::TERMS, GROUP = Tile::GROUP;
    using Tile::args, Tile::lane, Tile::thread, Tile::plain, Tile::blocks, Tile::in, Tile::active, Tile::first_batch;
    using Tile::batch, Tile::record, Tile::in_batch;
    const int batches;  // that the block walks
    const int stride;   // from a warp's tile to its next
    Relay<S, N, ALONE, 1> carries;
    Relay<S, TERMS * 2, ALONE || !SUMS, 1 + WARPS> sums;  // behind the carry: the order is that of one thread
    Relay<S, N, ALONE, 1 + 2 * WARPS> states;
    // Sums of the group that is being added up, where a tile may end within one; in shared memory, where warps take
    // turns.
    S* const begun_shared;
    S begun_alone[ALONE ? TERMS : 1];

    static __device__ __forceinline__ int handed_on() {  // bytes: what warps hand to one another
        return ALONE ? 0 : (blockDim.x / 32 * (1 + 2 * SUMS + RECOMPUTE) + SUMS) * 32 * N * sizeof(S);
    }
    __device__ __forceinline__ Backward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.rows, N, blockIdx.x, gridDim.x), ALONE ? T : T * (blockDim.x / 32), shared,
               shared + handed_on()),
          batches(static_cast<int>(args.batch - lane.first_row * args.group < args.group
                                       ? args.batch - lane.first_row * args.group
                                       : args.group)),
          stride(ALONE ? T : T * thread.warps),
          carries(shared, thread.warps),
          sums(shared, thread.warps),
          states(shared, RECOMPUTE ? thread.warps : 0),
          begun_shared(reinterpret_cast<S*>(shared) + threadIdx.x % 32) {}

    // ---- places ----

    __device__ __forceinline__ void to_next(Place& place) const {
        if (RECOMPUTE && place.unit > 0) {
            --place.unit, place.first -= UNIT, place.steps = UNIT, place.last = false;
            return;
        }
        if (place.block > 0)
            --place.block;
        else
            ++place.b, place.block = blocks - 1;
        this->enter(place);
    }
    // Whether the block's other units must be walked forward before.
    __device__ __forceinline__ bool climbs(const Place& place) const {
        return RECOMPUTE && place.last && place.unit > 0;
    }
    __device__ __forceinline__ int owner(int row) const {  // of a tile: the warp
        int tile = row / T;
        if (RECOMPUTE)  // a remainder, without the special function that an integer division takes
            while (tile >= thread.warps) tile -= thread.warps;
        return ALONE ? 0 : tile;
    }
    __device__ __forceinline__ int last_row(
        const Place& place) const {  // where this warp's last tile begins, < 0: none
        int row = thread.warp * T;
        if (row >= place.steps) return -1;
        if (RECOMPUTE)
            while (row + stride < place.steps) row += stride;
        return row;
    }
    // ---- inputs ----

    // This warp's tiles of a unit, from a row on.
    __device__ __forceinline__ void load_unit(const Place& place, int row) {
        for (; row < place.steps; row += stride) {
            this->point_in(place, row);
            this->load(place, row, record(row));
        }
    }

    // ---- states ----

    __device__ __forceinline__ S* checkpoint(const Place& place) const {  // the state before a unit
        return reinterpret_cast<S*>(args.checkpoints) +
               (static_cast<long long>(place.unit - 1) * args.batch + thread.b) * args.width + thread.d;
    }
    // A unit's. follows: the unit before it in time has just been walked too, and handed on its last state.
    __device__ __forceinline__ void find_states(const Place& place, bool follows, bool followed) {
#pragma unroll 1
        for (int row = thread.warp * T; row < place.steps; row += stride) {
            const int left = place.steps - row;
            const long long p = place.first + row;
            Prepared<V, S> prepared[T][N];
            const unsigned known = this->prepare_steps(record(row), prepared);
            S state[N];
            if (row || follows) {
                states.take(state, known);
            } else if (place.unit) {
#pragma unroll
                for (int i = 0; i < N; ++i) workspace_load<sizeof(S)>(&state[i], checkpoint(place) + i);
            } else if (place.block == 0) {
                thread.initial(state);
            } else {
                const Values<S, N> saved = In::C::get(record(0));
#pragma unroll
                for (int i = 0; i < N; ++i) state[i] = saved.get(i);
            }
            if (row == 0 && follows && followed && active)
#pragma unroll
                for (int i = 0; i < N; ++i) workspace_store<sizeof(S)>(checkpoint(place) + i, &state[i]);
            Values<S, N> before[T];
            if (plain && left >= T)
                this->follow_states(Bool<true>(), marks<T>(thread, Bool<true>(), p, T), prepared, state, before);
            else if (GENERAL)
                this->follow_states(Bool<false>(), marks<T>(thread, Bool<false>(), p, left < T ? left : T), prepared,
                                    state, before);
            if (left > T || followed) states.give(left > T ? owner(row + T) : 0, state);
            this->keep_states(record(row), before);
        }
    }
    __device__ __forceinline__ void climb(const Place& last) {
        Place place = last;
        place.first -= static_cast<long long>(last.unit) * UNIT, place.steps = UNIT, place.last = false;
        for (place.unit = 0; place.unit < last.unit; ++place.unit, place.first += UNIT) {
            load_unit(place, thread.warp * T);
            async_wait();
            find_states(place, place.unit > 0, true);
        }
        load_unit(last, thread.warp * T);
    }

    // ---- a tile ----

    template <typename Straight>
    __device__ __forceinline__ void tile(Straight straight, const Place& here, int row, const Place& next) {
        char* const at = record(row);
        const long long p = here.first + row;
        const int rest = here.steps - row, left = straight || rest > T ? T : rest;
        const Bits bits = straight || active ? marks<T>(thread, straight, p, left) : Bits{~0u, 0};
        this->out_to(straight, here, p);

        Linear<S> linear[T][N];
        this->linearise_all(straight, at, p, left, bits, linear);

        // The records are free for the next unit's tile.
        if (next.b < batches && !climbs(next) && row < next.steps) {
            if (next.b == in_batch)
                in.move(straight, next.first + row);
            else if (GENERAL)
                this->point_in(next, row);
            this->load(next, row, record(row));
        }

        // From batch to batch turns are taken too, lest a warp give twice before the next has taken.
        const bool begins = p + left == args.length;
        const int heir = row ? owner(row - T) : next.b < batches ? owner(next.steps - 1) : 0;
        S carry[N];
        if (!begins || here.b) carries.take(carry);
        if (begins) this->begin(carry);
        S gc[T][N];
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                S before = retreat<V>(linear[t][i], carry[i], gc[t][i]);
                carry[i] = across<V>(bits, t, skips<V>(straight, bits, t) ? carry[i] : before);
            }
        if (p == 0) this->end(carry);
        carries.give(heir, carry);
        S terms[T][TERMS];
        this->store_gradients(straight, left, bits, linear, gc, terms);
        if constexpr (SUMS == 0) return;
        const bool first = begins && here.b == 0;
        if (straight && (!RECOMPUTE || p % GROUP == 0))  // else a group may be cut by the saved block's end
            add_up(Bool<true>(), p, left, first, heir, terms);
        else if (GENERAL)
            add_up(Bool<false>(), p, left, first, heir, terms);
    }

    __device__ __forceinline__ S& begun(int i) { return ALONE ? begun_alone[ALONE ? i : 0] : begun_shared[32 * i]; }
    // Into the running sums, which take turns: whole groups, added up before the turn comes; in general step by step.
    template <typename Whole>
    __device__ __forceinline__ void add_up(Whole whole, long long p, int left, bool first, int heir,
                                           S (&terms)[T][TERMS]) {
        if (whole)
#pragma unroll
            for (int t = T - 2; t >= 0; --t)
#pragma unroll
                for (int i = 0; i < N * SUMS; ++i)
                    if ((t + 1) % GROUP) terms[t][i] = terms[t + 1][i] + terms[t][i];
        S sum[TERMS * 2];  // total and what it has lost
        if (first) {
#pragma unroll
            for (int i = 0; i < N * SUMS; ++i) sum[2 * i] = sum[2 * i + 1] = begun(i) = 0;
        } else {
            sums.take(sum);
        }
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
            if (whole ? t % GROUP == 0 : t < left && active) {
                const bool ends = whole || (p + t) % GROUP == 0;
#pragma unroll
                for (int i = 0; i < N * SUMS; ++i) {
                    S& so_far = begun(i);
                    const S value = whole ? terms[t][i] : so_far + terms[t][i];
                    if (!whole) so_far = ends ? S(0) : value;
                    if (!ends) continue;
                    Sum<S> one = {sum[2 * i], sum[2 * i + 1]};
                    one.add(value);
                    sum[2 * i] = one.total, sum[2 * i + 1] = one.lost;
                }
            }
        sums.give(heir, sum);
    }

    // ---- a batch, and all ----

    __device__ __forceinline__ void walk(const Place& here, const Place& next) {
        if (batch(here.b) != thread.b) thread.to_batch(batch(here.b));
        active = lane.active && this->present(here.b);
        if (GENERAL && climbs(here)) climb(here);
        async_wait();
        if constexpr (RECOMPUTE) find_states(here, climbs(here), false);
        const int last = last_row(here);
        if (next.b < batches && !climbs(next))  // where the next unit is longer
            load_unit(next, last < 0 ? thread.warp * T : last + stride);
#pragma unroll 1
        for (int row = last; row >= 0; row -= stride)
            if (plain && here.steps - row >= T)
                tile(Bool<true>(), here, row, next);
            else if (GENERAL)
                tile(Bool<false>(), here, row, next);
    }
    __device__ __forceinline__ void run() {
        if (args.length == 0) {
            active = lane.active;
            for (long long b = first_batch; thread.warp == 0 && b < args.batch && b < first_batch + args.group; ++b) {
                S carry[N];
                thread.to_batch(b), this->begin(carry), this->end(carry);
            }
            return;
        }
        Place here = {0, blocks - 1, 0, 0, 0, false};
        this->enter(here);
        this->out_batch = -1;
        this->point_in(here, 0);
        if (!climbs(here)) load_unit(here, thread.warp * T);
        while (here.b < batches) {
            Place next = here;
            to_next(next);
            walk(here, next);
            here = next;
        }
    }

    // The first warp was given them at the end.
    __device__ __forceinline__ void leave_sums() {
        if (SUMS == 0 || thread.warp) return;
        S sum[TERMS * 2] = {};
        if (args.length) sums.take(sum);  // without waiting: the last tile's heir is its own warp
        this->leave(sum, lane.row, args.rows > 1 && !(args.flags & SUMS_OF_BATCHES));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The parameter gradients: sums over the rows of `partials`, in an order that only the number of rows decides. A block
// takes COLUMNS neighbouring sums, each of its groups of so many threads every so-manieth row; then some of the groups
// add up all, and the first adds up these.

template <typename T, int THREADS, int COLUMNS> __device__ __forceinline__ void reduce(const Args& args) {
    using S = typename StateOf<T>::type;
    constexpr int GROUPS = THREADS / COLUMNS, SOME = 8;
    CUSRU_SHARED(S, of_group, THREADS);
    const bool of_batches = (args.flags & SUMS_OF_BATCHES) != 0;  // each has its own, which spans have added up
    const long long width = of_batches ? args.batch * args.width : args.sums * args.width;
    const int column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    const long long index = static_cast<long long>(blockIdx.x) * COLUMNS + column;
    const S* partial = reinterpret_cast<const S*>(args.partials) + index;
    Sum<S> sum;
    if (index < width)
#pragma unroll 8
        for (long long row = group; row < args.rows; row += GROUPS) {
            S v;
            workspace_load<sizeof(S)>(&v, partial + row * width);
            sum.add(v);
        }
    of_group[threadIdx.x] = sum.total;
    __syncthreads();
    Sum<S> some;
    if (group < SOME)
        for (int g = group; g < GROUPS; g += SOME) some.add(of_group[g * COLUMNS + column]);
    __syncthreads();
    of_group[threadIdx.x] = some.total;
    __syncthreads();
    if (group || index >= width) return;
    Sum<S> all;
    for (int g = 0; g < SOME; ++g) all.add(of_group[g * COLUMNS + column]);
    long long gate = index / args.width, d = index % args.width;
    if (of_batches) {
        store_one<T>(args.grad_weight_c.at(0, gate, d, 0), all.total, (args.flags & NARROW_WEIGHT) != 0);
        return;
    }
    if (args.grad_bias.data) {
        if (gate < 2) {
            store_one<T>(args.grad_bias.at(0, 0, d, gate), all.total, (args.flags & NARROW_BIAS) != 0);
            return;
        }
        gate -= 2;
    }
    store_one<T>(args.grad_weight_c.at(0, 0, d, gate), all.total, (args.flags & NARROW_WEIGHT) != 0);
}
