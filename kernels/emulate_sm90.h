// The H100's own instructions on the CPU, for emulate.h: barriers that count bytes, copies of boxes, products of warpgroups.
#pragma once

#pragma GCC visibility push(hidden)
namespace emulate {

// A barrier in shared memory.
struct Barrier {
    uint8_t arrivals, missing, phase, known;
    int32_t bytes;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_at(char* at) {
    auto* barrier = reinterpret_cast<Barrier*>(at);
    if (barrier->known != 0x5a) machine.error = "a barrier was used before it was made";
    return *barrier;
}

inline void barrier_init(char* at, unsigned arrivals) {
    *reinterpret_cast<Barrier*>(at) = {uint8_t(arrivals), uint8_t(arrivals), 0, 0x5a, 0};
}

inline void end_phase(Barrier& barrier) {
    if (barrier.missing > 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.missing = barrier.arrivals;
}

inline void barrier_arrive(char* at, unsigned bytes) {
    Barrier& barrier = barrier_at(at);
    if (barrier.missing == 0) machine.error = "more threads arrived at a barrier than it waits for";
    barrier.bytes += int32_t(bytes);
    --barrier.missing;
    end_phase(barrier);
}

// The running thread waits until `ready` is true of `asked`.
inline void poll(bool (*ready)(const void*), const void* asked) {
    Thread& thread = *machine.running;
    thread.ready = ready;
    thread.asked = asked;
    if (!ready(asked)) wait(State::Polling);
}

struct Phase {
    const Barrier* barrier;
    unsigned parity;
};

inline void barrier_wait(char* at, unsigned parity) {
    Phase phase{&barrier_at(at), parity};
    poll([](const void* asked) {
        auto* phase = static_cast<const Phase*>(asked);
        return phase->barrier->phase != phase->parity;
    }, &phase);
}

struct Turn {
    const Meeting* meeting;
    unsigned turns;
};

inline void meet(unsigned id, unsigned threads, bool stay) {
    Meeting& meeting = machine.meetings[id];
    Turn turn{&meeting, meeting.turns};
    if (++meeting.come == threads) meeting.come = 0, ++meeting.turns;
    if (stay)
        poll([](const void* asked) {
            auto* turn = static_cast<const Turn*>(asked);
            return turn->meeting->turns != turn->turns;
        }, &turn);
}

inline unsigned shared_offset(const char* at) {
    return unsigned(at - static_cast<char*>(machine.shared.get()));
}

// Where a byte of shared memory lies whose 16-byte pieces are exchanged within rows of 128 bytes.
inline char* exchanged(unsigned offset) {
    return static_cast<char*>(machine.shared.get()) + (offset ^ (offset >> 7 & 7) << 4);
}

inline void deliver(const Box& box) {
    unsigned to = shared_offset(box.to);
    if (to % 1024 % (128 * 8) != 0) machine.error = "a box does not start at eight rows";
    for (int r = 0; r < box.box_rows; ++r)
        for (int h = 0; h < box.box_heads; ++h)
            for (int column = 0; column < 64; ++column, to += 2) {
                unsigned short value = 0;
                bool inside = unsigned(box.row + r) < unsigned(box.rows) && unsigned(box.head + h) < unsigned(box.heads) &&
                              unsigned(box.column + column) < unsigned(box.columns);
                if (inside)
                    std::memcpy(&value, box.from + (box.row + r) * box.row_bytes + (box.head + h) * box.head_bytes +
                                            2 * (box.column + column), 2);
                std::memcpy(exchanged(to), &value, 2);
            }
    Barrier& barrier = barrier_at(box.barrier);
    barrier.bytes -= box.box_rows * box.box_heads * 128;
    end_phase(barrier);
}

inline void copy_box(const Box& box) {
    if (machine.arrival == Arrival::AtOnce) {
        deliver(box);
    } else {
        machine.boxes.push_back(box);
    }
}

inline void product(Product product) {
    product.group = machine.running->products_group;
    machine.running->products.push_back(product);
}

inline void commit_products() { ++machine.running->products_group; }

// The value of row i and inner index k of a factor in shared memory.
inline float shared_value(uint64_t matrix, bool turned, unsigned i, unsigned k, float (*value)(unsigned short)) {
    unsigned start = unsigned(matrix & 0x3fff) << 4, columns = unsigned(matrix >> 16 & 0x3fff) << 4;
    unsigned eight = unsigned(matrix >> 32 & 0x3fff) << 4;
    unsigned row = turned ? k : i, column = turned ? i : k;
    unsigned short bits;
    std::memcpy(&bits, exchanged(start + row / 8 * eight + row % 8 * 128 + column / 64 * columns + column % 64 * 2), 2);
    return value(bits);
}

inline void run_product(Thread* const* threads, size_t index) {
    const Product& first = threads[0]->products[index];
    unsigned n = first.n;
    std::vector<float> a(64 * 16), b(16 * n);
    for (unsigned k = 0; k < 16; ++k) {
        for (unsigned row = 0; row < 64; ++row) {
            if (!first.a) {
                a[row * 16 + k] = shared_value(first.of_a, first.a_turned, row, k, first.value);
                continue;
            }
            const unsigned* held = threads[row / 16 * 32 + row % 8 * 4 + k % 8 / 2]->products[index].a;
            a[row * 16 + k] = first.value(static_cast<unsigned short>(held[k / 8 * 2 + row % 16 / 8] >> k % 2 * 16));
        }
        for (unsigned column = 0; column < n; ++column)
            b[k * n + column] = shared_value(first.of_b, first.b_turned, column, k, first.value);
    }
    for (unsigned t = 0; t < 128; ++t)
        for (unsigned i = 0; i < n / 2; ++i) {
            unsigned row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
            float& c = threads[t]->products[index].c[i];
            float sum = first.add ? c : 0.0f;
            for (unsigned k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * n + column];
            c = sum;
        }
}

// The warpgroup's products run, but for those of the last `pending` groups.
inline void wait_products(unsigned pending) {
    Thread& thread = *machine.running;
    thread.pending = pending;
    thread.collective = {0, [](void* const* values, unsigned) {
        auto* threads = reinterpret_cast<Thread* const*>(values);
        const std::vector<Product>& products = threads[0]->products;
        size_t due = 0;
        while (due < products.size() && products[due].group + threads[0]->pending < threads[0]->products_group) ++due;
        for (unsigned t = 0; t < 128; ++t) {
            std::vector<Product>& own = threads[t]->products;
            bool alike = own.size() == products.size();
            for (size_t i = 0; alike && i < own.size(); ++i)
                alike = own[i].of_a == products[i].of_a && own[i].of_b == products[i].of_b && own[i].n == products[i].n;
            if (!alike) machine.error = "threads of a warpgroup issued different products";
        }
        if (machine.error) return;
        for (size_t i = 0; i < due; ++i) run_product(threads, i);
        for (unsigned t = 0; t < 128; ++t) threads[t]->products.erase(threads[t]->products.begin(), threads[t]->products.begin() + due);
    }, &thread};
    wait(State::InWarpgroup);
}

}  // namespace emulate
#pragma GCC visibility pop
