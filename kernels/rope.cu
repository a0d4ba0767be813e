// Rotates each head of `2·half` columns by its row's position, in place; `sign` −1 rotates the other way.
// With a = position·inv_freq[j]: (x1 cos a − x2 sin a, x2 cos a + x1 sin a). A thread turns one pair of HEADS heads.
#include "h1.cuh"

#define HEADS 4

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
    int first = blockIdx.y * HEADS, end = min(first + HEADS, heads);
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        for (int j = threadIdx.x; j < half; j += blockDim.x) {
            float s, c;
            turn(positions[t], inv_freq[j], s, c);
            s *= sign;
            for (int head = first; head < end; ++head) {
                T_X* pair = x.row(t) + (long long)head * 2 * half + j;
                float x1 = load(pair), x2 = load(pair + half);
                store(pair, x1 * c - x2 * s);
                store(pair + half, x2 * c + x1 * s);
            }
        }
    }
}
