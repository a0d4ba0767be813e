// Causal grouped-query attention over segments on tensor cores, forward (attention.cu has the formula).
//
// A block has the queries of one key head's group: ROWS rows, query after query with the group's heads of each, so that
// the heads share every tile of keys and values; M_TILES times 16 rows a warp. Tiles of 64 keys, counted from position
// 0, come by asynchronous copies into two stages. S = Q·Kᵀ, the online softmax and O += P·V stay in registers, P as the
// fragments of the next product. Blocks along x are key heads, along y query tiles, the last (longest) first; along z
// parts of the keys: with more than one, each leaves its own out and lse in `partial`, for attention_combine.cu.
//
// Shared memory: (ROWS + 4·64)·HEAD_DIM·2 bytes, 96 KiB for 128 rows of 128. Registers: 255, no spills.
// Macros: those of attention_mma.cuh, WARPS, M_TILES. Source: Dao, arXiv:2307.08691.
#include "attention_mma.cuh"

#define ROWS (WARPS * M_TILES * 16)
#define THREADS (WARPS * WARP)

extern "C" __global__ void __launch_bounds__(THREADS, WARPS == 1 ? 3 : 2)
    attention_mma(Rows<const T_X> q, Rows<const T_X> k, Rows<const T_X> v, long long key_rows, const unsigned* pages,
                  long long slots, long long pages_a_slot, int page_size, const Segment* segments, int capacity,
                  long long tokens, int group, float scale, long long window, Rows<T_X> out, Rows<float> lse,
                  float* partial_out, float* partial_lse) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), k_tiles = q_tile + ROWS * HEAD_DIM * 2;
    SharedAddress v_tiles = k_tiles + 2 * TILE_BYTES;
    int queries = ROWS / group, kv_head = blockIdx.x;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, queries, 1);
    auto wait_for_earlier = [] { after_earlier(); };
    if (tile.count == 0) return wait_for_earlier();
    Segment segment = tile.segment;
    long long row0 = segment.start + tile.first;
    int position0 = segment.past + tile.first, last = position0 + tile.count - 1, first = first_seen(position0, window);
    int used = tile.count * group, heads = gridDim.x * group;

    // This block's part of the key tiles.
    int from_tile = first / KEYS_A_TILE, a_part = (last / KEYS_A_TILE - from_tile + int(gridDim.z)) / int(gridDim.z);
    from_tile += a_part * int(blockIdx.z);
    int to_tile = min(from_tile + a_part, last / KEYS_A_TILE + 1);

    // A lane looks up the rows that its warp copies; of one warp, which has registers left, a tile ahead.
    constexpr int ROWS_A_WARP = KEYS_A_TILE / WARPS, LOOKED_UP = (ROWS_A_WARP + WARP - 1) / WARP;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    long long ahead[LOOKED_UP];
    auto look_up = [&](int key_tile) {
#pragma unroll
        for (int i = 0; i < LOOKED_UP; ++i) {
            int row = i * WARP + lane, position = key_tile * KEYS_A_TILE + warp * ROWS_A_WARP + row;
            ahead[i] = -1;
            if (row >= ROWS_A_WARP || position < first || position > last) continue;
            // One warp has registers left for the fast look-up.
            ahead[i] = WARPS == 1 ? key_row(segment, unsigned(position), key_rows, pages, slots, pages_a_slot, page_size)
                                  : key_row(segment, (long long)position, key_rows, pages, slots, pages_a_slot, page_size);
        }
    };
    auto fetch = [&](int key_tile, int stage) {
        if (WARPS > 1) look_up(key_tile);
#pragma unroll(WARPS == 1 ? ROWS_A_WARP * PIECES / WARP : 4)
        for (int i = 0; i < ROWS_A_WARP * PIECES / WARP; ++i) {
            int row = i * WARP / PIECES + lane / PIECES, piece = lane % PIECES;
            long long from = __shfl_sync(WHOLE_WARP, ahead[LOOKED_UP == 1 ? 0 : i / PIECES], row % WARP);
            int at = stage * TILE_BYTES + piece_at(warp * ROWS_A_WARP + row, piece), column = kv_head * HEAD_DIM + piece * 8;
            copy_async(k_tiles + at, k.row(max(from, 0ll)) + column, from >= 0);
            copy_async(v_tiles + at, v.row(max(from, 0ll)) + column, from >= 0);
        }
        commit_copies();
        if (WARPS == 1) look_up(key_tile + 1);
    };

    int warp_row = warp * M_TILES * 16;
    float total[M_TILES][HEAD_DIM / 8][4] = {}, largest[M_TILES][2], sum[M_TILES][2] = {};
    for (int m = 0; m < M_TILES; ++m)
        for (int r = 0; r < 2; ++r) largest[m][r] = -INFINITE;
    float scale_log2 = scale * LOG2_E;

    // Keys in pages that earlier steps wrote need not wait for the launch before this one.
    bool any = from_tile < to_tile, early = WARPS == 1 && any && pages && (from_tile + 1) * KEYS_A_TILE <= int(segment.past);
    auto begin = [&] {
        wait_for_earlier();
        fetch_queries<ROWS, THREADS>(q_tile, q, row0, kv_head * group, group, used);
    };
    if (!early) begin();
    if (WARPS == 1) look_up(from_tile);
    if (any) fetch(from_tile, 0);
    if (early) {
        begin();
        commit_copies();
    }
    for (int key_tile = from_tile; key_tile < to_tile; ++key_tile) {
        int stage = (key_tile - from_tile) % 2;
        if (key_tile + 1 < to_tile) {
            fetch(key_tile + 1, 1 - stage);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        SharedAddress k_tile = k_tiles + stage * TILE_BYTES;
        SharedAddress v_tile = v_tiles + stage * TILE_BYTES;
        float scores[M_TILES][KEYS_A_TILE / 8][4] = {};
#pragma unroll
        for (int d = 0; d < HEAD_DIM; d += 16) {
            unsigned a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) load_a(a[m], q_tile, warp_row + m * 16, d);
#pragma unroll
            for (int n = 0; n < KEYS_A_TILE / 8; n += 2) {
                unsigned b[2][2];
                load_b_rows(b, k_tile, n * 8, d);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply(scores[m][n], a[m], b[0], T_X{});
                    multiply(scores[m][n + 1], a[m], b[1], T_X{});
                }
            }
        }
        int key0 = key_tile * KEYS_A_TILE;
        bool whole = key0 + KEYS_A_TILE - 1 <= position0 && key0 >= first && (window == 0 || key0 > last - window);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!whole) {
                    // Keys of this tile that the query sees.
                    int end = position0 + (warp_row + m * 16 + r * 8 + lane / 4) / group - key0, begin = first_seen(end, window);
#pragma unroll
                    for (int n = 0; n < KEYS_A_TILE / 8; ++n)
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            int key = n * 8 + lane % 4 * 2 + j;
                            if (key > end || key < begin) scores[m][n][r * 2 + j] = -INFINITE;
                        }
                }
                float now = largest[m][r];
#pragma unroll
                for (int n = 0; n < KEYS_A_TILE / 8; ++n)
                    now = fmaxf(now, fmaxf(scores[m][n][r * 2], scores[m][n][r * 2 + 1]));
                now = fmaxf(now, __shfl_xor_sync(WHOLE_WARP, now, 1));
                now = fmaxf(now, __shfl_xor_sync(WHOLE_WARP, now, 2));
                // A row that has seen no key yet has no largest score: 0 keeps its sums 0.
                float base = now == -INFINITE ? 0.0f : now * scale_log2;
                float correction = exp2_fast(largest[m][r] * scale_log2 - base), row_sum = 0.0f;
                largest[m][r] = now;
#pragma unroll
                for (int n = 0; n < KEYS_A_TILE / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float& score = scores[m][n][r * 2 + j];
                        score = exp2_fast(fmaf(score, scale_log2, -base));
                        row_sum += score;
                    }
                sum[m][r] = fmaf(sum[m][r], correction, row_sum);
#pragma unroll
                for (int d = 0; d < HEAD_DIM / 8; ++d) {
                    total[m][d][r * 2] *= correction;
                    total[m][d][r * 2 + 1] *= correction;
                }
            }
#pragma unroll
        for (int n = 0; n < KEYS_A_TILE / 8; n += 2) {
            unsigned a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &scores[m][n + i / 2][i % 2 * 2];
                    a[m][i] = pack(pair[0], pair[1], T_X{});
                }
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d += 2) {
                unsigned b[2][2];
                load_b_columns(b, v_tile, n * 8, d * 8);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m) {
                    multiply(total[m][d], a[m], b[0], T_X{});
                    multiply(total[m][d + 1], a[m], b[1], T_X{});
                }
            }
        }
        __syncthreads();
    }
    wait_copies<0>();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float all = sum[m][r];
            all += __shfl_xor_sync(WHOLE_WARP, all, 1);
            all += __shfl_xor_sync(WHOLE_WARP, all, 2);
            int row = warp_row + m * 16 + r * 8 + lane / 4;
            if (row >= used) continue;
            long long query = row0 + row / group, head = kv_head * group + row % group;
            float inverse = all > 0.0f ? 1.0f / all : 0.0f, row_lse = largest[m][r] * scale + logf(all);
            if (gridDim.z > 1) {
                long long at_part = (blockIdx.z * tokens + query) * heads + head;
                if (lane % 4 == 0) partial_lse[at_part] = all > 0.0f ? row_lse : -INFINITE;
                for (int d = 0; d < HEAD_DIM / 8; ++d)
                    for (int j = 0; j < 2; ++j)
                        partial_out[at_part * HEAD_DIM + d * 8 + lane % 4 * 2 + j] = total[m][d][r * 2 + j] * inverse;
                continue;
            }
            if (lse.data && lane % 4 == 0) lse.row(query)[head] = row_lse;
            unsigned* to = reinterpret_cast<unsigned*>(out.row(query) + head * HEAD_DIM);
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d)
                to[d * 4 + lane % 4] = pack(total[m][d][r * 2] * inverse, total[m][d][r * 2 + 1] * inverse, T_X{});
        }
}
