// What the kernels of attention for any head size and storage share: tiles of f32 rows in shared memory, and products of them
// on the plain units.
//
// A block of 128 threads has ROWS rows of its own and goes over tiles of COLS others. Thread (y, x), with y = thread / 8 and
// x = thread % 8, has of a product's rows every 16th from y on, and of its columns every eighth from x on, or, of a head's,
// every eighth four from 4·x on; a row's columns are eight neighbouring lanes'. Values past HEAD_DIM are 0.
//
// Macros: HEAD_DIM, ROWS (16 or 64).
#pragma once
#include "attention.cuh"

#define THREADS 128
#define COLS (HEAD_DIM > 64 ? 32 : 64)
#define OWN_ROWS (ROWS / 16)
#define OWN_COLS (COLS / 8)
// Values from one row to the next, such that eight rows' pieces of 16 bytes lie in different banks.
#define PADDED ((HEAD_DIM + 31) / 32 * 32)
#define ROW_VALUES (PADDED + 4)
#define SUMMED ((HEAD_DIM + 3) / 4 * 4)
#define OWN_VALUES (PADDED / 8)
#define WEIGHT_ROW (COLS + 4)

struct alignas(16) Four {
    float values[4];
};
H1_DEVICE Four& four(float* at) { return *reinterpret_cast<Four*>(at); }
H1_DEVICE const Four& four(const float* at) { return *reinterpret_cast<const Four*>(at); }

// Loads `COUNT` rows of a head to a tile; `row_of(i)` is where row i begins, null for one of zeros.
template <int COUNT, class T, class RowOf>
H1_DEVICE void load_tile(float* tile, bool wide, RowOf row_of) {
    for (int i = threadIdx.x; i < COUNT * (PADDED / 8); i += THREADS) {
        int row = i / (PADDED / 8), d = i % (PADDED / 8) * 8;
        const T* from = row_of(row);
        float values[8] = {};
        if (from) load_eight(values, from + d, HEAD_DIM - d, wide);
        float* to = tile + row * ROW_VALUES + d;
        four(to) = {values[0], values[1], values[2], values[3]};
        four(to + 4) = {values[4], values[5], values[6], values[7]};
    }
}

// Rows of the queries of a key head's group from the segment's row `first` on: query after query, the group's heads of each.
struct QueryRows {
    Segment segment;
    int first, group, kv_head;

    H1_DEVICE long long query(int row) const { return (long long)segment.start + (first + row) / group; }
    H1_DEVICE int position(int row) const { return segment.past + (first + row) / group; }
    H1_DEVICE int head(int row) const { return kv_head * group + (first + row) % group; }
    template <class T>
    H1_DEVICE T* of(Rows<T> rows, int row) const {
        return rows.row(query(row)) + head(row) * HEAD_DIM;
    }
    // Loads `COUNT` of them to a tile, with zeros from `used` on.
    template <int COUNT, class T>
    H1_DEVICE void load(float* tile, Rows<const T> rows, int used) const {
        load_tile<COUNT, T>(tile, aligned(rows) && HEAD_DIM * sizeof(T) % 16 == 0,
                            [&](int row) -> const T* { return row < used ? of(rows, row) : nullptr; });
    }
};

// `out[row][col] += Σ_d a[row][d]·b[col][d]`.
H1_DEVICE void multiply_rows(float (&out)[OWN_ROWS][OWN_COLS], const float* a, const float* b) {
    int y = threadIdx.x / 8, x = threadIdx.x % 8;
#pragma unroll 2
    for (int d = 0; d < SUMMED; d += 4) {
        Four of_a[OWN_ROWS];
#pragma unroll
        for (int i = 0; i < OWN_ROWS; ++i) of_a[i] = four(a + (y + i * 16) * ROW_VALUES + d);
#pragma unroll
        for (int j = 0; j < OWN_COLS; ++j) {
            Four of_b = four(b + (x + j * 8) * ROW_VALUES + d);
#pragma unroll
            for (int i = 0; i < OWN_ROWS; ++i)
#pragma unroll
                for (int k = 0; k < 4; ++k) out[i][j] = fmaf(of_a[i].values[k], of_b.values[k], out[i][j]);
        }
    }
}

// Leaves a thread's weights `[ROWS][COLS]` for its warp, which alone reads them in `add_weighted`.
H1_DEVICE void leave(float* weights, const float (&own)[OWN_ROWS][OWN_COLS]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < OWN_ROWS; ++i)
#pragma unroll
        for (int j = 0; j < OWN_COLS; ++j)
            weights[(threadIdx.x / 8 + i * 16) * WEIGHT_ROW + threadIdx.x % 8 + j * 8] = own[i][j];
    __syncwarp();
}

// `total[row][d] += Σ_col weights[row][col]·b[col][d]`.
H1_DEVICE void add_weighted(float (&total)[OWN_ROWS][OWN_VALUES], const float* weights, const float* b) {
    int y = threadIdx.x / 8, x = threadIdx.x % 8;
#pragma unroll 1
    for (int col = 0; col < COLS; col += 4) {
        Four weight[OWN_ROWS];
#pragma unroll
        for (int i = 0; i < OWN_ROWS; ++i) weight[i] = four(weights + (y + i * 16) * WEIGHT_ROW + col);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int j = 0; j < OWN_VALUES; j += 4) {
                Four of_b = four(b + (col + k) * ROW_VALUES + x * 4 + j * 8);
#pragma unroll
                for (int i = 0; i < OWN_ROWS; ++i)
#pragma unroll
                    for (int n = 0; n < 4; ++n)
                        total[i][j + n] = fmaf(weight[i].values[k], of_b.values[n], total[i][j + n]);
            }
    }
}

// Writes a row of a total, of which this thread has every eighth four values.
template <class T>
H1_DEVICE void store_row(T* to, const float (&total)[OWN_VALUES], float factor) {
#pragma unroll
    for (int j = 0; j < OWN_VALUES; ++j) {
        int d = threadIdx.x % 8 * 4 + j / 4 * 32 + j % 4;
        if (d < HEAD_DIM) store(to + d, factor * total[j]);
    }
}

// The sum (or the largest) over the lanes that have a row.
H1_DEVICE float row_sum(float value) {
    for (int offset = 1; offset < 8; offset *= 2) value += __shfl_xor_sync(WHOLE_WARP, value, offset);
    return value;
}
H1_DEVICE float row_max(float value) {
    for (int offset = 1; offset < 8; offset *= 2) value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, offset));
    return value;
}
