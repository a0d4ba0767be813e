// The gradients of attention on the H100's tensor cores (attention_backward.cu has the formulas and leaves δ).
//
// In both kernels the first warpgroup copies and the others multiply, 64 rows each, as in attention_wgmma.cu.
// attention_dkv_wgmma: a block has KEYS keys of one head and goes over tiles of QUERY_ROWS rows of the queries that see
// them, the last first: Sᵀ = K·Qᵀ, dPᵀ = V·doutᵀ, dV += Pᵀ·dout, dK += dSᵀ·Q. Blocks: key heads along x, key tiles
// along y.
// attention_dq_wgmma: a block has ROWS rows of queries, the heads of a group together, and goes over tiles of KEYS keys,
// the last first: S = Q·Kᵀ, dP = dout·Vᵀ, dS = P·(dP − δ), dQ += dS·K. Blocks: key heads along x, query tiles along y, the
// last first.
// Both sum in the order of the tiles: S and dP are computed twice, so that nothing is added by two blocks.
//
// Shared memory: (2·KEYS + STAGES·2·QUERY_ROWS)·HEAD_DIM·2 + STAGES·8·QUERY_ROWS + 1024 bytes, and
// (2·ROWS + SLOTS·KEYS)·HEAD_DIM·2 + 1024. Registers: 168 at launch, no spills.
// Macros: those of attention_wgmma.cuh, STAGES, SLOTS. Source: Shah et al., arXiv:2407.08608.
#include "attention_wgmma.cuh"

#ifndef QUERY_ROWS
#define QUERY_ROWS 64
#endif
#ifndef KEYS
#define KEYS_ 128
#endif
#ifndef DQ_KEYS
#define DQ_KEYS 128
#endif
#define CONSUMERS 2
#define DKV_KEYS (64 * CONSUMERS)
#define ROWS (64 * CONSUMERS)
#define THREADS (WARPGROUP * (CONSUMERS + 1))
#define QUERY_BYTES (QUERY_ROWS * HEAD_DIM * 2)
#define KEYS_BYTES (DKV_KEYS * HEAD_DIM * 2)
#define ROWS_BYTES (ROWS * HEAD_DIM * 2)
#define SLOT_BYTES (DQ_KEYS * HEAD_DIM * 2)

#define BACKWARD_INPUTS                                                                                             \
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,  \
        const __grid_constant__ TensorMap dout, long long key_rows, const Segment *segments, int capacity,          \
        long long tokens, int heads, int group, float scale, long long window, Rows<const float> lse, const float *delta

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_dkv_wgmma(BACKWARD_INPUTS, Rows<T_X> dk, Rows<T_X> dv) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress k_tile = shared_address(shared), v_tile = k_tile + KEYS_BYTES, stages = v_tile + KEYS_BYTES;
    float* sums = reinterpret_cast<float*>(shared + 2 * KEYS_BYTES + STAGES * 2 * QUERY_BYTES);
    SharedAddress full = shared_address(sums + STAGES * 2 * QUERY_ROWS), empty = full + 8 * STAGES, kv_full = empty + 8 * STAGES;
    int kv_head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, queries = QUERY_ROWS / group;
    SegmentTile tile(segments, capacity, tokens, blockIdx.y, DKV_KEYS, true);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    // Positions of the first query that sees a key of the tile, and one past the last; tiles of queries.
    int key0 = tile.first, key_last = key0 + tile.count - 1, past = segment.past;
    int first = max(key0, past), end = past + int(segment.len);
    if (window > 0) end = min((long long)end, key_last + window);
    int steps = (max(end - first, 0) + queries - 1) / queries;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1 + WARP);
            barrier_init(empty + 8 * i, CONSUMERS * 4);
        }
        barrier_init(kv_full, 1);
    }
    // Rows that no query has stay 0.
    for (int i = threadIdx.x; i < STAGES * 2 * HALVES * QUERY_ROWS; i += THREADS)
        if (i % QUERY_ROWS >= queries * group) clear_row(stages + i * ROW_BYTES);
    fence_async();
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<40>();
        if (warp > 0) return;
        if (lane == 0 && steps > 0) {
            barrier_expect(kv_full, 2 * KEYS_BYTES);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                copy_box(k_tile + half * DKV_KEYS * ROW_BYTES, k, half * 64, kv_head, int(segment.keys + key0), kv_full);
                copy_box(v_tile + half * DKV_KEYS * ROW_BYTES, v, half * 64, kv_head, int(segment.keys + key0), kv_full);
            }
        }
        Ring<STAGES> at;
#pragma unroll 1
        for (int step = steps - 1; step >= 0; --step, at.next()) {
            int from = first + step * queries, used = min(queries, end - from) * group;
            long long row0 = segment.start + (long long)(from - past);
            SharedAddress to = stages + at.slot * 2 * QUERY_BYTES, barrier = full + 8 * at.slot;
            barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            if (lane == 0) {
                barrier_expect(barrier, 2 * queries * group * HEAD_DIM * 2);
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    copy_box(to + half * QUERY_ROWS * ROW_BYTES, q, half * 64, kv_head * group, int(row0), barrier);
                    copy_box(to + QUERY_BYTES + half * QUERY_ROWS * ROW_BYTES, dout, half * 64, kv_head * group, int(row0), barrier);
                }
            }
#pragma unroll
            for (int i = 0; i < QUERY_ROWS; i += WARP) {
                int row = i + lane;
                long long query = row0 + row / group, head = kv_head * group + row % group;
                float* of_row = sums + at.slot * 2 * QUERY_ROWS + row;
                // A row of no query has a probability of 0.
                of_row[0] = row < used ? lse.row(query)[head] * LOG2_E : INFINITE;
                of_row[QUERY_ROWS] = row < used ? delta[query * heads + head] : 0.0f;
            }
            barrier_arrive(barrier);
        }
        return;
    }

    take_registers<232>();
    int consumer = threadIdx.x / WARPGROUP - 1, warp_row = (warp - 4) * 16 + lane / 4;
    SharedAddress my_k = k_tile + consumer * 64 * ROW_BYTES, my_v = v_tile + consumer * 64 * ROW_BYTES;
    float dk_total[HEAD_DIM / 2], dv_total[HEAD_DIM / 2], scores[QUERY_ROWS / 2], slopes[QUERY_ROWS / 2];
    unsigned of_p[QUERY_ROWS / 16][4], of_slope[QUERY_ROWS / 16][4];
    float scale_log2 = scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) dk_total[i] = dv_total[i] = 0.0f;
    if (steps > 0) barrier_wait(kv_full, 0);
    Ring<STAGES> at;
    int before = -1;
    for (int step = steps - 1; step >= 0; --step, at.next()) {
        int from = first + step * queries, to = min(from + queries, end) - 1;
        SharedAddress q_tile = stages + at.slot * 2 * QUERY_BYTES, dout_tile = q_tile + QUERY_BYTES;
        const float* of_rows = sums + at.slot * 2 * QUERY_ROWS + lane % 4 * 2;
        barrier_wait(full + 8 * at.slot, at.parity);
        if (to + 1 < from + queries) {
            // Of the last tile: rows of other segments.
            for (int i = threadIdx.x % WARPGROUP; i < 2 * HALVES * QUERY_ROWS; i += WARPGROUP)
                if (i % QUERY_ROWS >= (to + 1 - from) * group) clear_row(q_tile + i * ROW_BYTES);
            fence_async();
            meet(1 + consumer, WARPGROUP);
        }
        products_begin();
        multiply_rows<DKV_KEYS, QUERY_ROWS>(scores, my_k, q_tile);
        products_commit();
        multiply_rows<DKV_KEYS, QUERY_ROWS>(slopes, my_v, dout_tile);
        products_commit();
        products_wait<1>();
        keep(scores);
        if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
        before = at.slot;
        bool whole = key_last <= from && (window == 0 || key0 > to - window);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float row_lse = of_rows[n * 8 + j];
#pragma unroll
                for (int r = 0; r < 2; ++r) scores[n * 4 + r * 2 + j] = exp2_fast(fmaf(scores[n * 4 + r * 2 + j], scale_log2, -row_lse));
            }
        if (!whole) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int key = key0 + warp_row + r * 8, column = lane % 4 * 2;
                int begin = max(key - from, 0) * group - column;
                int past_last = window > 0 ? int(min(key + window - from, (long long)queries)) * group - column : QUERY_ROWS;
#pragma unroll
                for (int n = 0; n < QUERY_ROWS / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        if (n * 8 + j < begin || n * 8 + j >= past_last) scores[n * 4 + r * 2 + j] = 0.0f;
            }
        }
        pack_fragments(of_p, scores);
        products_begin();
        multiply_fragments<QUERY_ROWS>(dv_total, of_p, dout_tile, true);
        products_commit();
        products_wait<1>();
        keep(slopes);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float row_delta = of_rows[QUERY_ROWS + n * 8 + j];
#pragma unroll
                for (int r = 0; r < 2; ++r) slopes[n * 4 + r * 2 + j] = scores[n * 4 + r * 2 + j] * (slopes[n * 4 + r * 2 + j] - row_delta);
            }
        pack_fragments(of_slope, slopes);
        products_begin();
        multiply_fragments<QUERY_ROWS>(dk_total, of_slope, q_tile, true);
        products_commit();
    }
    products_wait<0>();
    keep(dk_total);
    keep(dv_total);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int key = warp_row + r * 8;
        if (key >= tile.count) continue;
        long long row = segment.keys + (long long)key0 + key;
        unsigned* to_k = reinterpret_cast<unsigned*>(dk.row(row) + kv_head * HEAD_DIM);
        unsigned* to_v = reinterpret_cast<unsigned*>(dv.row(row) + kv_head * HEAD_DIM);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d) {
            to_k[d * 4 + lane % 4] = pack(scale * dk_total[d * 4 + r * 2], scale * dk_total[d * 4 + r * 2 + 1], T_X{});
            to_v[d * 4 + lane % 4] = pack(dv_total[d * 4 + r * 2], dv_total[d * 4 + r * 2 + 1], T_X{});
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_dq_wgmma(BACKWARD_INPUTS, Rows<T_X> dq) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), dout_tile = q_tile + ROWS_BYTES, ring = dout_tile + ROWS_BYTES;
    SharedAddress full = ring + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS, q_full = empty + 8 * SLOTS;
    int kv_head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, queries = ROWS / group;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, queries, false);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    long long row0 = segment.start + (long long)tile.first;
    int position0 = segment.past + tile.first, last = position0 + tile.count - 1, first_key = first_seen(position0, window);
    int from_tile = first_key / DQ_KEYS, to_tile = last / DQ_KEYS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, CONSUMERS * 4);
        }
        barrier_init(q_full, 1);
        fence_async();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<40>();
        if (threadIdx.x > 0) return;
        barrier_expect(q_full, 2 * queries * group * HEAD_DIM * 2);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            copy_box(q_tile + half * ROWS * ROW_BYTES, q, half * 64, kv_head * group, int(row0), q_full);
            copy_box(dout_tile + half * ROWS * ROW_BYTES, dout, half * 64, kv_head * group, int(row0), q_full);
        }
        Ring<SLOTS> at;
#pragma unroll 1
        for (int key_tile = to_tile; key_tile >= from_tile; --key_tile) {
            int row = int(segment.keys + key_tile * DQ_KEYS);
#pragma unroll
            for (int values = 0; values < 2; ++values, at.next()) {
                SharedAddress to = ring + at.slot * SLOT_BYTES, barrier = full + 8 * at.slot;
                barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
                barrier_expect(barrier, SLOT_BYTES);
#pragma unroll
                for (int half = 0; half < HALVES; ++half)
                    copy_box(to + half * DQ_KEYS * ROW_BYTES, values ? v : k, half * 64, kv_head, row, barrier);
            }
        }
        return;
    }

    take_registers<232>();
    int consumer = threadIdx.x / WARPGROUP - 1, warp_row = (warp - 4) * 16 + lane / 4;
    SharedAddress my_q = q_tile + consumer * 64 * ROW_BYTES, my_dout = dout_tile + consumer * 64 * ROW_BYTES;
    float total[HEAD_DIM / 2], scores[DQ_KEYS / 2], slopes[DQ_KEYS / 2], row_lse[2], row_delta[2];
    unsigned of_slope[DQ_KEYS / 16][4];
    float scale_log2 = scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) total[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8;
        long long query = row0 + row / group, head = kv_head * group + row % group;
        row_lse[r] = row < tile.count * group ? lse.row(query)[head] * LOG2_E : 0.0f;
        row_delta[r] = row < tile.count * group ? delta[query * heads + head] : 0.0f;
    }
    barrier_wait(q_full, 0);
    Ring<SLOTS> at;
    int before = -1;
    for (int key_tile = to_tile; key_tile >= from_tile; --key_tile) {
        int key0 = key_tile * DQ_KEYS;
        Ring<SLOTS> of_v = at;
        of_v.next();
        SharedAddress k_tile = ring + at.slot * SLOT_BYTES, v_tile = ring + of_v.slot * SLOT_BYTES;
        barrier_wait(full + 8 * at.slot, at.parity);
        if (key0 < first_key || key0 + DQ_KEYS - 1 > last) {
            // Keys outside of what the tile's queries see have a slope of 0, and so must be numbers.
            for (int row = threadIdx.x % WARPGROUP; row < HALVES * DQ_KEYS; row += WARPGROUP) {
                int key = key0 + row % DQ_KEYS;
                if (key < first_key || key > last) clear_row(k_tile + row * ROW_BYTES);
            }
            fence_async();
            meet(1 + consumer, WARPGROUP);
        }
        products_begin();
        multiply_rows<ROWS, DQ_KEYS>(scores, my_q, k_tile);
        products_commit();
        barrier_wait(full + 8 * of_v.slot, of_v.parity);
        multiply_rows<ROWS, DQ_KEYS>(slopes, my_dout, v_tile);
        products_commit();
        products_wait<1>();
        keep(scores);
        if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
        before = at.slot;
#pragma unroll
        for (int i = 0; i < DQ_KEYS / 2; ++i) scores[i] = exp2_fast(fmaf(scores[i], scale_log2, -row_lse[i / 2 % 2]));
        products_wait<0>();
        keep(slopes);
        if (lane == 0) barrier_arrive(empty + 8 * of_v.slot);
#pragma unroll
        for (int i = 0; i < DQ_KEYS / 2; ++i) slopes[i] = scores[i] * (slopes[i] - row_delta[i / 2 % 2]);
        if (key0 + DQ_KEYS - 1 > position0 || (window > 0 && key0 <= last - window)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int position = position0 + (warp_row + r * 8) / group;
                int seen = position - key0 - lane % 4 * 2, begin = first_seen(position, window) - key0 - lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < DQ_KEYS / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                        if (n * 8 + j > seen || n * 8 + j < begin) slopes[n * 4 + r * 2 + j] = 0.0f;
            }
        }
        pack_fragments(of_slope, slopes);
        products_begin();
        multiply_fragments<DQ_KEYS>(total, of_slope, k_tile, true);
        products_commit();
        at = of_v;
        at.next();
    }
    products_wait<0>();
    keep(total);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8;
        if (row >= tile.count * group) continue;
        unsigned* to = reinterpret_cast<unsigned*>(dq.row(row0 + row / group) + (kv_head * group + row % group) * HEAD_DIM);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; ++d)
            to[d * 4 + lane % 4] = pack(scale * total[d * 4 + r * 2], scale * total[d * 4 + r * 2 + 1], T_X{});
    }
}
