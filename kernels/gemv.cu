// One row times a weight: out[n] = Σ_k x[k]·weight[n, k] (+ bias[n]) (+ out[n]), a warp an output. Values are read VECTOR
// at a time; x, the weight and its rows are aligned to that.
#include "h1.cuh"

template <class T>
struct alignas(sizeof(T) * VECTOR) Pack {
    T values[VECTOR];
};

extern "C" __global__ void gemv(const T_X* x, const T_W* weight, const void* bias, int bias_type,
                                T_OUT* out, int add, long long outputs, long long inputs) {
    long long n = blockIdx.x * (long long)(blockDim.x / WARP) + threadIdx.x / WARP;
    if (n >= outputs) return;
    const T_W* row = weight + n * inputs;
    float sum = 0;
#pragma unroll 4
    for (long long k = threadIdx.x % WARP * VECTOR; k < inputs; k += WARP * VECTOR) {
        Pack<T_W> w = *reinterpret_cast<const Pack<T_W>*>(row + k);
        Pack<T_X> v = *reinterpret_cast<const Pack<T_X>*>(x + k);
        for (int i = 0; i < VECTOR; ++i) sum += load(v.values + i) * load(w.values + i);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) put(out + n, sum + (bias ? load_as(bias, bias_type, n) : 0.0f), add);
}
