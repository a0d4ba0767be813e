// Writes the keys and the values of each segment into the pages of its slot (pages.cuh), a warp a row. Rows that the tables lead
// outside are passed over. Blocks along y: keys, values.
#include "pages.cuh"

extern "C" __global__ void page_write(Rows<const T_X> keys, Rows<const T_X> values, PAGE_TABLES, Rows<T_OUT> all_keys,
                                      Rows<T_OUT> all_values, long long tokens, long long width) {
    after_earlier();
    Rows<const T_X> rows = blockIdx.y ? values : keys;
    Rows<T_OUT> out = blockIdx.y ? all_values : all_keys;
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    bool wide = aligned(rows) && aligned(out);
    for (long long t = blockIdx.x * (long long)warps + threadIdx.x / WARP; t < tokens; t += gridDim.x * (long long)warps) {
        long long to = page_row(segments, capacity, pages, slots, pages_a_slot, page_size, out_rows, t);
        if (to < 0) continue;
        for (long long c = 8 * lane; c < width; c += 8 * WARP) {
            float eight[8];
            load_eight(eight, rows.row(t) + c, width - c, wide);
            store_eight(out.row(to) + c, eight, width - c, wide);
        }
    }
}
