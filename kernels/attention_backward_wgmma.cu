// The gradients of attention on the H100's tensor cores (attention_backward.cu has the formulas and leaves δ).
//
// In both kernels the first warpgroup copies and the others multiply, 64 rows each, as in attention_wgmma.cu.
// attention_dkv_wgmma: a block has KEYS_A_BLOCK keys of one head and goes over tiles of QUERY_ROWS rows of the queries that see
// them, the last first: Sᵀ = K·Qᵀ, dPᵀ = V·doutᵀ, dV += Pᵀ·dout, dK += dSᵀ·Q. Blocks: key heads along x, key tiles
// along y, and parts of the tiles of queries along z, where there are more than one: then sums are left in `partials`,
// [parts][dk, dv][key rows][width], for attention_dkv_sum.
// attention_dq_wgmma: a block has ROWS rows of queries, the heads of a group together, and goes over tiles of
// KEYS_A_SLOT keys, the last first: S = Q·Kᵀ, dP = dout·Vᵀ, dS = P·(dP − δ), dQ += dS·K. Blocks: key heads along x, query
// tiles along y, the last first.
// Both sum in the order of the tiles: S and dP are computed twice, so that nothing is added by two blocks. No product runs
// from one turn of a loop into the next: the compiler would let them run one after the other then.
//
// Shared memory: (2·KEYS_A_BLOCK + STAGES·2·QUERY_ROWS)·HEAD_DIM·2 + STAGES·8·QUERY_ROWS + 1024 bytes, and
// (2·ROWS + SLOTS·KEYS_A_SLOT)·HEAD_DIM·2 + 1024. Registers: 168 (HEAD_DIM 64: 128) and 128 at launch, no spills.
// Macros: those of attention_wgmma.cuh. Source: Shah et al., arXiv:2407.08608.
#include "attention_wgmma.cuh"

#define QUERY_ROWS 64
#define QUERY_BYTES (QUERY_ROWS * HEAD_DIM * 2)
#define STAGES (HEAD_DIM == 64 ? 6 : 4)
#define DKV_CONSUMERS (HEAD_DIM == 64 ? 3 : 2)
#define DKV_THREADS (WARPGROUP * (DKV_CONSUMERS + 1))
#define KEYS_A_BLOCK (64 * DKV_CONSUMERS)
#define BLOCK_BYTES (KEYS_A_BLOCK * HEAD_DIM * 2)

#define DQ_CONSUMERS 3
#define DQ_THREADS (WARPGROUP * (DQ_CONSUMERS + 1))
#define ROWS (64 * DQ_CONSUMERS)
#define ROWS_BYTES (ROWS * HEAD_DIM * 2)
#define KEYS_A_SLOT (HEAD_DIM == 64 ? 80 : 64)
#define SLOTS 8
#define SLOT_BYTES (KEYS_A_SLOT * HEAD_DIM * 2)

#define BACKWARD_INPUTS                                                                                             \
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,  \
        const __grid_constant__ TensorMap dout, long long key_rows, const Segment *segments, int capacity,          \
        long long tokens, int heads, int group, float scale, long long window, Rows<const float> lse, const float *delta

// Writes a thread's part of row r as f32.
H1_DEVICE void store_sums(float* row, const float (&c)[HEAD_DIM / 2], int r, float factor) {
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d)
#pragma unroll
        for (int j = 0; j < 2; ++j) row[d * 8 + threadIdx.x % 4 * 2 + j] = factor * c[d * 4 + r * 2 + j];
}

extern "C" __global__ void __launch_bounds__(DKV_THREADS, 1)
    attention_dkv_wgmma(BACKWARD_INPUTS, Rows<T_X> dk, Rows<T_X> dv, float* partials) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress k_tile = shared_address(shared), v_tile = k_tile + BLOCK_BYTES, stages = v_tile + BLOCK_BYTES;
    float* sums = reinterpret_cast<float*>(shared + 2 * BLOCK_BYTES + STAGES * 2 * QUERY_BYTES);
    SharedAddress full = shared_address(sums + STAGES * 2 * QUERY_ROWS), empty = full + 8 * STAGES;
    SharedAddress kv_full = empty + 8 * STAGES;
    int kv_head = blockIdx.x, lane = threadIdx.x % WARP, queries = QUERY_ROWS / group;
    SegmentTile tile(segments, capacity, tokens, blockIdx.y, KEYS_A_BLOCK, 0);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    // Positions of the first query that sees a key of the tile, and one past the last; tiles of queries.
    int key0 = tile.first, key_last = key0 + tile.count - 1, past = segment.past;
    int first = max(key0, past), end = past + int(segment.len);
    if (window > 0) end = min((long long)end, key_last + window);
    int steps = (max(end - first, 0) + queries - 1) / queries;
    // The steps of this part.
    int begin_step = (long long)steps * blockIdx.z / gridDim.z, end_step = (long long)steps * (blockIdx.z + 1) / gridDim.z;
    if (threadIdx.x == 0) {
        make_ring<STAGES>(full, 1 + WARP, DKV_CONSUMERS);
        barrier_init(kv_full, 1);
    }
    // Rows that no query has stay 0.
    for (int i = threadIdx.x; i < STAGES * 2 * HALVES * QUERY_ROWS; i += DKV_THREADS)
        if (i % QUERY_ROWS >= queries * group) clear_row(stages + i * ROW_BYTES);
    fence_async();
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<DKV_CONSUMERS == 2 ? 40 : 32>();
        if (threadIdx.x >= WARP) return;
        if (lane == 0 && end_step > begin_step) {
            barrier_expect(kv_full, 2 * BLOCK_BYTES);
            copy_tile<KEYS_A_BLOCK>(k_tile, k, kv_head, segment.keys + key0, kv_full);
            copy_tile<KEYS_A_BLOCK>(v_tile, v, kv_head, segment.keys + key0, kv_full);
        }
        Ring<STAGES> at;
#pragma unroll 1
        for (int step = end_step - 1; step >= begin_step; --step, at.next()) {
            int from = first + step * queries, used = min(queries, end - from) * group;
            int row0 = segment.start + (from - past);
            SharedAddress to = stages + at.slot * 2 * QUERY_BYTES, barrier = full + 8 * at.slot;
            barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
            if (lane == 0) {
                barrier_expect(barrier, 2 * queries * group * HEAD_DIM * 2);
                copy_tile<QUERY_ROWS>(to, q, kv_head * group, row0, barrier);
                copy_tile<QUERY_ROWS>(to + QUERY_BYTES, dout, kv_head * group, row0, barrier);
            }
#pragma unroll
            for (int row = lane; row < QUERY_ROWS; row += WARP) {
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

    take_registers<DKV_CONSUMERS == 2 ? 232 : 160>();
    int consumer = threadIdx.x / WARPGROUP - 1, warp_row = (threadIdx.x - WARPGROUP) / WARP * 16 + lane / 4;
    SharedAddress my_k = k_tile + consumer * 64 * ROW_BYTES, my_v = v_tile + consumer * 64 * ROW_BYTES;
    float dk_total[HEAD_DIM / 2], dv_total[HEAD_DIM / 2], scores[QUERY_ROWS / 2], slopes[QUERY_ROWS / 2];
    unsigned of_p[QUERY_ROWS / 16][4], of_slope[QUERY_ROWS / 16][4];
    float scale_log2 = scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) dk_total[i] = dv_total[i] = 0.0f;
    if (end_step > begin_step) barrier_wait(kv_full, 0);
    Ring<STAGES> at;
    for (int step = end_step - 1; step >= begin_step; --step, at.next()) {
        int from = first + step * queries, count = min(queries, end - from);
        SharedAddress q_tile = stages + at.slot * 2 * QUERY_BYTES, dout_tile = q_tile + QUERY_BYTES;
        const float* of_rows = sums + at.slot * 2 * QUERY_ROWS + lane % 4 * 2;
        barrier_wait(full + 8 * at.slot, at.parity);
        // After the last query: rows of other segments.
        if (count < queries) clear_outside<QUERY_ROWS, 2>(q_tile, 0, count * group);
        products_begin();
        multiply_rows<KEYS_A_BLOCK, QUERY_ROWS>(scores, my_k, q_tile);
        products_commit();
        multiply_rows<KEYS_A_BLOCK, QUERY_ROWS>(slopes, my_v, dout_tile);
        products_commit();
        products_wait<1>();
        keep(scores);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float row_lse = of_rows[n * 8 + j];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float& score = scores[n * 4 + r * 2 + j];
                    score = exp2_fast(fmaf(score, scale_log2, -row_lse));
                }
            }
        if (key_last > from || (window > 0 && key0 <= from + count - 1 - window)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int key = key0 + warp_row + r * 8;
                int past_last = window > 0 ? int(min(key + window - from, (long long)queries)) : queries;
                replace_outside(scores, r, max(key - from, 0) * group, past_last * group, 0.0f);
            }
        }
        pack_fragments(of_p, scores);
        products_begin();
        multiply_fragments<QUERY_ROWS>(dv_total, of_p, dout_tile);
        products_commit();
        products_wait<1>();
        keep(slopes);
#pragma unroll
        for (int n = 0; n < QUERY_ROWS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float row_delta = of_rows[QUERY_ROWS + n * 8 + j];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float& slope = slopes[n * 4 + r * 2 + j];
                    slope = unpacked(of_p, n * 4 + r * 2 + j) * (slope - row_delta);
                }
            }
        pack_fragments(of_slope, slopes);
        products_begin();
        multiply_fragments<QUERY_ROWS>(dk_total, of_slope, q_tile);
        products_commit();
        products_wait<0>();
        keep(dk_total);
        keep(dv_total);
        if (lane == 0) barrier_arrive(empty + 8 * at.slot);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int key = warp_row + r * 8;
        if (key >= tile.count) continue;
        long long row = segment.keys + (long long)key0 + key;
        if (partials) {
            long long width = gridDim.x * HEAD_DIM;
            float* to = partials + (2 * blockIdx.z * key_rows + row) * width + kv_head * HEAD_DIM;
            store_sums(to, dk_total, r, scale);
            store_sums(to + key_rows * width, dv_total, r, 1.0f);
            continue;
        }
        store_row(dk.row(row) + kv_head * HEAD_DIM, dk_total, r, scale);
        store_row(dv.row(row) + kv_head * HEAD_DIM, dv_total, r, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(DQ_THREADS, 1) attention_dq_wgmma(BACKWARD_INPUTS, Rows<T_X> dq) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), dout_tile = q_tile + ROWS_BYTES, ring = dout_tile + ROWS_BYTES;
    SharedAddress full = ring + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS, q_full = empty + 8 * SLOTS;
    int kv_head = blockIdx.x, lane = threadIdx.x % WARP, queries = ROWS / group;
    SegmentTile tile(segments, capacity, tokens, gridDim.y - 1 - blockIdx.y, queries, 1);
    Segment segment = tile.segment;
    if (tile.count == 0 || (long long)segment.keys + segment.past + segment.len > key_rows) return;
    int row0 = segment.start + tile.first, position0 = segment.past + tile.first, last = position0 + tile.count - 1;
    int first = first_seen(position0, window), from_tile = first / KEYS_A_SLOT, to_tile = last / KEYS_A_SLOT;
    if (threadIdx.x == 0) {
        make_ring<SLOTS>(full, 1, DQ_CONSUMERS);
        barrier_init(q_full, 1);
        fence_async();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<32>();
        if (threadIdx.x > 0) return;
        barrier_expect(q_full, 2 * queries * group * HEAD_DIM * 2);
        copy_tile<ROWS>(q_tile, q, kv_head * group, row0, q_full);
        copy_tile<ROWS>(dout_tile, dout, kv_head * group, row0, q_full);
        Ring<SLOTS> at;
#pragma unroll 1
        for (int key_tile = to_tile; key_tile >= from_tile; --key_tile)
#pragma unroll
            for (int values = 0; values < 2; ++values, at.next()) {
                SharedAddress barrier = full + 8 * at.slot;
                barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
                barrier_expect(barrier, SLOT_BYTES);
                copy_tile<KEYS_A_SLOT>(ring + at.slot * SLOT_BYTES, values ? v : k, kv_head,
                                       segment.keys + key_tile * KEYS_A_SLOT, barrier);
            }
        return;
    }

    take_registers<160>();
    int consumer = threadIdx.x / WARPGROUP - 1, warp_row = (threadIdx.x - WARPGROUP) / WARP * 16 + lane / 4;
    SharedAddress my_q = q_tile + consumer * 64 * ROW_BYTES, my_dout = dout_tile + consumer * 64 * ROW_BYTES;
    float total[HEAD_DIM / 2], scores[KEYS_A_SLOT / 2], slopes[KEYS_A_SLOT / 2], row_lse[2], row_delta[2];
    unsigned of_slope[KEYS_A_SLOT / 16][4];
    float scale_log2 = scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) total[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8;
        bool used = row < tile.count * group;
        long long query = row0 + row / group, head = kv_head * group + row % group;
        row_lse[r] = used ? lse.row(query)[head] * LOG2_E : 0.0f;
        row_delta[r] = used ? delta[query * heads + head] : 0.0f;
    }
    barrier_wait(q_full, 0);
    Ring<SLOTS> at;
    for (int key_tile = to_tile; key_tile >= from_tile; --key_tile) {
        int key0 = key_tile * KEYS_A_SLOT;
        Ring<SLOTS> of_v = at;
        of_v.next();
        SharedAddress k_tile = ring + at.slot * SLOT_BYTES, v_tile = ring + of_v.slot * SLOT_BYTES;
        barrier_wait(full + 8 * at.slot, at.parity);
        if (key0 < first || key0 + KEYS_A_SLOT - 1 > last)
            clear_outside<KEYS_A_SLOT, 1>(k_tile, first - key0, last + 1 - key0);
        products_begin();
        multiply_rows<ROWS, KEYS_A_SLOT>(scores, my_q, k_tile);
        products_commit();
        barrier_wait(full + 8 * of_v.slot, of_v.parity);
        multiply_rows<ROWS, KEYS_A_SLOT>(slopes, my_dout, v_tile);
        products_commit();
        products_wait<1>();
        keep(scores);
#pragma unroll
        for (int i = 0; i < KEYS_A_SLOT / 2; ++i)
            scores[i] = exp2_fast(fmaf(scores[i], scale_log2, -row_lse[i / 2 % 2]));
        products_wait<0>();
        keep(slopes);
        if (lane == 0) barrier_arrive(empty + 8 * of_v.slot);
#pragma unroll
        for (int i = 0; i < KEYS_A_SLOT / 2; ++i) slopes[i] = scores[i] * (slopes[i] - row_delta[i / 2 % 2]);
        if (key0 + KEYS_A_SLOT - 1 > position0 || (window > 0 && key0 <= last - window)) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int position = position0 + (warp_row + r * 8) / group;
                replace_outside(slopes, r, int(first_seen(position, window)) - key0, position + 1 - key0, 0.0f);
            }
        }
        pack_fragments(of_slope, slopes);
        products_begin();
        multiply_fragments<KEYS_A_SLOT>(total, of_slope, k_tile);
        products_commit();
        products_wait<0>();
        keep(total);
        if (lane == 0) barrier_arrive(empty + 8 * at.slot);
        at = of_v;
        at.next();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int row = warp_row + r * 8;
        if (row >= tile.count * group) continue;
        store_row(dq.row(row0 + row / group) + (kv_head * group + row % group) * HEAD_DIM, total, r, scale);
    }
}
