// Writes the rows of each segment into the pages of its slot, a block a row: position p of slot s goes to row
// pages[s, p / page_size]·page_size + p % page_size. Rows that the tables lead outside are passed over.
#include "h1.cuh"

extern "C" __global__ void page_write(Rows<const T_X> rows, const Segment* segments, int capacity,
                                      const unsigned* pages, long long slots, long long pages_a_slot, int page_size,
                                      Rows<T_OUT> out, long long out_rows, long long tokens, long long width) {
    after_earlier();
    __shared__ int owner;
    for (long long t = blockIdx.x; t < tokens; t += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) owner = capacity;
        __syncthreads();
        for (int i = threadIdx.x; i < capacity; i += blockDim.x) {
            Segment segment = segments[i];
            // Segments do not overlap, so that at most one thread writes.
            if (segment.start <= t && t < (long long)segment.start + segment.len) owner = i;
        }
        __syncthreads();
        if (owner == capacity) continue;
        Segment segment = segments[owner];
        long long position = segment.past + (t - segment.start), page = position / page_size;
        if (segment.slot >= slots || page >= pages_a_slot) continue;
        long long to = (long long)pages[segment.slot * pages_a_slot + page] * page_size + position % page_size;
        if (to >= out_rows) continue;
        for (long long c = threadIdx.x; c < width; c += blockDim.x) store(out.row(to) + c, load(rows.row(t) + c));
    }
}
