// Which segment a row belongs to.
#pragma once
#include "h1.cuh"

// The segment of each of `count` rows from `first` on, for all threads of a block; -1 for a row of none.
H1_DEVICE void find_owners(const Segment* segments, int capacity, long long tokens, long long first, int count,
                           int* owner) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) owner[i] = -1;
    __syncthreads();
    for (int s = threadIdx.x; s < capacity; s += blockDim.x) {
        Segment segment = segments[s];
        if (!segment.lies_in(tokens)) continue;
        long long from = max((long long)segment.start, first), to = min((long long)segment.start + segment.len, first + count);
        // Segments do not overlap, so that no two threads write one value.
        for (long long t = from; t < to; ++t) owner[t - first] = s;
    }
    __syncthreads();
}
