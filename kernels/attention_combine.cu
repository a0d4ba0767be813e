// Attention over keys in parts: the sum of the parts' out by their lse, in order. A step of decoding has few queries and
// heads, whose time is that of their reads: a row has `warps_a_row` warps, each of which asks for AHEAD parts at once.
//
// Macros: T_OUT, HEAD_DIM.
#include "attention.cuh"

#define PIECES ((HEAD_DIM + WARP - 1) / WARP)
#define AHEAD 8
// Warps of a block; `warps_a_row` divides them.
#define WARPS 8

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    attention_combine(const float* partial_out, const float* partial_lse, int parts, int warps_a_row, long long tokens,
                      int heads, Rows<T_OUT> out, Rows<float> lse) {
    after_earlier();
    // What the warps of a row sum up, and the sum of their weights.
    __shared__ float shared[WARPS][HEAD_DIM + 1];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, own = warp % warps_a_row;
    long long i = blockIdx.x * (long long)(WARPS / warps_a_row) + warp / warps_a_row, rows = tokens * heads;
    bool there = i < rows;
    float largest = -INFINITE, sum = 0.0f, total[PIECES] = {};
    for (int part = lane; there && part < parts; part += WARP) largest = fmaxf(largest, partial_lse[part * rows + i]);
    for (int first = own * AHEAD; there && first < parts; first += warps_a_row * AHEAD) {
        float weights[AHEAD], values[AHEAD][PIECES];
#pragma unroll
        for (int p = 0; p < AHEAD; ++p) {
            // A part past the last has no weight, as one that saw no key.
            bool inside = first + p < parts;
            weights[p] = inside ? partial_lse[(first + p) * rows + i] : -INFINITE;
#pragma unroll
            for (int d = 0; d < PIECES; ++d)
                values[p][d] = inside && d * WARP + lane < HEAD_DIM
                                   ? partial_out[((first + p) * rows + i) * HEAD_DIM + d * WARP + lane]
                                   : 0.0f;
        }
        if (first == own * AHEAD) largest = warp_max(largest);
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
        if (d * WARP + lane < HEAD_DIM) shared[warp][d * WARP + lane] = total[d];
    if (lane == 0) shared[warp][HEAD_DIM] = sum;
    __syncthreads();
    if (!there || own > 0 || largest == -INFINITE) return;
    for (int other = warp + 1; other < warp + warps_a_row; ++other) {
        sum += shared[other][HEAD_DIM];
#pragma unroll
        for (int d = 0; d < PIECES; ++d)
            if (d * WARP + lane < HEAD_DIM) total[d] += shared[other][d * WARP + lane];
    }
#pragma unroll
    for (int d = 0; d < PIECES; ++d)
        if (d * WARP + lane < HEAD_DIM)
            store(out.row(i / heads) + i % heads * HEAD_DIM + d * WARP + lane, total[d] / sum);
    if (lse.data && lane == 0) lse.row(i / heads)[i % heads] = largest + logf(sum);
}
