// The scheduler and the statistics behind cuda_on_cpu.h: compiled once, and never instrumented by a sanitizer itself.
// Where kernels are (CUSRU_SANITIZE_ADDRESS, CUSRU_SANITIZE_THREAD), it tells the sanitizer about fibers, and about
// nothing that CUDA does not promise: switching fibers orders no memory accesses, barriers do.
#if defined(CUSRU_SANITIZE_ADDRESS) || defined(CUSRU_SANITIZE_THREAD)
#define CUSRU_SANITIZED
#endif
#include "cuda_on_cpu.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__x86_64__) && !defined(CUSRU_SIMULATOR_UCONTEXT)  // to try the other way on this machine too
#define SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

#if defined(CUSRU_SANITIZE_ADDRESS)
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
#define IF_ASAN(statement) statement
#else
#define IF_ASAN(statement)
#endif

#if defined(CUSRU_SANITIZE_THREAD)
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
extern "C" void __tsan_atomic8_store(volatile unsigned char* address, unsigned char value, int order);
#define IF_TSAN(statement) statement
constexpr unsigned NO_SYNC = 1;
#else
#define IF_TSAN(statement)
#endif

// ---- switching stacks ----

#if defined(SWITCH_BY_HAND)
// Saves what the ABI lets a function keep in registers on the old stack, and its pointer in *from; the other way round
// on the new one. MXCSR and the x87 control word are the same for all fibers of a launch.
asm(R"(
.text
.globl cusru_switch_stack
.hidden cusru_switch_stack
.type cusru_switch_stack, @function
cusru_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cusru_switch_stack, .-cusru_switch_stack
)");
extern "C" void cusru_switch_stack(void** from, void* to);

static void* new_stack(char*, char* top, void (*body)()) {
    void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63));
    *--stack = nullptr;  // where body's return address would be: body never returns
    *--stack = reinterpret_cast<void*>(body);
    return stack - 6;  // six registers, whatever they hold
}
#else
static void cusru_switch_stack(void** from, void* to) {
    ucontext_t here;  // on the stack that is left: it lives as long as it is needed
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

static void* new_stack(char* bottom, char* top, void (*body)()) {
    uintptr_t place = (reinterpret_cast<uintptr_t>(top) - sizeof(ucontext_t)) & ~uintptr_t(63);
    ucontext_t* context = reinterpret_cast<ucontext_t*>(place);
    getcontext(context);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = reinterpret_cast<char*>(context) - bottom;
    context->uc_link = nullptr;
    makecontext(context, body, 0);
    return context;
}
#endif

namespace cusru_simulator {

constexpr size_t STACK = CUSRU_SIMULATOR_STACK, PAGE = 4096;
// Static shared memory ends at 48 KiB, with what a launch asks for at 227 on sm_90; gaps between.
constexpr size_t SHARED = 48 * 1024, ALL_SHARED = 227 * 1024, SHARED_ARENA = 256 * 1024;
constexpr unsigned RESIDENT_BLOCKS = 4, RESIDENT_THREADS = 2048, DECLARATIONS = 64;

// Pages at an address that is a multiple of their size.
static char* map(size_t size) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mapped = mmap(nullptr, 2 * size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* pages = static_cast<char*>(mapped);
    char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(pages) + size - 1) & ~(size - 1));
    if (aligned != pages) munmap(pages, aligned - pages);
    munmap(aligned + size, pages + size - aligned);
    return aligned;
}

// Memory that was used before. ThreadSanitizer must not see one fiber's stack become another's
// without any ordering, so there everybody gets new pages.
template <size_t SIZE, size_t GUARD> struct Pool {
    std::vector<char*> free;
    ~Pool() {
        for (char* memory : free) munmap(memory, SIZE);
    }
    char* take() {
        if (free.empty()) {
            char* memory = map(SIZE);
            if (memory != nullptr && GUARD != 0) mprotect(memory, GUARD, PROT_NONE);
            return memory;
        }
        char* memory = free.back();
        free.pop_back();
        return memory;
    }
    void give(char* memory) {
        IF_TSAN(munmap(memory, SIZE); return;)
        IF_ASAN(__asan_unpoison_memory_region(memory + GUARD, SIZE - GUARD);)  // an abandoned fiber's frames
        free.push_back(memory);
    }
};

// A launch takes the memory that one before it has left, of whatever thread of the host, and leaves it again, or frees
// it where enough is left already: threads that have stopped launching keep nothing. No lock, which a fork could find
// held.
struct Memory {
    Pool<STACK, PAGE> stacks;
    Pool<SHARED_ARENA, 0> arenas;
};
static std::atomic<Memory*> kept[8];

static Memory* take_memory() {
    for (auto& place : kept)
        if (Memory* memory = place.exchange(nullptr)) return memory;
    return new Memory;
}
static void leave_memory(Memory* memory) {
    for (auto& place : kept) {
        Memory* nobody = nullptr;
        if (place.compare_exchange_strong(nobody, memory)) return;
    }
    delete memory;
}

// ---- one launch ----

struct Access {
    uint64_t address;
    unsigned tile, ordinal;
    unsigned char kind, bytes;
};

struct Statistics {
    uint64_t bytes[KINDS], requests[KINDS], sectors[KINDS], useful[KINDS];
};

struct Arrival {  // a lane at a shuffle, vote, __syncwarp or named barrier
    Operation operation;
    unsigned mask, source;
    uint64_t value, result;
    int line;
};

struct Block;
struct Warp {
    Block* block;
    unsigned first;                 // its first thread
    unsigned lanes, ready, exited;  // masks: those it has, those that can run, those that have returned
    unsigned arrived;               // mask: those that wait for others of this warp
    bool queued;
    Fiber* fibers[32];  // null before a lane first runs
    Arrival arrivals[32];
    char arrive, depart;  // ThreadSanitizer's addresses for __syncwarp, see barrier
    std::vector<Access> accesses;
};

struct Declaration {
    const void* key;
    char* memory;
    size_t bytes;
};

struct NamedBarrier {           // in its present phase
    unsigned arrived, waiting;  // masks of warps: those that have come, and those among them that wait
    unsigned threads;           // that it is for
    int line;                   // of the latest arrival
    unsigned char clock;        // ThreadSanitizer's address
};

struct Launch;
struct Block {
    Launch* launch;
    unsigned index, threads, exited, arrived;
    int line;  // of the barrier where threads wait
    char arrive, depart;
    NamedBarrier barriers[16];
    std::vector<Warp> warps;
    char* shared = nullptr;
    size_t shared_used;
    std::vector<Declaration> declarations;
};

struct Launch {
    const char* name;
    void (*kernel)(const void*);
    const void* args;
    unsigned grid, block_size;
    size_t dynamic_shared;
    uint64_t random;
    Statistics* statistics;
    char* error;
    size_t error_size;
    Memory& memory;
    bool failed = false;
    uint64_t progress = 0, idle = 0;  // idle: runs of a warp since anything but polling happened
    void* stack_pointer = nullptr;    // the scheduler's
    std::vector<Warp*> queue = {};    // warps with a lane that can run
    // The host's stack and fiber, for the sanitizers
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_size = 0;
    void* tsan = nullptr;
    char finished = 0;

    unsigned below(unsigned bound) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return static_cast<unsigned>((random >> 32) * bound >> 32);
    }
    void wake(Warp& warp, unsigned lanes) {
        warp.ready |= lanes;
        if (!warp.queued) queue.push_back(&warp);
        warp.queued = true;
    }
};

static Launch& launch_of(Fiber& fiber) { return *fiber.warp->block->launch; }

// Back to the scheduler; for a fiber that can go on, until that switches here again.
static void leave(Fiber& fiber, bool for_good = false) {
    Launch& launch = launch_of(fiber);
    (void)for_good;
    IF_ASAN(void** fake_stack = for_good ? nullptr : &fiber.fake_stack;)
    IF_ASAN(__sanitizer_start_switch_fiber(fake_stack, launch.stack_bottom, launch.stack_size);)
    IF_TSAN(__tsan_switch_to_fiber(launch.tsan, NO_SYNC);)
    cusru_switch_stack(&fiber.stack_pointer, launch.stack_pointer);
    IF_ASAN(__sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);)
}

__attribute__((format(printf, 2, 3), noreturn)) static void fail(Fiber& fiber, const char* format, ...) {
    Launch& launch = launch_of(fiber);
    int length = snprintf(launch.error, launch.error_size, "%s: block %u, thread %u: ", launch.name, fiber.block.x,
                          fiber.thread.x);
    va_list values;
    va_start(values, format);
    vsnprintf(launch.error + length, launch.error_size - length, format, values);
    va_end(values);
    launch.failed = true;
    leave(fiber, true);
    __builtin_unreachable();
}

static void body() {
    Fiber& me = fiber();
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    Launch& launch = *block.launch;
    IF_ASAN(__sanitizer_finish_switch_fiber(nullptr, &launch.stack_bottom, &launch.stack_size);)
    launch.kernel(launch.args);
    unsigned bit = 1u << me.lane;
    warp.exited |= bit;
    warp.ready &= ~bit;
    ++block.exited;
    ++launch.progress;
    if (block.arrived != 0)
        fail(me, "divergent barrier: returned, while %u threads of its block wait at the __syncthreads of line %d",
             block.arrived, block.line);
    for (unsigned left = warp.arrived; left != 0; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        const Arrival& other = warp.arrivals[lane];
        if (other.mask & bit)
            fail(me, "returned, while lane %u waits for it in line %d with mask 0x%08x", lane, other.line, other.mask);
    }
    if (block.exited == block.threads)
        for (unsigned id = 1; id < 16; ++id)
            if (const NamedBarrier& one = block.barriers[id]; one.arrived != 0)
                fail(
                    me,
                    "returned, the last of its block, while barrier %u has but %u of %u threads, the latest of line %d",
                    id, 32 * __builtin_popcount(one.arrived), one.threads, one.line);
    IF_TSAN(__tsan_release(&launch.finished);)
    leave(me, true);
    __builtin_unreachable();
}

static bool run_lane(Launch& launch, Warp& warp, unsigned lane) {
    Fiber* fiber = warp.fibers[lane];
    if (fiber == nullptr) {
        char* stack = launch.memory.stacks.take();
        if (stack == nullptr) {
            snprintf(launch.error, launch.error_size, "%s: no memory for a thread's stack", launch.name);
            launch.failed = true;
            return false;
        }
        fiber = warp.fibers[lane] = reinterpret_cast<Fiber*>(stack + STACK - sizeof(Fiber));
        *fiber = Fiber{};
        fiber->thread = {warp.first + lane, 0, 0};
        fiber->block = {warp.block->index, 0, 0};
        fiber->block_size = {launch.block_size, 1, 1};
        fiber->grid_size = {launch.grid, 1, 1};
        fiber->counting = launch.statistics != nullptr;
        fiber->warp = &warp;
        fiber->lane = lane;
        fiber->stack_pointer = new_stack(stack + PAGE, reinterpret_cast<char*>(fiber), body);
        IF_TSAN(fiber->tsan = __tsan_create_fiber(0);)
        ++launch.progress;
    }
    IF_ASAN(char* bottom = reinterpret_cast<char*>(fiber) + sizeof(Fiber) - STACK + PAGE;)
    IF_ASAN(__sanitizer_start_switch_fiber(&launch.fake_stack, bottom, STACK - PAGE);)
    IF_TSAN(__tsan_switch_to_fiber(fiber->tsan, NO_SYNC);)
    cusru_switch_stack(&launch.stack_pointer, fiber->stack_pointer);
    IF_ASAN(__sanitizer_finish_switch_fiber(launch.fake_stack, nullptr, nullptr);)
    return !launch.failed;
}

static void end_lane(Warp& warp, unsigned lane) {
    Fiber* fiber = warp.fibers[lane];
    if (fiber == nullptr) return;
    warp.fibers[lane] = nullptr;
    IF_TSAN(__tsan_destroy_fiber(fiber->tsan);)
    warp.block->launch->memory.stacks.give(reinterpret_cast<char*>(fiber) + sizeof(Fiber) - STACK);
}

// Every lane that can run, upwards or downwards, until it waits.
static bool run_warp(Launch& launch, Warp& warp) {
    uint64_t progress = launch.progress;
    unsigned flip = launch.below(2) * 31, todo = warp.ready;
    for (unsigned i = 0; i < 32; ++i) {
        unsigned lane = i ^ flip, bit = 1u << lane;
        if (!(todo & warp.ready & bit)) continue;
        if (!run_lane(launch, warp, lane)) return false;
        if (warp.exited & bit) end_lane(warp, lane);
    }
    launch.idle = launch.progress == progress ? launch.idle + 1 : 0;
    return true;
}

// ---- what a profiler would say ----

static uint64_t distinct(std::vector<Access>::iterator from, std::vector<Access>::iterator to, unsigned shift) {
    uint64_t count = 0, end = 0;  // sorted by address: end of what has been counted, in units of 2^shift bytes
    for (; from != to; ++from) {
        uint64_t first = from->address >> shift, last = ((from->address + from->bytes - 1) >> shift) + 1;
        if (last > end) count += last - std::max(first, end), end = last;
    }
    return count;
}

static void count(Warp& warp, Statistics& statistics) {
    auto by_request = [](const Access& a, const Access& b) {
        return a.kind != b.kind         ? a.kind < b.kind
               : a.tile != b.tile       ? a.tile < b.tile
               : a.ordinal != b.ordinal ? a.ordinal < b.ordinal
                                        : a.address < b.address;
    };
    auto by_address = [](const Access& a, const Access& b) { return a.address < b.address; };
    auto& list = warp.accesses;
    std::sort(list.begin(), list.end(), by_request);
    for (auto tile = list.begin(); tile != list.end();) {
        auto request = tile, i = tile;
        for (; i != list.end() && i->kind == tile->kind && i->tile == tile->tile; ++i)
            if (i->ordinal != request->ordinal) {
                statistics.bytes[tile->kind] += distinct(request, i, 0);
                ++statistics.requests[tile->kind];
                request = i;
            }
        statistics.bytes[tile->kind] += distinct(request, i, 0);
        ++statistics.requests[tile->kind];
        std::sort(tile, i, by_address);
        statistics.useful[tile->kind] += distinct(tile, i, 0);
        statistics.sectors[tile->kind] += distinct(tile, i, 5);
        tile = i;
    }
    list.clear();
}

// ---- what kernels call ----

void record(const void* address, unsigned bytes, Kind kind) {
    Fiber& me = fiber();
    IF_TSAN(__tsan_switch_to_fiber(launch_of(me).tsan, NO_SYNC);)  // the list is the scheduler's, not this thread's
    me.warp->accesses.push_back({reinterpret_cast<uint64_t>(address), me.tile, me.accesses[kind]++,
                                 static_cast<unsigned char>(kind), static_cast<unsigned char>(bytes)});
    IF_TSAN(__tsan_switch_to_fiber(me.tsan, NO_SYNC);)
}

void bad_address(const void* address, unsigned bytes) {
    fail(fiber(), "misaligned or null address %p of an access of %u bytes", address, bytes);
}

void barrier(int line) {
    Fiber& me = fiber();
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    Launch& launch = *block.launch;
    if (block.exited != 0)  // hardware lets this pass; CUDA's documentation does not
        fail(me, "divergent barrier: %u threads of the block returned before the __syncthreads of line %d",
             block.exited, line);
    if (block.arrived != 0 && block.line != line)
        fail(me, "divergent barrier: at the __syncthreads of line %d, while %u others wait at that of line %d", line,
             block.arrived, block.line);
    block.line = line;
    ++launch.progress;
    // Two addresses: a thread that is already on its way to the next barrier must not seem ordered before one that is
    // still to leave this one.
    IF_TSAN(__tsan_release(&block.arrive);)
    if (++block.arrived == block.threads) {
        IF_TSAN(__tsan_acquire(&block.arrive); __tsan_release(&block.depart);)
        block.arrived = 0;
        for (Warp& other : block.warps) launch.wake(other, other.lanes);
    } else {
        warp.ready &= ~(1u << me.lane);
        leave(me);
        IF_TSAN(__tsan_acquire(&block.depart);)
    }
}

// Notes a lane that is to meet those of the mask. True for the last of them; the others have to wait.
static bool meet(Fiber& me, Operation operation, unsigned mask, uint64_t value, unsigned source, int line) {
    Warp& warp = *me.warp;
    unsigned bit = 1u << me.lane;
    if (!(mask & bit)) fail(me, "line %d: mask 0x%08x does not name the calling lane %u", line, mask, me.lane);
    if (unsigned gone = mask & (warp.exited | ~warp.lanes))
        fail(me, "line %d: mask 0x%08x names lane %d, which has returned or does not exist", line, mask,
             __builtin_ctz(gone));
    // Two lanes that name each other must agree. (A lane that only one of them names may first meet others elsewhere.)
    for (unsigned left = warp.arrived & mask; left != 0; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        const Arrival& other = warp.arrivals[lane];
        if (other.mask == mask && other.operation == operation) break;  // then so do all the others of this mask
        if (other.mask & bit)
            fail(me, "line %d: arrives with mask 0x%08x, while lane %u waits in line %d with mask 0x%08x%s", line, mask,
                 lane, other.line, other.mask, other.mask == mask ? " at another operation" : "");
    }
    warp.arrivals[me.lane] = {operation, mask, source, value, 0, line};
    warp.arrived |= bit;
    ++warp.block->launch->progress;
    bool last = (warp.arrived & mask) == mask;
    if (!last) warp.ready &= ~bit;
    return last;
}

uint64_t exchange(Operation operation, unsigned mask, uint64_t value, unsigned source, int line) {
    Fiber& me = fiber();
    Warp& warp = *me.warp;
    bool last = meet(me, operation, mask, value, source, line);
    // Only __syncwarp orders memory; shuffles and votes do not.
    IF_TSAN(if (operation == SYNC) __tsan_release(&warp.arrive);)
    if (!last) {
        leave(me);
        IF_TSAN(if (operation == SYNC) __tsan_acquire(&warp.depart);)
        return warp.arrivals[me.lane].result;
    }
    IF_TSAN(if (operation == SYNC) {
        __tsan_acquire(&warp.arrive);
        __tsan_release(&warp.depart);
    })
    uint64_t votes = 0;
    if (operation == VOTE)
        for (unsigned left = mask; left != 0; left &= left - 1)
            votes |= (warp.arrivals[__builtin_ctz(left)].value & 1) << __builtin_ctz(left);
    for (unsigned left = mask; left != 0; left &= left - 1) {
        Arrival& one = warp.arrivals[__builtin_ctz(left)];
        bool named = one.source < 32 && (mask & 1u << one.source);  // another lane's value is undefined: here a NaN
        one.result = operation == VOTE ? votes : named ? warp.arrivals[one.source].value : ~uint64_t(0);
    }
    warp.arrived &= ~mask;
    warp.block->launch->wake(warp, mask);
    return warp.arrivals[me.lane].result;
}

#if defined(CUSRU_SANITIZE_THREAD)
// What every lane of a warp does at a named barrier, though one of them finds out when.
static void for_lanes(Fiber& me, const Warp& warp, void (*action)(void*), void* address) {
    for (unsigned left = warp.lanes; left != 0; left &= left - 1) {
        __tsan_switch_to_fiber(warp.fibers[__builtin_ctz(left)]->tsan, NO_SYNC);
        action(address);
    }
    __tsan_switch_to_fiber(me.tsan, NO_SYNC);
}
#endif

// A warp's last lane arrives for the whole warp. The others are held until then, or until the barrier is complete.
void named_barrier(Operation operation, int id, int threads, int line) {
    Fiber& me = fiber();
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    Launch& launch = *block.launch;
    if (id < 1 || id > 15 || threads < 32 || threads % 32 != 0 || unsigned(threads) > (block.threads + 31) / 32 * 32)
        fail(me, "line %d: barrier %d of %d threads; there are barriers 1 to 15, of 32 for each warp", line, id,
             threads);
    uint64_t value = uint64_t(threads) << 4 | unsigned(id);
    if (!meet(me, operation, warp.lanes, value, me.lane, line)) return leave(me);
    for (unsigned left = warp.lanes; left != 0; left &= left - 1) {
        const Arrival& other = warp.arrivals[__builtin_ctz(left)];
        if (other.line != line || other.value != value)
            fail(me,
                 "divergent barrier: line %d, barrier %d of %d threads, while lane %u is in line %d, barrier %u of %u",
                 line, id, threads, __builtin_ctz(left), other.line, unsigned(other.value & 15),
                 unsigned(other.value >> 4));
    }
    warp.arrived = 0;
    NamedBarrier& one = block.barriers[id];
    unsigned bit = 1u << warp.first / 32;
    if (one.arrived != 0 && one.threads != unsigned(threads))
        fail(me, "line %d: barrier %d of %d threads, while others have come in line %d to one of %u", line, id, threads,
             one.line, one.threads);
    if (one.arrived & bit)
        fail(me, "line %d: too many arrivals: its warp is back at barrier %d, which has but %u of %u threads", line, id,
             32 * __builtin_popcount(one.arrived), one.threads);
    one.arrived |= bit;
    one.threads = threads;
    one.line = line;
    if (operation == WAIT) one.waiting |= bit;
    IF_TSAN(for_lanes(me, warp, __tsan_release, &one.clock);)
    bool complete = 32 * __builtin_popcount(one.arrived) == threads;
    if (complete) {
        if (one.waiting == 0)
            fail(me, "line %d: too many arrivals: barrier %d has all its %d threads, and nobody waits", line, id,
                 threads);
        for (unsigned left = one.waiting; left != 0; left &= left - 1) {
            Warp& other = block.warps[__builtin_ctz(left)];
            IF_TSAN(for_lanes(me, other, __tsan_acquire, &one.clock);)
            launch.wake(other, other.lanes);
        }
        one.arrived = one.waiting = 0;
        // The next phase orders nothing after this one's arrivals: a store with release forgets them. It is the
        // scheduler's, which knows of no thread.
        IF_TSAN(__tsan_switch_to_fiber(launch.tsan, NO_SYNC); __tsan_atomic8_store(&one.clock, 0, __ATOMIC_RELEASE);
                __tsan_switch_to_fiber(me.tsan, NO_SYNC);)
    }
    if (operation == ARRIVE) return launch.wake(warp, warp.lanes);
    if (complete) return;
    warp.ready = 0;
    leave(me);
}

unsigned active_lanes() {
    Warp& warp = *fiber().warp;
    return warp.lanes & ~warp.exited;
}

static const char dynamic_declaration = 0;

void* shared_memory(const void* declaration, size_t bytes) {
    Fiber& me = fiber();
    Block& block = *me.warp->block;
    for (const Declaration& known : block.declarations)
        if (known.key == declaration && known.bytes == bytes) return known.memory;
    char* memory = block.shared + block.shared_used;
    block.shared_used += (bytes + 15) / 16 * 16 + 16;  // a gap, which AddressSanitizer knows of
    size_t total = bytes, dynamic = launch_of(me).dynamic_shared;
    for (const Declaration& known : block.declarations) total += known.bytes;
    bool has_dynamic = declaration == &dynamic_declaration;
    for (const Declaration& known : block.declarations) has_dynamic |= known.key == &dynamic_declaration;
    if (total > ALL_SHARED) fail(me, "%zu bytes of shared memory; a block has at most 227 KiB", total);
    if (total - (has_dynamic ? dynamic : 0) > SHARED || block.shared_used > SHARED_ARENA ||
        block.declarations.size() == DECLARATIONS)
        fail(me, "%zu bytes of shared memory; a block has at most 48 KiB", total);
    IF_ASAN(__asan_unpoison_memory_region(memory, (bytes + 7) / 8 * 8);)
    // A NaN in every floating-point format. Not by memset, which ThreadSanitizer would take for this thread's own
    // writing.
    for (size_t i = 0; i < (bytes + 7) / 8; ++i) reinterpret_cast<volatile uint64_t*>(memory)[i] = ~uint64_t(0);
    block.declarations.push_back({declaration, memory, bytes});
    return memory;
}
void* dynamic_shared_memory() { return shared_memory(&dynamic_declaration, launch_of(fiber()).dynamic_shared); }

void too_many_copies() { fail(fiber(), "more copies to shared memory at once than a thread may have here"); }

// A fence orders what is before it before what is after it only where an atomic access carries that to another thread.
// So: atomics after a fence release; a fence acquires what this thread's last atomics read. (This orders slightly more
// than a GPU does: accesses between the fence and the atomic are released too.)
void fence() {
    Fiber& me = fiber();
    me.fenced = true;
    IF_TSAN(for (const void* address : me.atomics) if (address != nullptr) __tsan_acquire(const_cast<void*>(address));)
}

void before_atomic(const void* address) {
    (void)address;
    IF_TSAN(if (fiber().fenced) __tsan_release(const_cast<void*>(address));)
}

void after_atomic(const void* address, bool changed) {
    Fiber& me = fiber();
    me.atomics[me.atomic_count++ % 8] = address;
    if (changed) {
        ++launch_of(me).progress;
        leave(me);
    }
}

// A thread that looks at a flag. It makes progress if it looks at another one, or sees another value.
void poll(const void* address, uint64_t value) {
    Fiber& me = fiber();
    if (me.polled != address || me.polled_value != value) ++launch_of(me).progress;
    me.polled = address;
    me.polled_value = value;
    leave(me);
}

// ---- launching ----

static bool start_block(Launch& launch, Block& block, unsigned index) {
    unsigned warps = (launch.block_size + 31) / 32;
    block.launch = &launch;
    block.index = index;
    block.threads = launch.block_size;
    block.exited = block.arrived = 0;
    std::fill(block.barriers, block.barriers + 16, NamedBarrier{});
    block.warps.resize(warps);
    block.declarations.clear();
    block.declarations.reserve(DECLARATIONS);
    block.shared_used = 16;
    if (block.shared != nullptr) launch.memory.arenas.give(block.shared);
    block.shared = launch.memory.arenas.take();
    if (block.shared == nullptr) {
        snprintf(launch.error, launch.error_size, "%s: no memory for a block's shared memory", launch.name);
        launch.failed = true;
        return false;
    }
    IF_ASAN(__asan_poison_memory_region(block.shared, SHARED_ARENA);)
    for (unsigned i = 0; i < warps; ++i) {
        Warp& warp = block.warps[i];
        unsigned lanes = std::min(32u, launch.block_size - 32 * i);
        warp.block = &block;
        warp.first = 32 * i;
        warp.lanes = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warp.ready = warp.exited = warp.arrived = 0;
        warp.queued = false;
        std::fill(warp.fibers, warp.fibers + 32, nullptr);
        launch.wake(warp, warp.lanes);
    }
    return true;
}

static void describe_deadlock(Launch& launch, const std::vector<std::unique_ptr<Block>>& blocks, const char* what) {
    int length = snprintf(launch.error, launch.error_size, "%s: deadlock: %s", launch.name, what);
    auto say = [&](auto... values) {
        if (length < static_cast<int>(launch.error_size))
            length += snprintf(launch.error + length, launch.error_size - length, values...);
    };
    for (const auto& block : blocks) {
        if (block->exited == block->threads) continue;
        say("; block %u: %u of %u threads returned", block->index, block->exited, block->threads);
        if (block->arrived != 0) say(", %u at the __syncthreads of line %d", block->arrived, block->line);
        for (unsigned id = 1; id < 16; ++id)
            if (const NamedBarrier& one = block->barriers[id]; one.arrived != 0)
                say(", barrier %u has %u of %u threads, the latest of line %d", id,
                    32 * __builtin_popcount(one.arrived), one.threads, one.line);
        for (const Warp& warp : block->warps) {
            if (warp.arrived == 0) continue;
            const Arrival& one = warp.arrivals[__builtin_ctz(warp.arrived)];
            say(", lanes 0x%08x of warp %u wait in line %d for lanes 0x%08x", warp.arrived, warp.first / 32, one.line,
                one.mask & ~warp.arrived);
            break;  // one warp says enough
        }
    }
}

static void simulate(Launch& launch) {
    unsigned resident = std::max(2u, std::min(RESIDENT_BLOCKS, RESIDENT_THREADS / launch.block_size));
    std::vector<std::unique_ptr<Block>> blocks;
    launch.queue.reserve(resident * 32);  // so that no fiber ever makes it grow, and a sanitizer sees that
    unsigned left = launch.grid;          // blocks yet to start, the last one first
    while (left > 0 && blocks.size() < resident) {
        blocks.push_back(std::make_unique<Block>());
        if (!start_block(launch, *blocks.back(), --left)) break;
    }
    while (!launch.failed && !launch.queue.empty()) {
        unsigned i = launch.below(static_cast<unsigned>(launch.queue.size()));
        Warp& warp = *launch.queue[i];
        if (!run_warp(launch, warp)) break;
        if (warp.ready == 0) {
            launch.queue[i] = launch.queue.back();
            launch.queue.pop_back();
            warp.queued = false;
            if (warp.exited == warp.lanes && launch.statistics != nullptr) count(warp, *launch.statistics);
            Block& block = *warp.block;
            if (block.exited == block.threads && left > 0 && !start_block(launch, block, --left)) break;
        }
        if (launch.idle > 10000 + 100 * launch.queue.size()) {
            describe_deadlock(launch, blocks, "threads poll flags that nobody changes");
            break;
        }
    }
    bool stuck = std::any_of(blocks.begin(), blocks.end(), [](auto& block) { return block->exited != block->threads; });
    if (launch.error[0] == 0 && stuck) describe_deadlock(launch, blocks, "every thread waits");
    for (auto& block : blocks) {
        for (Warp& warp : block->warps)
            for (unsigned lane = 0; lane < 32; ++lane) end_lane(warp, lane);
        if (block->shared != nullptr) launch.memory.arenas.give(block->shared);
    }
}

}  // namespace cusru_simulator

// Runs the kernel for every thread of the grid. `error` is empty afterwards, or says what went wrong.
extern "C" __attribute__((visibility("default"))) void cusru_simulate(const char* name, void (*kernel)(const void*),
                                                                      bool flushes, const void* args, size_t args_size,
                                                                      unsigned grid, unsigned block_size,
                                                                      size_t dynamic_shared, uint64_t seed,
                                                                      cusru_simulator::Statistics* statistics,
                                                                      char* error, size_t error_size) {
    using namespace cusru_simulator;
    error[0] = 0;
    if (grid == 0) return;
    alignas(64) char aligned[4096];
    if (args_size > sizeof aligned || block_size == 0 || block_size > 1024) {
        snprintf(error, error_size, "%s: a block has 1 to 1024 threads, the arguments at most 4096 bytes", name);
        return;
    }
    memcpy(aligned, args, args_size);
    uint64_t random = (seed + 1) * 0x9e3779b97f4a7c15u;
    Memory* memory = take_memory();
    Launch launch{name,       kernel, aligned,    grid,   block_size, dynamic_shared, random != 0 ? random : 1,
                  statistics, error,  error_size, *memory};
    IF_TSAN(launch.tsan = __tsan_get_current_fiber();)
#if defined(__SSE__)
    unsigned control = _mm_getcsr();
    constexpr unsigned FLUSH = 0x8040;  // of results and of arguments
    _mm_setcsr(flushes ? control | FLUSH : control & ~FLUSH);
#elif defined(__aarch64__)
    uint64_t control;
    asm volatile("mrs %0, fpcr" : "=r"(control));
    constexpr uint64_t FLUSH = 1u << 24;
    asm volatile("msr fpcr, %0" : : "r"(flushes ? control | FLUSH : control & ~FLUSH));
#endif
    simulate(launch);
#if defined(__SSE__)
    _mm_setcsr(control);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(control));
#endif
    leave_memory(memory);
    IF_TSAN(__tsan_acquire(&launch.finished);)
}
