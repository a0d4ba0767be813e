// Causal grouped-query attention over segments on the H100's tensor cores, forward (attention.cu has the formula).
//
// A tile of queries has ROWS rows, query after query with the group's heads of each; tiles of KEYS_A_SLOT keys are counted
// from position 0. A block takes tiles of queries from `counter` until none is left, the longest first, in rounds of
// `heads_together` key heads, whose keys stay in the cache. A warp of its first warpgroup copies: the queries, then keys and
// values into a ring of SLOTS tiles, from the last keys to the first. Each of the three others has 64 rows: it makes the softmax
// while the tensor cores multiply the next keys and the values of the ones before, or what another one gave them.
//
// Shared memory: (ROWS + SLOTS·KEYS)·HEAD_DIM·2 + 1024 bytes. Registers: 128 at launch, no spills.
// Macros: those of attention_wgmma.cuh, KEYS_A_SLOT. Source: Shah et al., arXiv:2407.08608.
#include "attention_wgmma.cuh"

#define CONSUMERS 3
#define ROWS (64 * CONSUMERS)
#define THREADS (WARPGROUP * (CONSUMERS + 1))
#define SLOTS 8
#define SLOT_BYTES (KEYS_A_SLOT * HEAD_DIM * 2)

// What a block's warpgroups know of a tile of queries; no query is the end.
struct Work {
    int row0, kv_head, position0, count, first, from_tile, to_tile;
    unsigned keys, slot, turn;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_wgmma(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap v, unsigned key_rows, const unsigned* pages, unsigned slots,
                    unsigned pages_a_slot, unsigned page_count, unsigned page_size, int box_rows,
                    const Segment* segments, int capacity, long long tokens, int kv_heads, int group, int tiles, int heads_together, float scale,
                    long long window, int* counter, Rows<T_X> out, Rows<float> lse) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), ring = q_tile + ROWS * HEAD_DIM * 2;
    SharedAddress full = ring + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS, q_full = empty + 8 * SLOTS, q_empty = q_full + 8;
    Work& shared_work = *reinterpret_cast<Work*>(shared + ROWS * HEAD_DIM * 2 + SLOTS * (SLOT_BYTES + 16) + 16);
    int lane = threadIdx.x % WARP, queries = ROWS / group;
    if (threadIdx.x == 0) {
        make_ring<SLOTS>(full, 1, CONSUMERS);
        make_ring<1>(q_full, 1, CONSUMERS);
        shared_work.turn = 0;
        fence_async();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<32>();
        if (threadIdx.x >= WARP) return;
        Ring<SLOTS> at;
        // Registers are few here: what is known of the tile is read where it lies.
        const Work& known = shared_work;
        for (;;) {
            int index = lane == 0 ? atomicAdd(counter, 1) : 0;
            index = __shfl_sync(WHOLE_WARP, index, 0);
            int round = index / (tiles * heads_together), rest = index % (tiles * heads_together);
            int heads = min(heads_together, kv_heads - round * heads_together);
            bool done = index >= tiles * kv_heads;
            SegmentTile tile(segments, done ? 0 : capacity, tokens, done ? 0 : tiles - 1 - rest / heads, queries, 1);
            if (tile.count == 0 && !done) continue;
            barrier_wait(q_empty, ~known.turn & 1);
            __syncwarp();
            if (lane == 0) {
                Work& work = shared_work;
                ++work.turn;
                work.count = tile.count;
                if (done) {
                    barrier_arrive(q_full);
                } else {
                    work.kv_head = round * heads_together + rest % heads;
                    work.row0 = tile.segment.start + tile.first;
                    work.position0 = tile.segment.past + tile.first;
                    work.keys = tile.segment.keys;
                    work.slot = tile.segment.slot;
                    work.first = first_seen(work.position0, window);
                    work.from_tile = work.first / KEYS_A_SLOT;
                    work.to_tile = (work.position0 + work.count - 1) / KEYS_A_SLOT;
                    barrier_expect(q_full, queries * group * HEAD_DIM * 2);
                    copy_tile<ROWS>(q_tile, q, work.kv_head * group, work.row0, q_full);
                }
            }
            if (done) return;
            __syncwarp();
            // Keys before the values of the tile before. A lane copies `box_rows` keys, which are one after the other; where
            // they lie is looked up once for keys and values.
            unsigned of_tile = 0, of_tile_before = 0;
#pragma unroll 1
            for (int step = 0, steps; step < (steps = 2 * (known.to_tile - known.from_tile + 1)); ++step, at.next()) {
                bool values = step > 0 && (step % 2 == 0 || step == steps - 1);
                if (!values) {
                    of_tile_before = of_tile;
                    of_tile = (known.to_tile - (step + 1) / 2) * KEYS_A_SLOT + lane * box_rows;
                    if (pages) {
                        // Of a page that is not there: a row behind the last, so that all are 0.
                        unsigned page = of_tile / page_size, there = page_count;
                        of_tile -= page * page_size;
                        if (known.slot < slots && page < pages_a_slot) there = pages[known.slot * pages_a_slot + page];
                        of_tile = there < page_count ? there * page_size + of_tile : key_rows;
                    } else {
                        of_tile += known.keys;
                    }
                }
                barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
                if (lane == 0) barrier_expect(full + 8 * at.slot, SLOT_BYTES);
                __syncwarp();
                if (lane * box_rows < KEYS_A_SLOT)
                    copy_tile<KEYS_A_SLOT>(ring + at.slot * SLOT_BYTES + lane * box_rows * ROW_BYTES, values ? v : k, known.kv_head,
                                           values && step < steps - 1 ? of_tile_before : of_tile, full + 8 * at.slot);
            }
        }
    }

    take_registers<160>();
    int warp_row = (threadIdx.x - WARPGROUP) / WARP * 16 + lane / 4;
    SharedAddress my_q = q_tile + (threadIdx.x / WARPGROUP - 1) * 64 * ROW_BYTES;
    float scale_log2 = scale * LOG2_E;
    Ring<SLOTS> at;
    for (unsigned turn = 0;; ++turn) {
        barrier_wait(q_full, turn & 1);
        Work work = shared_work;
        if (work.count == 0) return;
        int last = work.position0 + work.count - 1;
        // The position of each row's query.
        int positions[2] = {work.position0 + warp_row / group, work.position0 + (warp_row + 8) / group};
        float scores[KEYS_A_SLOT / 2], total[HEAD_DIM / 2], largest[2] = {-INFINITE, -INFINITE}, sum[2] = {}, correction[2];
        unsigned p[KEYS_A_SLOT / 16][4];

        auto release = [&](int slot) {
            if (lane == 0) barrier_arrive(empty + 8 * slot);
        };
        // Waits for values, of which those that no query of the tile sees must be numbers.
        auto await_values = [&](Ring<SLOTS> of_v, int key_tile) {
            barrier_wait(full + 8 * of_v.slot, of_v.parity);
            int key0 = key_tile * KEYS_A_SLOT;
            if (key0 < work.first || key0 + KEYS_A_SLOT - 1 > last)
                clear_outside<KEYS_A_SLOT, 1>(ring + of_v.slot * SLOT_BYTES, work.first - key0, last + 1 - key0);
        };
        auto softmax = [&](int key_tile) {
            int key0 = key_tile * KEYS_A_SLOT;
            bool whole = key0 + KEYS_A_SLOT - 1 <= work.position0 && (window == 0 || key0 > last - window);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (!whole)
                    replace_outside(scores, r, int(first_seen(positions[r], window)) - key0, positions[r] + 1 - key0, -INFINITE);
                float now = largest[r];
#pragma unroll
                for (int n = 0; n < KEYS_A_SLOT / 8; ++n) now = fmaxf(now, fmaxf(scores[n * 4 + r * 2], scores[n * 4 + r * 2 + 1]));
                now = fmaxf(now, __shfl_xor_sync(WHOLE_WARP, now, 1));
                now = fmaxf(now, __shfl_xor_sync(WHOLE_WARP, now, 2));
                // A row that has seen no key yet has no largest score: 0 keeps its sums 0.
                float base = now == -INFINITE ? 0.0f : now * scale_log2, row_sum = 0.0f;
                correction[r] = exp2_fast(fmaf(largest[r], scale_log2, -base));
                largest[r] = now;
#pragma unroll
                for (int n = 0; n < KEYS_A_SLOT / 8; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float& score = scores[n * 4 + r * 2 + j];
                        score = exp2_fast(fmaf(score, scale_log2, -base));
                        row_sum += score;
                    }
                sum[r] = fmaf(sum[r], correction[r], row_sum);
            }
        };

        barrier_wait(full + 8 * at.slot, at.parity);
        products_begin();
        multiply_rows<ROWS, KEYS_A_SLOT>(scores, my_q, ring + at.slot * SLOT_BYTES);
        products_commit();
        products_wait<0>();
        keep(scores);
        release(at.slot);
        at.next();
        softmax(work.to_tile);
        pack_fragments(p, scores);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) total[i] = 0.0f;
        for (int key_tile = work.to_tile; key_tile > work.from_tile; --key_tile) {
            Ring<SLOTS> of_k = at, of_v = at;
            of_v.next();
            await_values(of_v, key_tile);
            barrier_wait(full + 8 * of_k.slot, of_k.parity);
            products_begin();
            multiply_rows<ROWS, KEYS_A_SLOT>(scores, my_q, ring + of_k.slot * SLOT_BYTES);
            products_commit();
            multiply_fragments<KEYS_A_SLOT>(total, p, ring + of_v.slot * SLOT_BYTES);
            products_commit();
            products_wait<1>();
            keep(scores);
            release(of_k.slot);
            softmax(key_tile - 1);
            products_wait<0>();
            keep(total);
            release(of_v.slot);
            at = of_v;
            at.next();
            pack_fragments(p, scores);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; ++i) total[i] *= correction[i / 2 % 2];
        }
        if (lane == 0) barrier_arrive(q_empty);
        await_values(at, work.from_tile);
        products_begin();
        multiply_fragments<KEYS_A_SLOT>(total, p, ring + at.slot * SLOT_BYTES);
        products_commit();
        products_wait<0>();
        keep(total);
        release(at.slot);
        at.next();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float all = sum[r];
            all += __shfl_xor_sync(WHOLE_WARP, all, 1);
            all += __shfl_xor_sync(WHOLE_WARP, all, 2);
            int row = warp_row + r * 8;
            if (row >= work.count * group) continue;
            long long query = work.row0 + row / group, head = work.kv_head * group + row % group;
            if (lse.data && lane % 4 == 0) lse.row(query)[head] = largest[r] * scale + logf(all);
            store_row(out.row(query) + head * HEAD_DIM, total, r, all > 0.0f ? 1.0f / all : 0.0f);
        }
    }
}
