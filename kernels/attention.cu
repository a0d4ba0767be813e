// Causal grouped-query attention over segments, forward, for any head size and storage, with f32 products: query head j reads
// the key head j / (heads / kv_heads); out = Σ p·v with p = exp(scale·q·k − lse), lse = ln Σ exp(scale·q·k), over the keys
// position − window + 1 ..= position of its segment. attention_mma.cu is the fast path of 16 bits.
//
// A block has ROWS rows of the queries of one key head's group, query after query with the group's heads of each, and goes over
// tiles of COLS keys, counted from position 0, with an online softmax. Blocks along x are key heads, along y tiles of rows, the
// last (longest) first; along z parts of the keys: with more than one, each leaves its own out and lse in `partial`, for
// attention_combine.cu.
//
// Shared memory: ((ROWS + 2·COLS)·ROW_VALUES + ROWS·WEIGHT_ROW + COLS)·4 bytes. Macros: T_Q, T_KV, T_OUT, those of
// attention_tiles.cuh. Source: Milakov and Gimelshein, arXiv:1805.02867.
#include "attention_tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention(Rows<const T_Q> q, KEYS, const Segment* segments, int capacity, long long tokens, int group, float scale,
              long long window, Rows<T_OUT> out, Rows<float> lse, float* partial_out, float* partial_lse) {
    H1_DYNAMIC_SHARED(shared);
    float *q_tile = reinterpret_cast<float*>(shared), *k_tile = q_tile + ROWS * ROW_VALUES, *v_tile = k_tile + COLS * ROW_VALUES;
    float *weights = v_tile + COLS * ROW_VALUES, *hidden = weights + ROWS * WEIGHT_ROW;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, ROWS, group);
    if (tile.count == 0) return;
    Segment segment = tile.segment;
    int kv_head = blockIdx.x, heads = gridDim.x * group, y = threadIdx.x / 8, x = threadIdx.x % 8;
    QueryRows queries{segment, tile.first, group, kv_head};
    int last = queries.position(tile.count - 1), first = first_seen(queries.position(0), window);
    k.data += kv_head * HEAD_DIM;
    v.data += kv_head * HEAD_DIM;

    // This block's part of the key tiles.
    int from_tile = first / COLS, a_part = (last / COLS - from_tile + int(gridDim.z)) / int(gridDim.z);
    from_tile += a_part * int(blockIdx.z);
    int to_tile = min(from_tile + a_part, last / COLS + 1);

    queries.load<ROWS>(q_tile, q, tile.count);
    float total[OWN_ROWS][OWN_VALUES] = {}, largest[OWN_ROWS], sum[OWN_ROWS] = {};
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) largest[i] = -INFINITE;
    for (int key_tile = from_tile; key_tile < to_tile; ++key_tile) {
        int key0 = key_tile * COLS;
        __syncthreads();
        auto row_of_key = [&](int col) {
            int position = key0 + col;
            if (position < first || position > last) return -1ll;
            return key_row(segment, unsigned(position), key_rows, pages, slots, pages_a_slot, page_size);
        };
        auto load_keys = [&](float* to, Rows<const T_KV> rows) {
            load_tile<COLS, T_KV>(to, aligned(rows), [&](int col) -> const T_KV* {
                long long row = row_of_key(col);
                return row < 0 ? nullptr : rows.row(row);
            });
        };
        load_keys(k_tile, k);
        load_keys(v_tile, v);
        for (int col = threadIdx.x; col < COLS; col += THREADS) hidden[col] = row_of_key(col) < 0 ? -INFINITE : 0.0f;
        __syncthreads();
        float scores[OWN_ROWS][OWN_COLS] = {};
        multiply_rows(scores, q_tile, k_tile);
#pragma unroll
        for (int i = 0; i < OWN_ROWS; ++i) {
            // Keys of this tile that the query sees.
            int end = queries.position(y + i * 16) - key0, begin = first_seen(end, window);
            float now = largest[i];
#pragma unroll
            for (int j = 0; j < OWN_COLS; ++j) {
                int col = x + j * 8;
                scores[i][j] = col >= begin && col <= end ? fmaf(scale, scores[i][j], hidden[col]) : -INFINITE;
                now = fmaxf(now, scores[i][j]);
            }
            now = row_max(now);
            // A row that has seen no key yet has no largest score: 0 keeps its sums 0.
            float base = now == -INFINITE ? 0.0f : now, correction = expf(largest[i] - base);
            largest[i] = now;
            sum[i] *= correction;
#pragma unroll
            for (int j = 0; j < OWN_COLS; ++j) {
                scores[i][j] = expf(scores[i][j] - base);
                sum[i] += scores[i][j];
            }
#pragma unroll
            for (int j = 0; j < OWN_VALUES; ++j) total[i][j] *= correction;
        }
        leave(weights, scores);
        add_weighted(total, weights, v_tile);
    }
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i) {
        int row = y + i * 16;
        float all = row_sum(sum[i]), inverse = all > 0.0f ? 1.0f / all : 0.0f, row_lse = largest[i] + logf(all);
        if (row >= tile.count) continue;
        long long query = queries.query(row), head = queries.head(row);
        if (gridDim.z > 1) {
            long long at_part = (blockIdx.z * tokens + query) * heads + head;
            if (x == 0) partial_lse[at_part] = all > 0.0f ? row_lse : -INFINITE;
            store_row(partial_out + at_part * HEAD_DIM, total[i], inverse);
            continue;
        }
        store_row(queries.of(out, row), total[i], inverse);
        if (lse.data && x == 0) lse.row(query)[head] = row_lse;
    }
}
