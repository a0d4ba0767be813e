// What rotates heads: sines and cosines of a row's position, and eight pairs of a head at a time.
#pragma once
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

// The `half` sines and cosines of a position, by all threads of a block.
H1_DEVICE void make_turns(float* turns, unsigned position, const float* inv_freq, int half) {
    for (int j = threadIdx.x; j < half; j += blockDim.x) turn(position, inv_freq[j], turns[j], turns[half + j]);
}

// Rotates up to eight pairs of the head that begins at `head`, from pair `j` on, in place; y1 and y2 are what they become.
template <class T>
H1_DEVICE void rotate_eight(T* head, const float* turns, int j, int half, float sign, bool wide, float (&y1)[8],
                            float (&y2)[8]) {
    float x1[8], x2[8];
    load_eight(x1, head + j, half - j, wide);
    load_eight(x2, head + half + j, half - j, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        bool there = j + i < half;
        float s = there ? sign * turns[j + i] : 0.0f, c = there ? turns[half + j + i] : 0.0f;
        y1[i] = x1[i] * c - x2[i] * s;
        y2[i] = x2[i] * c + x1[i] * s;
    }
    store_eight(head + j, y1, half - j, wide);
    store_eight(head + half + j, y2, half - j, wide);
}
