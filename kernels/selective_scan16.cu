// The selective scan (selective_scan.cu) of channels with 16 states, forward; scan16.cuh has how a block divides the work.
//
// Chunks of STEPS tokens. While the stepping threads take chunk c, the preparing threads finish c − 1 (gate and store) and
// prepare c + 1. A stepping warp has 8 channels and 8 states; the sums of y over states are matrix products of two tokens'
// states with the C of eight tokens, of which each needs its own: the states count with 11 bits there, as C does, and the
// sums are f32.
//
// Shared memory: scan16_bytes in mixers/scan.rs, 86 KiB for bf16. Macros: those of scan16.cuh, T_OUT.
// Source: Gu and Dao, arXiv:2312.00752.
#include "scan16.cuh"

// Threads of a tile that step, and the states that each has of a channel.
#define STEPPING (2 * THREADS)
#define OWN_STATES 2

// A tile's shared memory, in bytes, each part twice, for chunks that follow each other: dt and dt·u of two tokens in a piece,
// [STEPS / 2][TILE]; B and C, [STEPS][D_STATE]; the sums of either half of the states for y, [2][STEPS][TILE].
#define SUM_ROW_BYTES ((TILE + 4) * 4)
#define A_SUM (STEPS * SUM_ROW_BYTES)
enum {
    PAIRS = 0,
    OF_B = PAIRS + STEPS / 2 * PIECE_ROW,
    OF_C = OF_B + STEPS / 2 * TWO_STATE_ROWS,
    SUMS = OF_C + STEPS / 2 * TWO_STATE_ROWS,
    HALF = SUMS + 2 * A_SUM
};

// What a preparing thread has of one token, OWN channels and as many values of B and C, and where they lie among those of
// a coming chunk, behind the tiles' parts.
struct Loaded {
    Raw<T_U, OWN> u;
    Raw<T_DELTA, OWN> delta;
    Raw<T_P, OWN> z, b, c;
};
#define A_TOKEN(T) (TILES * THREADS * OWN * int(sizeof(T)))
enum {
    COMING_DELTA = A_TOKEN(T_U),
    COMING_Z = COMING_DELTA + A_TOKEN(T_DELTA),
    COMING_B = COMING_Z + A_TOKEN(T_P),
    COMING_C = COMING_B + A_TOKEN(T_P),
    A_CHUNK = COMING_C + A_TOKEN(T_P)
};

extern "C" __global__ void __launch_bounds__(TILES * (STEPPING + THREADS), 1)
    selective_scan16(SCAN_INPUTS, Rows<float> state_out, long long slots_out, Rows<float> saved, long long saved_rows,
                     Rows<T_OUT> out, int tiles) {
    H1_DYNAMIC_SHARED(shared);
    Segment segment = segments[blockIdx.y];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Role<STEPPING> role;
    int index = blockIdx.x * TILES + role.tile;
    bool there = index < tiles;
    Tile tile(there ? index : 0, run, per_b, per_c);
    unsigned char* memory = shared + role.tile * 2 * HALF;
    int len = segment.len, chunks = (len + STEPS - 1) / STEPS;

    if (role.steps) {
        // A warp has 8 channels and 8 states: lane l channel l / 4 and two states from l % 4 · 2 on.
        int lane = threadIdx.x % WARP, warp = role.thread / WARP, in_tile = warp % 2 * 8 + lane / 4;
        int channel = tile.channel + in_tile, first_state = warp / 2 * 8 + lane % 4 * OWN_STATES;
        float decay[OWN_STATES], state[OWN_STATES];
        bool goes_on = there && segment.past > 0 && state_in.data && segment.slot < slots;
        long long value = (long long)channel * D_STATE + first_state;
        const float* before_first = state_in.row(goes_on ? segment.slot : 0) + value;
#pragma unroll
        for (int s = 0; s < OWN_STATES; ++s) {
            decay[s] = a.row(channel)[first_state + s] * LOG2_E;
            state[s] = goes_on ? before_first[s] : 0.0f;
        }
        // dt, dt·u and B of two tokens.
        struct Two {
            Together<4> pair;
            Together<2> b[2];
        };
        auto load_two = [&](unsigned char* half, int t) {
            unsigned char* of_b = half + OF_B + first_state * 4;
            Together<4> pair = at<4>(half + PAIRS + t / 2 * PIECE_ROW + piece_of(in_tile));
            return Two{pair, {at<2>(of_b + states_of(t)), at<2>(of_b + states_of(t + 1))}};
        };
        struct Decays {
            float of[2][OWN_STATES];
        };
        auto decays_of = [&](const Two& two) {
            Decays decays;
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int s = 0; s < OWN_STATES; ++s) decays.of[k][s] = exp2_fast(two.pair.values[2 * k] * decay[s]);
            return decays;
        };
        bool saves = there && saved.data;
        long long saved_first = segment.start / SCAN_CHUNK + blockIdx.y;
        auto save = [&](int done) {
            long long row = saved_first + done / SCAN_CHUNK;
            if (!saves || done >= len || row >= saved_rows) return;
            *reinterpret_cast<Together<2>*>(saved.row(row) + value) = {state[0], state[1]};
        };
        __syncthreads();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            unsigned char *half = memory + chunk % 2 * HALF, *of_c = half + OF_C + states_of(lane / 4) + first_state * 4;
            unsigned char* sums_at = half + SUMS + warp / 2 * A_SUM + lane % 4 * 2 * SUM_ROW_BYTES + in_tile * 4;
            // What tokens need is loaded, and their decays made, ahead of time, and a product is looked at after the
            // next one began, not to wait for them.
            Two now = load_two(half, 0), next = load_two(half, 2);
            Decays decays = decays_of(now);
            float y[2] = {}, last[4] = {};
            Together<2> c = {};
            auto look = [&](int t) {
                if (t % 8 / 2 == lane % 4) y[0] = last[0], y[1] = last[3];
                if (t % 8 < 6) return;
                at<1>(sums_at + t / 8 * 8 * SUM_ROW_BYTES) = {y[0]};
                at<1>(sums_at + t / 8 * 8 * SUM_ROW_BYTES + SUM_ROW_BYTES) = {y[1]};
            };
#pragma unroll
            for (int t = 0; t < STEPS; t += 2) {
                if (t % SCAN_CHUNK == 0) save(chunk * STEPS + t);
                if (t % 8 == 0) c = at<2>(of_c + t / 8 * 4 * TWO_STATE_ROWS);
                Two after = t + 4 < STEPS ? load_two(half, t + 4) : next;
                Decays decays_next = decays_of(next);
                float of_states[4], by_c[2] = {c.values[0], c.values[1]}, sums[4] = {};
#pragma unroll
                for (int s = 0; s < OWN_STATES; ++s) {
                    float before = fmaf(decays.of[0][s], state[s], now.pair.values[1] * now.b[0].values[s]);
                    state[s] = fmaf(decays.of[1][s], before, now.pair.values[3] * now.b[1].values[s]);
                    of_states[2 * s] = tf32_of(before);
                    of_states[2 * s + 1] = tf32_of(state[s]);
                }
                multiply_tf32(sums, of_states, by_c);
                if (t > 0) look(t - 2);
#pragma unroll
                for (int n = 0; n < 4; ++n) last[n] = sums[n];
                now = next, next = after, decays = decays_next;
            }
            look(STEPS - 2);
            __syncthreads();
        }
        if (!state_out.data || !there || segment.slot >= slots_out) return;
#pragma unroll
        for (int s = 0; s < OWN_STATES; ++s) state_out.row(segment.slot)[value + s] = state[s];
        return;
    }

    int t = role.thread * OWN / TILE, half = role.thread % 2, channel = tile.channel + half * OWN;
    float skip[OWN], bias[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        skip[i] = d ? d[channel + i] : 0.0f;
        bias[i] = delta_bias ? delta_bias[channel + i] : 0.0f;
    }
    long long first = segment.start + t;
    Moving<const T_U> u_at(u, first, channel, STEPS);
    Moving<const T_DELTA> delta_at(delta, first, channel, STEPS);
    Moving<const T_P> z_at(z, first, channel, STEPS);
    Moving<const T_P> b_at(b, first, tile.b + half * OWN, STEPS), c_at(c, first, tile.c + half * OWN, STEPS);
    Moving<T_OUT> out_at(out, first, channel, STEPS);
    int own = (role.tile * THREADS + role.thread) * OWN;
    auto fetch = [&](int chunk) {
        unsigned char* to = shared + TILES * 2 * HALF + chunk % COMING * A_CHUNK;
        bool inside = chunk * STEPS + t < len;
        int from = inside ? chunk : 0;
        if (chunk < chunks) {
            Raw<T_U, OWN>::copy(to + own * sizeof(T_U), u_at[from], inside);
            Raw<T_DELTA, OWN>::copy(to + COMING_DELTA + own * sizeof(T_DELTA), delta_at[from], inside);
            Raw<T_P, OWN>::copy(to + COMING_Z + own * sizeof(T_P), z_at[from], inside);
            Raw<T_P, OWN>::copy(to + COMING_B + own * sizeof(T_P), b_at[from], inside);
            Raw<T_P, OWN>::copy(to + COMING_C + own * sizeof(T_P), c_at[from], inside);
        }
        commit_copies();
    };
    auto arrived = [&](int chunk) {
        wait_copies<COMING - 1>();
        const unsigned char* from = shared + TILES * 2 * HALF + chunk % COMING * A_CHUNK;
        Loaded loaded;
        loaded.u.load_from(from + own * sizeof(T_U));
        loaded.delta.load_from(from + COMING_DELTA + own * sizeof(T_DELTA));
        loaded.z.load_from(from + COMING_Z + own * sizeof(T_P));
        loaded.b.load_from(from + COMING_B + own * sizeof(T_P));
        loaded.c.load_from(from + COMING_C + own * sizeof(T_P));
        return loaded;
    };
    // u and z of a chunk that is prepared and not yet finished.
    struct Kept {
        Raw<T_U, OWN> u;
        Raw<T_P, OWN> z;
    };
    auto prepare = [&](int chunk) {
        Loaded loaded = arrived(chunk);
        unsigned char* to = memory + chunk % 2 * HALF;
        unsigned char* pairs = to + PAIRS + t / 2 * PIECE_ROW + piece_of(half * OWN) + t % 2 * 8;
        float dt[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            dt[i] = softplus_of(loaded.delta[i] + bias[i]);
            // A token past the end changes no state.
            if (chunk * STEPS + t >= len) dt[i] = 0.0f;
            at<2>(pairs + i * 16) = {dt[i], dt[i] * loaded.u[i]};
        }
        unsigned char* states = to + states_of(t) + half * OWN * 4;
#pragma unroll
        for (int k = 0; k < OWN; k += 4) {
            const auto &b4 = loaded.b, &c4 = loaded.c;
            at<4>(states + OF_B + k * 4) = {b4[k], b4[k + 1], b4[k + 2], b4[k + 3]};
            at<4>(states + OF_C + k * 4) = {c4[k], c4[k + 1], c4[k + 2], c4[k + 3]};
        }
        return Kept{loaded.u, loaded.z};
    };
    auto finish = [&](int chunk, const Kept& kept) {
        unsigned char* sums = memory + chunk % 2 * HALF + SUMS + t * SUM_ROW_BYTES + half * OWN * 4;
        float y[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            float sum = at<4>(sums + i / 4 * 16).values[i % 4] + at<4>(sums + A_SUM + i / 4 * 16).values[i % 4];
            y[i] = fmaf(skip[i], kept.u[i], sum);
            y[i] *= silu(kept.z[i]);
        }
        if (there && chunk * STEPS + t < len) store_pack<OWN>(out_at[chunk], y, OWN);
    };
    auto turn = [&](int chunk, Kept& kept) {
        if (chunk > 1) finish(chunk - 2, kept);
        if (chunk < chunks) kept = prepare(chunk);
        fetch(chunk + COMING);
        if (chunk <= chunks) __syncthreads();
    };
    Kept even = {}, odd = {};
#pragma unroll
    for (int i = 0; i < COMING; ++i) fetch(i);
    for (int chunk = 0; chunk < chunks + 2; chunk += 2) {
        turn(chunk, even);
        if (chunk <= chunks) turn(chunk + 1, odd);
    }
}
