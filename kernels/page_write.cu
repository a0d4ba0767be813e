// Writes the keys and the values of each segment into the pages of its slot, a warp a row: position p of slot s goes to row
// pages[s, p / page_size]·page_size + p % page_size. Rows that the tables lead outside are passed over. Blocks along y: keys,
// values.
#include "h1.cuh"

extern "C" __global__ void page_write(Rows<const T_X> keys, Rows<const T_X> values, const Segment* segments, int capacity,
                                      const unsigned* pages, long long slots, long long pages_a_slot, int page_size,
                                      Rows<T_OUT> all_keys, Rows<T_OUT> all_values, long long out_rows, long long tokens,
                                      long long width) {
    after_earlier();
    Rows<const T_X> rows = blockIdx.y ? values : keys;
    Rows<T_OUT> out = blockIdx.y ? all_values : all_keys;
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    bool wide = aligned(rows) && aligned(out);
    for (long long t = blockIdx.x * (long long)warps + threadIdx.x / WARP; t < tokens; t += gridDim.x * (long long)warps) {
        // Segments do not overlap, so that at most one lane finds the row in its own.
        unsigned found = 0;
        Segment segment;
        for (int first = 0; first < capacity && !found; first += WARP) {
            segment = first + lane < capacity ? segments[first + lane] : Segment{};
            found = __ballot_sync(WHOLE_WARP, segment.start <= t && t < (long long)segment.start + segment.len);
        }
        if (!found) continue;
        int owner = __ffs(found) - 1;
        long long position = __shfl_sync(WHOLE_WARP, (long long)segment.past + (t - segment.start), owner);
        long long slot = __shfl_sync(WHOLE_WARP, segment.slot, owner), page = position / page_size;
        if (slot >= slots || page >= pages_a_slot) continue;
        long long to = (long long)pages[slot * pages_a_slot + page] * page_size + position % page_size;
        if (to >= out_rows) continue;
        for (long long c = 8 * lane; c < width; c += 8 * WARP) {
            float eight[8];
            load_eight(eight, rows.row(t) + c, width - c, wide);
            store_eight(out.row(to) + c, eight, width - c, wide);
        }
    }
}
