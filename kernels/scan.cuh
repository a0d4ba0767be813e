// What the scan's forward and backward share: how a tile of channels lies in a block, and what every step reads.
//
// A tile is up to TILE neighbouring channels that share their groups of B and C; LANES lanes of a warp have a channel,
// STATES states each (those past D_STATE are 0 and stay so). TILE·LANES threads. To load and to store, a thread has OWN
// neighbouring channels of one of STEPS tokens.
//
// Macros: T_U, T_DELTA, T_P, D_STATE, LANES (a power of two, 4 to 32), TILE (a power of two), and VECTOR: whether
// all rows are aligned such that OWN values are one load, and tiles are whole.
#pragma once
#include "h1.cuh"

// Tokens that are in shared memory at a time.
#define STEPS 32
// Tokens between two saved states, counted from the start of a segment; a multiple of STEPS.
#define SCAN_CHUNK 64
#define STATES ((D_STATE + LANES - 1) / LANES)
#define PADDED (STATES * LANES)
#define THREADS (TILE * LANES)
#define OWN (STEPS / LANES)
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

// 1 / (1 + exp(−x)), to a few units in the last place for x that are not far below 0.
H1_DEVICE float sigmoid_fast(float x) { return __fdividef(1.0f, 1.0f + exp2_fast(-LOG2_E * x)); }

// The step size and its derivative by delta.
H1_DEVICE float step_size(float raw, int softplus) {
    return softplus && raw <= 20.0f ? log1pf(exp2_fast(LOG2_E * raw)) : raw;
}
H1_DEVICE float step_derivative(float raw, int softplus) { return softplus && raw <= 20.0f ? sigmoid_fast(raw) : 1.0f; }

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

// B or C of up to STEPS tokens as they come, and into shared memory as [STEPS][PADDED] f32. Where a thread's share is a
// few neighbouring states of one token it is loaded ahead of its use.
template <class T>
struct Projection {
    static constexpr int SHARE = STEPS * PADDED / THREADS;
    static constexpr bool AHEAD = D_STATE == PADDED && SHARE <= 8 && (SHARE & (SHARE - 1)) == 0 && PADDED % SHARE == 0;
    Pack<T, AHEAD ? SHARE : 1> mine;

    H1_DEVICE void fetch(Rows<const T> rows, long long first, int count) {
        int i = threadIdx.x * SHARE, t = i / PADDED;
        if (AHEAD) mine = load_pack<AHEAD ? SHARE : 1>(rows.row(first + t) + i % PADDED, t < count ? SHARE : 0);
    }

    H1_DEVICE void put(float* shared, Rows<const T> rows, long long first, int count) const {
        if constexpr (AHEAD) {
#pragma unroll
            for (int i = 0; i < SHARE; ++i) shared[threadIdx.x * SHARE + i] = load(&mine.values[i]);
        } else {
            for (int i = threadIdx.x; i < STEPS * PADDED; i += THREADS) {
                int t = i / PADDED, n = i % PADDED;
                shared[i] = t < count && n < D_STATE ? load(rows.row(first + t) + n) : 0.0f;
            }
        }
    }
};

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
