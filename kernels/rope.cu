// Rotates each head of `2·half` columns by its row's position, in place; `sign` −1 rotates the other way.
// With a = position·inv_freq[j]: (x1 cos a − x2 sin a, x2 cos a + x1 sin a). A block takes a row: its threads make the
// `half` sines and cosines, and then turn eight pairs of a head each.
//
// Shared memory: 8·half bytes.
#include "rope.cuh"

extern "C" __global__ void rope(Rows<T_X> x, const unsigned* positions, const float* inv_freq, float sign,
                                long long tokens, int heads, int half) {
    after_earlier();
    H1_DYNAMIC_SHARED(shared);
    float* turns = reinterpret_cast<float*>(shared);
    int eights = (half + 7) / 8;
    bool wide = aligned(x) && half % 8 == 0;
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        __syncthreads();
        make_turns(turns, positions[t], inv_freq, half);
        __syncthreads();
        for (int item = threadIdx.x; item < heads * eights; item += blockDim.x) {
            float y1[8], y2[8];
            rotate_eight(x.row(t) + (long long)(item / eights) * 2 * half, turns, item % eights * 8, half, sign, wide, y1, y2);
        }
    }
}
