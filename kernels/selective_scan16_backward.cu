// The gradients of the selective scan (selective_scan_backward.cu has the formulas) of channels with 16 states; scan16.cuh
// has how a block divides the work. dB and dC are sums of products whose factors count with 11 bits, and are to be stored
// with no more.
//
// Chunks of CHUNK tokens, from the last to the first. A stepping thread runs a chunk from the saved state and keeps each
// token's state and decays in registers; then it goes back. The sums of dB and dC over a warp's channels are matrix
// products: of two tokens' h (or states) of 2 states of a thread, [rows: states][inner: 4 channels × 2 tokens], and dt·u
// (or dout·silu(z)) of the tokens, each in a column of its own. Sums over states, over the two halves of a warp and over
// warps are left in shared memory for the preparing threads, which add them in order.
//
// Shared memory: scan16_backward_bytes in mixers/scan.rs, 134 KiB for bf16. Macros: those of scan16.cuh, T_DOUT, T_DU, T_DDELTA, T_DP.
// Source: Gu and Dao, arXiv:2312.00752.
#include "scan16.cuh"

#define CHUNK SCAN_CHUNK
// Neighbouring channels, or states of B and C, of a token that a preparing thread has.
#define SHARE (CHUNK * TILE / THREADS)

// A tile's shared memory, in bytes, each part twice, for chunks that follow each other: dt and dt·u of two tokens in a piece,
// [CHUNK / 2][TILE]; dout·silu(z) of four tokens in a piece, [CHUNK / 4][TILE]; B and C, [CHUNK][D_STATE]; the shares of
// y, of Σ A·w and of Σ h·B of the threads of a channel, [3][CHUNK][TILE][4]; the shares of dB and dC of half warps, of
// two states and two tokens in a piece, [2][CHUNK / 2][4][D_STATE / 2].
enum {
    PAIRS = 0,
    GRADIENTS = PAIRS + CHUNK / 2 * PIECE_ROW,
    OF_B = GRADIENTS + CHUNK / 4 * PIECE_ROW,
    OF_C = OF_B + CHUNK / 2 * TWO_STATE_ROWS,
    SHARES = OF_C + CHUNK / 2 * TWO_STATE_ROWS,
    A_KIND = CHUNK * PIECE_ROW,
    BY_CHANNELS = SHARES + 3 * A_KIND,
    A_PART = D_STATE / 2 * 16,
    TWO_TOKENS = 4 * A_PART + 16,
    A_SUM = CHUNK / 2 * TWO_TOKENS,
    HALF = BY_CHANNELS + 2 * A_SUM
};

// What a preparing thread has of one token, and where it lies among those of a coming chunk, behind the tiles' parts.
struct Loaded {
    Raw<T_U, SHARE> u;
    Raw<T_DELTA, SHARE> delta;
    Raw<T_DOUT, SHARE> dout;
    Raw<T_P, SHARE> z, b, c;
};
#define A_TOKEN(T) (TILES * THREADS * SHARE * int(sizeof(T)))
enum {
    COMING_DELTA = A_TOKEN(T_U),
    COMING_DOUT = COMING_DELTA + A_TOKEN(T_DELTA),
    COMING_Z = COMING_DOUT + A_TOKEN(T_DOUT),
    COMING_B = COMING_Z + A_TOKEN(T_P),
    COMING_C = COMING_B + A_TOKEN(T_P),
    A_CHUNK = COMING_C + A_TOKEN(T_P)
};

// What it keeps until the token's sums are there: dt and its derivative, dout·silu(z), and what y is multiplied by for dz.
struct Kept {
    Raw<T_U, SHARE> u;
    float dt[SHARE], slope[SHARE], gradient[SHARE], of_y[SHARE];
};

extern "C" __global__ void __launch_bounds__(2 * TILES * THREADS, 1)
    selective_scan16_backward(SCAN_INPUTS, Rows<const float> saved, long long saved_rows, Rows<const T_DOUT> dout,
                              Rows<const float> dstate_out, long long dstate_slots, Rows<T_DU> du, Rows<T_DDELTA> ddelta,
                              Rows<T_DP> dz, Rows<T_DP> db, Rows<T_DP> dc, float* partial_b, float* partial_c,
                              float* partial_a, float* partial_d, int channels, Rows<float> dstate_in, long long slots_out,
                              int tiles) {
    H1_DYNAMIC_SHARED(shared);
    Segment segment = segments[blockIdx.y];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Role<THREADS, THREADS> role;
    int index = blockIdx.x * TILES + role.tile;
    bool there = index < tiles;
    Tile tile(there ? index : 0, run, per_b, per_c);
    unsigned char* memory = shared + role.tile * 2 * HALF;
    int len = segment.len, chunks = (len + CHUNK - 1) / CHUNK;

    if (role.steps) {
        // A warp has 8 channels: lane l channel l % 4 + l / 16 · 4 and states l / 4 % 4 · 4 and on.
        int lane = threadIdx.x % WARP, states = lane / 4 % 4;
        int in_tile = role.thread / WARP * 8 + lane % 4 + lane / 16 * 4, channel = tile.channel + in_tile;
        long long value = (long long)channel * D_STATE + states * STATES;
        float decay[STATES], h[STATES], da[STATES] = {};
#pragma unroll
        for (int s = 0; s < STATES; ++s) decay[s] = a.row(channel)[states * STATES + s] * LOG2_E;
        bool ends = there && dstate_out.data && segment.slot < dstate_slots;
        load_states(dstate_out.row(ends ? segment.slot : 0), channel, states * STATES, ends, 1.0f, h);
        long long saved_first = segment.start / SCAN_CHUNK + blockIdx.y;
        // The saved states of coming chunks lie behind their values.
        unsigned char* of_saved = shared + TILES * 2 * HALF + COMING * A_CHUNK + threadIdx.x * 16;
        auto fetch = [&](int i) {
            int chunk = chunks - 1 - i;
            bool kept_there = chunk >= 0 && saved_first + chunk < saved_rows;
            const float* from = saved.row(kept_there ? saved_first + chunk : 0) + value;
            copy_async(shared_address(of_saved + i % COMING * TILES * THREADS * 16), from, kept_there);
            commit_copies();
        };
#pragma unroll
        for (int i = 0; i < COMING; ++i) fetch(i);
        // Of the shares of dB and dC, the half warp's, and whether this lane has those of its own channels.
        int part = role.thread / WARP * 2 + lane / 16, of_part = BY_CHANNELS + lane % 2 * TWO_TOKENS + part * A_PART + states * 32;
        bool sums = lane / 16 == lane / 2 % 2;
        __syncthreads();
        for (int i = 0; i < chunks; ++i) {
            unsigned char *half = memory + i % 2 * HALF, *of_channel = half + piece_of(in_tile);
            unsigned char *of_states = half + states * 16, *shares = of_channel + SHARES + states * 4;
            Together<4> state[CHUNK + 1];
            float kept[CHUNK][STATES], dt[CHUNK];
            wait_copies<COMING - 1>();
            state[0] = at<4>(of_saved + i % COMING * TILES * THREADS * 16);
            fetch(i + COMING);
#pragma unroll
            for (int t = 0; t < CHUNK; t += 2) {
                Together<4> pair = at<4>(of_channel + PAIRS + t / 2 * PIECE_ROW);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    dt[t + k] = pair.values[2 * k];
                    Together<4> by_b = at<4>(of_states + OF_B + states_of(t + k));
#pragma unroll
                    for (int s = 0; s < STATES; ++s) {
                        float e = exp2_fast(dt[t + k] * decay[s]);
                        kept[t + k][s] = e;
                        state[t + k + 1].values[s] = fmaf(e, state[t + k].values[s], pair.values[2 * k + 1] * by_b.values[s]);
                    }
                }
            }
            // What a token needs is loaded before the shares of the last one are stored, not to wait for it.
            Together<4> b_now = at<4>(of_states + OF_B + states_of(CHUNK - 1));
            Together<4> c_now = at<4>(of_states + OF_C + states_of(CHUNK - 1));
            float by_h[2][4], by_state[2][4], of_h[2][4], input = 0.0f, own_gradient = 0.0f;
            Together<4> gradient;
#pragma unroll
            for (int t = CHUNK - 1; t >= 0; --t) {
                int group = t / 4 * 4, k = t % 4;
                if (k == 3) {
                    // A lane's are those of its channel and of token `states` of the four.
                    unsigned char* inputs = of_channel + PAIRS + (group / 2 + states / 2) * PIECE_ROW + states % 2 * 8;
                    unsigned char* gradients = of_channel + GRADIENTS + group / 4 * PIECE_ROW;
                    input = at<1>(inputs + 4).values[0];
                    own_gradient = at<1>(gradients + states * 4).values[0];
                    gradient = at<4>(gradients);
                    for (int j = 0; j < 2; ++j)
                        for (int n = 0; n < 4; ++n) by_h[j][n] = by_state[j][n] = 0.0f;
                }
                Together<4> by_b = b_now, by_c = c_now;
                if (t > 0) {
                    b_now = at<4>(of_states + OF_B + states_of(t - 1));
                    c_now = at<4>(of_states + OF_C + states_of(t - 1));
                }
                float y = 0.0f, by_input = 0.0f, by_decay = 0.0f;
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    float after = state[t + 1].values[s];
                    h[s] = fmaf(gradient.values[k], by_c.values[s], h[s]);
                    of_h[s / 2][k % 2 * 2 + s % 2] = h[s];
                    y = s == 0 ? after * by_c.values[s] : fmaf(after, by_c.values[s], y);
                    by_input = s == 0 ? h[s] * by_b.values[s] : fmaf(h[s], by_b.values[s], by_input);
                    h[s] *= kept[t][s];
                    float w = h[s] * state[t].values[s];
                    da[s] = fmaf(dt[t], w, da[s]);
                    by_decay = s == 0 ? decay[s] * w : fmaf(decay[s], w, by_decay);
                }
                at<1>(shares + t * PIECE_ROW) = {y};
                at<1>(shares + A_KIND + t * PIECE_ROW) = {by_decay};
                at<1>(shares + 2 * A_KIND + t * PIECE_ROW) = {by_input};
                if (k % 2 == 1) continue;
                float inputs[2] = {states == k ? input : 0.0f, states == k + 1 ? input : 0.0f};
                float gradients[2] = {states == k ? own_gradient : 0.0f, states == k + 1 ? own_gradient : 0.0f};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float *one = state[t + 1].values + 2 * j, *two = state[t + 2].values + 2 * j;
                    float of_state[4] = {one[0], one[1], two[0], two[1]};
                    multiply_tf32(by_h[j], of_h[j], inputs);
                    multiply_tf32(by_state[j], of_state, gradients);
                }
                if (k > 0 || !sums) continue;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    unsigned char* to = half + of_part + group / 2 * TWO_TOKENS + j * 16;
                    at<4>(to) = {by_h[j][0], by_h[j][1], by_h[j][2], by_h[j][3]};
                    at<4>(to + A_SUM) = {by_state[j][0], by_state[j][1], by_state[j][2], by_state[j][3]};
                }
            }
            __syncthreads();
        }
        if (there) {
            store_states(partial_a + blockIdx.y * (long long)channels * D_STATE, channel, states * STATES, true, da);
            if (dstate_in.data && segment.slot < slots_out) {
#pragma unroll
                for (int s = 0; s < STATES; ++s) h[s] = segment.past > 0 ? h[s] : 0.0f;
                store_states(dstate_in.row(segment.slot), channel, states * STATES, true, h);
            }
        }
    } else {
        int t = role.thread * SHARE / TILE, quarter = role.thread % (TILE / SHARE), channel = tile.channel + quarter * SHARE;
        float skip[SHARE], bias[SHARE], dd[SHARE] = {}, dbias[SHARE] = {};
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            skip[i] = d ? d[channel + i] : 0.0f;
            bias[i] = delta_bias ? delta_bias[channel + i] : 0.0f;
        }
        long long first = segment.start + t;
        Moving<const T_U> u_at(u, first, channel, CHUNK);
        Moving<const T_DELTA> delta_at(delta, first, channel, CHUNK);
        Moving<const T_DOUT> dout_at(dout, first, channel, CHUNK);
        Moving<const T_P> z_at(z, first, channel, CHUNK);
        Moving<const T_P> b_at(b, first, tile.b + quarter * SHARE, CHUNK), c_at(c, first, tile.c + quarter * SHARE, CHUNK);
        Moving<T_DU> du_at(du, first, channel, CHUNK);
        Moving<T_DDELTA> ddelta_at(ddelta, first, channel, CHUNK);
        Moving<T_DP> dz_at(dz, first, channel, CHUNK);
        // The two states and the two tokens whose dB and dC this thread adds and stores.
        int of_two = role.thread % 8, tokens_of = role.thread / 8 * 2;
        Moving<T_DP> db_at(db, segment.start + tokens_of, tile.b + of_two * 2, CHUNK);
        Moving<T_DP> dc_at(dc, segment.start + tokens_of, tile.c + of_two * 2, CHUNK);
        int partial_row = tiles * D_STATE, in_partial = index * D_STATE + of_two * 2;
        Moving<float> partial_b_at({partial_b, partial_row}, segment.start + tokens_of, in_partial, CHUNK);
        Moving<float> partial_c_at({partial_c, partial_row}, segment.start + tokens_of, in_partial, CHUNK);
        int own = (role.tile * THREADS + role.thread) * SHARE;
        auto fetch = [&](int i) {
            unsigned char* to = shared + TILES * 2 * HALF + i % COMING * A_CHUNK;
            int chunk = chunks - 1 - i;
            bool inside = chunk * CHUNK + t < len;
            int from = inside ? chunk : 0;
            if (chunk >= 0) {
                Raw<T_U, SHARE>::copy(to + own * sizeof(T_U), u_at[from], inside);
                Raw<T_DELTA, SHARE>::copy(to + COMING_DELTA + own * sizeof(T_DELTA), delta_at[from], inside);
                Raw<T_DOUT, SHARE>::copy(to + COMING_DOUT + own * sizeof(T_DOUT), dout_at[from], inside);
                Raw<T_P, SHARE>::copy(to + COMING_Z + own * sizeof(T_P), z_at[from], inside);
                Raw<T_P, SHARE>::copy(to + COMING_B + own * sizeof(T_P), b_at[from], inside);
                Raw<T_P, SHARE>::copy(to + COMING_C + own * sizeof(T_P), c_at[from], inside);
            }
            commit_copies();
        };
        auto arrived = [&](int i) {
            wait_copies<COMING - 1>();
            const unsigned char* from = shared + TILES * 2 * HALF + i % COMING * A_CHUNK;
            Loaded loaded;
            loaded.u.load_from(from + own * sizeof(T_U));
            loaded.delta.load_from(from + COMING_DELTA + own * sizeof(T_DELTA));
            loaded.dout.load_from(from + COMING_DOUT + own * sizeof(T_DOUT));
            loaded.z.load_from(from + COMING_Z + own * sizeof(T_P));
            loaded.b.load_from(from + COMING_B + own * sizeof(T_P));
            loaded.c.load_from(from + COMING_C + own * sizeof(T_P));
            return loaded;
        };
        auto prepare = [&](int i) {
            Loaded loaded = arrived(i);
            Kept kept;
            unsigned char *to = memory + i % 2 * HALF, *of_channel = to + piece_of(quarter * SHARE);
            unsigned char* pairs = of_channel + PAIRS + t / 2 * PIECE_ROW + t % 2 * 8;
            unsigned char* gradients = of_channel + GRADIENTS + t / 4 * PIECE_ROW + t % 4 * 4;
            kept.u = loaded.u;
            // A token past the end changes nothing.
            bool inside = (chunks - 1 - i) * CHUNK + t < len;
#pragma unroll
            for (int k = 0; k < SHARE; ++k) {
                float step = loaded.delta[k] + bias[k], gate = loaded.z[k], s = sigmoid(gate);
                float of_gate = (inside ? loaded.dout[k] : 0.0f) * s;
                kept.slope[k] = sigmoid(step);
                kept.dt[k] = inside ? softplus_of(step) : 0.0f;
                kept.of_y[k] = of_gate * fmaf(gate, 1.0f - s, 1.0f);
                kept.gradient[k] = of_gate * gate;
                at<2>(pairs + k * 16) = {kept.dt[k], kept.dt[k] * loaded.u[k]};
                at<1>(gradients + k * 16) = {kept.gradient[k]};
            }
            unsigned char* states = to + states_of(t) + quarter * 16;
            at<4>(states + OF_B) = {loaded.b[0], loaded.b[1], loaded.b[2], loaded.b[3]};
            at<4>(states + OF_C) = {loaded.c[0], loaded.c[1], loaded.c[2], loaded.c[3]};
            return kept;
        };
        auto finish = [&](int i, const Kept& kept) {
            int chunk = chunks - 1 - i;
            unsigned char *from = memory + i % 2 * HALF, *shares = from + SHARES + t * PIECE_ROW + piece_of(quarter * SHARE);
            unsigned char* parts = from + BY_CHANNELS + tokens_of / 2 * TWO_TOKENS + of_two * 16;
            if (there && chunk * CHUNK + t < len) {
                float du_own[SHARE], ddelta_own[SHARE], dz_own[SHARE];
#pragma unroll
                for (int k = 0; k < SHARE; ++k) {
                    float sums[3];
#pragma unroll
                    for (int kind = 0; kind < 3; ++kind) {
                        Together<4> four = at<4>(shares + kind * A_KIND + k * 16);
                        sums[kind] = (four.values[0] + four.values[1]) + (four.values[2] + four.values[3]);
                    }
                    float u_value = kept.u[k];
                    dz_own[k] = kept.of_y[k] * fmaf(skip[k], u_value, sums[0]);
                    du_own[k] = fmaf(kept.dt[k], sums[2], kept.gradient[k] * skip[k]);
                    ddelta_own[k] = fmaf(u_value, sums[2], LN_2 * sums[1]) * kept.slope[k];
                    dd[k] = fmaf(kept.gradient[k], u_value, dd[k]);
                    dbias[k] += ddelta_own[k];
                }
                store_pack<SHARE>(du_at[chunk], du_own, SHARE);
                store_pack<SHARE>(ddelta_at[chunk], ddelta_own, SHARE);
                store_pack<SHARE>(dz_at[chunk], dz_own, SHARE);
            }
#pragma unroll
            for (int kind = 0; kind < 2; ++kind) {
                Together<4> total = at<4>(parts + kind * A_SUM);
#pragma unroll
                for (int part = 1; part < 4; ++part) {
                    Together<4> more = at<4>(parts + kind * A_SUM + part * A_PART);
#pragma unroll
                    for (int s = 0; s < 4; ++s) total.values[s] += more.values[s];
                }
                float both[2][2] = {{total.values[0], total.values[2]}, {total.values[1], total.values[3]}};
                int inside = there ? len - chunk * CHUNK - tokens_of : 0;
                if (kind ? partial_c : partial_b) {
                    float* to = kind ? partial_c_at[chunk] : partial_b_at[chunk];
                    if (inside > 0) store_pack<2>(to, both[0], 2);
                    if (inside > 1) store_pack<2>(to + partial_row, both[1], 2);
                } else {
                    T_DP* to = kind ? dc_at[chunk] : db_at[chunk];
                    if (inside > 0) store_pack<2>(to, both[0], 2);
                    if (inside > 1) store_pack<2>(to + db.stride, both[1], 2);
                }
            }
        };
        auto turn = [&](int i, Kept& kept) {
            if (i > 1) finish(i - 2, kept);
            if (i < chunks) kept = prepare(i);
            fetch(i + COMING);
            if (i <= chunks) __syncthreads();
        };
        Kept even = {}, odd = {};
#pragma unroll
        for (int i = 0; i < COMING; ++i) fetch(i);
        for (int i = 0; i < chunks + 2; i += 2) {
            turn(i, even);
            if (i <= chunks) turn(i + 1, odd);
        }
        // The channels' sums over tokens: a thread a token and SHARE channels, added in the order of the tokens.
#pragma unroll
        for (int i = 0; i < SHARE; ++i) at<2>(memory + (t * TILE + quarter * SHARE + i) * 8) = {dd[i], dbias[i]};
    }
    __syncthreads();
    if (role.steps || role.thread >= 2 * TILE || !there) return;
    float total = 0.0f;
    for (int t = 0; t < CHUNK; ++t) total += at<1>(memory + (t * TILE * 2 + role.thread) * 4).values[0];
    partial_d[(blockIdx.y * 2 + role.thread % 2) * (long long)channels + tile.channel + role.thread / 2] = total;
}
