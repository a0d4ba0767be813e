// All inline PTX, each instruction with a body for the CPU beside it that keeps the same layout of its operands.
#pragma once

#ifdef __CUDACC__
#define H1_DEVICE __device__ __forceinline__
#else
#define H1_DEVICE inline
#endif

// Waits until the launches before this one are done, and lets the next one start. A kernel whose file calls it is launched
// while the one before it still runs (Source::early), and reads and writes nothing before but weights.
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
    return std::exp2(x);
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
