// What the tensor-core kernels of attention share: tiles of 16-bit rows in shared memory, and products of them.
//
// A tile is [rows][HEAD_DIM] of T_X, its 16-byte pieces permuted within a row so that eight rows' pieces of one column
// lie in different banks. Macros: T_X (bf16 or f16), HEAD_DIM (64 or 128).
#pragma once
#include "attention.cuh"

#define PIECES (HEAD_DIM / 8)
#define KEYS_A_TILE 64
#define TILE_BYTES (KEYS_A_TILE * HEAD_DIM * 2)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

H1_DEVICE void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) { multiply_bf16(c, a, b); }
H1_DEVICE void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], f16) { multiply_f16(c, a, b); }
H1_DEVICE unsigned pack(float low, float high, bf16) { return pack_bf16(low, high); }
H1_DEVICE unsigned pack(float low, float high, f16) { return pack_f16(low, high); }

// Where piece `piece` of a tile's row lies.
H1_DEVICE int piece_at(int row, int piece) { return (row * PIECES + (piece ^ (row & 7))) * 16; }

// The fragment of a of 16 rows from `row` and 16 columns from `col` of a tile.
H1_DEVICE void load_a(unsigned (&a)[4], SharedAddress tile, int row, int col) {
    int lane = threadIdx.x % WARP;
    load_matrices<false>(a, tile + piece_at(row + lane % 16, col / 8 + lane / 16));
}

// The fragments of b for two times 8 rows of a tile as columns: b[k][n] = tile[row + n][col + k].
H1_DEVICE void load_b_rows(unsigned (&b)[2][2], SharedAddress tile, int row, int col) {
    int lane = threadIdx.x % WARP;
    unsigned all[4];
    load_matrices<false>(all, tile + piece_at(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2));
    b[0][0] = all[0], b[0][1] = all[1], b[1][0] = all[2], b[1][1] = all[3];
}

// The fragments of b for two times 8 columns of a tile: b[k][n] = tile[row + k][col + n].
H1_DEVICE void load_b_columns(unsigned (&b)[2][2], SharedAddress tile, int row, int col) {
    int lane = threadIdx.x % WARP;
    unsigned all[4];
    load_matrices<true>(all, tile + piece_at(row + lane % 16, col / 8 + lane / 16));
    b[0][0] = all[0], b[0][1] = all[1], b[1][0] = all[2], b[1][1] = all[3];
}

// Starts to copy a tile of `ROWS` rows: query after query from `first` on, `group` heads of each; rows from `used` on
// are 0.
template <int ROWS, int THREADS>
H1_DEVICE void fetch_queries(SharedAddress tile, Rows<const T_X> rows, long long first, int head, int group, int used) {
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        int row = i / PIECES, piece = i % PIECES;
        bool valid = row < used;
        const T_X* from = rows.row(first + (valid ? row / group : 0)) + (head + (valid ? row % group : 0)) * HEAD_DIM;
        copy_async(tile + piece_at(row, piece), from + piece * 8, valid);
    }
}

// Starts to copy a tile of KEYS_A_TILE rows of one head from row `first` on; those outside of begin..end are 0.
template <int THREADS>
H1_DEVICE void fetch_rows(SharedAddress tile, Rows<const T_X> rows, long long first, int begin, int end, int head) {
    for (int i = threadIdx.x; i < KEYS_A_TILE * PIECES; i += THREADS) {
        int row = i / PIECES, piece = i % PIECES;
        bool valid = row >= begin && row < end;
        const T_X* from = rows.row(first + (valid ? row : begin)) + head * HEAD_DIM;
        copy_async(tile + piece_at(row, piece), from + piece * 8, valid);
    }
}
