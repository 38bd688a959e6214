// How time is split where columns are few. Whatever is affine in what goes from step to step (step.cuh has the list)
// need not be walked to be known: a stretch of time takes every c to factor c + sum, and a stretch after another is a
// stretch. So time is cut into spans. A block takes a span, the next that nobody has, and each of its warps a stretch
// of it, 8 steps; where there are 16 columns or fewer a warp's lanes have several such chunks of time. A warp loads its
// stretch once and finds out what that does to any state. From what its warps' stretches do the block knows what its
// span does, and tells; from what the spans before have told it knows where its own begins, and so where each stretch
// does. Then all are walked at once, and what follows is stored. The inputs of the block's next span are on their way
// meanwhile: data is read once, and a chain is a stretch long.
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
// whose lanes have the columns that all the warps' have, the last. Forward it does nothing else, so that it need not
// keep a tile in registers meanwhile; backward none does, and its stretch is the one whose states are found last.
template <typename V, bool BACKWARD> struct Exchange {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    static constexpr unsigned ALL = 0xffffffffu;
    // Spans whose words are on their way together, as many as there are registers for.
    static constexpr int ABREAST = sizeof(S) == 8 || V::STARTING ? 4 : 8;
    enum Kind { SUMMARY = 1, START = 2, END = 4 };  // that a span has told: bits of its flag
    const Args& args;
    const Lane lane;  // its own: a reference to another part of the kernel's state would keep all of it in memory
    const unsigned group;
    const int stretches, chunks;  // of a chunk; of a span
    const unsigned anchor;        // spans, a power of two
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
          anchor(1u << args.log_anchor),
          summaries(reinterpret_cast<Summary<S>*>(room) + threadIdx.x % 32 * N),
          starts(reinterpret_cast<S*>(room) + (stretches + 2) * 64 * N + threadIdx.x % 32 * N),
          notes(reinterpret_cast<unsigned*>(room + (3 * stretches + 5) * 32 * N * sizeof(S))) {}

    static __device__ __forceinline__ int workers() { return blockDim.x / 32 - !BACKWARD; }
    static __device__ __forceinline__ bool talks() { return threadIdx.x / 32 == blockDim.x / 32 - 1; }
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

    __device__ __forceinline__ bool is_anchor(unsigned span) const { return (span & (anchor - 1)) == 0; }
    __device__ __forceinline__ unsigned* flag(long long span) const {
        return reinterpret_cast<unsigned*>(args.signals) + args.groups * (1 + span) + group;
    }
    __device__ __forceinline__ S* word(Kind kind, long long span) const {
        const long long rows = kind == SUMMARY ? 2 * span
                               : kind == END   ? 2 * args.spans + span
                                               : 3 * args.spans + (span >> args.log_anchor);
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
        const unsigned from = span ? (span - 1) & ~(anchor - 1) : 0;
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
        const long long span_words = 2 * args.batch * args.width;  // from one's summaries to the next's
#pragma unroll 1
        for (int k = first; k < end_; k += ABREAST) {
            Summary<S> one[ABREAST][N];
            const S* const words = word(SUMMARY, from + k);
#pragma unroll
            for (int j = 0; j < ABREAST; ++j)
                workspace_load_if<sizeof(one[j])>(k + j < end_, one[j], words + j * span_words);
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
        const bool anchored = is_anchor(span);
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
        tell(END, span, end), told(END, span, SUMMARY | (is_anchor(span) ? START : 0));
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
            if (span <= exchange.anchor) thread.initial(value);
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
// and spans are taken from the last on. From the saved state before it a unit's states are found first, stretch after
// stretch. A warp's stretch is cut into parts, tile by tile: what a part's gradients need is found once and waits in
// shared memory for the span's start, so that registers have room for two blocks, of which one computes while the other
// waits. A part's steps are added up plainly to parameter sums; one warp adds those of all parts.

// What the second walk of a tile needs of its steps, a slot for each thread.
template <typename V, int T> struct Waiting {
    using S = typename V::S;
    static constexpr int N = V::COLUMNS;
    static constexpr bool OF_SRU = V::CELL == SRU, WEIGHTED = OF_SRU && V::WEIGHT != NO_WEIGHT;
    static constexpr bool OUTPUT = V::CELL == POOLING_FO || V::CELL == POOLING_IFO;  // the QRNN's gate
    static constexpr bool G = V::CELL != AFFINE && V::CELL != COMPLEMENT;
    static constexpr int VALUES = 3 + G + (OF_SRU || OUTPUT) + WEIGHTED + (WEIGHTED && V::STEP_WEIGHT) + (V::K == 4);
    struct alignas(access_width(T * VALUES * N * sizeof(S))) Row {
        S value[T][VALUES][N];
    };
    using Numbers = Field<Row, 0>;
    using Whole = Field<unsigned, Numbers::END>;  // the factors' form, a bit each
    static constexpr int BYTES = V::LINEAR ? Numbers::END : Whole::END;
    template <typename Use> static __device__ __forceinline__ void each(Linear<S>& l, Use use) {
        use(l.inflow), use(l.keep.keep), use(l.forget);
        if constexpr (G) use(l.g);
        if constexpr (OF_SRU || OUTPUT) use(l.u2);
        if constexpr (WEIGHTED) use(l.c_prev);
        if constexpr (WEIGHTED && V::STEP_WEIGHT) use(l.v_r);
        if constexpr (V::K == 4) use(l.skip);
    }
    // What only a product needs, as that.
    static __device__ __forceinline__ void shorten(Linear<S> (&linear)[T][N]) {
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                Linear<S>& l = linear[t][i];
                l.inflow *= l.slope, l.g *= l.slope_z, l.slope = l.slope_z = S(1);
            }
    }
    static __device__ __forceinline__ void put(char* at, Linear<S> (&linear)[T][N]) {
        Row row;
        unsigned whole = 0;
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                int j = 0;
                each(linear[t][i], [&](S& value) { row.value[t][j++][i] = value; });
                if (linear[t][i].keep.whole) whole |= 1u << (t * N + i);
            }
        Numbers::set(at, row);
        if constexpr (!V::LINEAR) Whole::set(at, whole);
    }
    static __device__ __forceinline__ void get(const Column<S> (&column)[N], char* at, Linear<S> (&linear)[T][N]) {
        Row row = Numbers::get(at);
        unsigned whole = V::CELL == AFFINE ? ~0u : 0;
        if constexpr (!V::LINEAR) whole = Whole::get(at);
#pragma unroll
        for (int t = 0; t < T; ++t)
#pragma unroll
            for (int i = 0; i < N; ++i) {
                Linear<S>& l = linear[t][i];
                l.slope = l.slope_z = l.g = S(1), l.v_r = column[i].v_r;
                int j = 0;
                each(l, [&](S& value) { value = row.value[t][j++][i]; });
                l.keep.whole = whole >> (t * N + i) & 1;
            }
    }
};

template <typename V, int T, int UNIT, bool RECOMPUTE> struct SplitBackward : BackwardTile<V, T, UNIT, RECOMPUTE> {
    using Tile = BackwardTile<V, T, UNIT, RECOMPUTE>;
    using In = typename Tile::In;
    using S = typename V::S;
    using Waits = Waiting<V, T>;
    static constexpr int N = V::COLUMNS, SUMS = V::SUMS, TERMS = Tile::TERMS, GROUP = Tile::GROUP;
    static constexpr int STRETCH = 8, PARTS = STRETCH / T;
    static_assert(GROUP == T, "a part's sums are one group's");
    using Tile::args, Tile::lane, Tile::thread, Tile::plain, Tile::every, Tile::blocks, Tile::in, Tile::active;
    using Tile::grad_u, Tile::grad_x, Tile::grad_weight;
    const bool small;     // a unit is no longer than a part, which has one to itself; else a stretch is of one unit
    const int units;      // of a chunk
    const int unit, row;  // of the warp's stretch
    const Exchange<V, true> exchange;
    Relay<S, N, !RECOMPUTE, 1> states;
    S* const sums;  // [part of the span][sum][lane]
    char* const waits;

    static __device__ __forceinline__ int warps() { return Exchange<V, true>::workers(); }
    static __device__ __forceinline__ int of_unit(const Args& args) {  // steps
        return RECOMPUTE ? static_cast<int>(args.save_every) : warps() * STRETCH;
    }
    static __device__ __forceinline__ int handed_on() {
        return warps() * 32 * (PARTS * SUMS + RECOMPUTE) * N * sizeof(S);
    }
    static __device__ __forceinline__ int before_records() {
        return Exchange<V, true>::bytes(warps()) + handed_on() + warps() * PARTS * Waits::BYTES;
    }
    __device__ __forceinline__ SplitBackward(const Args& args, char* shared)
        : Tile(args, Lane(args, args.batch, N, blockIdx.x % args.groups, args.groups, args.chunks), of_unit(args),
               shared, shared + before_records()),
          small(RECOMPUTE && every <= T),
          units(static_cast<int>(args.units)),
          unit(small ? thread.warp * PARTS : thread.warp / (warps() / units)),
          row(small ? 0 : thread.warp % (warps() / units) * STRETCH),
          exchange(args, lane, blockIdx.x % args.groups, warps(), shared),
          states(shared += Exchange<V, true>::bytes(warps()), warps()),
          sums(reinterpret_cast<S*>(shared) + threadIdx.x % 32),
          waits(shared + warps() * 32 * PARTS * SUMS * N * sizeof(S) + thread.warp * PARTS * Waits::BYTES) {
        active = lane.active, this->in_batch = 0, this->out_batch = -1;
        in.point(thread, 0, thread.b);
    }
    __device__ __forceinline__ char* at(int part) const { return this->record(thread.warp * STRETCH + part * T); }
    __device__ __forceinline__ char* waiting(int part) const { return waits + part * Waits::BYTES; }

    // Where the unit of the warp's part is; its steps are 0 where there is none.
    __device__ __forceinline__ Place place(unsigned span, int part) const {
        const long long chunk = (args.spans - span) * exchange.chunks - 1 - lane.chunk;
        Place one = {0, chunk * units + unit + (small ? part : 0), 0, 0, 0, true};
        if (span >= args.spans || one.block >= blocks) return one;
        this->enter(one), one.unit = 0;  // no saved block is longer than a unit
        return one;
    }
    static __device__ __forceinline__ int within(int steps, int most) {
        return steps < 0 ? 0 : steps < most ? steps : most;
    }
    __device__ __forceinline__ int steps(const Place& place) const {  // of the stretch; of several units, of the first
        return within(place.steps - row, STRETCH);
    }
    __device__ __forceinline__ void load(unsigned span, const Place& first) {
#pragma unroll 1
        for (int part = 0; part < PARTS; ++part) {
            const Place here = GENERAL && small ? place(span, part) : first;
            const int from = small ? 0 : row + part * T;
            if (here.steps <= from) continue;
            in.move(Bool<false>(), here.first + from);  // the first move may be all of time
            Tile::load(here, from, at(part));
        }
    }
    __device__ __forceinline__ int order() const { return warps() - 1 - thread.warp; }  // of the warp's stretch

    // A part: from which step of the stretch on, how many steps, what is marked of them.
    struct Part {
        int from, left;
        Bits bits;
    };
    // Of the warp's stretch in a span.
    struct Stretch {
        unsigned span;
        Place place;  // of its first unit
        long long first;
        int left;
        Bits bits;
    };
    template <typename Straight>
    __device__ __forceinline__ Stretch stretch(Straight straight, unsigned span, const Place& place) const {
        Stretch one = {span, place, place.first + row, straight ? STRETCH : steps(place), {}};
        if (!straight && small)
#pragma unroll 1
            for (int part = 1; part < PARTS; ++part) one.left += this->place(span, part).steps;
        one.bits = marks<STRETCH>(thread, straight, one.first, one.left);
        return one;
    }
    template <typename Straight>
    __device__ __forceinline__ Part part(Straight straight, const Stretch& of, int which) const {
        Part one = {which * T, straight ? T : within(of.left - which * T, T), {}};
        if (!straight && small) {
            const Place here = place(of.span, which);
            one.left = here.steps, one.from = here.steps ? static_cast<int>(here.first - of.first) : 0;
        }
        one.bits = {of.bits.pads >> one.from, of.bits.starts >> one.from};
        if (!straight && one.left < T) {  // what is beyond is another part's
            const unsigned beyond = ~0u << one.left;
            one.bits.pads |= beyond, one.bits.starts &= ~beyond;
        }
        return one;
    }

    template <typename Straight> __device__ __forceinline__ void find_states(Straight straight, const Stretch& of) {
        Prepared<V, S> prepared[STRETCH][N];
        const unsigned known = this->prepare_steps(at(0), prepared);
        S state[N];  // even where the stretch has no steps: the warps of a unit go together
        if (row) states.take(state, known);
        Values<S, N> before[STRETCH];
#pragma unroll
        for (int which = 0; which < PARTS; ++which) {
            const Part one = part(straight, of, which);
            if (which ? !straight && small : row == 0) {
                const Values<S, N> saved = In::C::get(at(which));
                if (of.place.block + which == 0)
                    thread.initial(state);
                else
#pragma unroll
                    for (int i = 0; i < N; ++i) state[i] = saved.get(i);
            }
            this->follow_states(straight, one.bits, prepared + which * T, state, before + which * T);
        }
        if (row + STRETCH < every) states.give(thread.warp + 1, state);
        this->keep_states(at(0), before);
    }
    // One step back, or none where there is padding.
    template <typename Straight>
    __device__ __forceinline__ S back(Straight straight, const Bits& bits, int t, const Linear<S>& linear, S carry,
                                      S& gc) const {
        const S before = retreat<V>(linear, carry, gc);
        return across<V>(bits, t, skips<V>(straight, bits, t) ? carry : before);
    }
    // What the stretch does to any carry.
    template <typename Straight> __device__ __forceinline__ void sum_up(Straight straight, const Stretch& of) {
        Product<S> product[N];
        S sum[N] = {};
        this->out_to(straight, of.place, of.first);
        int was = 0;  // where grad_x is
#pragma unroll 1
        for (int which = PARTS - 1; which >= 0; --which) {
            const Part one = part(straight, of, which);
            grad_x.move(straight, one.from - was), was = one.from;
            Linear<S> linear[T][N];
            this->linearise_all(straight, at(which), of.first + one.from, one.left, one.bits, linear);
            Waits::shorten(linear);
#pragma unroll
            for (int t = T - 1; t >= 0; --t)
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    S gc;
                    sum[i] = back(straight, one.bits, t, linear[t][i], sum[i], gc);
                    const Factor<S>& keep = linear[t][i].keep;
                    if (!skips<V>(straight, one.bits, t)) product[i].times(keep, keep.gone());
                }
            Waits::put(waiting(which), linear);
        }
        grad_x.move(straight, -was);
        Summary<S> summary[N];
#pragma unroll
        for (int i = 0; i < N; ++i) summary[i] = settled(product[i], sum[i], V::STARTING && of.bits.starts);
        exchange.put(order(), summary);
    }
    // From the part's start to its end.
    template <typename Straight>
    __device__ __forceinline__ void follow(Straight straight, const Bits& bits, const Linear<S> (&linear)[T][N],
                                           S (&carry)[N], S (&gc)[T][N]) const {
#pragma unroll
        for (int t = T - 1; t >= 0; --t)
#pragma unroll
            for (int i = 0; i < N; ++i) carry[i] = back(straight, bits, t, linear[t][i], carry[i], gc[t][i]);
    }
    __device__ __forceinline__ void start(S (&carry)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) carry[i] = exchange.start(order(), i);
    }
    template <typename Straight> __device__ __forceinline__ void walk(Straight straight, const Stretch& of) {
        S carry[N];
        start(carry);
        int was = 0;  // where the other cursors are
#pragma unroll 1
        for (int which = PARTS - 1; which >= 0; --which) {
            const Part one = part(straight, of, which);
            grad_u.move(straight, one.from - was), grad_weight.move(straight, one.from - was), was = one.from;
            Linear<S> linear[T][N];
            Waits::get(thread.column, waiting(which), linear);
            S gc[T][N], terms[T][TERMS];
            follow(straight, one.bits, linear, carry, gc);
            this->store_gradients(straight, one.left, one.bits, linear, gc, terms);
            if constexpr (SUMS)
#pragma unroll
                for (int i = 0; i < N * SUMS; ++i) {
#pragma unroll
                    for (int t = T - 2; t >= 0; --t) terms[t][i] = terms[t + 1][i] + terms[t][i];
                    sums[((thread.warp * PARTS + which) * TERMS + i) * 32] = terms[0][i];
                }
        }
        grad_u.move(straight, -was), grad_weight.move(straight, -was);
        if (of.first == 0 && of.left) this->end(carry);
    }
    // A span's groups, when all warps have theirs: in the order of one thread; then its chunks', from the first on.
    __device__ __forceinline__ void add_up(unsigned span) const {
        S sum[TERMS * 2] = {};
#pragma unroll 1
        for (int group = warps() * PARTS - 1; group >= 0; --group)
#pragma unroll
            for (int i = 0; i < N * SUMS; ++i) {
                Sum<S> one = {sum[2 * i], sum[2 * i + 1]};
                one.add(sums[(group * TERMS + i) * 32]);
                sum[2 * i] = one.total, sum[2 * i + 1] = one.lost;
            }
        if (GENERAL && exchange.chunks > 1)
#pragma unroll
            for (int i = 0; i < N * SUMS; ++i) {
                Sum<S> all;
#pragma unroll 1
                for (int chunk = 0; chunk < exchange.chunks; ++chunk) all.add(exchange.of_chunk(chunk, sum[2 * i]));
                sum[2 * i] = all.total;
            }
        if (lane.chunk == 0) this->leave(sum, static_cast<long long>(span) * args.batch + lane.row, args.rows > 1);
    }

    __device__ __forceinline__ void run() {
        unsigned span = exchange.first_span();
        Place here = place(span, 0);
        load(span, here);
        unsigned last = ~0u;                 // the span whose sums are to be added up,
        const bool adds = thread.warp == 0;  // while others wait for the warp that talks
        while (span < args.spans) {
            unsigned taken = 0;
            if (threadIdx.x == 0) taken = exchange.take_span();
            const bool whole = plain && !small && __all_sync(0xffffffffu, steps(here) == STRETCH);
            Stretch of;
            async_wait();
            if (whole) {
                of = stretch(Bool<true>(), span, here);
                if constexpr (RECOMPUTE) find_states(Bool<true>(), of);
                sum_up(Bool<true>(), of);
            } else if (GENERAL) {
                of = stretch(Bool<false>(), span, here);
                if constexpr (RECOMPUTE) find_states(Bool<false>(), of);
                sum_up(Bool<false>(), of);
            }
            if (threadIdx.x == 0) exchange.notes[0] = taken;
            exchange.meet();
            const unsigned next = exchange.notes[0];
            const bool talks = GENERAL && exchange.talks();
            Place there;
            if (talks) {  // first, for all wait
                S value[N];
                if (span <= exchange.anchor) this->begin(value);
                exchange.find_starts(span, value);
            } else {
                there = place(next, 0), load(next, there);
            }
            if (SUMS && adds && last < args.spans) add_up(last);
            exchange.meet();
            if (talks) there = place(next, 0), load(next, there);
            exchange.mend(span, [&](int stretch, S(&end)[N]) {
                if (stretch != order()) return false;
                start(end);
#pragma unroll 1
                for (int which = PARTS - 1; which >= 0; --which) {
                    Linear<S> linear[T][N];
                    S gc[T][N];
                    Waits::get(thread.column, waiting(which), linear);
                    follow(Bool<false>(), part(Bool<false>(), of, which).bits, linear, end, gc);
                }
                return true;
            });
            if (whole)
                walk(Bool<true>(), of);
            else if (GENERAL)
                walk(Bool<false>(), of);
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
