// All inline PTX, each instruction with a body for the CPU beside it that keeps the same layout of its operands.
#pragma once

#ifdef __CUDACC__
#define H1_DEVICE __device__ __forceinline__
#else
#define H1_DEVICE inline
#endif

// Waits until the launches before this one are done, and lets the next one start. A kernel whose file calls it is launched
// while the one before it still runs (Source::early), and reads and writes nothing before but weights, tables of a call, and
// keys and states that an earlier call stored.
H1_DEVICE void after_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// f32 to the nearest bf16, ties to even, as its bits.
H1_DEVICE unsigned short bf16_bits(float value) {
#ifdef __CUDACC__
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    unsigned bits = std::bit_cast<unsigned>(value);
    if (value != value) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// f32 to the nearest f16, ties to even, as its bits.
H1_DEVICE unsigned short f16_bits(float value) {
#ifdef __CUDACC__
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    return std::bit_cast<unsigned short>(static_cast<_Float16>(value));
#endif
}

// The f32 of a f16's bits.
H1_DEVICE float f16_value(unsigned short bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return static_cast<float>(std::bit_cast<_Float16>(bits));
#endif
}

// 2^x, to 2 units in the last place; results below 2^−126 are 0.
H1_DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return emulate::rough(std::exp2(x));
#endif
}

// 1 / x to a unit in the last place, where neither is below 2^−126; what is, counts as 0.
H1_DEVICE float reciprocal_fast(float x) {
#ifdef __CUDACC__
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#else
    return emulate::rough(1.0f / x);
#endif
}

// An address in shared memory.
#ifdef __CUDACC__
using SharedAddress = unsigned;
#else
using SharedAddress = char*;
#endif

H1_DEVICE SharedAddress shared_address(void* pointer) {
#ifdef __CUDACC__
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
#else
    return static_cast<char*>(pointer);
#endif
}

// Starts to copy 16 bytes to shared memory, or to fill them with 0 where not `valid`. Both addresses are multiples of 16.
H1_DEVICE void copy_async(SharedAddress to, const void* from, bool valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
#else
    emulate::copy_later(to, from, valid ? 16 : 0, valid ? 0 : 16);
#endif
}

// Closes a group of the copies started by this thread since the last one.
H1_DEVICE void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;");
#else
    emulate::commit_copies();
#endif
}

// Waits until all but the last PENDING groups of this thread have arrived.
template <int PENDING>
H1_DEVICE void wait_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    emulate::arrive(PENDING);
#endif
}

#ifndef __CUDACC__
struct MatrixLoad {
    const char* row;
    unsigned to[4];
};

template <bool TRANSPOSED>
void load_matrices_of_warp(MatrixLoad* const* lanes, unsigned) {
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned i = 0; i < 4; ++i) {
            unsigned short pair[2];
            for (unsigned j = 0; j < 2; ++j) {
                unsigned row = TRANSPOSED ? lane % 4 * 2 + j : lane / 4, col = TRANSPOSED ? lane / 4 : lane % 4 * 2 + j;
                std::memcpy(&pair[j], lanes[8 * i + row]->row + 2 * col, 2);
            }
            std::memcpy(&lanes[lane]->to[i], pair, 4);
        }
}
#endif

// Four matrices of 8 × 8 values of 16 bits: lane l gives the address of row l % 8 of matrix l / 8. Of each, a lane gets
// the two neighbours at row l / 4, columns l % 4 · 2 and the next; of the transposes where TRANSPOSED.
template <bool TRANSPOSED>
H1_DEVICE void load_matrices(unsigned (&to)[4], SharedAddress row) {
#ifdef __CUDACC__
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(row));
    }
#else
    MatrixLoad mine{row, {}};
    emulate::together<MatrixLoad>(0xffffffffu, mine, load_matrices_of_warp<TRANSPOSED>);
    std::memcpy(to, mine.to, sizeof mine.to);
#endif
}

#ifndef __CUDACC__
struct MatrixProduct {
    const unsigned* a;
    const unsigned* b;
    float* c;
};

template <float (*VALUE)(unsigned short)>
void multiply_in_warp(MatrixProduct* const* lanes, unsigned) {
    // A[16][16] and B[16][8]; a pair of neighbours along the inner index lies in one register, the first in its low half.
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned j = 0; j < 2; ++j) {
            for (unsigned i = 0; i < 4; ++i)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + j + i / 2 * 8] =
                    VALUE(static_cast<unsigned short>(lanes[lane]->a[i] >> 16 * j));
            for (unsigned i = 0; i < 2; ++i)
                b[lane % 4 * 2 + j + i * 8][lane / 4] = VALUE(static_cast<unsigned short>(lanes[lane]->b[i] >> 16 * j));
        }
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned i = 0; i < 4; ++i)
            for (unsigned k = 0; k < 16; ++k)
                lanes[lane]->c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}
#endif

// c += a·b of a warp: a 16 × 16, b 16 × 8, c 16 × 8 of f32. Lane l has of c row l / 4, columns l % 4 · 2 and the next,
// then the same of row l / 4 + 8; of a, pairs of columns, in the same places for columns 0 to 7, then for 8 to 15; of b
// rows l % 4 · 2 and the next of column l / 4, then the same 8 rows on.
#define H1_MULTIPLY(name, type, value)                                                                              \
    H1_DEVICE void name(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                            \
        H1_MULTIPLY_BODY(type, value)                                                                               \
    }
#ifdef __CUDACC__
#define H1_MULTIPLY_BODY(type, value)                                                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                             \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
inline float bf16_value(unsigned short bits) { return std::bit_cast<float>(static_cast<unsigned>(bits) << 16); }
#define H1_MULTIPLY_BODY(type, value)      \
    MatrixProduct mine{a, b, c};           \
    emulate::together<MatrixProduct>(0xffffffffu, mine, multiply_in_warp<value>);
#endif
H1_MULTIPLY(multiply_bf16, "bf16", bf16_value)
H1_MULTIPLY(multiply_f16, "f16", f16_value)

// Two f32 to the nearest bf16 or f16, `low` in the low half.
H1_DEVICE unsigned pack_bf16(float low, float high) {
#ifdef __CUDACC__
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return bf16_bits(low) | static_cast<unsigned>(bf16_bits(high)) << 16;
#endif
}

H1_DEVICE unsigned pack_f16(float low, float high) {
#ifdef __CUDACC__
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return f16_bits(low) | static_cast<unsigned>(f16_bits(high)) << 16;
#endif
}

#ifndef __CUDACC__
struct Tf32Product {
    const float* a;
    const float* b;
    float* c;
};

// The product leaves out the low 13 bits of its inputs.
inline float tf32_value(float value) { return std::bit_cast<float>(std::bit_cast<unsigned>(value) & 0xffffe000u); }

inline void multiply_tf32_in_warp(Tf32Product* const* lanes, unsigned) {
    float a[16][8], b[8][8];
    for (unsigned lane = 0; lane < 32; ++lane) {
        for (unsigned i = 0; i < 4; ++i) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32_value(lanes[lane]->a[i]);
        for (unsigned i = 0; i < 2; ++i) b[lane % 4 + i * 4][lane / 4] = tf32_value(lanes[lane]->b[i]);
    }
    for (unsigned lane = 0; lane < 32; ++lane)
        for (unsigned i = 0; i < 4; ++i)
            for (unsigned k = 0; k < 8; ++k)
                lanes[lane]->c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
}
#endif

// c += a·b of a warp, of f32 of which a and b count with 10 bits after the first: a 16 × 8, b 8 × 8. Lane l has of c what
// `multiply_bf16` says; of a column l % 4 of rows l / 4 and l / 4 + 8, then column l % 4 + 4 of both; of b rows l % 4 and
// l % 4 + 4 of column l / 4.
H1_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                   "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#else
    Tf32Product mine{a, b, c};
    emulate::together<Tf32Product>(0xffffffffu, mine, multiply_tf32_in_warp);
#endif
}

// The same with a 16 × 4 and b 4 × 8: lane l has column l % 4 of rows l / 4 and l / 4 + 8 of a, and row l % 4 of column l / 4 of b.
H1_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[2], float b) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(b)));
#else
    float of_a[4] = {a[0], a[1]}, of_b[2] = {b};
    multiply_tf32(c, of_a, of_b);
#endif
}

// Writes 1, 2 or 4 words to global memory at once, at multiples of their bytes, if `valid`: a predicate, never a branch.
template <int WORDS>
H1_DEVICE void store_global_if(bool valid, void* to, const unsigned (&words)[WORDS]) {
#ifdef __CUDACC__
#define H1_IF_VALID "{ .reg .pred valid; setp.ne.u32 valid, %0, 0; @valid st.global."
    unsigned when = valid;
    if constexpr (WORDS == 1) asm volatile(H1_IF_VALID "b32 [%1], %2; }" ::"r"(when), "l"(to), "r"(words[0]));
    if constexpr (WORDS == 2)
        asm volatile(H1_IF_VALID "v2.b32 [%1], {%2, %3}; }" ::"r"(when), "l"(to), "r"(words[0]), "r"(words[1]));
    if constexpr (WORDS == 4)
        asm volatile(H1_IF_VALID "v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(when), "l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
#undef H1_IF_VALID
#else
    if (valid) std::memcpy(to, words, sizeof words);
#endif
}

// Writes 16 bytes to shared memory.
H1_DEVICE void store_shared(SharedAddress to, unsigned a, unsigned b, unsigned c, unsigned d) {
#ifdef __CUDACC__
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
#else
    unsigned words[4] = {a, b, c, d};
    std::memcpy(to, words, sizeof words);
#endif
}

// Below: the H100's own instructions (sm_90a).

// A barrier in shared memory, 8 bytes: it waits for `arrivals` and, where they announce some, for bytes to be copied.
H1_DEVICE void barrier_init(SharedAddress barrier, unsigned arrivals) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
    emulate::barrier_init(barrier, arrivals);
#endif
}

H1_DEVICE void barrier_arrive(SharedAddress barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    emulate::barrier_arrive(barrier, 0);
#endif
}

// Arrives, and announces bytes that will be copied.
H1_DEVICE void barrier_expect(SharedAddress barrier, unsigned bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
    emulate::barrier_arrive(barrier, bytes);
#endif
}

// Waits until the phase of a barrier is no longer `parity`: phases are 0, 1, 0, …
H1_DEVICE void barrier_wait(SharedAddress barrier, unsigned parity) {
#ifdef __CUDACC__
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\n"
        "bra WAIT;\nDONE:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#else
    emulate::barrier_wait(barrier, parity);
#endif
}

// Threads that meet by number: `threads` of them at barrier `id`, 1 to 15; those that only arrive go on.
H1_DEVICE void meet(unsigned id, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulate::meet(id, threads, true);
#endif
}

H1_DEVICE void meet_later(unsigned id, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulate::meet(id, threads, false);
#endif
}

// This thread's writes to shared memory so far come before what the copy engine and the tensor cores do there after the
// next barrier.
H1_DEVICE void fence_async() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The registers of each thread of this warpgroup from now on.
template <int REGISTERS>
H1_DEVICE void give_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

template <int REGISTERS>
H1_DEVICE void take_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// What the driver makes of a matrix of 16-bit values [rows][heads][columns] and a box of it: [box rows][box heads][64],
// which lies in shared memory as rows of 128 bytes whose 16-byte pieces are exchanged (address bits 4 to 6 ^= bits 7 to 9).
#ifdef __CUDACC__
struct alignas(64) TensorMap {
    unsigned long long words[16];
};
#else
struct TensorMap {
    // The emulated driver's: address, bytes from one row and from one head to the next, columns, heads, rows, box heads
    // and rows.
    unsigned long long base, row_bytes, head_bytes, columns, heads, rows, box_heads, box_rows, unused[8];
};
#endif

// Starts to copy a box; what lies outside of the matrix is 0. `barrier` gets its bytes.
H1_DEVICE void copy_box(SharedAddress to, const TensorMap& map, int column, int head, int row, SharedAddress barrier) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(&map), "r"(column), "r"(head), "r"(row), "r"(barrier)
        : "memory");
#else
    emulate::copy_box({to, barrier, reinterpret_cast<const unsigned char*>(map.base), map.row_bytes, map.head_bytes, column, head, row,
                       int(map.columns), int(map.heads), int(map.rows), int(map.box_heads), int(map.box_rows)});
#endif
}

// A matrix of 16-bit values in shared memory as an operand of a warpgroup's product: rows of 64 values (128 bytes, pieces
// exchanged as above), 8 after each other, `next_eight` bytes to the next 8. Where the product's inner index runs along
// the rows' columns this is all; where it runs from row to row, `next_columns` bytes lead to the next 64 columns.
H1_DEVICE unsigned long long shared_matrix(SharedAddress at, unsigned next_columns, unsigned next_eight) {
#ifdef __CUDACC__
    unsigned start = at;
#else
    unsigned start = emulate::shared_offset(at);
#endif
    return (start & 0x3ffff) >> 4 | (unsigned long long)(next_columns >> 4) << 16 | (unsigned long long)(next_eight >> 4) << 32 |
           1ull << 62;
}

// Before the first product of a group: registers that products read or add to are as this thread left them.
H1_DEVICE void products_begin() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes a group of products.
H1_DEVICE void products_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    emulate::commit_products();
#endif
}

// Waits for all but the last PENDING groups. Until then their registers must stay as they are; `keep` those that are read.
template <int PENDING>
H1_DEVICE void products_wait() {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#else
    emulate::wait_products(PENDING);
#endif
}

template <int N>
H1_DEVICE void keep(float (&c)[N]) {
#ifdef __CUDACC__
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
#endif
}

// c (+)= a·b of a warpgroup: a 64 × 16, b 16 × n, c 64 × n of f32, with n/2 of them a thread: warp w of the four has rows
// 16·w to 16·w + 15, and of each 8 columns a lane what it has of c in `multiply`, one 8 after the other; of a in
// registers as there too. In shared memory a and b are `shared_matrix`: rows are a's rows and b's columns, or, where
// A_TURNED or B_TURNED, they run along the inner index. Runs until `products_wait`.
#define H1_F4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define H1_F16(c, i) H1_F4(c, i), H1_F4(c, i + 4), H1_F4(c, i + 8), H1_F4(c, i + 12)
#define H1_REGISTERS_32 H1_F16(c, 0), H1_F16(c, 16)
#define H1_REGISTERS_40 H1_REGISTERS_32, H1_F4(c, 32), H1_F4(c, 36)
#define H1_REGISTERS_64 H1_REGISTERS_32, H1_F16(c, 32), H1_F16(c, 48)
#define H1_LIST_32                                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define H1_LIST_40 H1_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define H1_LIST_64                                                                                                  \
    H1_LIST_40 ", "                                                                                                 \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#ifdef __CUDACC__
#define H1_PRODUCT(type, n, half, list, registers, i0, i1, i2, i3, i4, i5, i6)                                      \
    template <bool B_TURNED>                                                                                        \
    H1_DEVICE void product_##type(float (&c)[half], const unsigned (&a)[4], unsigned long long b, bool add) {       \
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #i5 ", 0;\n"                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" list "}, {%" #i0 ", %" #i1 \
                     ", %" #i2 ", %" #i3 "}, %" #i4 ", more, 1, 1, %" #i6 ";\n}"                                     \
                     : registers                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(B_TURNED)));      \
    }                                                                                                               \
    template <bool A_TURNED, bool B_TURNED>                                                                         \
    H1_DEVICE void product_##type(float (&c)[half], unsigned long long a, unsigned long long b, bool add) {         \
        asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" #i2 ", 0;\n"                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" list "}, %" #i0 ", %" #i1 \
                     ", more, 1, 1, %" #i3 ", %" #i4 ";\n}"                                                          \
                     : registers                                                                                    \
                     : "l"(a), "l"(b), "r"(int(add)), "n"(int(A_TURNED)), "n"(int(B_TURNED)));                      \
    }
#else
#define H1_PRODUCT(type, n, half, ...)                                                                              \
    template <bool B_TURNED>                                                                                        \
    void product_##type(float (&c)[half], const unsigned (&a)[4], unsigned long long b, bool add) {                 \
        emulate::product({c, n, a, 0, b, add, false, B_TURNED, type##_value, 0});                                   \
    }                                                                                                               \
    template <bool A_TURNED, bool B_TURNED>                                                                         \
    void product_##type(float (&c)[half], unsigned long long a, unsigned long long b, bool add) {                   \
        emulate::product({c, n, nullptr, a, b, add, A_TURNED, B_TURNED, type##_value, 0});                          \
    }
#endif
H1_PRODUCT(bf16, 64, 32, H1_LIST_32, H1_REGISTERS_32, 32, 33, 34, 35, 36, 37, 38)
H1_PRODUCT(bf16, 80, 40, H1_LIST_40, H1_REGISTERS_40, 40, 41, 42, 43, 44, 45, 46)
H1_PRODUCT(bf16, 128, 64, H1_LIST_64, H1_REGISTERS_64, 64, 65, 66, 67, 68, 69, 70)
H1_PRODUCT(f16, 64, 32, H1_LIST_32, H1_REGISTERS_32, 32, 33, 34, 35, 36, 37, 38)
H1_PRODUCT(f16, 80, 40, H1_LIST_40, H1_REGISTERS_40, 40, 41, 42, 43, 44, 45, 46)
H1_PRODUCT(f16, 128, 64, H1_LIST_64, H1_REGISTERS_64, 64, 65, 66, 67, 68, 69, 70)
