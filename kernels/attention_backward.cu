// The gradients of attention (attention.cu) for any head size and storage. With p as there from the saved lse and
// δ = Σ dout·out of a query: ds = p·(dout·v − δ), dq = scale·Σ ds·k, dk = scale·Σ ds·q, dv = Σ p·dout.
//
// attention_delta: a warp a query and head leaves δ in `delta`, [tokens][heads]. attention_dq: a warp a query and head
// goes over its keys in order. attention_dkv: a warp a key and key head goes over the queries that see it, head after
// head of the group. In both, 32 rows at a time, a lane a row, for the products; then a lane has every 32nd column.
// A key of no segment has a gradient of 0.
//
// Macros: T_Q, T_KV, T_OUT, T_DOUT, T_DQ, T_DKV, HEAD_DIM. Source: Dao et al., arXiv:2205.14135, appendix B.
#include "attention.cuh"

#define WARPS 4
#define PIECES ((HEAD_DIM + WARP - 1) / WARP)

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    attention_delta(Rows<const T_OUT> out, Rows<const T_DOUT> dout, long long tokens, int heads, float* delta) {
    long long i = blockIdx.x * (long long)WARPS + threadIdx.x / WARP, row = i / heads;
    if (row >= tokens) return;
    float sum = 0.0f;
    for (int d = threadIdx.x % WARP; d < HEAD_DIM; d += WARP) {
        long long column = i % heads * HEAD_DIM + d;
        sum = fmaf(load(out.row(row) + column), load(dout.row(row) + column), sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[i] = sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 4)
    attention_dq(Rows<const T_Q> q, Rows<const T_KV> k, Rows<const T_KV> v, long long key_rows,
                 const Segment* segments, int capacity, long long tokens, int heads, int group, float scale,
                 long long window, Rows<const float> lse, const float* delta, Rows<const T_DOUT> dout, Rows<T_DQ> dq) {
    __shared__ int owner[WARPS];
    __shared__ float query[WARPS][HEAD_DIM], gradient[WARPS][HEAD_DIM];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.y;
    long long first = blockIdx.x * (long long)WARPS, row = first + warp;
    find_owners(segments, capacity, tokens, first, min((long long)WARPS, tokens - first), owner);
    if (row >= tokens || owner[warp] < 0) return;
    for (int d = lane; d < HEAD_DIM; d += WARP) {
        query[warp][d] = scale * load(q.row(row) + head * HEAD_DIM + d);
        gradient[warp][d] = load(dout.row(row) + head * HEAD_DIM + d);
    }
    __syncwarp();
    Segment segment = segments[owner[warp]];
    long long position = segment.past + (row - segment.start);
    k.data += head / group * HEAD_DIM;
    v.data += head / group * HEAD_DIM;
    float total[PIECES] = {}, row_lse = lse.row(row)[head], row_delta = delta[row * heads + head];
    for (long long base = first_seen(position, window); base <= position; base += WARP) {
        long long from = segment.keys + base + lane;
        if (base + lane > position || from >= key_rows) from = -1;
        float score = 0.0f, dp = 0.0f;
        if (from >= 0)
            for (int d = 0; d < HEAD_DIM; ++d) {
                score = fmaf(query[warp][d], load(k.row(from) + d), score);
                dp = fmaf(gradient[warp][d], load(v.row(from) + d), dp);
            }
        float ds = from >= 0 ? expf(score - row_lse) * (dp - row_delta) : 0.0f;
        for (int j = 0; j < WARP; ++j) {
            float weight = __shfl_sync(WHOLE_WARP, ds, j);
            long long key = __shfl_sync(WHOLE_WARP, from, j);
            if (key < 0) continue;
            for (int i = 0; i < PIECES; ++i)
                if (i * WARP + lane < HEAD_DIM)
                    total[i] = fmaf(weight, load(k.row(key) + i * WARP + lane), total[i]);
        }
    }
    for (int i = 0; i < PIECES; ++i)
        if (i * WARP + lane < HEAD_DIM) store(dq.row(row) + head * HEAD_DIM + i * WARP + lane, scale * total[i]);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    attention_dkv(Rows<const T_Q> q, Rows<const T_KV> k, Rows<const T_KV> v, long long key_rows,
                  const Segment* segments, int capacity, long long tokens, int heads, int group, float scale,
                  long long window, Rows<const float> lse, const float* delta, Rows<const T_DOUT> dout, Rows<T_DKV> dk,
                  Rows<T_DKV> dv) {
    __shared__ float key[WARPS][HEAD_DIM], value[WARPS][HEAD_DIM];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, kv_head = blockIdx.y;
    long long row = blockIdx.x * (long long)WARPS + warp;
    if (row >= key_rows) return;
    k.data += kv_head * HEAD_DIM;
    v.data += kv_head * HEAD_DIM;
    for (int d = lane; d < HEAD_DIM; d += WARP) {
        key[warp][d] = scale * load(k.row(row) + d);
        value[warp][d] = load(v.row(row) + d);
    }
    __syncwarp();
    float dk_total[PIECES] = {}, dv_total[PIECES] = {};
    for (int s = 0; s < capacity; ++s) {
        Segment segment = segments[s];
        long long position = row - segment.keys, end = (long long)segment.past + segment.len;
        if (!segment.lies_in(tokens) || segment.len == 0 || position < 0 || position >= end) continue;
        if (window > 0) end = min(end, position + window);
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (long long base = max(position, (long long)segment.past); base < end; base += WARP) {
                long long from = base + lane < end ? segment.start + (base + lane - segment.past) : -1;
                float score = 0.0f, dp = 0.0f, p = 0.0f, ds = 0.0f;
                if (from >= 0) {
                    const T_Q* q_row = q.row(from) + head * HEAD_DIM;
                    const T_DOUT* dout_row = dout.row(from) + head * HEAD_DIM;
                    for (int d = 0; d < HEAD_DIM; ++d) {
                        score = fmaf(key[warp][d], load(q_row + d), score);
                        dp = fmaf(value[warp][d], load(dout_row + d), dp);
                    }
                    p = expf(score - lse.row(from)[head]);
                    ds = p * (dp - delta[from * heads + head]);
                }
                for (int j = 0; j < WARP; ++j) {
                    float weight = __shfl_sync(WHOLE_WARP, p, j), slope = __shfl_sync(WHOLE_WARP, ds, j);
                    long long query = __shfl_sync(WHOLE_WARP, from, j);
                    if (query < 0) continue;
                    for (int i = 0; i < PIECES; ++i) {
                        int d = i * WARP + lane;
                        if (d >= HEAD_DIM) continue;
                        dk_total[i] = fmaf(slope, load(q.row(query) + head * HEAD_DIM + d), dk_total[i]);
                        dv_total[i] = fmaf(weight, load(dout.row(query) + head * HEAD_DIM + d), dv_total[i]);
                    }
                }
            }
    }
    for (int i = 0; i < PIECES; ++i) {
        int d = i * WARP + lane;
        if (d >= HEAD_DIM) continue;
        store(dk.row(row) + kv_head * HEAD_DIM + d, scale * dk_total[i]);
        store(dv.row(row) + kv_head * HEAD_DIM + d, dv_total[i]);
    }
}
