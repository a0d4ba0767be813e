// Rotates each head of `2·half` columns by its row's position, in place; `sign` −1 rotates the other way.
// With a = position·inv_freq[j]: (x1 cos a − x2 sin a, x2 cos a + x1 sin a). A block takes a row: its threads make the
// `half` sines and cosines, and then turn eight pairs of a head each.
//
// Shared memory: 8·half bytes.
#include "h1.cuh"

// The sine and cosine of position·inv_freq, which reaches 10⁵ and more: the product less its quarter turns in f64 keeps all
// the digits that f32 inputs have, and a polynomial does the rest, |r| ≤ π/4 (Cephes' sinf and cosf).
H1_DEVICE void turn(unsigned position, float inv_freq, float& sine, float& cosine) {
    double angle = (double)position * (double)inv_freq, quarters = rint(angle * 0.63661977236758134308);
    float r = (float)(angle - quarters * 1.57079632679489661923), s = r * r;
    float sin_r = r + r * s * (-1.6666654611e-1f + s * (8.3321608736e-3f - s * 1.9515295891e-4f));
    float cos_r = 1.0f - 0.5f * s + s * s * (4.166664568298827e-2f + s * (-1.388731625493765e-3f + s * 2.443315711809948e-5f));
    int quarter = (int)(long long)quarters & 3;
    sine = quarter & 1 ? cos_r : sin_r;
    cosine = quarter & 1 ? sin_r : cos_r;
    if (quarter & 2) sine = -sine;
    if ((quarter + 1) & 2) cosine = -cosine;
}

extern "C" __global__ void rope(Rows<T_X> x, const unsigned* positions, const float* inv_freq, float sign,
                                long long tokens, int heads, int half) {
    after_earlier();
    H1_DYNAMIC_SHARED(shared);
    float *sines = reinterpret_cast<float*>(shared), *cosines = sines + half;
    int eights = (half + 7) / 8;
    bool wide = aligned(x) && half % 8 == 0;
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        __syncthreads();
        for (int j = threadIdx.x; j < half; j += blockDim.x) turn(positions[t], inv_freq[j], sines[j], cosines[j]);
        __syncthreads();
        for (int item = threadIdx.x; item < heads * eights; item += blockDim.x) {
            int j = item % eights * 8, count = half - j;
            T_X* pairs = x.row(t) + (long long)(item / eights) * 2 * half + j;
            float x1[8], x2[8], y1[8], y2[8];
            load_eight(x1, pairs, count, wide);
            load_eight(x2, pairs + half, count, wide);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float s = i < count ? sign * sines[j + i] : 0.0f, c = i < count ? cosines[j + i] : 0.0f;
                y1[i] = x1[i] * c - x2[i] * s;
                y2[i] = x2[i] * c + x1[i] * s;
            }
            store_eight(pairs, y1, count, wide);
            store_eight(pairs + half, y2, count, wide);
        }
    }
}
