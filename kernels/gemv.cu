// One row times a weight: out[n] = Σ_k x[k]·weight[n, k] (+ bias[n]) (+ out[n]), a warp an output. Values are read VECTOR
// at a time; x, the weight and its rows are aligned to that.
//
// Bound by the weight's bytes. A lane asks for its first AHEAD packs before it waits for whoever makes x, so that memory is
// busy while the launch before this one ends.
#include "h1.cuh"

#define AHEAD 8

template <class T>
struct alignas(sizeof(T) * VECTOR) Pack {
    T values[VECTOR];
};

extern "C" __global__ void gemv(const T_X* x, const T_W* weight, const void* bias, int bias_type,
                                T_OUT* out, int add, long long outputs, long long inputs) {
    constexpr int STEP = WARP * VECTOR;
    long long n = blockIdx.x * (long long)(blockDim.x / WARP) + threadIdx.x / WARP, first = threadIdx.x % WARP * VECTOR;
    if (n >= outputs) return;
    const T_W* row = weight + n * inputs;
    auto pack = [&](long long k) { return *reinterpret_cast<const Pack<T_W>*>(row + k); };
    Pack<T_W> ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (first + i * STEP < inputs) ahead[i] = pack(first + i * STEP);
    after_earlier();
    float sum = 0;
    auto take = [&](const Pack<T_W>& w, long long k) {
        Pack<T_X> v = *reinterpret_cast<const Pack<T_X>*>(x + k);
        for (int i = 0; i < VECTOR; ++i) sum += load(v.values + i) * load(w.values + i);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (first + i * STEP < inputs) take(ahead[i], first + i * STEP);
#pragma unroll 4
    for (long long k = first + AHEAD * STEP; k < inputs; k += STEP) take(pack(k), k);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) put(out + n, sum + (bias ? load_as(bias, bias_type, n) : 0.0f), add);
}
