// What the scan's forward and backward share: how a tile of channels lies in a block, and what every step reads.
//
// A tile is up to TILE neighbouring channels that share their groups of B and C; LANES lanes of a warp have a channel,
// STATES states each (those past D_STATE are 0 and stay so). TILE·LANES threads. To load and to store, a thread has OWN
// neighbouring channels of one of STEPS tokens.
//
// Macros: T_U, T_DELTA, T_P, D_STATE, LANES (a power of two, 4 to 32), TILE (a power of two), VECTOR: whether all rows are
// aligned such that OWN values are one load, and tiles are whole; and CUT: whether segments are cut in time.
#pragma once
#include "h1.cuh"

// Tokens that are in shared memory at a time.
#define STEPS 32
// Tokens between two saved states, counted from the start of a segment.
#define SCAN_CHUNK 16
#define STATES ((D_STATE + LANES - 1) / LANES)
#define PADDED (STATES * LANES)
#define THREADS (TILE * LANES)
#define OWN (STEPS / LANES)
#define WARP_CHANNELS (WARP / LANES)
// Of the values in global memory, STAGES times STEPS tokens are in shared memory or on their way there.
#define STAGES (D_STATE > 64 ? 1 : 2)
// Rows of [STEPS][TILE] values in shared memory, such that threads of neighbouring tokens meet in few banks.
#define STEP_ROW (TILE + 2)
#define SUM_ROW (TILE + 8)
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// `N` neighbouring values, loaded and stored at once where they are aligned.
template <class T, int N>
struct alignas(VECTOR ? (sizeof(T) * N < 16 ? sizeof(T) * N : 16) : sizeof(T)) Pack {
    T values[N];
};

// What a scan reads, as parameters of a kernel. z, d, delta_bias and state_in may be null.
#define SCAN_INPUTS                                                                                               \
    Rows<const T_U> u, Rows<const T_DELTA> delta, Rows<const float> a, Rows<const T_P> b, Rows<const T_P> c,      \
        Rows<const T_P> z, const float *d, const float *delta_bias, int softplus, const Segment *segments,        \
        long long tokens, int run, int per_b, int per_c, Rows<const float> state_in, long long slots

// A tile's place: its first channel, how many it has, and the first columns of its groups.
struct Tile {
    int channel, channels, b, c;

    H1_DEVICE Tile(int index, int run, int per_b, int per_c) {
        int a_run = (run + TILE - 1) / TILE, inside = index % a_run * TILE;
        channel = index / a_run * run + inside;
        channels = min(TILE, run - inside);
        b = channel / per_b * D_STATE;
        c = channel / per_c * D_STATE;
    }
};

// How segments are cut in time where CUT is 1, as parameters of a kernel: the first `count` segments of the table, each after
// every `part_tokens` tokens.
#define SCAN_PARTS int count, int part_tokens

// Of the parts of all segments, in order, the one with number `item`: its tokens, with the segment's past and slot, and how many
// parts the segment has before it and after it. Where segments are not cut, parts are segments.
struct Part {
    Segment segment;
    int of_segment, before = 0, after = 0;

    H1_DEVICE Part(const Segment* segments, int count, int part_tokens, long long tokens, int item) {
        of_segment = item;
        if constexpr (!CUT) {
            segment = segments[item];
        } else {
            for (of_segment = 0; of_segment < count; ++of_segment) {
                segment = segments[of_segment];
                int parts = segment.parts(tokens, part_tokens);
                if (item < parts) {
                    before = item;
                    after = parts - 1 - item;
                    segment.start += before * part_tokens;
                    segment.len = min(part_tokens, int(segment.len) - before * part_tokens);
                    return;
                }
                item -= parts;
            }
            segment.len = 0;
        }
    }

    // The row of what enters it from beyond it: its own (scan_parts.cu), or the slot of a segment that is not cut.
    H1_DEVICE unsigned entry(int item) const { return CUT ? item : segment.slot; }
};

// ln(1 + exp(x)) to a few units in the last place, without a branch or a division. With e = exp(−|x|) it is
// max(x, 0) + ln(1 + e), and ln(1 + e) / e is a minimax polynomial of e in 0..1.
H1_DEVICE float softplus_of(float x) {
    float e = exp2_fast(-LOG2_E * fabsf(x)), series = 0.00523250317f;
    series = fmaf(fmaf(fmaf(series, e, -0.0295044724f), e, 0.0782247037f), e, -0.136631399f);
    series = fmaf(fmaf(fmaf(series, e, 0.191059574f), e, -0.248429701f), e, 0.333190948f);
    series = fmaf(fmaf(series, e, -0.499994934f), e, 0.99999994f);
    return fmaf(e, series, fmaxf(x, 0.0f));
}

// `count` of `N` values of a row; the others are 0.
template <int N, class T>
H1_DEVICE Pack<T, N> load_pack(const T* from, int count) {
    Pack<T, N> pack = {};
    if (VECTOR && count == N) return *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) pack.values[i] = from[i];
    return pack;
}

template <int N, class T>
H1_DEVICE void store_pack(T* to, const float* values, int count) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) store(&pack.values[i], values[i]);
    if (VECTOR && count == N) {
        *reinterpret_cast<Pack<T, N>*>(to) = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) to[i] = pack.values[i];
}

// A thread's values at neighbouring places of shared memory, loaded at once.
template <int N>
struct alignas(N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4) Together {
    float values[N];
};
template <int N>
H1_DEVICE Together<N>& together(float* place) {
    return *reinterpret_cast<Together<N>*>(place);
}

// Starts to copy `columns` neighbouring values of `count` rows from `first` on into shared memory as [STEPS][COLUMNS],
// with zeros past them.
template <int COLUMNS, class T>
H1_DEVICE void fetch_rows(T* to, Rows<const T> rows, long long first, int count, int columns) {
    constexpr int SHARE = 16 / sizeof(T);
    if constexpr (VECTOR && COLUMNS % SHARE == 0) {
#pragma unroll
        for (int i = 0; i < (STEPS * COLUMNS / SHARE + THREADS - 1) / THREADS; ++i) {
            int at = (i * THREADS + threadIdx.x) * SHARE, t = at / COLUMNS;
            if (STEPS * COLUMNS / SHARE % THREADS == 0 || at < STEPS * COLUMNS)
                copy_async(shared_address(to + at), rows.row(first + min(t, count - 1)) + at % COLUMNS, t < count);
        }
    } else {
        for (int i = threadIdx.x; i < STEPS * COLUMNS; i += THREADS) {
            int t = i / COLUMNS, col = i % COLUMNS;
            to[i] = t < count && col < columns ? rows.row(first + t)[col] : T{};
        }
    }
}

// B or C of STEPS tokens from [STEPS][D_STATE] to [STEPS][PADDED] f32.
template <class T>
H1_DEVICE void widen(float* to, const T* from) {
    constexpr int SHARE = STEPS * PADDED / THREADS;
    if constexpr (D_STATE == PADDED && SHARE % 4 == 0 && SHARE * sizeof(T) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < SHARE; i += 16 / sizeof(T)) {
            int at = (i * THREADS + threadIdx.x * (16 / sizeof(T)));
            alignas(16) T values[16 / sizeof(T)];
            *reinterpret_cast<Together<4>*>(values) = *reinterpret_cast<const Together<4>*>(from + at);
#pragma unroll
            for (int j = 0; j < int(16 / sizeof(T)); j += 4) {
                Together<4> wide = {load(values + j), load(values + j + 1), load(values + j + 2), load(values + j + 3)};
                *reinterpret_cast<Together<4>*>(to + at + j) = wide;
            }
        }
    } else {
        for (int i = threadIdx.x; i < STEPS * PADDED; i += THREADS) {
            int t = i / PADDED, n = i % PADDED;
            to[i] = n < D_STATE ? load(from + t * D_STATE + n) : 0.0f;
        }
    }
}

// Sums of each of N values over COUNT lanes that are DISTANCE apart: afterwards lane l of these has those of N / COUNT
// values, value i·COUNT + l at place i; or, of fewer values than lanes, value l % N at place 0. Powers of two all.
template <int COUNT, int DISTANCE, int N>
H1_DEVICE void lane_sums(float (&values)[N], int lane) {
    int left = N;
#pragma unroll
    for (int offset = 1; offset < COUNT; offset *= 2) {
        if (left == 1) {
            values[0] += __shfl_xor_sync(WHOLE_WARP, values[0], offset * DISTANCE);
            continue;
        }
        left /= 2;
        bool odd = lane & offset;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            if (i >= left) break;
            float given = odd ? values[2 * i] : values[2 * i + 1], kept = odd ? values[2 * i + 1] : values[2 * i];
            values[i] = kept + __shfl_xor_sync(WHOLE_WARP, given, offset * DISTANCE);
        }
    }
}

// A lane's STATES values of a row of `[channels, D_STATE]`; 0 past the tile and D_STATE.
H1_DEVICE void load_states(const float* row, int channel, int first, bool valid, float scale, float* to) {
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        to[s] = valid && first + s < D_STATE ? row[(long long)channel * D_STATE + first + s] * scale : 0.0f;
}

H1_DEVICE void store_states(float* row, int channel, int first, bool valid, const float* from) {
#pragma unroll
    for (int s = 0; s < STATES; ++s)
        if (valid && first + s < D_STATE) row[(long long)channel * D_STATE + first + s] = from[s];
}
