// The words, types and intrinsics of CUDA C++ that kernels use, for emulate.h.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static __attribute__((section("h1_shared")))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __restrict__ __restrict

#pragma GCC visibility push(hidden)

#define H1_VECTOR(T, name)                                                                                          \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                              \
    struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                                                        \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                      \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
H1_VECTOR(float, float)
H1_VECTOR(int, int)
H1_VECTOR(unsigned, uint)
#undef H1_VECTOR

using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return std::min(std::max(x, 0.0f), 1.0f); }
inline void sincosf(float x, float* sine, float* cosine) { *sine = std::sin(x), *cosine = std::cos(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }
template <class T> void __stcg(T* to, T value) { *to = value; }

inline void __syncthreads() { emulate::wait(emulate::State::AtBarrier); }
inline int __syncthreads_count(int predicate) { return emulate::block_vote(predicate); }
inline int __syncthreads_or(int predicate) { return emulate::block_vote(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return emulate::block_vote(!predicate) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    int nothing = 0;
    emulate::together<int>(mask, nothing, [](int* const*, unsigned) {});
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned mine = predicate != 0;
    emulate::together<unsigned>(mask, mine, [](unsigned* const* lanes, unsigned) {
        unsigned all = 0;
        for (unsigned i = 0; i < 32; ++i) all |= lanes[i] ? *lanes[i] << i : 0;
        for (unsigned i = 0; i < 32; ++i)
            if (lanes[i]) *lanes[i] = all;
    });
    return mine;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    unsigned first = emulate::lane() & ~unsigned(width - 1);
    return emulate::shuffle(mask, value, first | (unsigned(lane) & unsigned(width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    unsigned mine = emulate::lane(), other = mine ^ unsigned(lanes);
    return emulate::shuffle(mask, value, other / width <= mine / width ? other : mine);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned mine = emulate::lane();
    return emulate::shuffle(mask, value, mine % width + delta < unsigned(width) ? mine + delta : mine);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned mine = emulate::lane();
    return emulate::shuffle(mask, value, mine % width >= delta ? mine - delta : mine);
}

// Whole numbers only: their sum has no order.
template <class T>
    requires std::is_integral_v<T>
T atomicAdd(T* to, T value) {
    return std::exchange(*to, *to + value);
}

#pragma GCC visibility pop
