// Where keys and values go: position p of slot s lies in row pages[s, p / page_size]·page_size + p % page_size.
#pragma once
#include "h1.cuh"

// Who rows belong to and where their pages are, as parameters of a kernel.
#define PAGE_TABLES                                                                                                      \
    const Segment *segments, int capacity, const unsigned *pages, long long slots, long long pages_a_slot, int page_size, \
        long long out_rows

// The row of the pages that row t goes to, found by a whole warp; −1 where the tables lead outside.
H1_DEVICE long long page_row(PAGE_TABLES, long long t) {
    // Segments do not overlap, so that at most one lane finds the row in its own.
    int lane = threadIdx.x % WARP;
    unsigned found = 0;
    Segment segment;
    for (int first = 0; first < capacity && !found; first += WARP) {
        segment = first + lane < capacity ? segments[first + lane] : Segment{};
        found = __ballot_sync(WHOLE_WARP, segment.start <= t && t < (long long)segment.start + segment.len);
    }
    if (!found) return -1;
    int owner = __ffs(found) - 1;
    long long position = __shfl_sync(WHOLE_WARP, (long long)segment.past + (t - segment.start), owner);
    long long slot = __shfl_sync(WHOLE_WARP, segment.slot, owner), page = position / page_size;
    if (slot >= slots || page >= pages_a_slot) return -1;
    long long to = (long long)pages[slot * pages_a_slot + page] * page_size + position % page_size;
    return to < out_rows ? to : -1;
}
