// Causal grouped-query attention over segments on the H100's tensor cores, forward (attention.cu has the formula).
//
// A tile of queries has ROWS rows, query after query with the group's heads of each; tiles of KEYS keys are counted from
// position 0. A block takes tiles of queries from `counter` until none is left, the longest first, in rounds of
// `heads_together` key heads, whose keys stay in the cache. Its first warpgroup copies: the queries, then keys and values
// into a ring of SLOTS tiles, from the last keys to the first. Each of the others has 64 rows: the scores of the next
// keys and the values of the ones before are multiplied while it makes the softmax, and while one of them does, another
// one multiplies (they take turns by named barriers).
//
// Shared memory: (ROWS + SLOTS·KEYS)·HEAD_DIM·2 + 1024 bytes. Registers: 168 at launch, no spills.
// Macros: those of attention_wgmma.cuh, CONSUMERS, SLOTS. Source: Shah et al., arXiv:2407.08608.
#include "attention_wgmma.cuh"

#ifndef KEYS_A_SLOT
#define KEYS_A_SLOT 128
#endif
#define ROWS (64 * CONSUMERS)
#define THREADS (WARPGROUP * (CONSUMERS + 1))
#define SLOT_BYTES (KEYS_A_SLOT * HEAD_DIM * 2)

// What a block's warpgroups know of a tile of queries.
struct Work {
    long long row0;
    int kv_head, position0, count, first, from_tile, to_tile;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_wgmma(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                    const __grid_constant__ TensorMap v, long long key_rows, const unsigned* pages, long long slots,
                    long long pages_a_slot, int page_size, const Segment* segments, int capacity, long long tokens,
                    int kv_heads, int group, int tiles, int heads_together, float scale, long long window, int* counter,
                    Rows<T_X> out, Rows<float> lse) {
    H1_DYNAMIC_SHARED(shared);
    SharedAddress q_tile = shared_address(shared), ring = q_tile + ROWS * HEAD_DIM * 2;
    SharedAddress full = ring + SLOTS * SLOT_BYTES, empty = full + 8 * SLOTS;
    SharedAddress q_full = empty + 8 * SLOTS, q_empty = q_full + 8;
    Work& shared_work = *reinterpret_cast<Work*>(shared + ROWS * HEAD_DIM * 2 + SLOTS * (SLOT_BYTES + 16) + 16);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, queries = ROWS / group;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, CONSUMERS * 4);
        }
        barrier_init(q_full, 1);
        barrier_init(q_empty, CONSUMERS * 4);
        fence_async();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        give_registers<CONSUMERS == 2 ? 40 : 32>();
        if (threadIdx.x > 0) return;
        Ring<SLOTS> at;
        unsigned turn = 0;
        for (;;) {
            int index = atomicAdd(counter, 1);
            Work work;
            work.count = -1;
            Segment segment = {};
            if (index < tiles * kv_heads) {
                int round = index / (tiles * heads_together), rest = index % (tiles * heads_together);
                int heads = min(heads_together, kv_heads - round * heads_together);
                work.kv_head = round * heads_together + rest % heads;
                SegmentTile tile(segments, capacity, tokens, tiles - 1 - rest / heads, queries, false);
                segment = tile.segment;
                work.row0 = segment.start + (long long)tile.first;
                work.position0 = segment.past + tile.first;
                work.count = tile.count;
                work.first = first_seen(work.position0, window);
                work.from_tile = work.first / KEYS_A_SLOT;
                work.to_tile = (work.position0 + work.count - 1) / KEYS_A_SLOT;
                if (work.count == 0) continue;
            }
            barrier_wait(q_empty, ~turn & 1);
            shared_work = work;
            if (work.count < 0) {
                barrier_arrive(q_full);
                return;
            }
            barrier_expect(q_full, queries * group * HEAD_DIM * 2);
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                copy_box(q_tile + half * ROWS * ROW_BYTES, q, half * 64, work.kv_head * group, int(work.row0), q_full);
            ++turn;
            // Keys before the values of the tile before.
            int steps = 2 * (work.to_tile - work.from_tile + 1);
            int rows = pages ? page_size : KEYS_A_SLOT;
#pragma unroll 1
            for (int step = 0; step < steps; ++step, at.next()) {
                bool values = step > 0 && (step % 2 == 0 || step == steps - 1);
                int key0 = (work.to_tile - (values ? (step - 1) / 2 : (step + 1) / 2)) * KEYS_A_SLOT;
                barrier_wait(empty + 8 * at.slot, at.parity ^ 1);
                SharedAddress to = ring + at.slot * SLOT_BYTES, barrier = full + 8 * at.slot;
                barrier_expect(barrier, SLOT_BYTES);
                // Keys one after the other are copied at once, those in pages a page at a time.
#pragma unroll 1
                for (int r = 0; r < KEYS_A_SLOT; r += rows) {
                    long long row = key_row(segment, key0 + r, key_rows, pages, slots, pages_a_slot, page_size);
                    if (row < 0) row = key_rows;
#pragma unroll
                    for (int half = 0; half < HALVES; ++half)
                        copy_box(to + (half * KEYS_A_SLOT + r) * ROW_BYTES, values ? v : k, half * 64, work.kv_head, int(row), barrier);
                }
            }
        }
    }

    take_registers<CONSUMERS == 2 ? 232 : 160>();
    int consumer = threadIdx.x / WARPGROUP - 1, warp_row = (warp - 4) * 16 + lane / 4;
    SharedAddress my_q = q_tile + consumer * 64 * ROW_BYTES;
    float scale_log2 = scale * LOG2_E;
    Ring<SLOTS> at;
#ifdef PINGPONG
    if (consumer == CONSUMERS - 1) meet_later(1, 2 * WARPGROUP);
#endif
    for (unsigned turn = 0;; ++turn) {
        barrier_wait(q_full, turn & 1);
        Work work = shared_work;
        if (work.count < 0) return;
        int last = work.position0 + work.count - 1;
        // The last key of each row.
        int ends[2] = {work.position0 + warp_row / group, work.position0 + (warp_row + 8) / group};
        float scores[KEYS_A_SLOT / 2], total[HEAD_DIM / 2], largest[2] = {-INFINITE, -INFINITE}, sum[2] = {};
        float correction[2];
        unsigned p[KEYS_A_SLOT / 16][4];

        auto release = [&](int slot) {
            if (lane == 0) barrier_arrive(empty + 8 * slot);
        };
        // Values outside of what the tile's queries see have a probability of 0, and so must be numbers.
        auto clean = [&](int slot, int key_tile) {
            int key0 = key_tile * KEYS_A_SLOT;
            if (key0 >= work.first && key0 + KEYS_A_SLOT - 1 <= last) return;
            SharedAddress tile = ring + slot * SLOT_BYTES;
            for (int row = threadIdx.x % WARPGROUP; row < HALVES * KEYS_A_SLOT; row += WARPGROUP) {
                int key = key0 + row % KEYS_A_SLOT;
                if (key < work.first || key > last) clear_row(tile + row * ROW_BYTES);
            }
            fence_async();
            meet(8 + consumer, WARPGROUP);
        };
        auto softmax = [&](int key_tile) {
            int key0 = key_tile * KEYS_A_SLOT;
            bool whole = key0 + KEYS_A_SLOT - 1 <= work.position0 && (window == 0 || key0 > last - window);
            if (!whole) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    int end = ends[r] - key0 - lane % 4 * 2, begin = first_seen(ends[r], window) - key0 - lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < KEYS_A_SLOT / 8; ++n)
#pragma unroll
                        for (int j = 0; j < 2; ++j)
                            if (n * 8 + j > end || n * 8 + j < begin) scores[n * 4 + r * 2 + j] = -INFINITE;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
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
            barrier_wait(full + 8 * of_v.slot, of_v.parity);
            clean(of_v.slot, key_tile);
            barrier_wait(full + 8 * of_k.slot, of_k.parity);
#ifdef PINGPONG
            meet(1 + consumer, 2 * WARPGROUP);
#endif
            keep(total);
            products_begin();
            multiply_rows<ROWS, KEYS_A_SLOT>(scores, my_q, ring + of_k.slot * SLOT_BYTES);
            products_commit();
            multiply_fragments<KEYS_A_SLOT>(total, p, ring + of_v.slot * SLOT_BYTES, true);
            products_commit();
#ifdef PINGPONG
            meet_later(1 + (consumer + 1) % CONSUMERS, 2 * WARPGROUP);
#endif
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
#ifdef LAZY
            if (__any_sync(WHOLE_WARP, correction[0] != 1.0f || correction[1] != 1.0f))
#endif
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 2; ++i) total[i] *= correction[i / 2 % 2];
        }
        if (lane == 0) barrier_arrive(q_empty);
        barrier_wait(full + 8 * at.slot, at.parity);
        clean(at.slot, work.from_tile);
        keep(total);
        products_begin();
        multiply_fragments<KEYS_A_SLOT>(total, p, ring + at.slot * SLOT_BYTES, true);
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
            float inverse = all > 0.0f ? 1.0f / all : 0.0f;
            if (lse.data && lane % 4 == 0) lse.row(query)[head] = largest[r] * scale + logf(all);
            unsigned* to = reinterpret_cast<unsigned*>(out.row(query) + head * HEAD_DIM);
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; ++d)
                to[d * 4 + lane % 4] = pack(total[d * 4 + r * 2] * inverse, total[d * 4 + r * 2 + 1] * inverse, T_X{});
        }
    }
}
