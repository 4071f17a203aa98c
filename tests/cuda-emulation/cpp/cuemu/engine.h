// Fibers, barriers and launches. Sanitizers are told of every switch.
#pragma once
#include "../module.h"

#if defined(__x86_64__) && !defined(CUEMU_UCONTEXT)
#define CUEMU_ASSEMBLY 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUEMU_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUEMU_TSAN 1
// GCC expands small memcpy and memset without telling the sanitizer.
extern "C" void __tsan_read_range(void *, unsigned long);
extern "C" void __tsan_write_range(void *, unsigned long);
#define CUEMU_RELEASE(p) __tsan_release(p)
#define CUEMU_ACQUIRE(p) __tsan_acquire(p)
#define CUEMU_READS(p, n) __tsan_read_range((void *)(p), n)
#define CUEMU_WRITES(p, n) __tsan_write_range((void *)(p), n)
#else
#define CUEMU_RELEASE(p) (void)0
#define CUEMU_ACQUIRE(p) (void)0
#define CUEMU_READS(p, n) (void)0
#define CUEMU_WRITES(p, n) (void)0
#endif
#define CUEMU_PLAIN __attribute__((no_sanitize_address, no_sanitize_thread, no_sanitize_undefined))

// The bounds of the section of __shared__ variables; null where there is none.
extern "C" {
extern char __start_cuemu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuemu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace cuemu {

// Where in the source a thread waits, and for what.
struct Site {
    const char *file;
    int line;
    const char *what;
};
#define CUEMU_SITE(what) (cuemu::Site{__FILE__, __LINE__, what})

enum State : uint8_t { READY, AT_BARRIER, AT_WARP, EXITED };

// A cp.async that was started.
struct Copy {
    void *to;
    const void *from;
    unsigned bytes;
    int group;
};

struct Fiber {
    void *sp = nullptr;
    char *stack = nullptr; // null until it runs
    unsigned stack_number = 0;
    uint3 index{};
    unsigned flat = 0;
    State state = EXITED;
    Site site{};
    // Of the operation of its warp that it waits in.
    unsigned mask = 0;
    void *data = nullptr;
    const void *operation = nullptr;
    bool predicate = false; // of __syncthreads_or and the like
    Copy copies[64];
    int copy_count = 0, copy_group = 0;
    void *fake_stack = nullptr, *tsan = nullptr;
#if !CUEMU_ASSEMBLY
    ucontext_t context{};
#endif
};

struct Engine {
    Fiber fibers[CUEMU_THREADS];
    Fiber *current = nullptr;
    const CuemuLaunch *launch = nullptr;
    uint3 block{};
    dim3 block_size, grid_size;
    unsigned threads = 0, free_count = 0;
    uint16_t free_stacks[CUEMU_THREADS];
    char *dynamic_shared = nullptr;
    unsigned votes = 0; // how many threads came to the last barrier with a true predicate
    uint64_t random = 1, switches = 0;
    void *scheduler = nullptr, *scheduler_fake = nullptr, *scheduler_tsan = nullptr;
    const void *scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    // Happens-before edges: barriers take turns, since a thread that runs ahead must not leak its next release.
    uint64_t barrier_tag[2] = {}, in_tag = 0, out_tag = 0, post_tag[CUEMU_THREADS] = {}, go_tag[CUEMU_THREADS] = {};
    unsigned barriers = 0;
#if !CUEMU_ASSEMBLY
    ucontext_t scheduler_context{};
#endif
};
inline Engine engine;

[[noreturn]] CUEMU_PLAIN inline void fail(const char *message) {
    Engine &e = engine;
    fprintf(stderr, "cuemu: %s (kernel %s, block %u,%u,%u)\n", message, e.launch ? e.launch->kernel->name : "?",
            e.block.x, e.block.y, e.block.z);
    int shown = 0;
    for (unsigned i = 0; i < e.threads && shown < 6; i++) {
        Fiber &f = e.fibers[i], &before = e.fibers[i ? i - 1 : 0];
        bool same = i && f.state == before.state && (f.state == EXITED || !memcmp(&f.site, &before.site, sizeof(Site)));
        if (same) continue;
        const char *doing = f.state == EXITED ? "has exited" : f.state == READY ? "runs" : "waits";
        fprintf(stderr, "  thread %u and on: %s", i, doing);
        if (f.state != EXITED && f.site.file) fprintf(stderr, ", %s at %s:%d", f.site.what, f.site.file, f.site.line);
        fputc('\n', stderr);
        shown++;
    }
    abort();
}

// --- Switching --------------------------------------------------------------------------------------------------

#if CUEMU_ASSEMBLY
extern "C" void cuemu_switch(void **save, void *to) __asm__("cuemu_switch_local");
__asm__(R"(
.text
.p2align 4
.type cuemu_switch_local,@function
cuemu_switch_local:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
.size cuemu_switch_local,.-cuemu_switch_local
)");
#endif

CUEMU_PLAIN inline void to_scheduler(Fiber *me, bool last) {
    Engine &e = engine;
#if CUEMU_ASAN
    __sanitizer_start_switch_fiber(last ? nullptr : &me->fake_stack, e.scheduler_stack, e.scheduler_size);
#endif
#if CUEMU_TSAN
    __tsan_switch_to_fiber(e.scheduler_tsan, 1 /* no happens-before edge */);
#endif
#if CUEMU_ASSEMBLY
    cuemu_switch(&me->sp, e.scheduler);
#else
    swapcontext(&me->context, &e.scheduler_context);
#endif
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(me->fake_stack, &e.scheduler_stack, &e.scheduler_size);
#endif
    (void)last;
}

CUEMU_PLAIN inline void fiber_main() {
    Engine &e = engine;
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &e.scheduler_stack, &e.scheduler_size);
#endif
    Fiber *me = e.current;
    CUEMU_ACQUIRE(&e.in_tag);
    e.launch->kernel->call(e.launch->parameters);
    CUEMU_RELEASE(&e.out_tag);
    me->state = EXITED;
    to_scheduler(me, true);
    abort();
}

// Gives a thread that has not run yet a stack: the one that was given back last, which the cache holds.
CUEMU_PLAIN inline void start(Fiber &f) {
    Engine &e = engine;
#if CUEMU_TSAN
    unsigned number = f.flat; // one that two fibers share would look like a race
#else
    unsigned number = e.free_stacks[--e.free_count];
#endif
    f.stack = e.launch->stacks + number * CUEMU_STACK;
    f.stack_number = number;
#if CUEMU_TSAN
    if (!f.tsan) f.tsan = __tsan_create_fiber(0);
#endif
#if CUEMU_ASAN
    __asan_unpoison_memory_region(f.stack + 4096, CUEMU_STACK - 4096);
#endif
#if CUEMU_ASSEMBLY
    // Aligned to 16; moved a little from stack to stack, or all would share their sets of the cache.
    void **sp = (void **)(f.stack + CUEMU_STACK - 64 - number * 320 % 16384);
    *--sp = nullptr; // where a return address would stand
    *--sp = (void *)&fiber_main;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = CUEMU_STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, (void (*)())fiber_main, 0);
#endif
}

CUEMU_PLAIN inline void resume(Fiber *f) {
    Engine &e = engine;
    if (!f->stack) start(*f);
    e.current = f;
    e.switches++;
#if CUEMU_ASAN
    __sanitizer_start_switch_fiber(&e.scheduler_fake, f->stack, CUEMU_STACK);
#endif
#if CUEMU_TSAN
    __tsan_switch_to_fiber(f->tsan, 1);
#endif
#if CUEMU_ASSEMBLY
    cuemu_switch(&e.scheduler, f->sp);
#else
    swapcontext(&e.scheduler_context, &f->context);
#endif
#if CUEMU_ASAN
    __sanitizer_finish_switch_fiber(e.scheduler_fake, nullptr, nullptr);
#endif
    if (f->state != EXITED) return;
#if !CUEMU_TSAN
    e.free_stacks[e.free_count++] = f->stack_number;
#endif
    f->stack = nullptr;
}

// --- The threads of a block -------------------------------------------------------------------------------------

CUEMU_PLAIN inline void shuffle(unsigned *list, size_t length) {
    for (size_t i = length; i > 1; i--) {
        uint64_t &x = engine.random;
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        unsigned &other = list[x % i], kept = list[i - 1];
        list[i - 1] = other, other = kept;
    }
}

// 0 to length - 1 as the launch orders them.
CUEMU_PLAIN inline void in_order(unsigned *list, size_t length) {
    for (size_t i = 0; i < length; i++) list[i] = engine.launch->order == 1 ? length - 1 - i : i;
}

// Until every lane of the warp waits at a barrier or has exited.
CUEMU_PLAIN inline void run_warp(unsigned warp, unsigned *lanes) {
    for (bool progress = true; progress;) {
        progress = false;
        if (engine.launch->order == 2) shuffle(lanes, 32);
        for (unsigned i = 0; i < 32; i++) {
            unsigned thread = warp * 32 + lanes[i];
            if (thread >= engine.threads || engine.fibers[thread].state != READY) continue;
            resume(&engine.fibers[thread]);
            progress = true;
        }
    }
}

// No thread can go on, though some wait in an operation of their warp.
[[noreturn]] CUEMU_PLAIN inline void fail_stuck() {
    Engine &e = engine;
    for (unsigned i = 0; i < e.threads; i++) {
        Fiber &f = e.fibers[i], *warp = &e.fibers[i / 32 * 32];
        for (unsigned l = 0; f.state == AT_WARP && l < 32 && i / 32 * 32 + l < e.threads; l++)
            if (f.mask >> l & 1 && warp[l].state == EXITED) fail("a lane that a warp mask names has exited");
    }
    fail("deadlock: some lanes wait in a warp operation that others never reach");
}

// Lets all go on if all wait at one barrier; false when all have exited.
CUEMU_PLAIN inline bool pass_barrier() {
    Engine &e = engine;
    unsigned exited = 0, waiting = 0, votes = 0;
    Site first{};
    bool same = true;
    for (unsigned i = 0; i < e.threads; i++) {
        Fiber &f = e.fibers[i];
        exited += f.state == EXITED;
        if (f.state != AT_BARRIER) continue;
        if (!waiting++) first = f.site;
        same = same && first.line == f.site.line && first.file == f.site.file;
        votes += f.predicate;
    }
    if (exited == e.threads) return false;
    if (waiting + exited != e.threads) fail_stuck();
    if (exited) fail("some threads exited before a __syncthreads that the others reached");
    if (!same) fail("threads of one block wait at different __syncthreads");
    for (unsigned i = 0; i < e.threads; i++) e.fibers[i].state = READY;
    e.votes = votes;
    e.barriers++;
    return true;
}

// Warps run as far apart as the barriers allow: in step, they would hide a missing barrier.
CUEMU_PLAIN inline void run_block() {
    Engine &e = engine;
    unsigned warp_count = (e.threads + 31) / 32, warps[CUEMU_THREADS / 32], lanes[32];
    in_order(warps, warp_count);
    in_order(lanes, 32);
    for (unsigned i = 0; i < e.threads; i++) {
        Fiber &f = e.fibers[i];
        f.flat = i;
        f.state = READY;
        f.site = {};
        f.copy_count = f.copy_group = 0;
        f.index = {i % e.block_size.x, i / e.block_size.x % e.block_size.y, i / (e.block_size.x * e.block_size.y)};
    }
    do {
        if (e.launch->order == 2) shuffle(warps, warp_count);
        for (unsigned i = 0; i < warp_count; i++) run_warp(warps[i], lanes);
    } while (pass_barrier());
}

CUEMU_PLAIN inline unsigned barrier(Site site, bool predicate) {
    Fiber *me = engine.current;
    me->site = site;
    me->predicate = predicate;
    me->state = AT_BARRIER;
    auto *tag = &engine.barrier_tag[engine.barriers & 1];
    (void)tag;
    CUEMU_RELEASE(tag);
    to_scheduler(me, false);
    CUEMU_ACQUIRE(tag);
    return engine.votes;
}

// --- Launches ---------------------------------------------------------------------------------------------------

CUEMU_PLAIN inline void fill(char *from, char *to) {
    for (; from < to; from++) *(volatile char *)from = (char)0xff;
}

// Memory that starts as NaN and is as long as was asked for, so that a sanitizer sees reads beyond it.
CUEMU_PLAIN inline void run_with_shared(size_t bytes) {
    size_t whole = (bytes + 127) / 128 * 128;
    char *shared = bytes ? (char *)aligned_alloc(128, whole) : nullptr;
    if (bytes && !shared) fail("no memory for dynamic shared memory");
    fill(shared, shared + whole);
    fill(__start_cuemu_shared, __stop_cuemu_shared);
    engine.dynamic_shared = shared;
#if CUEMU_ASAN
    if (whole > bytes) __asan_poison_memory_region(shared + bytes, whole - bytes);
#endif
    CUEMU_RELEASE(&engine.in_tag);
    run_block();
    CUEMU_ACQUIRE(&engine.out_tag);
#if CUEMU_ASAN
    if (whole > bytes) __asan_unpoison_memory_region(shared + bytes, whole - bytes);
#endif
    free(shared);
}

// The driver sees to it that one launch runs at a time, within the limits of a device.
CUEMU_PLAIN inline void run(const CuemuLaunch &launch) {
    Engine &e = engine;
    e.launch = &launch;
    e.block_size = {launch.block[0], launch.block[1], launch.block[2]};
    e.grid_size = {launch.grid[0], launch.grid[1], launch.grid[2]};
    e.threads = launch.block[0] * launch.block[1] * launch.block[2];
    for (e.free_count = 0; e.free_count < CUEMU_THREADS; e.free_count++)
        e.free_stacks[e.free_count] = (uint16_t)(CUEMU_THREADS - 1 - e.free_count);
    e.random = 0x9E3779B97F4A7C15ull * (1 + launch.seed);
#if CUEMU_TSAN
    e.scheduler_tsan = __tsan_get_current_fiber();
#endif
    size_t blocks = (size_t)launch.grid[0] * launch.grid[1] * launch.grid[2];
    unsigned *order = (unsigned *)malloc(blocks * sizeof(unsigned));
    if (!order) fail("no memory for the list of blocks");
    in_order(order, blocks);
    if (launch.order == 2) shuffle(order, blocks);
    for (size_t i = 0; i < blocks; i++) {
        unsigned b = order[i], x = launch.grid[0], y = launch.grid[1];
        e.block = {b % x, b / x % y, b / (x * y)};
        run_with_shared(launch.shared);
    }
    free(order);
    e.launch = nullptr;
}

// --- Kernels by name --------------------------------------------------------------------------------------------

inline const CuemuKernel *kernels = nullptr;

template <auto F> struct Registered;
template <class... A, void (*F)(A...)> struct Registered<F> {
    struct Layout {
        size_t sizes[sizeof...(A) + 1] = {sizeof(A)..., 0}, offsets[sizeof...(A) + 1] = {};
        constexpr Layout() {
            size_t alignment[] = {alignof(A)..., 1}, end = 0;
            for (size_t i = 0; i < sizeof...(A); i++) {
                offsets[i] = (end + alignment[i] - 1) / alignment[i] * alignment[i];
                end = offsets[i] + sizes[i];
            }
        }
    };
    static constexpr Layout layout{};
    template <class T> static T read(void *p) {
        T value;
        memcpy((void *)&value, p, sizeof(T));
        return value;
    }
    template <size_t... I> static void unpack(void **p, std::index_sequence<I...>) {
        F(read<std::remove_cv_t<A>>(p[I])...);
    }
    static void call(void **p) { unpack(p, std::index_sequence_for<A...>{}); }
};

template <auto F> struct Register {
    CuemuKernel kernel;
    explicit Register(const char *name) {
        using R = Registered<F>;
        unsigned count = sizeof(R::layout.sizes) / sizeof(size_t) - 1;
        kernel = {name, R::call, count, R::layout.sizes, R::layout.offsets, kernels};
        kernels = &kernel;
    }
};

CUEMU_PLAIN inline const uint3 &thread_index() { return engine.current->index; }
CUEMU_PLAIN inline const uint3 &block_index() { return engine.block; }
CUEMU_PLAIN inline const dim3 &block_size() { return engine.block_size; }
CUEMU_PLAIN inline const dim3 &grid_size() { return engine.grid_size; }

template <class T> CUEMU_PLAIN T *dyn_shared() {
    // Launched without: a kernel may still name it. Touching it is a fault, on the page that is never mapped.
    return (T *)engine.dynamic_shared;
}

} // namespace cuemu

// Stands after each kernel that the host launches.
#define CU_KERNEL(name) static cuemu::Register<name> cuemu_kernel_##name(#name);

#define threadIdx (cuemu::thread_index())
#define blockIdx (cuemu::block_index())
#define blockDim (cuemu::block_size())
#define gridDim (cuemu::grid_size())
#define warpSize 32

extern "C" __attribute__((visibility("default"), used)) inline CuemuModule cuemu_module() {
    return {cuemu::kernels, cuemu::run, (size_t)(__stop_cuemu_shared - __start_cuemu_shared)};
}
