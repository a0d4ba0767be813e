// What every kernel shares: storage types whose values are loaded and stored as f32, views, sums over a warp and a block.
//
// A kernel gets its storage types by macros (T_X, T_OUT, …: float, bf16 or f16), and computes in f32. Sums have an order
// that the sizes alone fix.
#pragma once

#ifdef __CUDACC__
// For the emulator: a kernel that it can launch. And a block's dynamic shared memory, as bytes.
#define INFINITY __int_as_float(0x7f800000)
#define H1_EXPORT(kernel)
#define H1_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "emulate.h"
#endif
#include "ptx.cuh"

#define WARP 32
#define WHOLE_WARP 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

// Rows of values, `stride` values from one to the next.
template <class T>
struct Rows {
    T* data;
    long long stride;

    H1_DEVICE T* row(long long r) const { return data + r * stride; }
};

H1_DEVICE float load(const float* from) { return *from; }
H1_DEVICE float load(const bf16* from) { return __uint_as_float(static_cast<unsigned>(from->bits) << 16); }
H1_DEVICE float load(const f16* from) { return f16_value(from->bits); }

H1_DEVICE void store(float* to, float value) { *to = value; }
H1_DEVICE void store(bf16* to, float value) { to->bits = bf16_bits(value); }
H1_DEVICE void store(f16* to, float value) { to->bits = f16_bits(value); }

// Eight values that lie on a border of 16 bytes.
template <class T>
struct alignas(16) Eight {
    T values[8];
};

// Whether all rows begin on a border of 16 bytes.
template <class T>
H1_DEVICE bool aligned(Rows<T> rows) {
    return ((unsigned long long)rows.data | (unsigned long long)rows.stride * sizeof(T)) % 16 == 0;
}

// Eight values of which `count` are there, 0 for the others; read at once where rows are `wide`, which is aligned.
template <class T>
H1_DEVICE void load_eight(float (&to)[8], const T* from, long long count, bool wide) {
    if (wide && count >= 8) {
        auto values = *reinterpret_cast<const Eight<T>*>(from);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = load(values.values + i);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = i < count ? load(from + i) : 0.0f;
    }
}

// Writes the first `count` of eight values.
template <class T>
H1_DEVICE void store_eight(T* to, const float (&from)[8], long long count, bool wide) {
    if (wide && count >= 8) {
        Eight<T> values;
#pragma unroll
        for (int i = 0; i < 8; ++i) store(values.values + i, from[i]);
        *reinterpret_cast<Eight<T>*>(to) = values;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) store(to + i, from[i]);
    }
}

// Replaces eight values, or adds to them.
template <class T>
H1_DEVICE void put_eight(T* to, float (&from)[8], long long count, bool wide, bool add) {
    if (add) {
        float there[8];
        load_eight(there, to, count, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) from[i] += there[i];
    }
    store_eight(to, from, count, wide);
}

// A value of a type that is known at run time alone.
enum { TYPE_F32, TYPE_BF16, TYPE_F16 };
H1_DEVICE float load_as(const void* from, int type, long long index) {
    if (type == TYPE_F32) return static_cast<const float*>(from)[index];
    unsigned short bits = static_cast<const unsigned short*>(from)[index];
    return type == TYPE_BF16 ? __uint_as_float(static_cast<unsigned>(bits) << 16) : f16_value(bits);
}

// Replaces what is there, or adds to it.
template <class T>
H1_DEVICE void put(T* to, float value, bool add) {
    store(to, add ? load(to) + value : value);
}

// 1 / (1 + exp(−x)), to a few units in the last place for x that are not far below 0.
H1_DEVICE float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }
H1_DEVICE float silu(float x) { return x * sigmoid(x); }

// The sum over a warp, in every lane.
H1_DEVICE float warp_sum(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, offset);
    return value;
}

// The largest of a warp, in every lane.
H1_DEVICE float warp_max(float value) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, offset));
    return value;
}

// The sum over a block of whole warps, in every thread; `shared` has room for 32 values.
H1_DEVICE float block_sum(float value, float* shared) {
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? shared[threadIdx.x % WARP] : 0.0f);
}

// The largest of a block of whole warps, in every thread; `shared` has room for 32 values.
H1_DEVICE float block_max(float value, float* shared) {
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < blockDim.x / WARP ? shared[threadIdx.x % WARP] : -INFINITE);
}

// All values of `rows × cols`, over the whole grid: blocks along x take rows, those along y columns.
#define EACH(row, col, rows, cols)                                       \
    for (long long row = blockIdx.x; row < (rows); row += gridDim.x)     \
        for (long long col = blockIdx.y * (long long)blockDim.x + threadIdx.x; col < (cols); \
             col += gridDim.y * (long long)blockDim.x)

// The same, eight columns at a time, of which `col` is the first.
#define EACH_EIGHT(row, col, rows, cols)                                 \
    for (long long row = blockIdx.x; row < (rows); row += gridDim.x)     \
        for (long long col = 8 * (blockIdx.y * (long long)blockDim.x + threadIdx.x); col < (cols); \
             col += 8 * (gridDim.y * (long long)blockDim.x))

// A segment as the device holds it. One that does not lie in `tokens` rows counts as empty.
struct Segment {
    unsigned start, len, past, slot, keys;

    H1_DEVICE bool lies_in(long long tokens) const { return (long long)start + len <= tokens; }

    // How many parts of `part_tokens` tokens it has, the last one perhaps shorter; one where that is 0, for all of it.
    H1_DEVICE int parts(long long tokens, int part_tokens) const {
        if (len == 0 || !lies_in(tokens)) return 0;
        return part_tokens == 0 ? 1 : (len + part_tokens - 1) / part_tokens;
    }
};
