// How time is split where what goes from step to step is not affine: the forward of SRU with weight_c, whose gates read
// the state. A state that begins wrong is forgotten: the gates draw two trajectories of a column together until their
// bits are the same, and then they are the same for ever. So time is cut into spans, each for a block, whose warps take
// turns as in relay.cuh, and walked twice.
//
// The first launch guesses: every span is walked at once, from c0 as if it were the first. It leaves the spans' ends
// and, every `slice` tiles, the states. The second mends: each span is walked again, from the end that the one before
// was left with, until in all of a block's columns the states are those that were left: then all that follows is there
// already. Which is right if the end that it began from was. So the last block of a group to be done looks at all spans
// in order, and walks once more those that began from anything but what is now the end of the one before.
//
// Every step is in the end what its state makes of it, so every bit is that of a walk from the first step to the last,
// by induction over spans, whatever the numbers: NaN are compared by their bits too. Nobody waits for another block.
#pragma once
#include "split.cuh"

template <typename V, int T, bool MEND> struct GuessForward : ForwardTile<V, T> {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    using Tile = ForwardTile<V, T>;
    using Tile::args, Tile::lane, Tile::first, Tile::thread, Tile::in, Tile::h, Tile::saver, Tile::plain;
    const unsigned group;
    const int turn;   // steps
    const int next;   // whose turn is after this warp's
    long long span;   // that is walked,
    long long until;  // its end,
    unsigned tile;    // and the warp's tile of it
    Relay<S, N, false, 1> relay;
    static constexpr int NOTES = 16;
    // Whether there is nothing more to do in the span; how many blocks were done before; of each warp, the first span
    // of those that it looked at that began from what is not the end of the one before.
    unsigned* const notes;

    __device__ __forceinline__ GuessForward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.batch, N, blockIdx.x % args.groups, args.groups), 0, shared,
               shared + blockDim.x * N * sizeof(S) + NOTES * sizeof(unsigned)),
          group(blockIdx.x % static_cast<unsigned>(args.groups)),
          turn(thread.warps * T),
          next(held(thread.warp + 1 < thread.warps ? thread.warp + 1 : 0)),
          relay(shared, thread.warps),
          notes(reinterpret_cast<unsigned*>(shared)) {}

    // ---- what launches and blocks leave one another ----

    enum Launch { GUESSED = 0, MENDED = 1 };
    __device__ __forceinline__ S* row(char* room, long long which) const {
        return reinterpret_cast<S*>(room) + (which * args.batch + lane.row) * args.width + lane.column;
    }
    __device__ __forceinline__ S* end_of(Launch launch, long long span) const {
        return row(args.words, launch * args.spans + span);
    }
    __device__ __forceinline__ S* state_after(unsigned tile) const {  // the last of a slice
        const unsigned slice = static_cast<unsigned>(args.slice);
        return row(args.checkpoints, span * (static_cast<unsigned>(args.units) / slice) + tile / slice);
    }
    __device__ __forceinline__ unsigned* counter() const { return reinterpret_cast<unsigned*>(args.signals) + group; }
    __device__ __forceinline__ void put(S* at, const S (&value)[N]) const {
        if (lane.active) workspace_store<sizeof(value)>(at, value);
    }
    __device__ __forceinline__ void get(const S* at, S (&value)[N]) const { workspace_load<sizeof(value)>(value, at); }
    // Whether all of the block's columns have the same bits in both.
    __device__ __forceinline__ bool same(const S (&a)[N], const S (&b)[N]) const {
        bool differ = false;
#pragma unroll
        for (int i = 0; i < N; ++i) differ |= !same_bits(a[i], b[i]);
        return !__any_sync(0xffffffffu, differ && lane.active);
    }

    // ---- a span ----

    // The end of a slice or of the span; whether the state there is the one that was there.
    __device__ __forceinline__ bool reach(long long rest, bool compared, S* at, const S (&there)[N],
                                          const S (&state)[N]) {
        const bool merged = MEND && compared && same(there, state);
        if (compared && !merged) put(at, state);
        if (rest <= T) {
            put(end_of(MEND ? MENDED : GUESSED, span), state);
            if (until == args.length) this->end(state);
        } else if (!merged) {
            relay.give(next, state);
        } else {           // all who wait for their turns are to hear
            __syncwarp();  // its own lanes have looked; a vote orders no memory
            if (threadIdx.x % 32 == 0) notes[0] = 1;
            __syncwarp();
            for (int turns = 1, to = next; turns < thread.warps && turns * T < rest; ++turns) {
                relay.call(to);
                to = to + 1 < thread.warps ? to + 1 : 0;
            }
        }
        return merged;
    }
    // A tile; whether the states are those that were there.
    template <typename Straight> __device__ __forceinline__ bool walk_tile(Straight straight) {
        const long long rest = until - first;
        const int left = straight || rest > T ? T : static_cast<int>(rest);
        const Bits bits = marks<T>(thread, straight, first, left);
        Prepared<V, S> prepared[T][N];
        this->prepare_all(prepared);
        in.move(straight, first + turn);
        this->load(rest - turn);
        const bool compared = left == T && !((tile + 1) & (static_cast<unsigned>(args.slice) - 1));
        const bool onward = rest > T && !compared;
        S* const at = state_after(tile);
        S there[N] = {};
        if (MEND && compared && lane.active) get(at, there);  // by now: a turn is to be short

        S state[T + 1][N];
        relay.take(state[0]);
        const unsigned told = MEND ? notes[0] : 0;  // looked at when the chain is done, which need not wait for it
        this->follow(straight, bits, prepared, state);
        bool merged = MEND && told;
        if (onward && !merged)
            relay.give(next, state[T]);
        else if (merged)
            return true;
        else
            merged = reach(rest, compared, at, there, state[T]);
        this->store(straight, left, bits, prepared, state);
        h.move(straight, turn), saver.move(turn), first += turn, tile += thread.warps;
        return merged;
    }
    // From `start` on to the end or, of a span that was walked before, to where nothing changes any more.
    __device__ __forceinline__ void walk(long long which, const S (&start)[N]) {
        if (MEND) {
            async_wait();  // for what was loaded in vain
            __syncthreads();
            if (threadIdx.x == 0) notes[0] = 0;
            __syncthreads();
        }
        span = which, tile = thread.warp;
        const long long steps = args.units * T, begin = span * steps, p = begin + thread.warp * T;
        until = begin + steps < args.length ? begin + steps : args.length;
        if (p >= until) return;
        in.move(Bool<false>(), p), h.move(Bool<false>(), p - first), first = p;
        if (saver.blocks) saver.to(thread, p, lane.reversed ? args.lead : 0);
        this->load(until - p);
        if (thread.warp == 0) relay.give(0, start);
        bool merged = false;
        while (!merged && first < until)
            if (plain && until - first >= T)
                merged = walk_tile(Bool<true>());
            else if (GENERAL)
                merged = walk_tile(Bool<false>());
    }

    // ---- a launch ----

    __device__ __forceinline__ void guess() {
        if (blockIdx.x < args.groups && threadIdx.x == 0) {
            const unsigned none = 0;
            workspace_store<4>(counter(), &none);
        }
        S start[N];
        thread.initial(start);
        walk(blockIdx.x / static_cast<unsigned>(args.groups), start);
    }
    // Of the spans from the third on, the first that began from anything but what is the end of the one before. Warps
    // look side by side: most often there is none.
    __device__ __forceinline__ long long first_wrong() const {
        long long wrong = args.spans;
#pragma unroll 1
        for (long long which = args.spans - 1 - thread.warp; which >= 2; which -= thread.warps) {
            S was[N], now[N];
            get(end_of(GUESSED, which - 1), was), get(end_of(MENDED, which - 1), now);
            if (!same(was, now)) wrong = which;
        }
        if (threadIdx.x % 32 == 0) notes[2 + thread.warp] = static_cast<unsigned>(wrong);
        __syncthreads();
        for (int warp = 0; warp < thread.warps; ++warp)
            if (notes[2 + warp] < wrong) wrong = notes[2 + warp];
        return wrong;
    }
    __device__ __forceinline__ void mend() {
        long long which = 1 + blockIdx.x / static_cast<unsigned>(args.groups);
        bool in_order = false;
        S was[N], now[N];
        if (thread.warp == 0) get(end_of(GUESSED, which), was), put(end_of(MENDED, which), was);
        thread.initial(was);
#pragma unroll 1
        while (which < args.spans) {
            get(end_of(in_order ? MENDED : GUESSED, which - 1), now);
            if (!same(was, now)) walk(which, now);
            __syncthreads();
            if (in_order) {
                ++which;
            } else {
                if (threadIdx.x == 0) notes[1] = add_acquire_release(counter());
                __syncthreads();
                if (notes[1] + 2 < args.spans) break;
                in_order = true, which = first_wrong();
            }
            if (which < args.spans) get(end_of(GUESSED, which - 1), was);
        }
        async_wait();
    }
    __device__ __forceinline__ void run() { MEND ? mend() : guess(); }
};
