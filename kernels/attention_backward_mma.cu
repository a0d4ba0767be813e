// The gradients of attention on tensor cores (attention_backward.cu has the formulas and leaves δ).
//
// attention_dq_mma: a block has 128 rows of queries, the heads of one group together as in attention_mma.cu, 16 a warp.
// It goes over tiles of 64 keys: S = Q·Kᵀ, dP = dout·Vᵀ, dS = P·(dP − δ), dQ += dS·K. Blocks: key heads along x, query
// tiles along y, the last first.
// attention_dkv_mma: a block has 64 keys of one head, 16 a warp, and goes over tiles of 64 rows of the queries that see
// them, 32 at a time: Sᵀ = K·Qᵀ, dPᵀ = V·doutᵀ, dV += Pᵀ·dout, dK += dSᵀ·Q. Blocks: key heads along x, key tiles along y.
// Both sum in the order of the tiles: S and dP are computed twice, so that nothing is added by two blocks.
// attention_no_keys: gradients of the keys that no query sees, of segments without rows and after the last, which are 0.
//
// Shared memory: (2·128 + 4·64)·HEAD_DIM·2 bytes, and 6·64·HEAD_DIM·2 + 1024. Registers: at most 255, no spills.
// Macros: those of attention_mma.cuh. Source: Dao, arXiv:2307.08691.
#include "attention_mma.cuh"

#define ROWS 128
#define DQ_THREADS 256
#define DKV_THREADS 128
#define HALF 32

#define BACKWARD_INPUTS                                                                                          \
    Rows<const T_X> q, Rows<const T_X> k, Rows<const T_X> v, long long key_rows, const Segment *segments,        \
        int capacity, long long tokens, int heads, int group, float scale, long long window, Rows<const float> lse, \
        const float *delta, Rows<const T_X> dout

extern "C" __global__ void __launch_bounds__(DQ_THREADS, 1) attention_dq_mma(BACKWARD_INPUTS, Rows<T_X> dq) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), dout_tile = q_tile + ROWS * HEAD_DIM * 2;
    SharedAddress k_tiles = dout_tile + ROWS * HEAD_DIM * 2, v_tiles = k_tiles + 2 * TILE_BYTES;
    int kv_head = blockIdx.x, lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, ROWS / group, 1);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    long long row0 = segment.start + tile.first;
    int position0 = segment.past + tile.first, last = position0 + tile.count - 1, first = first_seen(position0, window);
    int used = tile.count * group;
    fetch_queries<ROWS, DQ_THREADS>(q_tile, q, row0, kv_head * group, group, used);
    fetch_queries<ROWS, DQ_THREADS>(dout_tile, dout, row0, kv_head * group, group, used);
    auto fetch = [&](int key_tile, int stage) {
        int begin = max(0, first - key_tile * KEYS_A_TILE), end = last + 1 - key_tile * KEYS_A_TILE;
        long long from = (long long)segment.keys + key_tile * KEYS_A_TILE;
        fetch_rows<DQ_THREADS>(k_tiles + stage * TILE_BYTES, k, from, begin, end, kv_head);
        fetch_rows<DQ_THREADS>(v_tiles + stage * TILE_BYTES, v, from, begin, end, kv_head);
        commit_copies();
    };
    float total[HEAD_DIM / 8][4] = {}, row_lse[2], row_delta[2], scale_log2 = scale * LOG2_E;
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8 + lane / 4;
        long long query = row0 + row / group, head = kv_head * group + row % group;
        row_lse[r] = row < used ? lse.row(query)[head] * LOG2_E : 0.0f;
        row_delta[r] = row < used ? delta[query * heads + head] : 0.0f;
    }
    int from_tile = first / KEYS_A_TILE, to_tile = last / KEYS_A_TILE;
    fetch(from_tile, 0);
    for (int key_tile = from_tile; key_tile <= to_tile; ++key_tile) {
        int stage = (key_tile - from_tile) % 2;
        if (key_tile < to_tile) {
            fetch(key_tile + 1, 1 - stage);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        SharedAddress k_tile = k_tiles + stage * TILE_BYTES, v_tile = v_tiles + stage * TILE_BYTES;
        float scores[KEYS_A_TILE / 8][4] = {}, slopes[KEYS_A_TILE / 8][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 16) {
            unsigned a[4], of_dout[4];
            load_a(a, q_tile, warp_row, d);
            load_a(of_dout, dout_tile, warp_row, d);
#pragma unroll
            for (int n = 0; n < KEYS_A_TILE / 8; n += 2) {
                unsigned b[2][2];
                load_b_rows(b, k_tile, n * 8, d);
                multiply(scores[n], a, b[0], T_X{});
                multiply(scores[n + 1], a, b[1], T_X{});
                load_b_rows(b, v_tile, n * 8, d);
                multiply(slopes[n], of_dout, b[0], T_X{});
                multiply(slopes[n + 1], of_dout, b[1], T_X{});
            }
        }
        int key0 = key_tile * KEYS_A_TILE;
        bool whole = key0 + KEYS_A_TILE - 1 <= position0 && key0 >= first && (window == 0 || key0 > last - window);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int end = position0 + (warp_row + r * 8 + lane / 4) / group - key0, begin = first_seen(end, window);
#pragma unroll
            for (int n = 0; n < KEYS_A_TILE / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    int key = n * 8 + lane % 4 * 2 + j, i = r * 2 + j;
                    float p = exp2_fast(fmaf(scores[n][i], scale_log2, -row_lse[r]));
                    slopes[n][i] = whole || (key <= end && key >= begin) ? p * (slopes[n][i] - row_delta[r]) : 0.0f;
                }
        }
#pragma unroll
        for (int n = 0; n < KEYS_A_TILE / 8; n += 2) {
            unsigned a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &slopes[n + i / 2][i % 2 * 2];
                a[i] = pack(pair[0], pair[1], T_X{});
            }
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d += 2) {
                unsigned b[2][2];
                load_b_columns(b, k_tile, n * 8, d * 8);
                multiply(total[d], a, b[0], T_X{});
                multiply(total[d + 1], a, b[1], T_X{});
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8 + lane / 4;
        if (row >= used) continue;
        unsigned* to = reinterpret_cast<unsigned*>(dq.row(row0 + row / group) + (kv_head * group + row % group) * HEAD_DIM);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
            to[d * 4 + lane % 4] = pack(scale * total[d][r * 2], scale * total[d][r * 2 + 1], T_X{});
    }
}

extern "C" __global__ void __launch_bounds__(DKV_THREADS, 2)
    attention_dkv_mma(BACKWARD_INPUTS, Rows<T_X> dk, Rows<T_X> dv) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress k_tile = shared_address(shared), v_tile = k_tile + TILE_BYTES;
    SharedAddress q_tiles = v_tile + TILE_BYTES, dout_tiles = q_tiles + 2 * TILE_BYTES;
    float* lse_tiles = reinterpret_cast<float*>(shared + 6 * TILE_BYTES);
    float* delta_tiles = lse_tiles + 2 * KEYS_A_TILE;
    int kv_head = blockIdx.x, lane = threadIdx.x % WARP, warp_row = threadIdx.x / WARP * 16;
    SegmentTile tile(segments, capacity, tokens, blockIdx.y, KEYS_A_TILE, 0);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    // Positions of the first query that sees a key of the tile, and one past the last.
    int key0 = tile.first, key_last = key0 + tile.count - 1, queries = KEYS_A_TILE / group;
    int past = segment.past, first = max(key0, past), end = past + int(segment.len);
    if (window > 0) end = min((long long)end, key_last + window);
    fetch_rows<DKV_THREADS>(k_tile, k, segment.keys + (long long)key0, 0, tile.count, kv_head);
    fetch_rows<DKV_THREADS>(v_tile, v, segment.keys + (long long)key0, 0, tile.count, kv_head);
    auto fetch = [&](int from, int stage) {
        int used = min(queries, end - from) * group;
        long long row0 = segment.start + (long long)(from - past);
        fetch_queries<KEYS_A_TILE, DKV_THREADS>(q_tiles + stage * TILE_BYTES, q, row0, kv_head * group, group, used);
        fetch_queries<KEYS_A_TILE, DKV_THREADS>(dout_tiles + stage * TILE_BYTES, dout, row0, kv_head * group, group, used);
        commit_copies();
        for (int row = threadIdx.x; row < KEYS_A_TILE; row += DKV_THREADS) {
            long long query = row0 + row / group, head = kv_head * group + row % group;
            // A row of no query has a probability of 0.
            lse_tiles[stage * KEYS_A_TILE + row] = row < used ? lse.row(query)[head] * LOG2_E : INFINITE;
            delta_tiles[stage * KEYS_A_TILE + row] = row < used ? delta[query * heads + head] : 0.0f;
        }
    };
    float dk_total[HEAD_DIM / 8][4] = {}, dv_total[HEAD_DIM / 8][4] = {}, scale_log2 = scale * LOG2_E;
    if (first < end) fetch(first, 0);
    int stage = 0;
    for (int from = first; from < end; from += queries, stage = 1 - stage) {
        if (from + queries < end) {
            fetch(from + queries, 1 - stage);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        SharedAddress q_tile = q_tiles + stage * TILE_BYTES, dout_tile = dout_tiles + stage * TILE_BYTES;
        int to = min(from + queries, end) - 1;
        bool whole = key_last <= from && (window == 0 || key0 > to - window);
#pragma unroll 1
        for (int half = 0; half < KEYS_A_TILE; half += HALF) {
            float scores[HALF / 8][4] = {}, slopes[HALF / 8][4] = {};
#pragma unroll
            for (int d = 0; d < HEAD_DIM; d += 16) {
                unsigned of_k[4], of_v[4];
                load_a(of_k, k_tile, warp_row, d);
                load_a(of_v, v_tile, warp_row, d);
#pragma unroll
                for (int n = 0; n < HALF / 8; n += 2) {
                    unsigned b[2][2];
                    load_b_rows(b, q_tile, half + n * 8, d);
                    multiply(scores[n], of_k, b[0], T_X{});
                    multiply(scores[n + 1], of_k, b[1], T_X{});
                    load_b_rows(b, dout_tile, half + n * 8, d);
                    multiply(slopes[n], of_v, b[0], T_X{});
                    multiply(slopes[n + 1], of_v, b[1], T_X{});
                }
            }
#pragma unroll
            for (int n = 0; n < HALF / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    int row = half + n * 8 + lane % 4 * 2 + j, position = from + row / group;
                    float row_lse = lse_tiles[stage * KEYS_A_TILE + row];
                    float row_delta = delta_tiles[stage * KEYS_A_TILE + row];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        int key = key0 + warp_row + r * 8 + lane / 4, i = r * 2 + j;
                        bool seen = whole || (key <= position && (window == 0 || key > position - window));
                        float p = seen ? exp2_fast(fmaf(scores[n][i], scale_log2, -row_lse)) : 0.0f;
                        scores[n][i] = p;
                        slopes[n][i] = p * (slopes[n][i] - row_delta);
                    }
                }
#pragma unroll
            for (int n = 0; n < HALF / 8; n += 2) {
                unsigned of_p[4], of_slope[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float *p = &scores[n + i / 2][i % 2 * 2], *slope = &slopes[n + i / 2][i % 2 * 2];
                    of_p[i] = pack(p[0], p[1], T_X{});
                    of_slope[i] = pack(slope[0], slope[1], T_X{});
                }
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 8; d += 2) {
                    unsigned b[2][2];
                    load_b_columns(b, dout_tile, half + n * 8, d * 8);
                    multiply(dv_total[d], of_p, b[0], T_X{});
                    multiply(dv_total[d + 1], of_p, b[1], T_X{});
                    load_b_columns(b, q_tile, half + n * 8, d * 8);
                    multiply(dk_total[d], of_slope, b[0], T_X{});
                    multiply(dk_total[d + 1], of_slope, b[1], T_X{});
                }
            }
        }
        __syncthreads();
    }
    wait_copies<0>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int key = warp_row + r * 8 + lane / 4;
        if (key >= tile.count) continue;
        long long row = segment.keys + (long long)key0 + key;
        unsigned* to_k = reinterpret_cast<unsigned*>(dk.row(row) + kv_head * HEAD_DIM);
        unsigned* to_v = reinterpret_cast<unsigned*>(dv.row(row) + kv_head * HEAD_DIM);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            to_k[d * 4 + lane % 4] = pack(scale * dk_total[d][r * 2], scale * dk_total[d][r * 2 + 1], T_X{});
            to_v[d * 4 + lane % 4] = pack(dv_total[d][r * 2], dv_total[d][r * 2 + 1], T_X{});
        }
    }
}
