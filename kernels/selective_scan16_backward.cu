// The gradients of the selective scan (selective_scan_backward.cu has the formulas) of channels with 16 states; scan16.cuh
// has how a block divides the work. dB and dC are sums of products whose factors count with 11 bits, and are to be stored
// with no more.
//
// Chunks of CHUNK tokens, from the last to the first. A stepping thread keeps in registers what each token of a chunk adds to
// its states and their decays, runs through the chunk from the saved state, and goes back; where it has gone back over two
// tokens, what two of the next chunk add and decay by takes their place, so that exponentials are made beside products. The
// sums of dB and dC over a warp's channels are matrix products: of two tokens' h (or states) of 2 states of a thread, [rows:
// states][inner: 4 channels × 2 tokens], and dt·u (or dout·silu(z)) of the tokens, each in a column of its own. Sums over
// states, over the two halves of a warp and over warps are left in shared memory for the preparing threads, which add them
// in order.
//
// In the turn of chunk i (counted from the last) the preparing threads finish i − 1, and prepare i + 2.
//
// Shared memory: scan16_backward_bytes in mixers/scan.rs, 151 KiB for values of 16 bits. Macros: those of scan16.cuh, T_DOUT,
// T_DU, T_DDELTA, T_DP, and T_DB and T_DC: T_DP, or float where the gradients of a group's tiles are still to be added;
// `db` and `dc` then have [tiles][D_STATE] columns.
// Source: Gu and Dao, arXiv:2312.00752.
#include "scan16.cuh"

#define CHUNK SCAN_CHUNK
// Neighbouring channels, or states of B and C, of a token that a preparing thread has.
#define SHARE (CHUNK * TILE / THREADS)
// Threads of a tile that copy the values of a kind; each copies of every second kind.
#define COPYING (CHUNK * TILE / COPIED)

// A tile's shared memory, in bytes. Of three chunks that follow each other, what is stepped with: dt, dt·u and
// dout·silu(z), of four tokens in a piece, [CHUNK / 4][TILE] each; B and C, [CHUNK][D_STATE].
enum {
    OF_DT = 0,
    TAKEN_IN = OF_DT + CHUNK / 4 * PIECE_ROW,
    GRADIENTS = TAKEN_IN + CHUNK / 4 * PIECE_ROW,
    OF_B = GRADIENTS + CHUNK / 4 * PIECE_ROW,
    OF_C = OF_B + CHUNK / 2 * TWO_STATE_ROWS,
    INPUTS = OF_C + CHUNK / 2 * TWO_STATE_ROWS
};
// Of two chunks, what steps leave: the shares of y, of Σ A·w and of Σ h·B of the threads of a channel,
// [3][CHUNK][TILE][4]; the shares of dB and dC of half warps, of two states and two tokens in a piece,
// [2][CHUNK / 2][4][D_STATE / 2].
enum {
    SHARES = 3 * INPUTS,
    A_KIND = CHUNK * PIECE_ROW,
    BY_CHANNELS = 3 * A_KIND,
    A_PART = D_STATE / 2 * 16,
    TWO_TOKENS = 4 * A_PART + 16,
    A_SUM = CHUNK / 2 * TWO_TOKENS + 64,
    LEFT = BY_CHANNELS + 2 * A_SUM,
    A_TILE = SHARES + 2 * LEFT
};

// Behind the tiles' parts, of COMING chunks and of one whose values are in use: a tile's values as they are in global memory,
// [CHUNK][16] of each kind. Behind these, saved states of COMING chunks.
enum {
    OF_U = 0,
    OF_DELTA = OF_U + CHUNK * TILE * 2,
    OF_Z = OF_DELTA + CHUNK * TILE * 2,
    B_VALUES = OF_Z + CHUNK * TILE * 2,
    C_VALUES = B_VALUES + CHUNK * D_STATE * 2,
    OF_DOUT = C_VALUES + CHUNK * D_STATE * 2,
    VALUES = OF_DOUT + CHUNK * TILE * int(sizeof(T_DOUT)),
    A_CHUNK = TILES * VALUES,
    SAVED = TILES * A_TILE + (COMING + 1) * A_CHUNK,
    A_SAVED = TILES * THREADS * 16
};

// What a preparing thread has of one token.
struct Loaded {
    Raw<T_U, SHARE> u;
    Raw<T_DELTA, SHARE> delta;
    Raw<T_DOUT, SHARE> dout;
    Raw<T_P, SHARE> z, b, c;
};

// What it keeps until the token's sums are there: dt and its derivative, dout·silu(z), and what y is multiplied by for dz.
struct Kept {
    Raw<T_U, SHARE> u;
    float dt[SHARE], slope[SHARE], gradient[SHARE], of_y[SHARE];
};

// The sums over half warps of two states' dB or dC, of two tokens that are `stride` apart, the first `count` of them.
template <class T>
H1_DEVICE void store_sums(const Together<4> (&parts)[4], T* to, long long stride, int count) {
    Together<4> total = parts[0];
#pragma unroll
    for (int part = 1; part < 4; ++part)
#pragma unroll
        for (int i = 0; i < 4; ++i) total.values[i] += parts[part].values[i];
    float of_tokens[2][2] = {{total.values[0], total.values[2]}, {total.values[1], total.values[3]}};
#pragma unroll
    for (int k = 0; k < 2; ++k) store_valid<2>(to + k * stride, of_tokens[k], count > k);
}

extern "C" __global__ void __launch_bounds__(2 * TILES * THREADS, 1)
    selective_scan16_backward(SCAN_INPUTS, SCAN_PARTS, Rows<const float> saved, long long saved_rows,
                              Rows<const T_DOUT> dout, Rows<const float> dstate_out, long long dstate_slots,
                              Rows<T_DU> du, Rows<T_DDELTA> ddelta, Rows<T_DP> dz, Rows<T_DB> db, Rows<T_DC> dc,
                              float* partial_a, float* partial_d, int channels, Rows<float> dstate_in,
                              long long slots_out, int tiles) {
    H1_DYNAMIC_SHARED(shared);
    Part part(segments, count, part_tokens, tokens, blockIdx.y);
    Segment segment = part.segment;
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Role<THREADS, THREADS> role;
    int index = blockIdx.x * TILES + role.tile;
    bool there = index < tiles;
    Tile tile(there ? index : 0, run, per_b, per_c);
    unsigned char* memory = shared + role.tile * A_TILE;
    int len = segment.len, chunks = (len + CHUNK - 1) / CHUNK;

    if (role.steps) {
        // A warp has 8 channels: lane l channel l % 4 + l / 16 · 4 and states l / 4 % 4 · 4 and on.
        int lane = threadIdx.x % WARP, states = lane / 4 % 4;
        int in_tile = role.thread / WARP * 8 + lane % 4 + lane / 16 * 4, channel = tile.channel + in_tile;
        long long value = (long long)channel * D_STATE + states * STATES;
        float decay[STATES], h[STATES], da[STATES] = {};
#pragma unroll
        for (int s = 0; s < STATES; ++s) decay[s] = a.row(channel)[states * STATES + s] * LOG2_E;
        unsigned entry = part.entry(blockIdx.y);
        bool ends = there && dstate_out.data && entry < dstate_slots;
        load_states(dstate_out.row(ends ? entry : 0), channel, states * STATES, ends, 1.0f, h);
        long long saved_first = segment.start / SCAN_CHUNK + part.of_segment;
        unsigned char* of_saved = shared + SAVED + threadIdx.x * 16;
        auto fetch = [&](int i) {
            int chunk = chunks - 1 - i;
            bool kept_there = chunk >= 0 && saved_first + chunk < saved_rows;
            const float* from = saved.row(kept_there ? saved_first + chunk : 0) + value;
            copy_async(shared_address(of_saved + i % COMING * A_SAVED), from, kept_there);
            commit_copies();
        };
        // Of a chunk, by token: the decays, and the states before and after it; what it adds to the state stands in the place
        // of the latter until the chunk is run through.
        Together<4> state[CHUNK + 1];
        float decays[CHUNK][STATES];
        int of_channel = piece_of(in_tile), of_states = states * 16;
        // What two tokens from t on are stepped with.
        struct Two {
            Together<2> dt, taken_in;
            Together<4> b[2];
        };
        auto load_two = [&](unsigned char* inputs, int t) {
            Two two;
            unsigned char* from = inputs + of_channel + t / 4 * PIECE_ROW + t % 4 * 4;
            two.dt = at<2>(from + OF_DT);
            two.taken_in = at<2>(from + TAKEN_IN);
#pragma unroll
            for (int k = 0; k < 2; ++k) two.b[k] = at<4>(inputs + OF_B + of_states + states_of(t + k));
            return two;
        };
        // Returns bits of what it made.
        auto begin_two = [&](int t, const Two& two) {
            unsigned made = 0;
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    decays[t + k][s] = exp2_fast(two.dt.values[k] * decay[s]);
                    made |= __float_as_uint(decays[t + k][s]);
                    state[t + k + 1].values[s] = two.taken_in.values[k] * two.b[k].values[s];
                }
            return made;
        };
        auto begin_state = [&](int i) {
            wait_copies<COMING - 1>();
            state[0] = at<4>(of_saved + i % COMING * A_SAVED);
            fetch(i + COMING);
        };
#pragma unroll
        for (int i = 0; i < COMING; ++i) fetch(i);
        // A lane has two tokens' shares of its half warp, of dB if its columns of a product are of its own channels' tokens;
        // those of dC are in the other columns, as the gradients that this lane multiplies with are of the other half's channel.
        bool has_db = lane / 16 == lane / 2 % 2;
        int half_warp = role.thread / WARP * 2 + lane / 16, of_other = piece_of(in_tile ^ 4);
        int of_part = BY_CHANNELS + (has_db ? 0 : A_SUM) + lane % 2 * TWO_TOKENS + half_warp * A_PART + states * 32;
        // No bits, which the compiler cannot know: it moves what only the next turn needs behind all else, where exponentials
        // wait for each other, unless a value that is stored in this turn depends on it.
        unsigned nothing = static_cast<unsigned>(chunks) >> 31, made = 0;
        // The values of the first chunk have come, and then it is prepared.
        __syncthreads();
        __syncthreads();
#pragma unroll
        for (int t = 0; t < CHUNK; t += 2) begin_two(t, load_two(memory, t));
        begin_state(0);
        __syncthreads();
        for (int i = 0; i < chunks; ++i) {
            unsigned char *inputs = memory + i % 3 * INPUTS, *next = memory + (i + 1) % 3 * INPUTS;
            unsigned char *left = memory + SHARES + i % 2 * LEFT, *shares = left + of_channel + states * 4;
            unsigned char *dts = inputs + OF_DT + of_channel, *gradients = inputs + GRADIENTS + of_channel;
            unsigned char *of_b = inputs + OF_B + of_states, *of_c = inputs + OF_C + of_states;
            // What a token needs is loaded before the shares of the last one are stored, not to wait for it.
            Together<4> b_now[2], c_now[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                b_now[k] = at<4>(of_b + states_of(CHUNK - 2 + k));
                c_now[k] = at<4>(of_c + states_of(CHUNK - 2 + k));
            }
            Together<4> gradient = at<4>(gradients + (CHUNK / 4 - 1) * PIECE_ROW);
#pragma unroll
            for (int t = 0; t < CHUNK; ++t)
#pragma unroll
                for (int s = 0; s < STATES; ++s)
                    state[t + 1].values[s] = fmaf(decays[t][s], state[t].values[s], state[t + 1].values[s]);
            float by_h[2][4], by_state[2][4], of_h[2][4], input = 0.0f, other_gradient = 0.0f;
            Together<4> dt;
            Two two;
#pragma unroll
            for (int t = CHUNK - 1; t >= 0; --t) {
                int group = t / 4 * 4, k = t % 4;
                if (k % 2 == 1) two = load_two(next, t - 1);
                if (k == 3) {
                    // A lane multiplies those of token `states` of the four.
                    dt = at<4>(dts + group / 4 * PIECE_ROW);
                    unsigned char* of_token = inputs + group / 4 * PIECE_ROW + states * 4;
                    input = at<1>(of_token + TAKEN_IN + of_channel).values[0];
                    other_gradient = at<1>(of_token + GRADIENTS + of_other).values[0];
                    for (int j = 0; j < 2; ++j)
                        for (int n = 0; n < 4; ++n) by_h[j][n] = by_state[j][n] = 0.0f;
                }
                Together<4> by_b = b_now[k % 2], by_c = c_now[k % 2];
                if (t > 1) {
                    b_now[k % 2] = at<4>(of_b + states_of(t - 2));
                    c_now[k % 2] = at<4>(of_c + states_of(t - 2));
                }
                float y = 0.0f, by_input = 0.0f, by_decay = 0.0f;
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    float after = state[t + 1].values[s];
                    h[s] = fmaf(gradient.values[k], by_c.values[s], h[s]);
                    of_h[s / 2][k % 2 * 2 + s % 2] = h[s];
                    y = s == 0 ? after * by_c.values[s] : fmaf(after, by_c.values[s], y);
                    by_input = s == 0 ? h[s] * by_b.values[s] : fmaf(h[s], by_b.values[s], by_input);
                    h[s] *= decays[t][s];
                    float w = h[s] * state[t].values[s];
                    da[s] = fmaf(dt.values[k], w, da[s]);
                    by_decay = s == 0 ? decay[s] * w : fmaf(decay[s], w, by_decay);
                }
                if (k == 0 && t > 0) gradient = at<4>(gradients + (group / 4 - 1) * PIECE_ROW);
                if (k % 2 == 1) y = __uint_as_float(__float_as_uint(y) | (made & nothing));
                at<1>(shares + t * PIECE_ROW) = {y};
                at<1>(shares + A_KIND + t * PIECE_ROW) = {by_decay};
                at<1>(shares + 2 * A_KIND + t * PIECE_ROW) = {by_input};
                if (k % 2 == 1) continue;
                float inputs_of[2] = {states == k ? input : 0.0f, states == k + 1 ? input : 0.0f};
                float gradients_of[2] = {states == k ? other_gradient : 0.0f,
                                         states == k + 1 ? other_gradient : 0.0f};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float *one = state[t + 1].values + 2 * j, *second = state[t + 2].values + 2 * j;
                    float of_state[4] = {one[0], one[1], second[0], second[1]};
                    multiply_tf32(by_h[j], of_h[j], inputs_of);
                    multiply_tf32(by_state[j], of_state, gradients_of);
                }
                if (t == 0) begin_state(i + 1);
                made = begin_two(t, two);
                if (k > 0) continue;
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    Together<4> own;
#pragma unroll
                    for (int n = 0; n < 4; ++n) own.values[n] = has_db ? by_h[j][n] : by_state[j][n];
                    at<4>(left + of_part + group / 2 * TWO_TOKENS + j * 16) = own;
                }
            }
            __syncthreads();
        }
        __syncthreads();
        if (there) {
            store_states(partial_a + blockIdx.y * (long long)channels * D_STATE, channel, states * STATES, true, da);
            if (dstate_in.data && part.before == 0 && segment.slot < slots_out) {
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
        Moving<T_DU> du_at(du, first, channel, CHUNK);
        Moving<T_DDELTA> ddelta_at(ddelta, first, channel, CHUNK);
        Moving<T_DP> dz_at(dz, first, channel, CHUNK);
        // The two states and the two tokens whose dB and dC this thread adds and stores.
        int of_two = role.thread % 8, tokens_of = role.thread / 8 * 2;
        int of_b = (sizeof(T_DB) == 4 ? index * D_STATE : tile.b) + of_two * 2;
        int of_c = (sizeof(T_DC) == 4 ? index * D_STATE : tile.c) + of_two * 2;
        Moving<T_DB> db_at(db, segment.start + tokens_of, of_b, CHUNK);
        Moving<T_DC> dc_at(dc, segment.start + tokens_of, of_c, CHUNK);
        // What a thread copies: of every second kind, 16 bytes of one token; in f32, 16 bytes of dout.
        int copied = role.thread % COPYING, of_token = copied * COPIED / TILE, from_value = copied * COPIED % TILE;
        bool odd = role.thread >= COPYING;
        long long from_token = segment.start + of_token;
        int from_channel = tile.channel + from_value;
        constexpr bool WIDE = sizeof(T_DOUT) == 4;
        Moving<const Half> sources[3] = {odd ? halves(delta, from_token, from_channel, CHUNK)
                                             : halves(u, from_token, from_channel, CHUNK),
                                         odd ? halves(b, from_token, tile.b + from_value, CHUNK)
                                             : halves(z, from_token, from_channel, CHUNK),
                                         halves(c, from_token, tile.c + from_value, CHUNK)};
        if constexpr (!WIDE)
            if (odd) sources[2] = halves(dout, from_token, from_channel, CHUNK);
        int wide_token = role.thread * 4 / TILE;
        Moving<const T_DOUT> wide(dout, segment.start + wide_token, tile.channel + role.thread * 4 % TILE, CHUNK);
        unsigned char* raw = shared + TILES * A_TILE + role.tile * VALUES;
        auto fetch = [&](int i) {
            unsigned char* to = raw + i % (COMING + 1) * A_CHUNK;
            int chunk = max(chunks - 1 - i, 0), count = i < chunks ? len - chunk * CHUNK : 0;
            bool inside = of_token < count, wide_inside = wide_token < count;
            int from = inside ? chunk : 0;
            SharedAddress piece = shared_address(to + copied * 16);
            copy_async(piece + (odd ? OF_DELTA : OF_U), sources[0][from], inside);
            copy_async(piece + (odd ? B_VALUES : OF_Z), sources[1][from], inside);
            if (!WIDE || !odd) copy_async(piece + (odd ? OF_DOUT : C_VALUES), sources[2][from], inside);
            if (WIDE) copy_async(shared_address(to + OF_DOUT + role.thread * 16), wide[wide_inside ? chunk : 0], wide_inside);
            commit_copies();
        };
        auto load_values = [&](int i) {
            unsigned char *from = raw + i % (COMING + 1) * A_CHUNK, *own = from + role.thread * SHARE * 2;
            Loaded loaded;
            loaded.u.load_from(own + OF_U);
            loaded.delta.load_from(own + OF_DELTA);
            loaded.dout.load_from(from + OF_DOUT + role.thread * SHARE * sizeof(T_DOUT));
            loaded.z.load_from(own + OF_Z);
            loaded.b.load_from(own + B_VALUES);
            loaded.c.load_from(own + C_VALUES);
            return loaded;
        };
        // `slot` is i % 3.
        auto prepare = [&](int i, int slot, const Loaded& loaded) {
            Kept kept;
            unsigned char *to = memory + slot * INPUTS, *of_channel = to + piece_of(quarter * SHARE);
            unsigned char* of_token = of_channel + t / 4 * PIECE_ROW + t % 4 * 4;
            kept.u = loaded.u;
            // A token past the end changes nothing.
            unsigned of_inside = i < chunks && (chunks - 1 - i) * CHUNK + t < len ? ~0u : 0u;
#pragma unroll
            for (int k = 0; k < SHARE; ++k) {
                float step = loaded.delta[k] + bias[k], gate = loaded.z[k], s = sigmoid(gate);
                float of_gate = masked(loaded.dout[k], of_inside) * s;
                kept.slope[k] = sigmoid(step);
                kept.dt[k] = masked(softplus_of(step), of_inside);
                kept.of_y[k] = of_gate * fmaf(gate, 1.0f - s, 1.0f);
                kept.gradient[k] = of_gate * gate;
                at<1>(of_token + OF_DT + k * 16) = {kept.dt[k]};
                at<1>(of_token + TAKEN_IN + k * 16) = {kept.dt[k] * loaded.u[k]};
                at<1>(of_token + GRADIENTS + k * 16) = {kept.gradient[k]};
            }
            unsigned char* states = to + states_of(t) + quarter * 16;
            at<4>(states + OF_B) = {loaded.b[0], loaded.b[1], loaded.b[2], loaded.b[3]};
            at<4>(states + OF_C) = {loaded.c[0], loaded.c[1], loaded.c[2], loaded.c[3]};
            return kept;
        };
        // What steps left of a token of this thread's, and of the two states and tokens whose dB and dC it adds.
        struct Left {
            Together<4> shares[3][SHARE], parts[2][4];
        };
        auto load_left = [&](int i) {
            unsigned char *from = memory + SHARES + i % 2 * LEFT, *shares = from + t * PIECE_ROW + piece_of(quarter * SHARE);
            unsigned char* parts = from + BY_CHANNELS + tokens_of / 2 * TWO_TOKENS + of_two * 16;
            Left left;
#pragma unroll
            for (int kind = 0; kind < 3; ++kind)
#pragma unroll
                for (int k = 0; k < SHARE; ++k) left.shares[kind][k] = at<4>(shares + kind * A_KIND + k * 16);
#pragma unroll
            for (int kind = 0; kind < 2; ++kind)
#pragma unroll
                for (int part = 0; part < 4; ++part) left.parts[kind][part] = at<4>(parts + kind * A_SUM + part * A_PART);
            return left;
        };
        auto finish = [&](int i, const Kept& kept, const Left& left) {
            int chunk = chunks - 1 - i;
            bool here = there && chunk >= 0, inside = here && chunk * CHUNK + t < len;
            float du_own[SHARE], ddelta_own[SHARE], dz_own[SHARE];
#pragma unroll
            for (int k = 0; k < SHARE; ++k) {
                float sums[3];
#pragma unroll
                for (int kind = 0; kind < 3; ++kind) {
                    const float* four = left.shares[kind][k].values;
                    sums[kind] = (four[0] + four[1]) + (four[2] + four[3]);
                }
                float u_value = kept.u[k];
                dz_own[k] = kept.of_y[k] * fmaf(skip[k], u_value, sums[0]);
                du_own[k] = fmaf(kept.dt[k], sums[2], kept.gradient[k] * skip[k]);
                ddelta_own[k] = fmaf(u_value, sums[2], LN_2 * sums[1]) * kept.slope[k];
                dd[k] = fmaf(kept.gradient[k], u_value, dd[k]);
                dbias[k] += inside ? ddelta_own[k] : 0.0f;
            }
            store_valid<SHARE>(du_at[chunk], du_own, inside);
            store_valid<SHARE>(ddelta_at[chunk], ddelta_own, inside);
            store_valid<SHARE>(dz_at[chunk], dz_own, inside);
            int count = here ? len - chunk * CHUNK - tokens_of : 0;
            store_sums(left.parts[0], db_at[chunk], db.stride, count);
            store_sums(left.parts[1], dc_at[chunk], dc.stride, count);
        };
        Kept kept[3] = {};
#pragma unroll
        for (int i = 0; i < COMING; ++i) fetch(i);
        wait_copies<COMING - 1>();
        __syncthreads();
        for (int three = 0; three < chunks + 3; three += 3) {
            // All three, that there be no branch: past the last chunk they change nothing.
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                int i = three + k;
                // Loaded before anything is stored, not to wait for it.
                Loaded loaded = load_values(i);
                Left left = load_left(i + 1);
                finish(i - 3, kept[k], left);
                kept[k] = prepare(i, k, loaded);
                fetch(i + COMING);
                wait_copies<COMING - 1>();
                if (i < chunks + 2) __syncthreads();
            }
        }
        // The channels' sums over tokens: a thread a token and SHARE channels, added in the order of the tokens.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SHARE; ++i) at<2>(memory + (t * TILE + quarter * SHARE + i) * 8) = {dd[i], dbias[i]};
    }
    __syncthreads();
    if (role.steps || role.thread >= 2 * TILE || !there) return;
    float total = 0.0f;
    for (int t = 0; t < CHUNK; ++t) total += at<1>(memory + (t * TILE * 2 + role.thread) * 4).values[0];
    partial_d[(blockIdx.y * 2 + role.thread % 2) * (long long)channels + tile.channel + role.thread / 2] = total;
}
