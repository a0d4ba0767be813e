// The optimiser's step: the squared norm in two launches, the clip factor, AdamW.
#include "h1.cuh"

// Columns of `control`.
enum { LEARNING_RATE, CORRECTION1, CORRECTION2, NORM, CLIP, CONTROL };

#ifdef T_OUT
// With g = clip·grad: p ← p·(1 − lr·decay), m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
// p ← p − lr·(m/correction1) / (√(v/correction2) + eps); nothing where a number of `control` is not finite.
extern "C" __global__ void adamw(float* param, const float* grad, float* moment1, float* moment2, T_OUT* stored,
                                 const float* control, float beta1, float beta2, float eps, float weight_decay,
                                 long long n) {
    for (int i = 0; i < CONTROL; ++i)
        if (!(fabsf(control[i]) < INFINITE)) return;
    float clip = control[CLIP], rate = control[LEARNING_RATE], decay = 1.0f - rate * weight_decay;
    float correction1 = control[CORRECTION1], correction2 = control[CORRECTION2];
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x) {
        float g = clip * grad[i];
        float m = beta1 * moment1[i] + (1.0f - beta1) * g;
        float v = beta2 * moment2[i] + (1.0f - beta2) * g * g;
        float p = param[i] * decay - rate * (m / correction1) / (sqrtf(v / correction2) + eps);
        moment1[i] = m;
        moment2[i] = v;
        param[i] = p;
        if (stored) store(stored + i, p);
    }
}
#else
// partials[block] = Σ x² over a chunk, in an order that the sizes fix.
extern "C" __global__ void squared_norm_partials(const float* x, float* partials, long long n, long long chunk) {
    __shared__ float shared[WARP];
    long long first = blockIdx.x * chunk, end = min(first + chunk, n);
    float sum = 0;
    for (long long i = first + threadIdx.x; i < end; i += blockDim.x) sum += x[i] * x[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// out += Σ partials, by one block.
extern "C" __global__ void squared_norm_total(const float* partials, float* out, int count) {
    __shared__ float shared[WARP];
    float sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partials[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[0] += sum;
}

// norm = √squared_norm, clip = min(1, max_norm / (norm + 1e-6)), NaN where the norm is not finite.
extern "C" __global__ void clip_factor(const float* squared_norm, float max_norm, float* control) {
    float norm = sqrtf(squared_norm[0]), clip = max_norm / (norm + 1e-6f);
    control[NORM] = norm;
    control[CLIP] = norm < INFINITE ? fminf(1.0f, clip) : NOT_A_NUMBER;
}
#endif
