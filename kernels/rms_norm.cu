// RMS norm, a block a row: out = weight ⊙ x·inv, inv = 1 / sqrt(mean(x²) + eps).
//
// Backward, with g = dout ⊙ weight: dx = inv·(g − x·inv²·mean(g ⊙ x)); dweight += Σ_t dout[t] ⊙ x[t]·inv[t], whose sum
// over its rows each block leaves in its row of `partials`, if there are.
//
// Bound by the bytes of the rows, and where there are few rows by the time of a read: a thread asks for HELD · 8 values at
// once and keeps them for the second pass. What is beyond HELD · 8 · threads is read twice.
#include "h1.cuh"

#define HELD 2
// Threads of a block of backward, at most.
#define BACKWARD_THREADS 512

// The first of the columns that a thread takes the h-th time.
H1_DEVICE int column(int h) { return 8 * (h * blockDim.x + threadIdx.x); }

extern "C" __global__ void rms_norm(Rows<const T_X> x, const T_W* weight, float eps, Rows<T_OUT> out, float* inv_rms,
                                    long long tokens, int hidden) {
    after_earlier();
    __shared__ float shared[WARP];
    bool wide = aligned(x) && aligned(out) && aligned(Rows<const T_W>{weight, 0});
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        const T_X* row = x.row(t);
        float held[HELD][8], weights[HELD][8], squares = 0;
#pragma unroll
        for (int h = 0; h < HELD; ++h) load_eight(held[h], row + column(h), hidden - column(h), wide);
#pragma unroll
        for (int h = 0; h < HELD; ++h) load_eight(weights[h], weight + column(h), hidden - column(h), wide);
#pragma unroll
        for (int h = 0; h < HELD; ++h)
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += held[h][i] * held[h][i];
        for (int h = HELD; column(h) < hidden; ++h) {
            float values[8];
            load_eight(values, row + column(h), hidden - column(h), wide);
            for (int i = 0; i < 8; ++i) squares += values[i] * values[i];
        }
        float inv = 1.0f / sqrtf(block_sum(squares, shared) / hidden + eps);
        if (inv_rms && threadIdx.x == 0) inv_rms[t] = inv;
        auto finish = [&](float (&values)[8], const float (&weights)[8], int c) {
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = values[i] * inv * weights[i];
            store_eight(out.row(t) + c, values, hidden - c, wide);
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) finish(held[h], weights[h], column(h));
        for (int h = HELD; column(h) < hidden; ++h) {
            load_eight(held[0], row + column(h), hidden - column(h), wide);
            load_eight(weights[0], weight + column(h), hidden - column(h), wide);
            finish(held[0], weights[0], column(h));
        }
    }
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS)
    rms_norm_backward(Rows<const T_X> x, const T_W* weight, const float* inv_rms, Rows<const T_OUT> dout, Rows<T_OUT> dx,
                      int add, long long tokens, int hidden, float* partials) {
    after_earlier();
    __shared__ float shared[WARP];
    bool wide = aligned(x) && aligned(dout) && aligned(dx) && aligned(Rows<const T_W>{weight, 0}) && hidden % 8 == 0;
    float* of_block = partials + (partials ? (long long)blockIdx.x * hidden : 0);
    float sums[HELD][8] = {};
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        float values[HELD][8], slopes[HELD][8], product = 0, inv = inv_rms[t];
        // x and g of eight columns, and the part of their product; what the row adds to dweight is added to `sums`.
        auto take = [&](float (&values)[8], float (&slopes)[8], float (&sums)[8], int c) {
            float weights[8];
            load_eight(values, x.row(t) + c, hidden - c, wide);
            load_eight(slopes, dout.row(t) + c, hidden - c, wide);
            load_eight(weights, weight + c, hidden - c, wide);
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[i] += slopes[i] * values[i] * inv;
                sum += (slopes[i] *= weights[i]) * values[i];
            }
            return sum;
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) product += take(values[h], slopes[h], sums[h], column(h));
        for (int h = HELD; column(h) < hidden; ++h) {
            int c = column(h);
            float more_values[8], more_slopes[8], more_sums[8] = {};
            if (partials && t != blockIdx.x) load_eight(more_sums, of_block + c, hidden - c, wide);
            product += take(more_values, more_slopes, more_sums, c);
            if (partials) store_eight(of_block + c, more_sums, hidden - c, wide);
        }
        float along = block_sum(product, shared) / hidden * inv * inv;
        auto finish = [&](const float (&values)[8], float (&slopes)[8], int c) {
#pragma unroll
            for (int i = 0; i < 8; ++i) slopes[i] = inv * (slopes[i] - values[i] * along);
            put_eight(dx.row(t) + c, slopes, hidden - c, wide, add);
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) finish(values[h], slopes[h], column(h));
        for (int h = HELD; column(h) < hidden; ++h) {
            // Added to dweight already.
            float counted[8] = {};
            take(values[0], slopes[0], counted, column(h));
            finish(values[0], slopes[0], column(h));
        }
    }
#pragma unroll
    for (int h = 0; h < HELD; ++h)
        if (partials) store_eight(of_block + column(h), sums[h], hidden - column(h), wide);
}
