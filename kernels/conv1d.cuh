// What the convolution's forward and backward share.
#pragma once
#include "rows_of.cuh"

// Rows that a block takes.
#define CONV_ROWS 64
// Rows whose values a thread loads at once.
#define AHEAD 8

// The input of a segment at row t, which may lie up to TAPS rows before its first.
template <class T>
H1_DEVICE float past_input(Rows<const T> x, Rows<const float> state, long long slots, Segment segment, long long t,
                           int channel) {
    long long before = (long long)segment.start - t;
    if (before <= 0) return load(x.row(t) + channel);
    bool goes_on = segment.past > 0 && state.data && segment.slot < slots;
    return goes_on ? state.row(segment.slot)[(long long)channel * TAPS + TAPS - before] : 0.0f;
}
