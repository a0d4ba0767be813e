// The gradients of attention (attention.cu) for any head size and storage, with f32 products. With p as there from the saved
// lse and δ = Σ dout·out of a query: ds = p·(dout·v − δ), dq = scale·Σ ds·k, dk = scale·Σ ds·q, dv = Σ p·dout.
//
// attention_delta: a warp a query and head leaves δ in `delta`, [tokens][heads]. attention_dq: a block has ROWS rows of
// queries as in attention.cu, and goes over the keys that they see. attention_dkv: a block has ROWS keys of a key head, and
// goes over the rows of the queries that see them, in order. attention_no_keys: a key of no segment has a gradient of 0.
//
// Shared memory: (2·(ROWS + COLS)·ROW_VALUES + ROWS·WEIGHT_ROW)·4 bytes, and 2·COLS·4 for attention_dkv.
// Macros: T_Q, T_KV, T_OUT, T_DOUT, T_DQ, T_DKV, those of attention_tiles.cuh. Source: Dao et al., arXiv:2205.14135,
// appendix B.
#include "attention_tiles.cuh"

#define WARPS 4

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

#define BACKWARD_INPUTS                                                                                                \
    Rows<const T_Q> q, Rows<const T_KV> k, Rows<const T_KV> v, long long key_rows, const Segment *segments, int capacity, \
        long long tokens, int heads, int group, float scale, long long window, Rows<const float> lse, const float *delta, \
        Rows<const T_DOUT> dout

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_dq(BACKWARD_INPUTS, Rows<T_DQ> dq) {
    H1_DYNAMIC_SHARED(shared);
    float *q_tile = reinterpret_cast<float*>(shared), *dout_tile = q_tile + ROWS * ROW_VALUES;
    float *k_tile = dout_tile + ROWS * ROW_VALUES, *v_tile = k_tile + COLS * ROW_VALUES, *weights = v_tile + COLS * ROW_VALUES;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, ROWS, group);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    int kv_head = blockIdx.x, y = threadIdx.x / 8, x = threadIdx.x % 8;
    QueryRows queries{segment, tile.first, group, kv_head};
    int last = queries.position(tile.count - 1), first = first_seen(queries.position(0), window);
    k.data += kv_head * HEAD_DIM;
    v.data += kv_head * HEAD_DIM;
    queries.load<ROWS>(q_tile, q, tile.count);
    queries.load<ROWS>(dout_tile, dout, tile.count);
    float total[OWN_ROWS][OWN_VALUES] = {}, row_lse[OWN_ROWS], row_delta[OWN_ROWS];
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) {
        int row = min(y + i * 16, tile.count - 1);
        row_lse[i] = lse.row(queries.query(row))[queries.head(row)];
        row_delta[i] = delta[queries.query(row) * heads + queries.head(row)];
    }
    for (int key0 = first / COLS * COLS; key0 <= last; key0 += COLS) {
        __syncthreads();
        auto load_keys = [&](float* to, Rows<const T_KV> rows) {
            load_tile<COLS, T_KV>(to, aligned(rows), [&](int col) -> const T_KV* {
                return key0 + col >= first && key0 + col <= last ? rows.row((long long)segment.keys + key0 + col) : nullptr;
            });
        };
        load_keys(k_tile, k);
        load_keys(v_tile, v);
        __syncthreads();
        float scores[OWN_ROWS][OWN_COLS] = {}, slopes[OWN_ROWS][OWN_COLS] = {};
        multiply_rows(scores, q_tile, k_tile);
        multiply_rows(slopes, dout_tile, v_tile);
#pragma unroll
        for (int i = 0; i < OWN_ROWS; ++i) {
            // Keys of this tile that the query sees.
            int end = queries.position(y + i * 16) - key0, begin = first_seen(end, window);
#pragma unroll
            for (int j = 0; j < OWN_COLS; ++j) {
                int col = x + j * 8;
                float p = col >= begin && col <= end ? expf(fmaf(scale, scores[i][j], -row_lse[i])) : 0.0f;
                slopes[i][j] = p * (slopes[i][j] - row_delta[i]);
            }
        }
        leave(weights, slopes);
        add_weighted(total, weights, k_tile);
    }
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) {
        int row = y + i * 16;
        if (row < tile.count) store_row(queries.of(dq, row), total[i], scale);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_dkv(BACKWARD_INPUTS, Rows<T_DKV> dk, Rows<T_DKV> dv) {
    H1_DYNAMIC_SHARED(shared);
    float *k_tile = reinterpret_cast<float*>(shared), *v_tile = k_tile + ROWS * ROW_VALUES;
    float *q_tile = v_tile + ROWS * ROW_VALUES, *dout_tile = q_tile + COLS * ROW_VALUES;
    float *weights = dout_tile + COLS * ROW_VALUES, *of_lse = weights + ROWS * WEIGHT_ROW, *of_delta = of_lse + COLS;
    SegmentTile tile(segments, capacity, tokens, blockIdx.y, ROWS, 0);
    Segment segment = tile.segment;
    long long end_of_keys = (long long)segment.past + segment.len;
    if (tile.count == 0 || segment.keys + end_of_keys > key_rows) return;
    int kv_head = blockIdx.x, y = threadIdx.x / 8, x = threadIdx.x % 8;
    long long row0 = (long long)segment.keys + tile.first;
    k.data += kv_head * HEAD_DIM;
    v.data += kv_head * HEAD_DIM;
    auto load_keys = [&](float* to, Rows<const T_KV> rows) {
        load_tile<ROWS, T_KV>(to, aligned(rows), [&](int row) -> const T_KV* {
            return row < tile.count ? rows.row(row0 + row) : nullptr;
        });
    };
    load_keys(k_tile, k);
    load_keys(v_tile, v);
    // The rows of the queries that see one of the keys.
    long long seen_last = window > 0 ? min(end_of_keys, tile.first + tile.count - 1 + window) : end_of_keys;
    int from = max(0, tile.first - int(segment.past)) * group, to = int(seen_last - segment.past) * group;
    float dk_total[OWN_ROWS][OWN_VALUES] = {}, dv_total[OWN_ROWS][OWN_VALUES] = {};
    for (int first = from; first < to; first += COLS) {
        QueryRows queries{segment, first, group, kv_head};
        __syncthreads();
        queries.load<COLS>(q_tile, q, to - first);
        queries.load<COLS>(dout_tile, dout, to - first);
        for (int col = threadIdx.x; col < COLS && first + col < to; col += THREADS) {
            of_lse[col] = lse.row(queries.query(col))[queries.head(col)];
            of_delta[col] = delta[queries.query(col) * heads + queries.head(col)];
        }
        __syncthreads();
        float scores[OWN_ROWS][OWN_COLS] = {}, slopes[OWN_ROWS][OWN_COLS] = {};
        multiply_rows(scores, k_tile, q_tile);
        multiply_rows(slopes, v_tile, dout_tile);
#pragma unroll
        for (int j = 0; j < OWN_COLS; ++j) {
            int col = x + j * 8;
            bool there = first + col < to;
            // Keys of this tile that the query sees.
            int end = queries.position(col) - tile.first, begin = first_seen(end, window);
#pragma unroll
            for (int i = 0; i < OWN_ROWS; ++i) {
                int row = y + i * 16;
                bool seen = there && row >= begin && row <= end;
                float p = seen ? expf(fmaf(scale, scores[i][j], -of_lse[col])) : 0.0f;
                scores[i][j] = p;
                slopes[i][j] = seen ? p * (slopes[i][j] - of_delta[col]) : 0.0f;
            }
        }
        leave(weights, scores);
        add_weighted(dv_total, weights, dout_tile);
        leave(weights, slopes);
        add_weighted(dk_total, weights, q_tile);
    }
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) {
        int row = y + i * 16;
        if (row >= tile.count) continue;
        store_row(dk.row(row0 + row) + kv_head * HEAD_DIM, dk_total[i], scale);
        store_row(dv.row(row0 + row) + kv_head * HEAD_DIM, dv_total[i], 1.0f);
    }
}

// Gradients of keys and values that were made in parts: [parts][dk, dv][key rows][width], summed in order.
extern "C" __global__ void attention_dkv_sum(const float* partials, int parts, long long key_rows, int width,
                                             Rows<T_DKV> dk, Rows<T_DKV> dv) {
    EACH(row, col, 2 * key_rows, width) {
        float sum = 0.0f;
        for (int part = 0; part < parts; ++part) sum += partials[(2 * part * key_rows + row) * width + col];
        store((row < key_rows ? dk.row(row) : dv.row(row - key_rows)) + col, sum);
    }
}

// A thread a row.
extern "C" __global__ void attention_no_keys(const Segment* segments, int capacity, long long key_rows, int width,
                                             Rows<T_DKV> dk, Rows<T_DKV> dv) {
    long long threads = (long long)gridDim.x * blockDim.x;
    for (long long row = blockIdx.x * (long long)blockDim.x + threadIdx.x; row < key_rows; row += threads) {
        bool queried = false;
        for (int s = 0; s < capacity; ++s) {
            long long position = row - segments[s].keys;
            queried |= segments[s].len > 0 && position >= 0 && position < (long long)segments[s].past + segments[s].len;
        }
        if (queried) continue;
        for (int i = 0; i < width; ++i) {
            store(dk.row(row) + i, 0.0f);
            store(dv.row(row) + i, 0.0f);
        }
    }
}
