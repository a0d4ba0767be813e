// What the scan's forward and backward share for channels with 16 states, softplus and a gate, in tiles of 16 whole
// channels and rows aligned such that 16 bytes are one load.
//
// A block has TILES neighbouring tiles (scan.cuh) of one segment, or of a part of one, and threads of two roles for each, so that every quarter
// of a multiprocessor has warps of either. The preparing threads copy a tile's values to shared memory
// COMING chunks ahead, make of them what a step needs, and later finish and store what the stepping threads left; a
// stepping thread runs a few states of one channel through time. Both work at once, on chunks of tokens that are one apart.
//
// Macros: T_U, T_DELTA, T_P (of 16 bits), CUT.
#pragma once
#define D_STATE 16
#define LANES 4
#define TILE 16
#define VECTOR 1
#include "scan.cuh"

#define TILES 2
// Chunks whose values are on their way to shared memory.
#define COMING 3

// A thread's place where STEPPING threads of a tile step and PREPARING others prepare: whether it steps, which of the block's
// tiles, and its number among the tile's threads of its role.
template <int STEPPING, int PREPARING>
struct Role {
    bool steps;
    int tile, thread;

    H1_DEVICE Role() {
        steps = threadIdx.x < TILES * STEPPING;
        int number = threadIdx.x - (steps ? 0 : TILES * STEPPING), of_a_tile = steps ? STEPPING : PREPARING;
        tile = number / of_a_tile;
        thread = number % of_a_tile;
    }
};

// In shared memory four values are a piece of 16 bytes. A row has a piece a channel; it is two pieces longer, with one
// after 8 channels, and two tokens' B or C are one piece longer, so that the pieces of one access lie in different banks.
#define PIECE_ROW ((TILE + 2) * 16)
#define TWO_STATE_ROWS ((2 * D_STATE / 4 + 1) * 16)
// Where the piece of a channel lies in a row.
H1_DEVICE int piece_of(int channel) { return (channel + channel / 8) * 16; }
// Where the states of B or C of a token lie.
H1_DEVICE int states_of(int token) { return token / 2 * TWO_STATE_ROWS + token % 2 * D_STATE * 4; }

// The place that moves by as many bytes a chunk from `start` on.
template <class T>
struct Moving {
    T* start;
    int bytes;

    H1_DEVICE Moving(Rows<T> rows, long long row, int column, int tokens)
        : start(rows.row(row) + column), bytes(rows.stride * tokens * int(sizeof(T))) {}
    H1_DEVICE T* operator[](int chunk) const {
        return (T*)((char*)start + (long long)chunk * bytes);
    }
};

// Values of 16 bits that one copy has.
#define COPIED 8
using Half = unsigned short;
template <class T>
H1_DEVICE Moving<const Half> halves(Rows<const T> rows, long long row, int column, int tokens) {
    static_assert(sizeof(T) == sizeof(Half));
    return Moving<const Half>({reinterpret_cast<const Half*>(rows.data), rows.stride}, row, column, tokens);
}

// `N` neighbouring values as they are in global memory, in whole registers.
template <class T, int N>
struct Raw {
    Pack<unsigned, N * sizeof(T) / 4> words;

    H1_DEVICE void load_from(const unsigned char* from) { words = *reinterpret_cast<const decltype(words)*>(from); }
    H1_DEVICE float operator[](int i) const { return value(i, T{}); }

  private:
    H1_DEVICE float value(int i, float) const { return __uint_as_float(words.values[i]); }
    H1_DEVICE float value(int i, bf16) const {
        return __uint_as_float(i % 2 ? words.values[i / 2] & 0xffff0000u : words.values[i / 2] << 16);
    }
    H1_DEVICE float value(int i, f16) const {
        return f16_value(static_cast<unsigned short>(words.values[i / 2] >> i % 2 * 16));
    }
};

// Stores N neighbouring values at once where they are `valid`, without a branch.
template <int N, class T>
H1_DEVICE void store_valid(T* to, const float* values, bool valid) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) store(&pack.values[i], values[i]);
    store_global_if(valid, to, reinterpret_cast<const Pack<unsigned, N * sizeof(T) / 4>&>(pack).values);
}

// N values at a place in shared memory.
template <int N>
H1_DEVICE Together<N>& at(unsigned char* place) {
    return *reinterpret_cast<Together<N>*>(place);
}

// The bits of a value that `bits` has.
H1_DEVICE float masked(float value, unsigned bits) { return __uint_as_float(__float_as_uint(value) & bits); }
