// Rotates the heads of a row in place, as rope.cu does, and writes the last of them, its keys, and its values into the pages of
// its slot, as page_write.cu does. A block takes a row. `heads` in all, from `first_key` on those of keys.
//
// Shared memory: 8·half bytes.
#include "pages.cuh"
#include "rope.cuh"

extern "C" __global__ void rope_page_write(Rows<T_X> x, const unsigned* positions, const float* inv_freq, float sign,
                                           long long tokens, int heads, int half, int first_key, Rows<const T_X> values,
                                           PAGE_TABLES, Rows<T_OUT> all_keys, Rows<T_OUT> all_values) {
    H1_DYNAMIC_SHARED(shared);
    float* turns = reinterpret_cast<float*>(shared);
    int eights = (half + 7) / 8, rotated = heads * eights;
    long long width = (long long)(heads - first_key) * 2 * half;
    bool wide = half % 8 == 0 && aligned(x) && aligned(values) && aligned(all_keys) && aligned(all_values);
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        __syncthreads();
        make_turns(turns, positions[t], inv_freq, half);
        long long to = page_row(segments, capacity, pages, slots, pages_a_slot, page_size, out_rows, t);
        // Tables of the call were there before.
        after_earlier();
        __syncthreads();
        for (int item = threadIdx.x; item < rotated + (width + 7) / 8; item += blockDim.x) {
            if (item >= rotated) {
                long long c = (long long)(item - rotated) * 8;
                float eight[8];
                load_eight(eight, values.row(t) + c, width - c, wide);
                if (to >= 0) store_eight(all_values.row(to) + c, eight, width - c, wide);
                continue;
            }
            int head = item / eights, j = item % eights * 8;
            float y1[8], y2[8];
            rotate_eight(x.row(t) + (long long)head * 2 * half, turns, j, half, sign, wide, y1, y2);
            if (head < first_key || to < 0) continue;
            // As they are in x.
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                T_X stored[2];
                store(stored, y1[i]);
                store(stored + 1, y2[i]);
                y1[i] = load(stored);
                y2[i] = load(stored + 1);
            }
            T_OUT* key = all_keys.row(to) + (long long)(head - first_key) * 2 * half;
            store_eight(key + j, y1, half - j, wide);
            store_eight(key + half + j, y2, half - j, wide);
        }
    }
}
