// What the kernels of attention share: where keys lie, and which a query sees.
#pragma once
#include "rows_of.cuh"

// Keys and values as parameters of a kernel: a segment's lie one after the other from the row in the table, or, where
// there are pages, position p of slot s in row pages[s, p / page_size]·page_size + p % page_size.
#define KEYS                                                                                                \
    Rows<const T_KV> k, Rows<const T_KV> v, long long key_rows, const unsigned *pages, long long slots,     \
        long long pages_a_slot, int page_size

// The row of a key; −1 if the tables lead outside. Positions have 32 bits: as `unsigned` they are divided fast, as `long long` by a
// call, which takes fewer registers.
template <class Position>
H1_DEVICE long long key_row(Segment segment, Position position, long long key_rows, const unsigned* pages, long long slots,
                            long long pages_a_slot, int page_size) {
    long long row = (long long)segment.keys + position;
    if (pages) {
        Position page = position / Position(page_size);
        if (segment.slot >= slots || page >= pages_a_slot) return -1;
        row = (long long)pages[segment.slot * pages_a_slot + page] * page_size + position % Position(page_size);
    }
    return row < key_rows ? row : -1;
}

// The first position that a query sees; a window of 0 is none.
H1_DEVICE long long first_seen(long long position, long long window) {
    return window > 0 ? max(0ll, position + 1 - window) : 0;
}

// The part of a segment that a block has: `count` rows from `first` on; none if the index is past the last.
struct SegmentTile {
    Segment segment = {};
    int first = 0, count = 0;

    // Tiles of `size` rows, of which a query has `a_query`; or, if that is 0, of all keys; segment after segment.
    H1_DEVICE SegmentTile(const Segment* segments, int capacity, long long tokens, int tile, int size, int a_query) {
        for (int s = 0; s < capacity; ++s) {
            segment = segments[s];
            long long end = (long long)segment.past + segment.len, rows = a_query ? (long long)segment.len * a_query : end;
            if (segment.len == 0 || !segment.lies_in(tokens) || max(end, rows) > 0x7fffffff) continue;
            int all = rows, tiles = (all - 1) / size + 1;
            if (tile < tiles) {
                first = tile * size;
                count = min(size, all - first);
                return;
            }
            tile -= tiles;
        }
    }
};
