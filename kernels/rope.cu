// Rotates each head of `2·half` columns by its row's position, in place; `sign` −1 rotates the other way.
// With a = position·inv_freq[j]: (x1 cos a − x2 sin a, x2 cos a + x1 sin a). A thread turns one pair of HEADS heads.
#include "h1.cuh"

#define HEADS 4

extern "C" __global__ void rope(Rows<T_X> x, const unsigned* positions, const float* inv_freq, float sign,
                                long long tokens, int heads, int half) {
    int first = blockIdx.y * HEADS, end = min(first + HEADS, heads);
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        for (int j = threadIdx.x; j < half; j += blockDim.x) {
            // The angle reaches 10⁵: its product and sine in f64 keep all the digits that f32 inputs have.
            double sine, cosine;
            sincos((double)positions[t] * (double)inv_freq[j], &sine, &cosine);
            float c = (float)cosine, s = sign * (float)sine;
            for (int head = first; head < end; ++head) {
                T_X* pair = x.row(t) + (long long)head * 2 * half + j;
                float x1 = load(pair), x2 = load(pair + half);
                store(pair, x1 * c - x2 * s);
                store(pair + half, x2 * c + x1 * s);
            }
        }
    }
}
