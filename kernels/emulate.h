// Runs a kernel on the CPU: the same .cu text, compiled by a host C++20 compiler into a shared object.
//
// Every CUDA thread of a block is a fiber; blocks run one after another. A fiber runs until it meets a barrier or a
// collective of its warp, then the next one runs, in an order that the launch chooses: 0 ascending, 1 descending,
// others shuffled anew at every turn. Threads that wait for each other for ever, and lanes of a warp that meet in
// different collectives, are errors. Before a block its shared memory is filled with NaN. Asynchronous copies arrive at once
// in order 0, so that one into a place which is still read shows, and in others when they are waited for, not before.
// With 256 added to the order, functions that a card has to a few units in the last place are off by one, always downwards.
// Not modelled: memory ordering, races between blocks, the speed of anything.
//
// H1_DYNAMIC_SHARED(name) is the block's dynamic shared memory as unsigned char. H1_EXPORT(kernel) gives
// `const char* h1_launch_kernel(args, grid, block, shared, order)`: args as cuLaunchKernel takes them, grid and block as
// three numbers, shared in bytes; null, or what went wrong. The compiler's line is
// `c++ -std=c++20 -O1 -fPIC -shared -I kernels -x c++ kernel.cu`.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define H1_EMULATED 1
#define H1_DYNAMIC_SHARED(name) auto* name = static_cast<unsigned char*>(emulate::machine.shared.get())
#define H1_EXPORT(kernel)                                                                                           \
    extern "C" __attribute__((visibility("default"))) const char* h1_launch_##kernel(                               \
        void** args, const unsigned* grid, const unsigned* block, size_t shared, unsigned order) {                  \
        return emulate::launch(kernel, args, grid, block, shared, order);                                           \
    }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
using uint3 = dim3;

#pragma GCC visibility push(hidden)
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

// Static shared memory lies in a section of its own, to be filled before each block.
extern char __start_h1_shared[] __attribute__((weak));
extern char __stop_h1_shared[] __attribute__((weak));

#if defined(__x86_64__)
// Saves what a call must keep on the stack of the old fiber, and takes it from the stack of the new one.
extern "C" void h1_switch_fiber(void** from, void* to);
asm(".pushsection .text\n.type h1_switch_fiber, @function\n.local h1_switch_fiber\nh1_switch_fiber:\n"
    "push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n.popsection\n");
#endif

namespace emulate {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t STACK = 256 << 10;
#else
inline constexpr size_t STACK = 64 << 10;
#endif

// A stack and where it stands.
struct Fiber {
    std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
    void* top = nullptr;
#else
    ucontext_t context;
#endif
    void* fake = nullptr;

    void start(void (*entry)()) {
        if (!stack) stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
        // The fiber before left for ever, and with it the marks around its variables.
        ASAN_UNPOISON_MEMORY_REGION(stack.get(), STACK);
#endif
#if defined(__x86_64__)
        auto* sp = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack.get()) + STACK) & ~uintptr_t(15));
        *--sp = nullptr;
        *--sp = reinterpret_cast<void*>(entry);
        top = sp -= 6;
        std::fill_n(sp, 6, nullptr);
#else
        getcontext(&context);
        context.uc_stack = {.ss_sp = stack.get(), .ss_size = STACK};
        makecontext(&context, entry, 0);
#endif
    }
};

// A warp's collective as a lane brings it: what to do when all of `mask` have come, and the lane's own values.
struct Collective {
    unsigned mask = 0;
    void (*act)(void* const* lanes, unsigned present) = nullptr;
    void* mine = nullptr;
};

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, zeros, group;
};

// A product of a warpgroup as each of its threads issues it (ptx.cuh); it runs when it is waited for, from what is then
// in registers and shared memory.
struct Product {
    float* c;
    unsigned n;
    const unsigned* a;
    uint64_t of_a, of_b;
    bool add, a_turned, b_turned;
    float (*value)(unsigned short);
    unsigned group;
};

// A copy of a box into shared memory (ptx.cuh).
struct Box {
    char *to, *barrier;
    const unsigned char* from;
    uint64_t row_bytes, head_bytes;
    int column, head, row, columns, heads, rows, box_heads, box_rows;
};

// Threads that have come to a barrier by number, and how often it was complete.
struct Meeting {
    unsigned come = 0, turns = 0;
};

enum class State { Ready, AtBarrier, InCollective, InWarpgroup, Polling, Done };

struct Thread {
    Fiber fiber;
    dim3 index;
    State state = State::Done;
    Collective collective;
    std::vector<Copy> copies;
    unsigned group = 0;
    std::vector<Product> products;
    unsigned products_group = 0, pending = 0;
    // What a thread that polls waits for.
    bool (*ready)(const void*) = nullptr;
    const void* asked = nullptr;
};

// When copies arrive: as they are asked for, or boxes only when nothing else can go on, in turn or the last one first, and
// others when they are waited for.
enum class Arrival { AtOnce, InTurn, LastFirst };

struct Machine {
    std::mutex one_launch;
    std::vector<Thread> threads;
    Thread* running = nullptr;
    Fiber scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    std::unique_ptr<void, void (*)(void*)> shared{nullptr, std::free};
    int votes = 0, vote = 0;
    // Copies that have not arrived yet: with order 0 there are none, otherwise they wait till nothing else can run.
    std::vector<Box> boxes;
    Arrival arrival = Arrival::AtOnce;
    bool rough = false;
    Meeting meetings[16];
    const char* error = nullptr;
    void (*call)(void*) = nullptr;
    void* arguments = nullptr;
};
inline Machine machine;

// What a card may give for a result that is above 0: a power of two is exact.
inline float rough(float value) {
    auto bits = std::bit_cast<uint32_t>(value);
    bool exact = (bits & 0x7fffff) == 0 || !std::isfinite(value);
    return machine.rough && !exact ? std::bit_cast<float>(bits - 1) : value;
}

inline void hop(Fiber& from, Fiber& to, [[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
    bool back = &to == &machine.scheduler;
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake, back ? machine.scheduler_stack : to.stack.get(),
                                   back ? machine.scheduler_size : STACK);
#endif
#if defined(__x86_64__)
    h1_switch_fiber(&from.top, to.top);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* old = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(from.fake, &old, &size);
    if (&from != &machine.scheduler) machine.scheduler_stack = old, machine.scheduler_size = size;
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
    machine.call(machine.arguments);
    machine.running->state = State::Done;
    hop(machine.running->fiber, machine.scheduler, true);
}

// The running thread waits until its state is Ready again.
inline void wait(State state) {
    Thread& thread = *machine.running;
    thread.state = state;
    hop(thread.fiber, machine.scheduler, false);
}

// All lanes of `mask` come together; the last one acts on the values of them all, by lane (null: not present).
template <class T>
void together(unsigned mask, T& mine, void (*act)(T* const* lanes, unsigned present)) {
    machine.running->collective = {mask, reinterpret_cast<void (*)(void* const*, unsigned)>(act), &mine};
    wait(State::InCollective);
}

// Lets go the lanes of a warp whose collective is complete.
inline bool complete(Thread* warp, unsigned lanes) {
    bool any = false;
    for (unsigned lane = 0; lane < lanes; ++lane) {
        if (warp[lane].state != State::InCollective) continue;
        Collective& first = warp[lane].collective;
        void* values[32] = {};
        unsigned present = 0;
        bool all = true;
        for (unsigned other = 0; other < lanes; ++other) {
            if (!(first.mask >> other & 1) || warp[other].state == State::Done) continue;
            if (warp[other].state != State::InCollective) {
                all = false;
            } else if (warp[other].collective.act != first.act || warp[other].collective.mask != first.mask) {
                machine.error = "lanes of a warp met in different collectives";
                return false;
            } else {
                values[other] = warp[other].collective.mine;
                present |= 1u << other;
            }
        }
        if (!(first.mask >> lane & 1)) machine.error = "a lane called a collective whose mask leaves it out";
        if (!all || machine.error) continue;
        first.act(values, present);
        for (unsigned other = 0; other < lanes; ++other)
            if (present >> other & 1) warp[other].state = State::Ready;
        any = true;
    }
    return any;
}

// Lets a warpgroup go whose threads have all come, and acts on what they brought.
inline bool complete_warpgroup(Thread* group, unsigned threads) {
    unsigned come = 0;
    void* values[128];
    for (unsigned t = 0; t < threads; ++t)
        if (group[t].state == State::InWarpgroup) values[come++] = group[t].collective.mine;
    if (come < 128) return false;
    group[0].collective.act(values, 0);
    for (unsigned t = 0; t < 128; ++t) group[t].state = State::Ready;
    return true;
}

inline void deliver(const Box& box);

inline void run_block(unsigned count, unsigned order, uint64_t& random) {
    Machine& m = machine;
    std::vector<unsigned> turn(count);
    for (unsigned t = 0; t < count; ++t) {
        turn[t] = order == 1 ? count - 1 - t : t;
        m.threads[t].state = State::Ready;
        m.threads[t].copies.clear();
        m.threads[t].group = 0;
        m.threads[t].products.clear();
        m.threads[t].products_group = 0;
        m.threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        m.threads[t].fiber.start(enter);
    }
    for (;;) {
        if (order > 1) {
            for (unsigned t = count; t > 1; --t) {
                random = random * 6364136223846793005u + 1442695040888963407u;
                std::swap(turn[t - 1], turn[(random >> 33) % t]);
            }
        }
        unsigned done = 0, waiting = 0;
        bool moved = false;
        for (unsigned t : turn) {
            Thread& thread = m.threads[t];
            if (thread.state == State::Polling && thread.ready(thread.asked)) thread.state = State::Ready;
            if (thread.state == State::Ready) {
                m.running = &thread;
                threadIdx = thread.index;
                hop(m.scheduler, thread.fiber, false);
                moved = true;
            }
            done += thread.state == State::Done;
            waiting += thread.state == State::AtBarrier;
        }
        for (unsigned first = 0; first < count; first += 32)
            moved |= complete(&m.threads[first], std::min(32u, count - first));
        for (unsigned first = 0; first < count; first += 128)
            moved |= complete_warpgroup(&m.threads[first], std::min(128u, count - first));
        if (!m.error && done == count && !m.boxes.empty()) m.error = "a block ended before its copies had arrived";
        if (m.error || done == count) return;
        if (!moved && !m.boxes.empty()) {
            auto next = m.arrival == Arrival::LastFirst ? m.boxes.end() - 1 : m.boxes.begin();
            deliver(*next);
            m.boxes.erase(next);
        } else if (done + waiting == count) {
            m.vote = std::exchange(m.votes, 0);
            for (unsigned t = 0; t < count; ++t)
                if (m.threads[t].state == State::AtBarrier) m.threads[t].state = State::Ready;
        } else if (!moved) {
            m.error = "threads of a block wait for each other for ever";
            return;
        }
    }
}

template <class... A, size_t... I>
const char* launch(void (*kernel)(A...), void** args, std::index_sequence<I...>, const unsigned* grid,
                   const unsigned* block, size_t shared, unsigned order) {
    Machine& m = machine;
    std::lock_guard<std::mutex> lock(m.one_launch);
    auto call = [&] { kernel(*static_cast<std::remove_const_t<A>*>(args[I])...); };
    m.call = [](void* call_) { (*static_cast<decltype(call)*>(call_))(); };
    m.arguments = &call;
    m.error = nullptr;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    unsigned count = block[0] * block[1] * block[2], blocks = grid[0] * grid[1] * grid[2];
    if (count == 0 || count > 1024 || blocks == 0) return "a launch of no thread, or of more than 1024 in a block";
    if (shared > (227u << 10)) return "a launch with more shared memory than a multiprocessor has";
    if (m.threads.size() < count) m.threads = std::vector<Thread>(count);
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, std::max<size_t>(shared, 1)) != 0) return "no memory for a block's shared memory";
    m.shared.reset(memory);
    m.rough = order & 256;
    order &= 255;
    uint64_t random = order;
    m.boxes.clear();
    m.arrival = order == 0 ? Arrival::AtOnce : order == 1 ? Arrival::InTurn : Arrival::LastFirst;
    for (unsigned b = 0; b < blocks && !m.error; ++b) {
        unsigned at = order == 1 ? blocks - 1 - b : b;
        blockIdx = {at % grid[0], at / grid[0] % grid[1], at / (grid[0] * grid[1])};
        std::memset(m.shared.get(), 0xff, shared);
        std::fill(std::begin(m.meetings), std::end(m.meetings), Meeting{});
        if (__start_h1_shared) std::memset(__start_h1_shared, 0xff, size_t(__stop_h1_shared - __start_h1_shared));
        run_block(count, order, random);
    }
    if (m.error) m.threads.clear();
    return m.error;
}

template <class... A>
const char* launch(void (*kernel)(A...), void** args, const unsigned* grid, const unsigned* block, size_t shared,
                   unsigned order) {
    return launch(kernel, args, std::index_sequence_for<A...>{}, grid, block, shared, order);
}

inline void arrive_now(const Copy& copy) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.zeros);
}

// Asynchronous copies of the running thread: `bytes` from `from`, then zeros; those that are still to come do in `arrive`.
inline void copy_later(void* to, const void* from, unsigned bytes, unsigned zeros) {
    Copy copy{to, from, bytes, zeros, machine.running->group};
    if (machine.arrival == Arrival::AtOnce) return arrive_now(copy);
    machine.running->copies.push_back(copy);
}

inline void commit_copies() { ++machine.running->group; }

// All but the last `pending` groups arrive.
inline void arrive(unsigned pending) {
    Thread& thread = *machine.running;
    std::erase_if(thread.copies, [&](const Copy& copy) {
        if (copy.group + pending >= thread.group) return false;
        arrive_now(copy);
        return true;
    });
}

inline unsigned lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <class T>
struct Shuffle {
    T value;
    unsigned from;
};

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2));
    Shuffle<T> mine{value, from};
    together<Shuffle<T>>(mask, mine, [](Shuffle<T>* const* lanes, unsigned) {
        T values[32];
        std::memset(static_cast<void*>(values), 0xff, sizeof values);
        for (unsigned i = 0; i < 32; ++i)
            if (lanes[i]) values[i] = lanes[i]->value;
        for (unsigned i = 0; i < 32; ++i)
            if (lanes[i]) lanes[i]->value = values[lanes[i]->from];
    });
    return mine.value;
}

template <class T>
T block_vote(T predicate) {
    machine.votes += predicate != 0;
    wait(State::AtBarrier);
    return machine.vote;
}

}  // namespace emulate
#pragma GCC visibility pop

#include "emulate_sm90.h"
#include "emulate_types.h"
