// RMS norm, a block a row: out = weight ⊙ x·inv, inv = 1 / sqrt(mean(x²) + eps).
//
// Backward, with g = dout ⊙ weight: dx = inv·(g − x·inv²·mean(g ⊙ x)); dweight += Σ_t dout[t] ⊙ x[t]·inv[t], whose sums
// over a chunk of rows `rms_norm_dweight` leaves in `partials`.
#include "h1.cuh"

extern "C" __global__ void rms_norm(Rows<const T_X> x, const T_W* weight, float eps, Rows<T_OUT> out, float* inv_rms,
                                    long long tokens, int hidden) {
    after_earlier();
    __shared__ float shared[WARP];
    // A step of decoding is one row, whose time is that of its reads one after the other: eight values each where they fit.
    int wide = hidden % 8 == 0 && aligned(x) && aligned(out) && aligned(Rows<const T_W>{weight, 0}) ? hidden : 0;
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        const T_X* row = x.row(t);
        float squares = 0;
        for (int c = 8 * threadIdx.x; c < wide; c += 8 * blockDim.x) {
            auto values = *reinterpret_cast<const Eight<T_X>*>(row + c);
            for (int i = 0; i < 8; ++i) squares += load(values.values + i) * load(values.values + i);
        }
        for (int c = wide + threadIdx.x; c < hidden; c += blockDim.x) squares += load(row + c) * load(row + c);
        float inv = 1.0f / sqrtf(block_sum(squares, shared) / hidden + eps);
        if (inv_rms && threadIdx.x == 0) inv_rms[t] = inv;
        for (int c = 8 * threadIdx.x; c < wide; c += 8 * blockDim.x) {
            auto values = *reinterpret_cast<const Eight<T_X>*>(row + c);
            auto weights = *reinterpret_cast<const Eight<T_W>*>(weight + c);
            Eight<T_OUT> results;
            for (int i = 0; i < 8; ++i)
                store(results.values + i, load(values.values + i) * inv * load(weights.values + i));
            *reinterpret_cast<Eight<T_OUT>*>(out.row(t) + c) = results;
        }
        for (int c = wide + threadIdx.x; c < hidden; c += blockDim.x)
            store(out.row(t) + c, load(row + c) * inv * load(weight + c));
    }
}

extern "C" __global__ void rms_norm_backward(Rows<const T_X> x, const T_W* weight, const float* inv_rms,
                                             Rows<const T_OUT> dout, Rows<T_OUT> dx, int add, long long tokens,
                                             int hidden) {
    after_earlier();
    __shared__ float shared[WARP];
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        const T_X* row = x.row(t);
        const T_OUT* gradient = dout.row(t);
        float product = 0, inv = inv_rms[t];
        for (int c = threadIdx.x; c < hidden; c += blockDim.x)
            product += load(gradient + c) * load(weight + c) * load(row + c);
        float along = block_sum(product, shared) / hidden * inv * inv;
        for (int c = threadIdx.x; c < hidden; c += blockDim.x)
            put(dx.row(t) + c, inv * (load(gradient + c) * load(weight + c) - load(row + c) * along), add);
    }
}

extern "C" __global__ void rms_norm_dweight(Rows<const T_X> x, const float* inv_rms, Rows<const T_OUT> dout,
                                            float* partials, long long tokens, int hidden, int chunk) {
    after_earlier();
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= hidden) return;
    long long first = (long long)blockIdx.x * chunk, end = min(first + chunk, tokens);
    float sum = 0;
    for (long long t = first; t < end; ++t) sum += load(dout.row(t) + c) * load(x.row(t) + c) * inv_rms[t];
    partials[(long long)blockIdx.x * hidden + c] = sum;
}
