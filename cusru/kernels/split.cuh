// How time is split where columns are few. Whatever is affine in what goes from step to step (step.cuh has the list)
// need not be walked to be known: a stretch of time takes every c to factor c + sum, and a stretch after another is a
// stretch. So time is cut into spans. A block takes a span, the next that nobody has, and each of its warps a tile of
// it; where there are 16 columns or fewer a warp's lanes have several such chunks of time. A warp loads its tile once
// and finds out, in registers, what the tile does to any state. From what its tiles do the block knows what its span
// does, and tells; from what the spans before have told it knows where its own begins, and so where each tile does.
// Then all tiles are walked at once, and what follows is stored. The inputs of the block's next span are on their way
// meanwhile: data is read once, and a chain is a tile long.
//
// Which spans are asked is fixed: every `anchor`th tells its start, and the others add to it what those since have
// told, in one order. So every bit is the same whoever is late. What a span waits for was taken before: somebody works
// on it, however few blocks there are.
//
// What is not finite is not added up, for a product of infinity and 0 is neither: there stretches are walked one after
// the other, each from the end of the one before, and the span tells its end.
#pragma once
#include "sru.cuh"

// The product of factors, and 1 - it: the one keeps the digits of factors near 0, the other of those near 1.
template <typename S> struct Product {
    S product = 1, gone = 0;
    __device__ __forceinline__ void times(const Factor<S>& f, S gone_) {
        product = f.times(product);
        gone = fma(gone_, S(1) - gone, gone);
    }
};

// c -> factor c + sum. `kept` is the one of the two, which its last bit says. Where a sequence starts in the stretch
// nothing comes across: `kept` is then infinite. And it is NaN where the end must be walked.
template <typename S> struct alignas(2 * sizeof(S)) Summary {
    S kept, sum;
    __device__ __forceinline__ Factor<S> factor() const { return {kept, last_bit(kept)}; }
};
template <typename S> __device__ __forceinline__ bool finite(S v) { return v - v == S(0); }
template <typename S> __device__ __forceinline__ S infinite() { return S(__uint_as_float(0x7f800000u)); }
template <typename S> __device__ __forceinline__ S not_a_number() { return S(__uint_as_float(0x7fffffffu)); }
template <typename V, typename S> __device__ __forceinline__ bool starts_anew(const Summary<S>& s) {
    return V::STARTING && s.kept == infinite<S>();
}
template <typename S> __device__ __forceinline__ bool is_lost(const Summary<S>& s) { return s.kept != s.kept; }
template <typename S> __device__ __forceinline__ Summary<S> settled(const Product<S>& p, S sum, bool anew) {
    const bool whole = p.gone > S(0.75);
    const S kept = with_last_bit(whole ? p.product : -p.gone, whole);
    const bool lost = !finite(sum) || !(anew || finite(p.gone));
    return {lost ? not_a_number<S>() : anew ? infinite<S>() : kept, sum};
}
// The end of a stretch that begins at `start`.
template <typename V, typename S> __device__ __forceinline__ S end_of(const Summary<S>& s, S start) {
    return starts_anew<V>(s) ? s.sum : s.factor().times(start) + s.sum;
}
// Stretches, one after the other. What is lost stays not finite.
template <typename V, typename S> struct Sequence {
    Product<S> product;
    S sum = 0;
    bool anew = false;
    __device__ __forceinline__ void add(const Summary<S>& s) {
        if (starts_anew<V>(s)) {
            product = {}, sum = s.sum, anew = true;
            return;
        }
        sum = end_of<V>(s, sum);
        product.times(s.factor(), s.factor().gone());
    }
    __device__ __forceinline__ Summary<S> whole() const { return settled(product, sum, anew); }
};

// What the stretches of a block's span, in the order of processing, and the spans tell one another. One warp talks,
// whose lanes have the columns that all the warps' have: forward the last, which does nothing else, so that none keeps
// its tile in registers meanwhile; backward, where that would make a block's warps too many for their registers, the
// first.
template <typename V, bool BACKWARD> struct Exchange {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    static constexpr unsigned ALL = 0xffffffffu;
    static constexpr int ABREAST = 4;               // spans whose words are on their way together
    enum Kind { SUMMARY = 1, START = 2, END = 4 };  // that a span has told: bits of its flag
    const Args& args;
    const Lane lane;  // its own: a reference to another part of the kernel's state would keep all of it in memory
    const unsigned group;
    const int stretches, chunks;  // of a chunk; of a span
    Summary<S>* const summaries;  // those of a thread's columns lie side by side, as they do in the workspace
    S* const starts;
    unsigned* const notes;  // the span that the block takes next; whether an end must be walked

    static __device__ __forceinline__ int bytes(int stretches) {
        return (3 * stretches + 5) * 32 * N * static_cast<int>(sizeof(S)) + 16;
    }
    __device__ __forceinline__ Exchange(const Args& args, const Lane& lane, unsigned group, int stretches, char* room)
        : args(args),
          lane(lane),
          group(group),
          stretches(stretches),
          chunks(N == 1 ? static_cast<int>(args.chunks) : 1),  // of two columns a thread there are lanes enough
          summaries(reinterpret_cast<Summary<S>*>(room) + threadIdx.x % 32 * N),
          starts(reinterpret_cast<S*>(room) + (stretches + 2) * 64 * N + threadIdx.x % 32 * N),
          notes(reinterpret_cast<unsigned*>(room + (3 * stretches + 5) * 32 * N * sizeof(S))) {}

    static __device__ __forceinline__ int workers() { return blockDim.x / 32 - !BACKWARD; }
    static __device__ __forceinline__ bool talks() { return threadIdx.x / 32 == (BACKWARD ? 0 : workers()); }
    static __device__ __forceinline__ void meet() { __syncthreads(); }

    // ---- within the block ----

    // Of a stretch; then of the chunk and of the span, which the talking warp puts there.
    __device__ __forceinline__ void put(int stretch, const Summary<S> (&summary)[N]) const {
        copy<sizeof(summary)>(summaries + stretch * 32 * N, summary);
    }
    __device__ __forceinline__ void get(int stretch, Summary<S> (&summary)[N]) const {
        copy<sizeof(summary)>(summary, summaries + stretch * 32 * N);
    }
    __device__ __forceinline__ const Summary<S>& summary(int stretch, int i) const {
        return summaries[stretch * 32 * N + i];
    }
    __device__ __forceinline__ S& start(int stretch, int i) const { return starts[stretch * 32 * N + i]; }
    // The column's, of another chunk.
    __device__ __forceinline__ S of_chunk(int chunk, S value) const {
        return __shfl_sync(ALL, value,
                           chunk * lane.columns + (lane.active ? threadIdx.x % 32 % lane.columns : lane.columns - 1));
    }
    __device__ __forceinline__ Summary<S> of_chunk(int chunk, const Summary<S>& s) const {
        return {of_chunk(chunk, s.kept), of_chunk(chunk, s.sum)};
    }
    // One after the other.
    __device__ __forceinline__ Summary<S> of_all_chunks(const Summary<S>& own) const {
        if (chunks == 1) return own;
        Sequence<V, S> all;
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) all.add(of_chunk(chunk, own));
        return all.whole();
    }

    // ---- between blocks ----

    __device__ __forceinline__ unsigned* flag(long long span) const {
        return reinterpret_cast<unsigned*>(args.signals) + args.groups * (1 + span) + group;
    }
    __device__ __forceinline__ S* word(Kind kind, long long span) const {
        const long long rows = kind == SUMMARY ? 2 * span
                               : kind == END
                                   ? 2 * args.spans + span
                                   : 3 * args.spans + static_cast<unsigned>(span) / static_cast<unsigned>(args.anchor);
        return reinterpret_cast<S*>(args.words) + rows * args.batch * args.width +
               (lane.row * args.width + lane.column) * (kind == SUMMARY ? 2 : 1);
    }
    __device__ __forceinline__ unsigned wait(Kind kind, long long span) const {  // what the span has told by then
        unsigned kinds;
#pragma unroll 1
        do kinds = load_acquire(flag(span));
        while (!(kinds & kind));
        return kinds;
    }
    // In this order; `before`: what the span has told already.
    __device__ __forceinline__ void told(Kind kind, long long span, unsigned before) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) store_release(flag(span), before | kind);
    }
    template <typename Value>
    __device__ __forceinline__ void tell(Kind kind, long long span, const Value (&value)[N]) const {
        if (lane.active && lane.chunk == 0) workspace_store<sizeof(value)>(word(kind, span), value);
    }
    template <typename Value> __device__ __forceinline__ void hear(Kind kind, long long span, Value (&value)[N]) const {
        workspace_load<sizeof(value)>(value, word(kind, span));
    }
    __device__ __forceinline__ unsigned take_span() const {
        return atomicAdd(reinterpret_cast<unsigned*>(args.signals) + group, 1u);
    }

    // Where the span starts, and where the next does, unless this one's end must be walked: then its summary `all` is
    // lost. Before the first anchor `value` comes as where time begins.
    __device__ __forceinline__ void look_back(unsigned span, const Summary<S> (&all)[N], S (&value)[N],
                                              S (&next)[N]) const {
        const unsigned anchor = static_cast<unsigned>(args.anchor), from = span ? (span - 1) / anchor * anchor : 0;
        const int before = static_cast<int>(span - from), lane_ = threadIdx.x % 32;
        unsigned started = 0;
#pragma unroll 1
        for (int k = lane_; k < before; k += 32) {
            const unsigned kinds = wait(SUMMARY, from + k);
            if (k == 0) started = kinds & START;
        }
        __syncwarp();  // a shuffle orders no memory
        started = __shfl_sync(ALL, started, 0);
        if (from && started) hear(START, from, value);
        // What spans have told since the anchor: each chunk's lanes add up some of them.
        const int some = (static_cast<int>(anchor) + chunks - 1) / chunks, first = lane.chunk * some;
        const int end_ = first + some < before ? first + some : before;
        Sequence<V, S> since[N];
#pragma unroll 1
        for (int k = first; k < end_; k += ABREAST) {
            Summary<S> one[ABREAST][N];
#pragma unroll
            for (int j = 0; j < ABREAST; ++j) hear(SUMMARY, from + (k + j < end_ ? k + j : k), one[j]);
#pragma unroll
            for (int j = 0; j < ABREAST; ++j)
                if (k + j < end_)
#pragma unroll
                    for (int i = 0; i < N; ++i) since[i].add(one[j][i]);
        }
        if (from && !started) {
            if (lane_ == 0) wait(START, from);
            __syncwarp();
            hear(START, from, value);
        }
        const bool anchored = span % anchor == 0;
        bool lost[N], next_lost[N], any = false;
        S begin[N];
        Summary<S> with[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const Summary<S> past = of_all_chunks(since[i].whole());
            begin[i] = value[i];
            value[i] = end_of<V>(past, begin[i]);
            // As the next span will find its own: from this one on, if it tells its start.
            const bool mine = anchored ? lane.chunk == 0 : first <= before && before < first + some;
            if (anchored) since[i] = {};
            if (mine) since[i].add(all[i]);
            with[i] = of_all_chunks(since[i].whole());
            next[i] = end_of<V>(with[i], anchored ? value[i] : begin[i]);
            lost[i] = is_lost(past), next_lost[i] = anchored ? lost[i] : is_lost(with[i]);
            any |= lost[i] || next_lost[i];
        }
        if (__any_sync(ALL, any)) {
#pragma unroll 1
            for (int k = 0; k < before; ++k) {
                Summary<S> one[N];
                hear(SUMMARY, from + k, one);
                bool ask = false;
#pragma unroll
                for (int i = 0; i < N; ++i) ask |= is_lost(one[i]);
                S end[N];
                if (__any_sync(ALL, ask)) {
                    if (lane_ == 0) wait(END, from + k);
                    __syncwarp();
                    hear(END, from + k, end);
                }
#pragma unroll
                for (int i = 0; i < N; ++i) begin[i] = is_lost(one[i]) ? end[i] : end_of<V>(one[i], begin[i]);
            }
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (lost[i]) value[i] = begin[i];
                if (next_lost[i]) next[i] = anchored ? end_of<V>(with[i], begin[i]) : end_of<V>(all[i], begin[i]);
            }
        }
        if (anchored && span) tell(START, span, value), told(START, span, SUMMARY);
    }
    // When all have put their summaries.
    __device__ __forceinline__ void find_starts(unsigned span, S (&value)[N]) const {
        bool lost = false;
        Sequence<V, S> sequence[N];
#pragma unroll 4
        for (int e = 0; e < stretches; ++e) {
            Summary<S> one[N];
            get(e, one);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                lost |= V::STARTING && is_lost(one[i]);  // else the whole is
                sequence[i].add(one[i]);
            }
        }
        Summary<S> own[N], all[N];
        S next[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            own[i] = sequence[i].whole();
            all[i] = of_all_chunks(own[i]);
            lost |= is_lost(own[i]) || is_lost(all[i]);
        }
        put(stretches, own), put(stretches + 1, all);
        if (span + 1 < args.spans) tell(SUMMARY, span, all), told(SUMMARY, span, 0);
        look_back(span, all, value, next);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            S begin = value[i];
#pragma unroll 1
            for (int chunk = 1; chunk < chunks; ++chunk) {
                begin = end_of<V>(of_chunk(chunk - 1, own[i]), begin);
                if (lane.chunk == chunk) value[i] = begin;
            }
            start(stretches, i) = lane.chunk + 1 < chunks ? end_of<V>(own[i], value[i]) : next[i];
        }
#pragma unroll 4
        for (int e = 0; e < stretches; ++e) {
            Summary<S> one[N];
            get(e, one);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                start(e, i) = value[i];
                value[i] = end_of<V>(one[i], value[i]);
            }
        }
        lost = __any_sync(ALL, lost);
        if (threadIdx.x % 32 == 0) notes[1] = lost;
    }
    // Where an end must be walked: `walk` does, for a warp's stretch, from its start on.
    template <typename Walk> __device__ __forceinline__ void mend(unsigned span, const Walk& walk) const {
        if (!GENERAL || !notes[1]) return;
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll 1
            for (int e = 0; e < stretches; ++e) {
                S end[N];
                if (walk(e, end) && lane.chunk == chunk)
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        const Summary<S> one = summary(e, i);
                        const S walked = is_lost(one) ? end[i] : end_of<V>(one, start(e, i));
                        // The chunk's end is known from its start, if that is; the last one's from the span's.
                        const Summary<S> own = summary(stretches, i);
                        const bool whole = e + 1 == stretches, last = chunk + 1 == chunks;
                        if (!whole || is_lost(last ? summary(stretches + 1, i) : own))
                            start(e + 1, i) = whole && !is_lost(own) ? end_of<V>(own, start(0, i)) : walked;
                        else if (!last)
                            start(e + 1, i) = end_of<V>(own, start(0, i));
                    }
                __syncthreads();
            }
            if (chunks > 1 && talks()) {
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const S begin = of_chunk(chunk, start(stretches, i));
                    if (lane.chunk == chunk + 1) start(0, i) = begin;
                }
            }
            if (chunks > 1) __syncthreads();
        }
        if (!talks()) return;
        S end[N];
#pragma unroll
        for (int i = 0; i < N; ++i) end[i] = of_chunk(chunks - 1, start(stretches, i));
        tell(END, span, end), told(END, span, SUMMARY | (span % static_cast<unsigned>(args.anchor) ? 0 : START));
    }

    // ---- span after span ----

    __device__ __forceinline__ unsigned first_span() const {
        if (talks() && threadIdx.x % 32 == 0) notes[0] = take_span();
        meet();
        const unsigned span = notes[0];
        meet();
        return span;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward. Saved states begin slices of as many tiles as make whole saved blocks: within a slice tile follows tile, as
// the backward will walk it; its end is the start of the next, in h and among the saved states too.

template <typename V, int T> struct SplitForward : ForwardTile<V, T> {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    using Tile = ForwardTile<V, T>;
    using Tile::args, Tile::first, Tile::thread, Tile::in, Tile::h, Tile::saver, Tile::plain, Tile::lane;
    const int in_slice;  // which of its tiles is the warp's
    const Exchange<V, false> exchange;
    Relay<S, N, false, 1> relay;

    static __device__ __forceinline__ int warps() { return Exchange<V, false>::workers(); }
    __device__ __forceinline__ SplitForward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.batch, N, blockIdx.x % args.groups, args.groups, args.chunks), 0, shared,
               shared + Exchange<V, false>::bytes(warps()) + warps() * 32 * N * sizeof(S)),
          in_slice(thread.warp % static_cast<int>(args.slice)),
          exchange(args, lane, blockIdx.x % args.groups, warps(), shared),
          relay(shared += Exchange<V, false>::bytes(warps()), warps()) {}

    __device__ __forceinline__ long long chunk(unsigned span) const {
        return static_cast<long long>(span) * exchange.chunks + lane.chunk;
    }
    __device__ __forceinline__ long long place(unsigned span) const {  // of the tile; negative within the lead
        return (chunk(span) * warps() + thread.warp) * T - (lane.reversed ? args.lead : 0);
    }
    __device__ __forceinline__ long long beginning(unsigned span) const { return place(span) < 0 ? 0 : place(span); }
    __device__ __forceinline__ int steps(long long place) const {
        const long long end = args.length - place < T ? args.length - place : T;
        const long long begin = place < 0 ? -place : 0;
        return end > begin ? static_cast<int>(end - begin) : 0;
    }
    __device__ __forceinline__ void load(unsigned span, int left) {
        if (!left) return;
        const long long p = beginning(span);
        plain ? in.move(Bool<true>(), p) : in.move(Bool<false>(), p);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // copies pass through registers: not all at once
        if constexpr (V::LINEAR) return Tile::load_tile(Bool<false>(), left);
#endif
        Tile::load(left);
    }

    // What a tile does to any state.
    template <typename Straight>
    __device__ __forceinline__ void sum_up(Straight straight, const Bits& bits, const Prepared<V, S> (&prepared)[T][N],
                                           Summary<S> (&summary)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Product<S> product;
            S sum = 0;
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const S before = across<V>(bits, t, sum);
                const bool skip = skips<V>(straight, bits, t);
                sum = skip ? before : advance<V>(prepared[t][i], before);
                if (!skip) product.times(factor<V>(prepared[t][i]), gone<V>(prepared[t][i]));
            }
            summary[i] = settled(product, sum, V::STARTING && bits.starts);
        }
    }
    template <typename Straight>
    __device__ __forceinline__ void walk(Straight straight, unsigned span, int left, const Bits& bits,
                                         const Prepared<V, S> (&prepared)[T][N]) {
        const long long p = beginning(span);
        h.move(straight, p - first), first = p;
        if (saver.blocks) saver.to(thread, p, lane.reversed ? args.lead : 0);
        S state[T + 1][N];
        if (in_slice) {
            relay.take(state[0]);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) state[0][i] = exchange.start(thread.warp, i);
        }
        this->follow(straight, bits, prepared, state);
        const bool last = left && first + left == args.length;
        if (in_slice + 1 < args.slice) {
            relay.give(thread.warp + 1, state[T]);
        } else if (!last) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const S next = exchange.start(thread.warp + 1, i);
#pragma unroll
                for (int t = 1; t <= T; ++t)
                    if (straight ? t == T : t >= left) state[t][i] = next;
            }
        }
        if (last) this->end(state[T]);
        this->store(straight, left, bits, prepared, state);
    }

    __device__ __forceinline__ void talk(unsigned span) const {
        while (GENERAL && span < args.spans) {
            unsigned next = 0;
            if (threadIdx.x % 32 == 0) next = exchange.notes[0] = exchange.take_span();
            exchange.meet();
            next = __shfl_sync(0xffffffffu, next, 0);
            S value[N];
            if (span <= args.anchor) thread.initial(value);
            exchange.find_starts(span, value);
            exchange.meet();
            exchange.mend(span, [](int, S(&)[N]) { return false; });
            span = next;
        }
    }
    __device__ __forceinline__ void run() {
        unsigned span = exchange.first_span();
        if (exchange.talks()) return talk(span);
        int left = span < args.spans ? steps(place(span)) : 0;
        load(span, left);
        while (span < args.spans) {
            const long long p = beginning(span);
            const bool whole = plain && __all_sync(0xffffffffu, left == T);
            Bits bits;
            Prepared<V, S> prepared[T][N];
            Summary<S> summary[N];
            this->prepare_all(prepared);
            if (whole) {
                bits = marks<T>(thread, Bool<true>(), p, T);
                sum_up(Bool<true>(), bits, prepared, summary);
            } else if (GENERAL) {
                bits = marks<T>(thread, Bool<false>(), p, left);
                sum_up(Bool<false>(), bits, prepared, summary);
            }
            exchange.put(thread.warp, summary);
            exchange.meet();
            const unsigned next = exchange.notes[0];
            const int next_left = next < args.spans ? steps(place(next)) : 0;
            load(next, next_left);
            exchange.meet();
            exchange.mend(span, [&](int stretch, S(&end)[N]) {
                if (stretch != thread.warp) return false;
                S state[T + 1][N];
#pragma unroll
                for (int i = 0; i < N; ++i) state[0][i] = exchange.start(stretch, i);
                this->follow(Bool<false>(), bits, prepared, state);
#pragma unroll
                for (int i = 0; i < N; ++i) end[i] = state[T][i];
                return true;
            });
            if (whole)
                walk(Bool<true>(), span, T, bits, prepared);
            else if (GENERAL)
                walk(Bool<false>(), span, left, bits, prepared);
            span = next, left = next_left;
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Backward. A span is some saved blocks, or where every state was saved one stretch of time, in either case in units,
// and spans are taken from the last on. From the saved state before it a unit's states are found first, tile after
// tile. Groups of a tile's steps are added up plainly to parameter sums; one warp adds those of all tiles.

template <typename V, int T, int UNIT, bool RECOMPUTE> struct SplitBackward : BackwardTile<V, T, UNIT, RECOMPUTE> {
    using Tile = BackwardTile<V, T, UNIT, RECOMPUTE>;
    using In = typename Tile::In;
    using S = typename V::S;
    static constexpr int N = V::COLUMNS, SUMS = V::SUMS, TERMS = Tile::TERMS, GROUP = Tile::GROUP;
    using Tile::args, Tile::lane, Tile::thread, Tile::plain, Tile::every, Tile::blocks, Tile::in, Tile::active;
    const int units;      // of a chunk
    const int unit, row;  // of the warp's tile
    const Exchange<V, true> exchange;
    Relay<S, N, !RECOMPUTE, 1> states;
    S* const sums;  // [warp][group of a tile][sum][lane]

    static __device__ __forceinline__ int warps() { return Exchange<V, true>::workers(); }
    static __device__ __forceinline__ int of_unit(const Args& args) {  // steps
        return RECOMPUTE ? static_cast<int>(args.save_every) : warps() * T;
    }
    static __device__ __forceinline__ int handed_on() {
        return warps() * 32 * (T / GROUP * SUMS + RECOMPUTE) * N * sizeof(S);
    }
    __device__ __forceinline__ SplitBackward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.batch, N, blockIdx.x % args.groups, args.groups, args.chunks), of_unit(args),
               shared, shared + Exchange<V, true>::bytes(warps()) + handed_on()),
          units(static_cast<int>(args.units)),
          unit(thread.warp / (warps() / units)),
          row(thread.warp % (warps() / units) * T),
          exchange(args, lane, blockIdx.x % args.groups, warps(), shared),
          states(shared += Exchange<V, true>::bytes(warps()), warps()),
          sums(reinterpret_cast<S*>(shared) + threadIdx.x % 32) {
        active = lane.active, this->in_batch = 0, this->out_batch = -1;
        in.point(thread, 0, thread.b);
    }
    __device__ __forceinline__ char* at() const { return this->record(thread.warp * T); }

    // Where the warp's unit is; its steps are 0 where there is none.
    __device__ __forceinline__ Place place(unsigned span) const {
        const long long chunk = (args.spans - span) * exchange.chunks - 1 - lane.chunk;
        Place one = {0, chunk * units + unit, 0, 0, 0, true};
        if (span >= args.spans || one.block >= blocks) return one;
        this->enter(one), one.unit = 0;  // no saved block is longer than a unit
        return one;
    }
    __device__ __forceinline__ int steps(const Place& place) const {  // of the tile
        const int left = place.steps - row;
        return left < 0 ? 0 : left < T ? left : T;
    }
    __device__ __forceinline__ void load(const Place& place) {
        if (!steps(place)) return;
        in.move(Bool<false>(), place.first + row);  // the first move may be all of time
        Tile::load(place, row, at());
    }
    __device__ __forceinline__ int stretch() const { return warps() - 1 - thread.warp; }  // which the tile is

    template <typename Straight>
    __device__ __forceinline__ void find_states(Straight straight, const Place& place, const Bits& bits) {
        Prepared<V, S> prepared[T][N];
#pragma unroll
        for (int t = 0; t < T; ++t) {
            Step<S> step[N];
            In::get(thread.column, at() + t * In::BYTES, step);
#pragma unroll
            for (int i = 0; i < N; ++i) prepared[t][i] = prepare<V>(thread.column[i], step[i]);
        }
        S state[N];  // even where the tile has no steps: the warps of a unit go together
        if (row) {
            states.take(state);
        } else if (place.block == 0) {
            thread.initial(state);
        } else {
            const Values<S, N> saved = In::C::get(at());
#pragma unroll
            for (int i = 0; i < N; ++i) state[i] = saved.get(i);
        }
        Values<S, N> before[T];
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                state[i] = across<V>(bits, t, state[i]);
                before[t].set(i, state[i]);
                if (!skips<V>(straight, bits, t)) state[i] = advance<V>(prepared[t][i], state[i]);
            }
        if (row + T < every) states.give(thread.warp + 1, state);
#pragma unroll
        for (int t = 0; t < T; ++t) In::C::set(at() + t * In::BYTES, before[t]);
    }
    // One step back, or none where there is padding.
    template <typename Straight>
    __device__ __forceinline__ S back(Straight straight, const Bits& bits, int t, const Linear<S>& linear, S carry,
                                      S& gc) const {
        const S before = retreat<V>(linear, carry, gc);
        return across<V>(bits, t, skips<V>(straight, bits, t) ? carry : before);
    }
    // What a tile does to any carry.
    template <typename Straight>
    __device__ __forceinline__ void sum_up(Straight straight, const Bits& bits, const Linear<S> (&linear)[T][N]) const {
        Summary<S> summary[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Product<S> product;
            S sum = 0, gc;
#pragma unroll
            for (int t = T - 1; t >= 0; --t) {
                sum = back(straight, bits, t, linear[t][i], sum, gc);
                const Factor<S>& keep = linear[t][i].keep;
                if (!skips<V>(straight, bits, t)) product.times(keep, keep.gone());
            }
            summary[i] = settled(product, sum, V::STARTING && bits.starts);
        }
        exchange.put(stretch(), summary);
    }
    // From the tile's start to its end.
    template <typename Straight>
    __device__ __forceinline__ void follow(Straight straight, const Bits& bits, const Linear<S> (&linear)[T][N],
                                           S (&carry)[N], S (&gc)[T][N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) carry[i] = exchange.start(stretch(), i);
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
#pragma unroll
            for (int i = 0; i < N; ++i) carry[i] = back(straight, bits, t, linear[t][i], carry[i], gc[t][i]);
    }
    template <typename Straight>
    __device__ __forceinline__ void walk(Straight straight, const Place& place, const Bits& bits,
                                         const Linear<S> (&linear)[T][N]) {
        const int left = straight ? T : steps(place);
        S carry[N], gc[T][N];
        follow(straight, bits, linear, carry, gc);
        if (place.first + row == 0 && left) this->end(carry);
        S terms[T][TERMS];
        this->store_gradients(straight, left, bits, linear, gc, terms);
        if constexpr (SUMS == 0) return;
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
#pragma unroll
            for (int i = 0; i < N * SUMS; ++i) {
                if ((t + 1) % GROUP) terms[t][i] = terms[t + 1][i] + terms[t][i];
                if (t % GROUP == 0) sums[((thread.warp * T + t) / GROUP * TERMS + i) * 32] = terms[t][i];
            }
    }
    // A span's groups, when all warps have theirs: in the order of one thread.
    __device__ __forceinline__ void add_up(unsigned span) const {
        S sum[TERMS * 2] = {};
#pragma unroll 1
        for (int group = warps() * T / GROUP - 1; group >= 0; --group)
#pragma unroll
            for (int i = 0; i < N * SUMS; ++i) {
                Sum<S> one = {sum[2 * i], sum[2 * i + 1]};
                one.add(sums[(group * TERMS + i) * 32]);
                sum[2 * i] = one.total, sum[2 * i + 1] = one.lost;
            }
        this->leave(sum, (static_cast<long long>(span) * exchange.chunks + lane.chunk) * args.batch + lane.row,
                    args.rows > 1);
    }

    __device__ __forceinline__ void run() {
        unsigned span = exchange.first_span();
        Place here = place(span);
        load(here);
        unsigned last = ~0u;                           // the span whose sums are to be added up,
        const bool adds = thread.warp + 1 == warps();  // while others wait for the warp that talks
        while (span < args.spans) {
            unsigned taken = 0;
            if (threadIdx.x == 0) taken = exchange.take_span();
            const int left = steps(here);
            const bool whole = plain && __all_sync(0xffffffffu, left == T);
            const long long p = here.first + row;
            Bits bits;
            Linear<S> linear[T][N];
            async_wait();
            if (whole) {
                bits = marks<T>(thread, Bool<true>(), p, T);
                this->out_to(Bool<true>(), here, p);
                if constexpr (RECOMPUTE) find_states(Bool<true>(), here, bits);
                this->linearise_all(Bool<true>(), at(), p, T, bits, linear);
                sum_up(Bool<true>(), bits, linear);
            } else if (GENERAL) {
                bits = marks<T>(thread, Bool<false>(), p, left);
                this->out_to(Bool<false>(), here, p);
                if constexpr (RECOMPUTE) find_states(Bool<false>(), here, bits);
                this->linearise_all(Bool<false>(), at(), p, left, bits, linear);
                sum_up(Bool<false>(), bits, linear);
            }
            if (threadIdx.x == 0) exchange.notes[0] = taken;
            exchange.meet();
            const unsigned next = exchange.notes[0];
            const Place there = place(next);
            load(there);
            if (SUMS && adds && last < args.spans) add_up(last);
            if (GENERAL && exchange.talks()) {
                S value[N];
                if (span <= args.anchor) this->begin(value);
                exchange.find_starts(span, value);
            }
            exchange.meet();
            exchange.mend(span, [&](int which, S(&end)[N]) {
                if (which != stretch()) return false;
                S gc[T][N];
                follow(Bool<false>(), bits, linear, end, gc);
                return true;
            });
            if (whole)
                walk(Bool<true>(), here, bits, linear);
            else if (GENERAL)
                walk(Bool<false>(), here, bits, linear);
            last = span;
            span = next, here = there;
        }
        if (SUMS && last < args.spans) {
            exchange.meet();
            if (adds) add_up(last);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------

// No counter has counted, no flag is set. By itself, before: workspaces come with arbitrary contents.
__device__ __forceinline__ void clear(const Args& args) {
    const long long count = args.groups * (1 + args.spans);
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += static_cast<long long>(gridDim.x) * blockDim.x) {
        const unsigned none = 0;
        workspace_store<4>(args.signals + 4 * i, &none);
    }
}
