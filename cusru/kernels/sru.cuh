// The kernels: forward, backward, and the sum of the parameter gradients' parts. step.cuh has the mathematics, relay.cuh
// how time is walked.
#pragma once
#include "relay.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Forward. A thread has COLUMNS neighbouring columns; lanes that follow one another hold columns that do.

// Where states are saved: after the last time of each block of `every`, which of a reversed column is its first step.
template <typename V> struct Saver {
    static constexpr int N = V::COLUMNS;
    using S = typename V::S;
    long long every, blocks, until;  // until: steps from a tile's first to the next that is saved
    Cursor at;
    __device__ __forceinline__ Saver(const Thread<V>& thread, long long first) : every(thread.args.save_every) {
        const Args& args = thread.args;
        blocks = args.c.data ? (args.length + every - 1) / every : 0;
        at = {thread.reversed ? args.c.at(blocks - 1, thread.b, thread.d, 0) : args.c.at(0, thread.b, thread.d, 0),
              thread.reversed ? -args.c.time : args.c.time};
        until = (thread.reversed ? args.length - (blocks - 1) * every : every) - 1;
        move(first);
    }
    __device__ __forceinline__ void move(long long steps) {
        if (!blocks) return;
        if (every == 1) return at.move(Bool<false>(), steps);
        for (until -= steps; until < 0; until += every) at.move(Bool<false>(), 1);
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

template <typename V, int T, bool ALONE> struct Forward {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    const Args& args;
    const Lane lane;
    const Thread<V> thread;
    const bool plain;
    const long long turn;  // steps
    long long first;       // of the tile's steps
    Relay<S, N, ALONE> relay;
    char* const records;  // the warp's
    Inputs<V, false> in;
    Cursor h;
    Saver<V> saver;

    __device__ __forceinline__ Forward(const Args& args, char* shared)
        : args(args),
          lane(args, args.batch, N),
          thread(args, lane, lane.row),
          plain((args.flags & STRAIGHT) && lane.all_active),
          turn(static_cast<long long>(thread.warps) * T),
          first(static_cast<long long>(thread.warp) * T),
          relay(shared),
          records(shared + thread.warp * T * Inputs<V, false>::BYTES),
          h(thread.cursor(args.h, first)),
          saver(thread, first) {
        in.point(thread, first, thread.b);
    }
    __device__ __forceinline__ char* record(int t) const { return records + t * Inputs<V, false>::BYTES; }

    template <typename Straight> __device__ __forceinline__ void load_tile(Straight straight, long long left) {
        tile_boundary();
#pragma unroll
        for (int t = 0; t < T; ++t)
            if (straight || t < left) in.load(thread, straight, record(t), t);
    }
    __device__ __forceinline__ void load(long long left) {
        if (plain && left >= T)
            load_tile(Bool<true>(), T);
        else
            load_tile(Bool<false>(), left);
    }
    __device__ __forceinline__ void end(const S (&c)[N]) {
        if (!lane.active) return;
#pragma unroll
        for (int i = 0; i < N; ++i) store_one<typename V::T>(args.c_last.at(0, thread.b, thread.d + i, 0), c[i], false);
        // A forward column's last block, cut short by the end
        if (saver.blocks && !thread.reversed && args.length % saver.every)
            saver.save(args.c.at(saver.blocks - 1, thread.b, thread.d, 0), c);
    }

    template <typename Straight> __device__ __forceinline__ void tile(Straight straight) {
        const long long rest = args.length - first;
        const int left = straight || rest > T ? T : static_cast<int>(rest);
        const unsigned pads = straight ? 0 : padding<T>(thread, first, left);
        Prepared<V, S> prepared[T][N];
        async_wait();
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Step<S> step[N];
            in.get(thread.column, record(t), step);
#pragma unroll
            for (int i = 0; i < N; ++i) prepared[t][i] = prepare<V>(thread.column[i], step[i]);
        }
        in.move(straight, first + turn);
        load(rest - turn);

        S state[T + 1][N];
        if (first)
            relay.take(state[0]);
        else
            thread.initial(state[0]);
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                state[t + 1][i] = advance<V>(prepared[t][i], state[t][i]);
                if (!straight && pads >> t & 1) state[t + 1][i] = state[t][i];
            }
        if (rest > T)
            relay.give(thread.warp + 1 < thread.warps ? thread.warp + 1 : 0, state[T]);
        else
            end(state[T]);

#pragma unroll
        for (int t = 0; t < T; ++t) {
            Values<typename V::T, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                S value = output<V>(thread.column[i], prepared[t][i], state[t][i], state[t + 1][i]);
                out.set(i, !straight && pads >> t & 1 ? S(0) : value);
            }
            if (straight || (t < left && lane.active)) out.store(h(straight, t));
        }
        if (straight || lane.active) saver.template operator()<T>(straight, left, state);
        h.move(straight, turn), saver.move(turn), first += turn;
    }

    __device__ __forceinline__ void run() {
        if (args.length == 0 && thread.warp == 0) {
            S c[N];
            thread.initial(c);
            end(c);
        }
        load(args.length - first);
        while (first < args.length)
            if (plain && args.length - first >= T)
                tile(Bool<true>());
            else
                tile(Bool<false>());
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward. A block walks its columns against their direction, over `group` batches one after another, window by window:
// the steps whose inputs are in shared memory together. Within a window the warps take turns at tiles of T steps. Where not
// every state was saved a window is a saved block for each warp. What is saved makes those independent, so each warp first
// walks its own forward, for the states, with no turn to wait for. Of a block longer than UNIT steps a window has as many
// units of that length; before the first of them it is walked forward once more, for the states between units, which go to
// `checkpoints`.

// Where a block is, the same for all its threads.
struct Window {
    long long b;          // batch, of those of a row
    long long block;      // the first of its saved blocks, in the order of processing
    long long first;      // the first of its steps, likewise
    int unit, units;      // its first unit's number within the saved block, and how many it has
    int head, full;       // steps of its first unit, of those between
    int tail;             // of its last, where that is not the first
    int tiles;            // of all units
    bool climb;           // the states between its block's units are still to be found
};

template <typename V, int T, int UNIT, bool RECOMPUTE, bool ALONE> struct Backward {
    using Type = typename V::T;
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, K = V::K;
    using In = Inputs<V, true>;
    const Args& args;
    const Lane lane;
    const long long first_batch, batches;  // of the row; batches that the block walks
    Thread<V> thread;
    const bool plain, by_time;  // by_time: saved blocks begin at multiples of save_every in time, also of reversed columns
    const long long every, blocks;
    Relay<S, N, ALONE> relay;
    char* const records;
    In in;
    Cursor grad_u, grad_x, grad_weight;
    long long out;         // step at which these are
    bool active;           // whether what is walked is to be stored
    S carry[N];
    Sum<S> bias_f[N], bias_r[N], v_f[N], v_r[N];

    __device__ __forceinline__ Backward(const Args& args, char* shared)
        : args(args),
          lane(args, args.rows, N),
          first_batch(lane.row * args.group),
          batches(args.batch - lane.first_row * args.group < args.group ? args.batch - lane.first_row * args.group
                                                                        : args.group),
          thread(args, lane, first_batch),
          plain((args.flags & STRAIGHT) && lane.all_active && (lane.last_row + 1) * args.group <= args.batch),
          by_time(RECOMPUTE && thread.reversed),
          every(RECOMPUTE ? args.save_every : static_cast<long long>(T) * thread.warps),
          blocks((args.length + every - 1) / every),
          relay(shared),
          records(shared) {}

    // ---- windows ----

    static __device__ __forceinline__ int tiles_of(int steps) { return (steps + T - 1) / T; }
    // A saved block's first step and its steps. A reversed column's first block is the one that may be short.
    __device__ __forceinline__ long long block_start(long long block) const {
        return by_time && block ? args.length - (blocks - block) * every : block * every;
    }
    __device__ __forceinline__ long long block_steps(long long block) const {
        return (block + 1 < blocks ? block_start(block + 1) : args.length) - block_start(block);
    }
    __device__ __forceinline__ bool long_blocks() const { return RECOMPUTE && every > UNIT; }
    __device__ __forceinline__ void measure(Window& w) const {  // from b, block, unit, units
        w.first = block_start(w.block);
        if (long_blocks()) {
            const long long rest = block_steps(w.block) - static_cast<long long>(w.unit) * UNIT;
            w.first += static_cast<long long>(w.unit) * UNIT;
            w.full = UNIT;
            w.head = rest < UNIT ? static_cast<int>(rest) : UNIT;
            const long long last = rest - static_cast<long long>(w.units - 1) * UNIT;
            w.tail = last < UNIT ? static_cast<int>(last) : UNIT;
        } else {
            w.full = static_cast<int>(every);
            w.head = static_cast<int>(block_steps(w.block));
            w.tail = static_cast<int>(block_steps(w.block + w.units - 1));
        }
        w.tiles = tiles_of(w.head) + (w.units > 2 ? (w.units - 2) * tiles_of(w.full) : 0) +
                  (w.units > 1 ? tiles_of(w.tail) : 0);
    }
    __device__ __forceinline__ void enter_block(Window& w) const {  // the last window of w.block, and of those before it
        w.unit = 0, w.units = 1, w.climb = false;
        if (long_blocks()) {
            const int units = static_cast<int>((block_steps(w.block) + UNIT - 1) / UNIT);
            w.unit = (units - 1) / thread.warps * thread.warps;
            w.units = units - w.unit;
            w.climb = units > 1;
        } else if (RECOMPUTE) {
            w.units = static_cast<int>(w.block % thread.warps) + 1;
            w.block -= w.units - 1;
        }
        measure(w);
    }
    __device__ __forceinline__ void enter_batch(Window& w, long long b) const {
        w.b = b, w.block = blocks - 1;
        enter_block(w);
    }
    __device__ __forceinline__ void to_next(Window& w) const {
        if (w.unit) {
            w.unit -= thread.warps, w.units = thread.warps, w.climb = false;
            measure(w);
        } else if (w.block) {
            --w.block;
            enter_block(w);
        } else {
            enter_batch(w, w.b + 1);
        }
    }
    // Its batch. Rows may differ by some: where another in the block has more, the last is walked again, as if it were padding.
    __device__ __forceinline__ bool present(const Window& w) const { return first_batch + w.b < args.batch; }
    __device__ __forceinline__ long long batch(const Window& w) const {
        return present(w) ? first_batch + w.b : args.batch - 1;
    }
    __device__ __forceinline__ int unit_steps(const Window& w, int unit) const {
        return unit == 0 ? w.head : unit == w.units - 1 ? w.tail : w.full;
    }
    __device__ __forceinline__ long long unit_start(const Window& w, int unit) const {
        return w.first + (unit ? w.head + static_cast<long long>(unit - 1) * w.full : 0);
    }
    __device__ __forceinline__ int slots() const { return RECOMPUTE ? UNIT : T * thread.warps; }  // of a unit
    __device__ __forceinline__ char* record(int unit, int row) const {
        return records + (unit * slots() + row) * In::BYTES;
    }

    // ---- inputs ----

    template <typename Straight>
    __device__ __forceinline__ void load(Straight straight, const Window& w, int unit, int row, int left) {
        tile_boundary();
        char* const at = record(unit, row);
#pragma unroll
        for (int t = 0; t < T; ++t)
            if (straight || t < left) {
                in.load(thread, straight, at + t * In::BYTES, t);
                // The state before the step; before the first of all there is none.
                if constexpr (!RECOMPUTE)
                    In::C::load(at + t * In::BYTES, t || in.place ? in.c(straight, t) - in.c.step : in.c.at);
            }
        if (RECOMPUTE && row == 0 && (!long_blocks() || w.unit + unit == 0)) {  // before a block
            const long long block = w.block + (long_blocks() ? 0 : unit), time = thread.reversed ? blocks - block : block - 1;
            if (block) In::C::load(at, args.c.at(time, batch(w), thread.d, 0));
        }
    }
    // A tile, if the window has it, at which the cursors are.
    __device__ __forceinline__ void load(const Window& w, int unit, int row) {
        const int left = unit_steps(w, unit) - row;
        if (plain && left >= T)
            load(Bool<true>(), w, unit, row, T);
        else
            load(Bool<false>(), w, unit, row, left);
    }
    // All tiles of a window but those that another has too: a warp at a time, for they are in another's place.
    __device__ __forceinline__ void load_window(const Window& w, const Window* other) {
        for (int unit = 0, n = 0; unit < w.units; ++unit)
            for (int row = 0; row < unit_steps(w, unit); row += T, ++n)
                if (n % thread.warps == thread.warp &&
                    !(other && unit < other->units && row < unit_steps(*other, unit))) {
                    in.point(thread, unit_start(w, unit) + row, batch(w));
                    load(w, unit, row);
                }
    }

    // ---- states ----

    // A unit's, from `state` on: the state before each step goes into its record.
    template <typename Straight>
    __device__ __forceinline__ void recompute(Straight straight, char* at, unsigned pads, S (&state)[N]) {
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Step<S> step[N];
            In::get(thread.column, at + t * In::BYTES, step);
            Values<S, N> before;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                before.set(i, state[i]);
                S next = advance<V>(prepare<V>(thread.column[i], step[i]), state[i]);
                state[i] = !straight && pads >> t & 1 ? state[i] : next;
            }
            In::C::set(at + t * In::BYTES, before);
        }
    }
    __device__ __forceinline__ void recompute(const Window& w, int unit, S (&state)[N]) {
        const int steps = unit_steps(w, unit);
#pragma unroll 1
        for (int row = 0; row < steps; row += T) {
            const int left = steps - row;
            if (plain && left >= T)
                recompute(Bool<true>(), record(unit, row), 0, state);
            else
                recompute(Bool<false>(), record(unit, row),
                          padding<T>(thread, unit_start(w, unit) + row, left < T ? left : T), state);
        }
    }
    __device__ __forceinline__ S* checkpoint(int unit) const {  // the state before a unit of a long block
        return reinterpret_cast<S*>(args.checkpoints) +
               (static_cast<long long>(unit - 1) * args.batch + thread.b) * args.width + thread.d;
    }
    __device__ __forceinline__ void state_before(const Window& w, int unit, S (&state)[N]) const {
        if (w.unit + unit && long_blocks()) {
#pragma unroll
            for (int i = 0; i < N; ++i) workspace_load<sizeof(S)>(&state[i], checkpoint(w.unit + unit) + i);
        } else if (w.block + unit == 0) {
            thread.initial(state);
        } else {
            Values<S, N> saved = In::C::get(record(unit, 0));
#pragma unroll
            for (int i = 0; i < N; ++i) state[i] = saved.get(i);
        }
    }
    // A long block's units but the last, forward, by the first warp.
    __device__ __forceinline__ void climb(const Window& last) {
        Window w = last;
        w.units = 1;
        S state[N];
        for (w.unit = 0; w.unit < last.unit + last.units - 1; ++w.unit) {
            measure(w);
            for (int row = 0; row < UNIT; row += T) {
                in.point(thread, w.first + row, batch(w));
                load(w, 0, row);
            }
            async_wait();
            if (w.unit == 0) state_before(w, 0, state);
            recompute(w, 0, state);
            if (active)
#pragma unroll
                for (int i = 0; i < N; ++i) workspace_store<sizeof(S)>(checkpoint(w.unit + 1) + i, &state[i]);
        }
    }
    __device__ __forceinline__ void meet() {
        if (!ALONE) __syncthreads();
    }
    __device__ __forceinline__ void find_states(const Window& w) {
        if (w.climb) {
            if (thread.warp == 0) climb(w);
            meet();
            load_window(w, nullptr);
            async_wait();
        }
        meet();
        for (int unit = thread.warp; unit < w.units; unit += thread.warps) {
            S state[N];
            state_before(w, unit, state);
            recompute(w, unit, state);
        }
        meet();
    }

    // ---- a tile ----

    template <typename Straight>
    __device__ __forceinline__ void tile(Straight straight, const Window& w, int unit, int row, const Window& next,
                                         int to) {
        char* const at = record(unit, row);
        const long long p = unit_start(w, unit) + row;
        const int rest = unit_steps(w, unit) - row, left = straight || rest > T ? T : rest;
        const unsigned pads = straight ? 0 : active ? padding<T>(thread, p, left) : ~0u;
        out_to(straight, p);

        Linear<S> linear[T][N];
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
            Values<Type, N> out;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Column<S>& k = thread.column[i];
                linear[t][i] = linearise<V>(k, step[i], of_h.get(i), state[i]);
                if constexpr (V::SKIP == SKIP_X)
                    out.set(i, !straight && pads >> t & 1 ? S(0) : linear[t][i].skip * k.scale);
            }
            if constexpr (V::SKIP == SKIP_X)
                if (straight || (t < left && grad_x.at && active)) out.store(grad_x(straight, t));
        }

        // The records are free for the next window's tile.
        if (next.b < batches && !next.climb && unit < next.units && row < unit_steps(next, unit)) {
            const long long there = unit_start(next, unit) + row;
            if (next.b == w.b)
                in.move(straight, there);
            else
                in.point(thread, there, batch(next));
            load(next, unit, row);
        }

        // From batch to batch turns are taken too, lest a warp give twice before the next has taken.
        const bool begins = p + left == args.length;
        if (!begins || w.b) relay.take(carry);
        if (begins) begin();
        S gc[T][N];
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                S before = retreat<V>(linear[t][i], carry[i], gc[t][i]);
                carry[i] = !straight && pads >> t & 1 ? carry[i] : before;
            }
        if (p == 0) end();
        if (p || next.b < batches) relay.give(to, carry);
        store_gradients(straight, left, pads, linear, gc);
    }

    template <typename Straight>
    __device__ __forceinline__ void store_gradients(Straight straight, int left, unsigned pads, const Linear<S> (&linear)[T][N],
                                                    const S (&gc)[T][N]) {
        S g_f[N][T], g_r[N][T];
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Values<Type, K * N> packed;
            Values<Type, N> rows[K];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const Linear<S>& l = linear[t][i];
                const S values[4] = {gc[t][i] * (l.g * l.slope_z), gc[t][i] * l.forget, l.u2, l.skip};
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    S value = !straight && pads >> t & 1 ? S(0) : values[k];
                    packed.set(i * K + k, value);
                    rows[k].set(i, value);
                    if (k == 1) g_f[i][t] = value;
                    if (k == 2) g_r[i][t] = value;
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
        if constexpr (V::WEIGHT != NO_WEIGHT) {
            S w_f[N][T], w_r[N][T];
#pragma unroll
            for (int t = 0; t < T; ++t) {
                StepWeight<V> weights;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const bool pad = !straight && pads >> t & 1;
                    w_f[i][t] = pad ? S(0) : g_f[i][t] * linear[t][i].c_prev;
                    w_r[i][t] = pad ? S(0) : g_r[i][t] * linear[t][i].c_prev;
                    if constexpr (V::STEP_WEIGHT) weights.set(0, i, w_f[i][t]), weights.set(1, i, w_r[i][t]);
                }
                if constexpr (V::STEP_WEIGHT)
                    if (straight || (t < left && grad_weight.at && active))
                        weights.store(grad_weight(straight, t), args.grad_weight_c.row);
            }
            if constexpr (V::WEIGHT == WEIGHT_COLUMN)
#pragma unroll
                for (int i = 0; i < N; ++i) v_f[i].add(w_f[i]), v_r[i].add(w_r[i]);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) bias_f[i].add(g_f[i]), bias_r[i].add(g_r[i]);
    }

    // ---- a batch, and all ----

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < N; ++i)
            carry[i] = args.grad_c_last.data
                           ? thread.one(args.grad_c_last, thread.b, thread.d + i, 0, NARROW_GRAD_C_LAST)
                           : S(0);
    }
    __device__ __forceinline__ void end() {
        if (!args.grad_c0.data || !active) return;
#pragma unroll
        for (int i = 0; i < N; ++i)
            store_one<Type>(args.grad_c0.at(0, thread.b, thread.d + i, 0), carry[i], (args.flags & NARROW_C0) != 0);
    }

    // ---- results ----

    __device__ __forceinline__ void out_at(const Window& w, long long p) {
        out = p;
        grad_u = thread.cursor(args.grad_u, p, batch(w)), grad_x = thread.cursor(args.grad_x, p, batch(w));
        grad_weight = thread.cursor(args.grad_weight_c, p, batch(w));
    }
    template <typename Straight> __device__ __forceinline__ void out_to(Straight straight, long long p) {
        const long long steps = p - out;
        out = p;
        grad_u.move(straight, steps), grad_x.move(straight, steps), grad_weight.move(straight, steps);
    }

    __device__ __forceinline__ void walk(const Window& w, const Window& next) {
        async_wait();
        if (batch(w) != thread.b) thread.to_batch(batch(w));
        active = lane.active && present(w);
        if constexpr (RECOMPUTE) find_states(w);
        if (next.b < batches && !next.climb && (next.tiles > w.tiles || next.b != w.b)) load_window(next, &w);
        out_at(w, w.first);
        if (next.b < batches && next.b == w.b) in.point(thread, next.first, batch(next));

        // This warp's tiles, of those that are counted from the window's first.
        const int head = tiles_of(w.head), full = tiles_of(w.full);
        int n = w.tiles - 1 - (w.tiles - 1 - thread.warp + thread.warps) % thread.warps;
#pragma unroll 1
        for (; n >= 0; n -= thread.warps) {
            const int unit = !RECOMPUTE || n < head ? 0 : 1 + (n - head) / full;
            const int row = (unit ? n - head - (unit - 1) * full : n) * T;
            const int to = (n ? n - 1 : next.tiles - 1) % thread.warps;  // who has the next tile
            if (plain && unit_steps(w, unit) - row >= T)
                tile(Bool<true>(), w, unit, row, next, to);
            else
                tile(Bool<false>(), w, unit, row, next, to);
        }
    }
    __device__ __forceinline__ void run() {
        if (args.length == 0) {
            active = lane.active;
            for (long long b = first_batch; thread.warp == 0 && b < args.batch && b < first_batch + args.group; ++b)
                thread.to_batch(b), begin(), end();
            return;
        }
        Window w;
        enter_batch(w, 0);
        if (!w.climb) load_window(w, nullptr);
        while (w.b < batches) {
            Window next = w;
            to_next(next);
            walk(w, next);
            w = next;
        }
    }

    // A parameter's sums, of the warps one after the other. Those of several rows wait for reduce(), a single row's are the
    // gradients. `gate`: of the gradient; `place`: of all sums.
    __device__ __forceinline__ void leave(Sum<S> (&sum)[N], const Array& gradient, int gate, int place, int narrow) {
        if (!ALONE) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N; ++i) relay.slot(thread.warp, i) = sum[i].total;
            __syncthreads();
        }
        if (thread.warp || !lane.active) return;
        S* partial = reinterpret_cast<S*>(args.partials) + (lane.row * args.sums + place) * args.width + thread.d;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            for (int w = 1; !ALONE && w < thread.warps; ++w) sum[i].add(relay.slot(w, i));
            if (args.rows > 1)
                workspace_store<sizeof(S)>(partial + i, &sum[i].total);
            else  // 0 +: as reduce() begins, which takes the sign from a -0
                store_one<Type>(gradient.at(0, 0, thread.d + i, gate), S(0) + sum[i].total, (args.flags & narrow) != 0);
        }
    }
    __device__ __forceinline__ void leave_sums() {
        int place = 0;
        if (args.grad_bias.data) {
            leave(bias_f, args.grad_bias, 0, place++, NARROW_BIAS);
            leave(bias_r, args.grad_bias, 1, place++, NARROW_BIAS);
        }
        if constexpr (V::WEIGHT == WEIGHT_COLUMN)
            if (args.grad_weight_c.data) {
                leave(v_f, args.grad_weight_c, 0, place++, NARROW_WEIGHT);
                leave(v_r, args.grad_weight_c, 1, place++, NARROW_WEIGHT);
            }
    }
};

// ---------------------------------------------------------------------------------------------------------------------

// ---------------------------------------------------------------------------------------------------------------------
// The parameter gradients: sums over the rows of `partials`, in an order that only the number of rows decides. A block
// takes COLUMNS neighbouring sums, each of its groups of so many threads every so-manieth row; then some of the groups add
// up all, and the first adds up these.

template <typename T, int THREADS, int COLUMNS> __device__ __forceinline__ void reduce(const Args& args) {
    using S = typename StateOf<T>::type;
    constexpr int GROUPS = THREADS / COLUMNS, SOME = 8;
    CUSRU_SHARED(S, of_group, THREADS);
    const long long width = args.sums * args.width;
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
    if (args.grad_bias.data) {
        if (gate < 2) {
            store_one<T>(args.grad_bias.at(0, 0, d, gate), all.total, (args.flags & NARROW_BIAS) != 0);
            return;
        }
        gate -= 2;
    }
    store_one<T>(args.grad_weight_c.at(0, 0, d, gate), all.total, (args.flags & NARROW_WEIGHT) != 0);
}
