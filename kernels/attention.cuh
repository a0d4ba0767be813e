// What the kernels of attention share: where keys lie, and which a query sees.
#pragma once
#include "rows_of.cuh"

// Keys and values as parameters of a kernel: a segment's lie one after the other from the row in the table, or, where
// there are pages, position p of slot s in row pages[s, p / page_size]·page_size + p % page_size.
#define KEYS                                                                                                \
    Rows<const T_KV> k, Rows<const T_KV> v, long long key_rows, const unsigned *pages, long long slots,     \
        long long pages_a_slot, int page_size

// The row of a key; −1 if the tables lead outside.
H1_DEVICE long long key_row(Segment segment, long long position, long long key_rows, const unsigned* pages,
                            long long slots, long long pages_a_slot, int page_size) {
    long long row = segment.keys + position;
    if (pages) {
        long long page = position / page_size;
        if (segment.slot >= slots || page >= pages_a_slot) return -1;
        row = (long long)pages[segment.slot * pages_a_slot + page] * page_size + position % page_size;
    }
    return row < key_rows ? row : -1;
}

// The first position that a query sees; a window of 0 is none.
H1_DEVICE long long first_seen(long long position, long long window) {
    return window > 0 ? max(0ll, position + 1 - window) : 0;
}
