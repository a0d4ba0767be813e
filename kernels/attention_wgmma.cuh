// What attention's kernels for the H100 share: tiles that the copy engine fills, and products of them by warpgroups.
//
// A tile is [HEAD_DIM / 64][rows][64] of T_X, its 16-byte pieces exchanged as ptx.cuh says. Macros: T_X (bf16 or f16),
// HEAD_DIM (64 or 128).
#pragma once
#include "attention_mma.cuh"

#define WARPGROUP 128
#define ROW_BYTES 128
#define HALVES (HEAD_DIM / 64)

template <bool B_TURNED, int N>
H1_DEVICE void product(float (&c)[N], const unsigned (&a)[4], unsigned long long b, bool add, bf16) {
    product_bf16<B_TURNED>(c, a, b, add);
}
template <bool B_TURNED, int N>
H1_DEVICE void product(float (&c)[N], const unsigned (&a)[4], unsigned long long b, bool add, f16) {
    product_f16<B_TURNED>(c, a, b, add);
}
template <bool A_TURNED, bool B_TURNED, int N>
H1_DEVICE void product(float (&c)[N], unsigned long long a, unsigned long long b, bool add, bf16) {
    product_bf16<A_TURNED, B_TURNED>(c, a, b, add);
}
template <bool A_TURNED, bool B_TURNED, int N>
H1_DEVICE void product(float (&c)[N], unsigned long long a, unsigned long long b, bool add, f16) {
    product_f16<A_TURNED, B_TURNED>(c, a, b, add);
}

// The value i of the sums that were packed.
template <int STEPS>
H1_DEVICE float unpacked(const unsigned (&a)[STEPS][4], int i) {
    T_X value = {static_cast<unsigned short>(a[i / 8][i % 8 / 2] >> i % 2 * 16)};
    return load(&value);
}

// Writes 0 to a row of a tile.
H1_DEVICE void clear_row(SharedAddress row) {
#pragma unroll
    for (int i = 0; i < ROW_BYTES; i += 16) store_shared(row + i, 0u, 0u, 0u, 0u);
}

// A tile's rows from an address on as a factor whose inner index runs along them: step d has 16 columns.
template <int TILE_ROWS>
struct Along {
    unsigned long long base;
    H1_DEVICE Along(SharedAddress tile) : base(shared_matrix(tile, 0, 8 * ROW_BYTES)) {}
    H1_DEVICE unsigned long long step(int d) const { return base + ((d / 4 * TILE_ROWS * ROW_BYTES + d % 4 * 32) >> 4); }
};

// The same, whose inner index runs from row to row: step n has 16 rows.
template <int TILE_ROWS>
struct Across {
    unsigned long long base;
    H1_DEVICE Across(SharedAddress tile) : base(shared_matrix(tile, TILE_ROWS * ROW_BYTES, 8 * ROW_BYTES)) {}
    H1_DEVICE unsigned long long step(int n) const { return base + ((n * 16 * ROW_BYTES) >> 4); }
};

// c = a·bᵀ of 64 rows of one tile and N · 2 of another.
template <int A_ROWS, int B_ROWS, int N>
H1_DEVICE void multiply_rows(float (&c)[N], SharedAddress a, SharedAddress b) {
    Along<A_ROWS> of_a(a);
    Along<B_ROWS> of_b(b);
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; ++d) product<false, false>(c, of_a.step(d), of_b.step(d), d > 0, T_X{});
}

// c += a·b of fragments and a tile's rows.
template <int B_ROWS, int N, int STEPS>
H1_DEVICE void multiply_fragments(float (&c)[N], const unsigned (&a)[STEPS][4], SharedAddress b) {
    Across<B_ROWS> of_b(b);
#pragma unroll
    for (int n = 0; n < STEPS; ++n) product<true>(c, a[n], of_b.step(n), true, T_X{});
}

// Sums of a product as the fragments of the next.
template <int STEPS>
H1_DEVICE void pack_fragments(unsigned (&a)[STEPS][4], const float (&c)[STEPS * 8]) {
#pragma unroll
    for (int n = 0; n < STEPS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[n][i] = pack(c[n * 8 + i * 2], c[n * 8 + i * 2 + 1], T_X{});
}

// Place and parity of the slots of a ring in the order of their use.
template <int N>
struct Ring {
    int slot = 0;
    unsigned parity = 0;
    H1_DEVICE void next() {
        if (++slot == N) slot = 0, parity ^= 1;
    }
};

// The barriers of a ring, `full` and then `empty` of each slot: full once `writers` have arrived and the bytes that they
// announced, empty once every warp of the consumers has.
template <int SLOTS>
H1_DEVICE void make_ring(SharedAddress full, int writers, int consumers) {
    for (int i = 0; i < SLOTS; ++i) {
        barrier_init(full + 8 * i, writers);
        barrier_init(full + 8 * (SLOTS + i), consumers * WARPGROUP / WARP);
    }
}

// Starts to copy `rows` of a head into a tile.
template <int TILE_ROWS>
H1_DEVICE void copy_tile(SharedAddress tile, const TensorMap& rows, int head, int row, SharedAddress barrier) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        copy_box(tile + half * TILE_ROWS * ROW_BYTES, rows, half * 64, head, row, barrier);
}

// Sets the rows of tiles but those from `begin` to `end` to 0, for what a warpgroup multiplies next: what has a weight of
// 0 must be a number. The consumers all do it, each before it reads them.
template <int TILE_ROWS, int TILES>
H1_DEVICE void clear_outside(SharedAddress tiles, int begin, int end) {
    for (int i = threadIdx.x % WARPGROUP; i < TILES * HALVES * TILE_ROWS; i += WARPGROUP)
        if (i % TILE_ROWS < begin || i % TILE_ROWS >= end) clear_row(tiles + i * ROW_BYTES);
    fence_async();
    meet(threadIdx.x / WARPGROUP, WARPGROUP);
}

// Replaces a thread's values of row r (of its two) in the columns but those from `begin` to `end`.
template <int N>
H1_DEVICE void replace_outside(float (&c)[N], int r, int begin, int end, float value) {
    int column = threadIdx.x % 4 * 2;
    begin -= column, end -= column;
#pragma unroll
    for (int n = 0; n < N / 4; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
            if (n * 8 + j < begin || n * 8 + j >= end) c[n * 4 + r * 2 + j] = value;
}

// Writes a thread's part of row r.
H1_DEVICE void store_row(T_X* row, const float (&c)[HEAD_DIM / 2], int r, float factor) {
    unsigned* to = reinterpret_cast<unsigned*>(row) + threadIdx.x % 4;
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 8; ++d) to[d * 4] = pack(factor * c[d * 4 + r * 2], factor * c[d * 4 + r * 2 + 1], T_X{});
}
