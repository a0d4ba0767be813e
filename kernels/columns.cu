// Sums over rows in two launches: `column_partials` sums a chunk of rows, `column_totals` the chunks, both in order.
// A row of weight 0 is passed over, whatever it holds; without weights each counts once.
#include "h1.cuh"

#ifdef T_X
extern "C" __global__ void column_partials(Rows<const T_X> x, const float* weights, float* partials, long long rows,
                                           long long cols, int chunk) {
    long long c = blockIdx.y * (long long)blockDim.x + threadIdx.x;
    if (c >= cols) return;
    long long first = (long long)blockIdx.x * chunk, end = min(first + chunk, rows);
    float sum = 0;
    for (long long r = first; r < end; ++r) {
        float weight = weights ? weights[r] : 1.0f;
        if (weight != 0) sum += weight * load(x.row(r) + c);
    }
    partials[(long long)blockIdx.x * cols + c] = sum;
}
#else
// out[c] += Σ_chunk partials[chunk, c]: a block has a warp's width of columns, each of WARPS warps every WARPS-th chunk.
#define WARPS 32

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    column_totals(const float* partials, float* out, long long chunks, long long cols) {
    __shared__ float sums[WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    long long c = blockIdx.x * (long long)WARP + lane;
    float sum = 0;
#pragma unroll 8
    for (long long chunk = warp; chunk < chunks; chunk += WARPS)
        if (c < cols) sum += partials[chunk * cols + c];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= cols) return;
#pragma unroll
    for (int other = 1; other < WARPS; ++other) sum += sums[other][lane];
    out[c] += sum;
}
#endif
