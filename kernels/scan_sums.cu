// Sums, in order, of what the tiles and parts of segments of selective_scan_backward.cu leave. Macros: T_DP.
#include "h1.cuh"

// A thread a token and column of B or C: the sum over its group's tiles, in order.
extern "C" __global__ void scan_group_sum(const float* partial, long long tokens, int tiles, int tiles_a_group,
                                          int d_state, Rows<T_DP> out) {
    int columns = tiles / tiles_a_group * d_state;
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x)
        for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < columns; i += gridDim.y * blockDim.x) {
            const float* from = partial + (t * tiles + i / d_state * tiles_a_group) * d_state + i % d_state;
            float total = 0.0f;
            for (int tile = 0; tile < tiles_a_group; ++tile) total += from[tile * d_state];
            store(out.row(t) + i, total);
        }
}

// A thread a value of A, D and the bias: the sum over segments and their parts, in order. dA replaces, the others add.
extern "C" __global__ void scan_segment_sum(const float* partial_a, const float* partial_d, const Segment* segments,
                                            int count, int part_tokens, long long tokens, int channels, int d_state,
                                            Rows<float> da, float* dd, float* dbias) {
    long long values = (long long)channels * (d_state + 2);
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < values;
         i += gridDim.x * (long long)blockDim.x) {
        int channel = i / (d_state + 2), k = i % (d_state + 2);
        float total = 0.0f;
        for (int s = 0, item = 0; s < count; ++s) {
            if (part_tokens == 0) item = s;
            for (int parts = segments[s].parts(tokens, part_tokens); parts > 0; --parts, ++item)
                total += k < d_state ? partial_a[((long long)item * channels + channel) * d_state + k]
                                     : partial_d[((long long)item * 2 + k - d_state) * channels + channel];
        }
        if (k < d_state) da.row(channel)[k] = total;
        if (k == d_state && dd) dd[channel] += total;
        if (k == d_state + 1 && dbias) dbias[channel] += total;
    }
}
