// All inline PTX, each instruction with a body for the CPU beside it that keeps the same layout of its operands.
#pragma once

#ifdef __CUDACC__
#define H1_DEVICE __device__ __forceinline__
#else
#define H1_DEVICE inline
#endif

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
