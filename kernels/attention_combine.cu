// Attention over keys in parts: the sum of the parts' out by their lse, in order. A warp a query and head. A step of decoding has
// few of them, whose time is that of their reads: AHEAD parts are asked for at once.
//
// Macros: T_OUT, HEAD_DIM.
#include "attention.cuh"

#define PIECES ((HEAD_DIM + WARP - 1) / WARP)
#define AHEAD 8

extern "C" __global__ void attention_combine(const float* partial_out, const float* partial_lse, int parts,
                                             long long tokens, int heads, Rows<T_OUT> out, Rows<float> lse) {
    after_earlier();
    long long i = blockIdx.x * (long long)(blockDim.x / WARP) + threadIdx.x / WARP, rows = tokens * heads;
    if (i >= rows) return;
    float largest = -INFINITE, sum = 0.0f, total[PIECES] = {};
    int lane = threadIdx.x % WARP;
    for (int part = lane; part < parts; part += WARP) largest = fmaxf(largest, partial_lse[part * rows + i]);
    largest = warp_max(largest);
    if (largest == -INFINITE) return;
    for (int first = 0; first < parts; first += AHEAD) {
        float weights[AHEAD], values[AHEAD][PIECES];
#pragma unroll
        for (int p = 0; p < AHEAD; ++p) {
            // A part past the last has no weight, as one that saw no key.
            weights[p] = first + p < parts ? partial_lse[(first + p) * rows + i] : -INFINITE;
#pragma unroll
            for (int d = 0; d < PIECES; ++d)
                values[p][d] = weights[p] > -INFINITE && d * WARP + lane < HEAD_DIM
                                   ? partial_out[((first + p) * rows + i) * HEAD_DIM + d * WARP + lane]
                                   : 0.0f;
        }
#pragma unroll
        for (int p = 0; p < AHEAD; ++p) {
            float weight = expf(weights[p] - largest);
            sum += weight;
#pragma unroll
            for (int d = 0; d < PIECES; ++d) total[d] = fmaf(weight, values[p][d], total[d]);
        }
    }
#pragma unroll
    for (int d = 0; d < PIECES; ++d)
        if (d * WARP + lane < HEAD_DIM)
            store(out.row(i / heads) + i % heads * HEAD_DIM + d * WARP + lane, total[d] / sum);
    if (lse.data && lane == 0) lse.row(i / heads)[i % heads] = largest + logf(sum);
}
