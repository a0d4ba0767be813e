// Causal grouped-query attention over segments, forward, for any head size and storage: query head j reads the key head
// j / (heads / kv_heads); out = Σ p·v with p = exp(scale·q·k − lse), lse = ln Σ exp(scale·q·k), over the keys
// position − window + 1 ..= position of its segment. attention_mma.cu is the fast path.
//
// A warp a query and head: WARPS queries a block, heads along y. It takes 32 keys at a time, a lane a key, for the
// scores, with the running largest score and sum of an online softmax; then a lane has every 32nd column of out, and
// adds the values key after key.
//
// Macros: T_Q, T_KV, T_OUT, HEAD_DIM. Source: Milakov and Gimelshein, arXiv:1805.02867.
#include "attention.cuh"

#define WARPS 4
#define PIECES ((HEAD_DIM + WARP - 1) / WARP)

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    attention(Rows<const T_Q> q, KEYS, const Segment* segments, int capacity, long long tokens, int group, float scale,
              long long window, Rows<T_OUT> out, Rows<float> lse) {
    __shared__ int owner[WARPS];
    __shared__ float query[WARPS][HEAD_DIM];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.y;
    long long first = blockIdx.x * (long long)WARPS, row = first + warp;
    find_owners(segments, capacity, tokens, first, min((long long)WARPS, tokens - first), owner);
    if (row >= tokens || owner[warp] < 0) return;
    for (int d = lane; d < HEAD_DIM; d += WARP) query[warp][d] = scale * load(q.row(row) + head * HEAD_DIM + d);
    __syncwarp();
    Segment segment = segments[owner[warp]];
    long long position = segment.past + (row - segment.start);
    k.data += head / group * HEAD_DIM;
    v.data += head / group * HEAD_DIM;
    float sum = 0.0f, largest = -INFINITE, total[PIECES] = {};
    for (long long base = first_seen(position, window); base <= position; base += WARP) {
        long long from = -1;
        if (base + lane <= position)
            from = key_row(segment, base + lane, key_rows, pages, slots, pages_a_slot, page_size);
        float score = 0.0f;
        if (from >= 0)
            for (int d = 0; d < HEAD_DIM; ++d) score = fmaf(query[warp][d], load(k.row(from) + d), score);
        float now = fmaxf(largest, warp_max(from >= 0 ? score : -INFINITE));
        if (now == -INFINITE) continue;
        float p = from >= 0 ? expf(score - now) : 0.0f, correction = expf(largest - now);
        largest = now;
        sum = sum * correction + warp_sum(p);
        for (int i = 0; i < PIECES; ++i) total[i] *= correction;
        for (int j = 0; j < WARP; ++j) {
            float weight = __shfl_sync(WHOLE_WARP, p, j);
            long long value_row = __shfl_sync(WHOLE_WARP, from, j);
            if (value_row < 0) continue;
            for (int i = 0; i < PIECES; ++i)
                if (i * WARP + lane < HEAD_DIM)
                    total[i] = fmaf(weight, load(v.row(value_row) + i * WARP + lane), total[i]);
        }
    }
    for (int i = 0; i < PIECES; ++i)
        if (i * WARP + lane < HEAD_DIM) store(out.row(row) + head * HEAD_DIM + i * WARP + lane, total[i] / sum);
    if (lse.data && lane == 0) lse.row(row)[head] = largest + logf(sum);
}
