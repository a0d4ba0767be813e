// The selective scan (selective_scan.cu) of channels with 16 states, forward; scan16.cuh has how a block divides the work.
//
// Chunks of STEPS tokens. A turn is the time between two barriers: the stepping threads take the last EIGHT tokens of chunk
// c − 1 and all but the last EIGHT of chunk c, which they have loaded by its end; the preparing threads finish c − 2 (gate and
// store) and prepare c + 1. A stepping warp has 8 channels and 8 states, each lane two states of a channel as a matrix product
// has them. Products of two tokens, one in rows 0 to 7 and one in 8 to 15, make of dt·u and B what the states take in, and of
// the states and the C of eight tokens their sums y, of which each token needs its own. dt·u counts there as a sum of two
// values of 11 bits, B and C exactly, the states are cut off after 11 bits for y; sums are f32.
//
// Shared memory: scan16_bytes in mixers/scan.rs, 170 KiB. Macros: those of scan16.cuh, T_OUT.
// Source: Gu and Dao, arXiv:2312.00752.
#include "scan16.cuh"

// Threads of a tile that step, and the states that each has of a channel.
#define STEPPING (2 * THREADS)
#define OWN_STATES 2
// Threads of a tile that prepare, and the neighbouring channels, or states of B and C, that each has of a token.
#define PREPARING (2 * THREADS)
#define SHARE (STEPS * TILE / PREPARING)
#define EIGHT 8
// Cut off after 11 bits, values are on the average too small by 2^-11 · 0.5 / ln 2 of themselves.
#define UNCUT 1.000352f
#define GROUPS (STEPS / EIGHT)

// A tile's shared memory, in bytes. Twice, for chunks that follow each other: dt of four tokens in a piece,
// [STEPS / 4][TILE]; dt·u in a piece of four pairs of tokens, [STEPS / 8][TILE][first or second token][2 parts]; B alike,
// [STEPS / 8][D_STATE][first or second token]; C, [STEPS][D_STATE]. SUMS_HELD times: the sums over either half of the
// states for y, [2][STEPS][TILE]. Rows are farther apart than that, for the values of one access to lie in different banks.
#define INPUT_ROW (TILE * 80 + 32)
#define B_ROW (D_STATE * 40)
#define TWO_ROWS ((2 * 16 + 8) * 4)
#define A_SUM (STEPS / 2 * TWO_ROWS)
// Chunks whose sums are held.
#define SUMS_HELD 4
enum {
    OF_DT = 0,
    INPUTS = OF_DT + STEPS / 4 * PIECE_ROW,
    OF_B = INPUTS + GROUPS * INPUT_ROW,
    OF_C = OF_B + GROUPS * B_ROW,
    HALF = OF_C + STEPS / 2 * TWO_ROWS,
    SUMS = 2 * HALF,
    A_TILE = SUMS + SUMS_HELD * 2 * A_SUM
};

// Where a channel's dt·u, and a state's B, lie in a row, and where a token's C and sums do.
H1_DEVICE int input_of(int channel) { return (channel + channel / 4) * 64 + channel / 8 * 16; }
H1_DEVICE int b_of(int state) { return (state + state / 4) * 32; }
H1_DEVICE int row_of(int token) { return token / 2 * TWO_ROWS + token % 2 * 64; }

// Behind the tiles' parts lie the values of chunks as they are in global memory, [kind][tile][STEPS][16]: of those on their
// way, and of as many as are not finished.
enum { OF_U, OF_DELTA, OF_Z, OF_B_VALUES, OF_C_VALUES, KINDS };
#define A_KIND (TILES * STEPS * 16 * 2)
#define CHUNKS_HELD (COMING + 5)
// A chunk's place is bits of its number.
static_assert((CHUNKS_HELD & (CHUNKS_HELD - 1)) == 0 && (SUMS_HELD & (SUMS_HELD - 1)) == 0);
// Threads that copy the values of a kind; each copies of every second kind.
#define COPYING (STEPS * TILE / COPIED)

extern "C" __global__ void __launch_bounds__(TILES * (STEPPING + PREPARING), 1)
    selective_scan16(SCAN_INPUTS, SCAN_PARTS, Rows<float> state_out, long long slots_out, Rows<float> saved,
                     long long saved_rows, Rows<T_OUT> out, int tiles) {
    H1_DYNAMIC_SHARED(shared);
    Part part(segments, count, part_tokens, tokens, blockIdx.y);
    Segment segment = part.segment;
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Role<STEPPING, PREPARING> role;
    int index = blockIdx.x * TILES + role.tile;
    bool there = index < tiles;
    Tile tile(there ? index : 0, run, per_b, per_c);
    unsigned char* memory = shared + role.tile * A_TILE;
    int len = segment.len, chunks = (len + STEPS - 1) / STEPS;

    if (role.steps) {
        // Lane l has channel l / 4 of its warp's eight, and two states from 2·(l % 4) on.
        int lane = threadIdx.x % WARP, warp = role.thread / WARP, row = lane / 4, col = lane % 4;
        int in_tile = warp % 2 * 8 + row, channel = tile.channel + in_tile, first_state = warp / 2 * 8 + col * OWN_STATES;
        float decay[OWN_STATES], state[OWN_STATES];
        unsigned entry = part.entry(blockIdx.y);
        bool goes_on = there && (CUT || segment.past > 0) && state_in.data && entry < slots;
        long long value = (long long)channel * D_STATE + first_state;
        const float* before_first = state_in.row(goes_on ? entry : 0) + value;
#pragma unroll
        for (int s = 0; s < OWN_STATES; ++s) {
            decay[s] = a.row(channel)[first_state + s] * LOG2_E;
            state[s] = goes_on ? before_first[s] : 0.0f;
        }
        // All bits in the lanes whose dt·u are of the first, or of the second, of two tokens.
        unsigned of_first = col < 2 ? ~0u : 0u, of_second = ~of_first;
        struct Group {
            Together<4> dt[2], inputs, b;
            Together<2> c;
        };
        auto load_group = [&](unsigned char* half, int g) {
            Group group;
#pragma unroll
            for (int i = 0; i < 2; ++i) group.dt[i] = at<4>(half + OF_DT + (g * 2 + i) * PIECE_ROW + piece_of(in_tile));
            group.inputs = at<4>(half + INPUTS + g * INPUT_ROW + input_of(in_tile) + col * 16);
            group.b = at<4>(half + OF_B + g * B_ROW + b_of(warp / 2 * 8 + row) + col / 2 * 16);
            group.c = at<2>(half + OF_C + row_of(g * EIGHT + row) + first_state * 4);
            return group;
        };
        // What two tokens do to the states.
        struct Two {
            float decays[2][OWN_STATES], input[4];
        };
        auto make_two = [&](const Group& group, int two) {
            Two made = {};
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int s = 0; s < OWN_STATES; ++s)
                    made.decays[k][s] = exp2_fast(group.dt[two / 2].values[two % 2 * 2 + k] * decay[s]);
            float parts = group.inputs.values[two], inputs[2] = {masked(parts, of_first), masked(parts, of_second)};
            multiply_tf32(made.input, inputs, group.b.values[two]);
            return made;
        };
        // Where the state before the next SCAN_CHUNK tokens goes, and how many of such the rows have room for.
        long long saved_first = segment.start / SCAN_CHUNK + part.of_segment;
        float* saved_at = saved.row(saved_first) + value;
        long long left = there && saved.data ? min((len + SCAN_CHUNK - 1LL) / SCAN_CHUNK, saved_rows - saved_first) : 0;
        int to_save = static_cast<int>(left);
        auto save = [&] {
            if (to_save-- > 0) *reinterpret_cast<Together<2>*>(saved_at) = {state[0], state[1]};
            saved_at += saved.stride;
        };
        unsigned char* sums = memory + SUMS + warp / 2 * A_SUM + row_of(2 * col) + in_tile * 4;
        // Of the product over the states of two tokens: looked at once the next one began, not to wait for it.
        float y[2] = {}, last[4] = {};
        auto look = [&](int two, unsigned char* to) {
            if (two == col) y[0] = last[0], y[1] = last[3];
            if (two < 3) return;
            at<1>(to) = {y[0]};
            at<1>(to + row_of(1)) = {y[1]};
        };
        __syncthreads();
        __syncthreads();
        // What tokens need is loaded, and made, ahead of time.
        Group now = load_group(memory, 0);
        Two two = make_two(now, 0);
        unsigned char* last_sums = sums;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            unsigned char* to = sums + (chunk & (SUMS_HELD - 1)) * 2 * A_SUM;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                bool ends = g == GROUPS - 1;
                if (ends) __syncthreads();
                Group next = load_group(memory + ((chunk + ends) & 1) * HALF, ends ? 0 : g + 1);
                if (g * EIGHT % SCAN_CHUNK == 0) save();
#pragma unroll
                for (int i = 0; i < EIGHT / 2; ++i) {
                    Two two_next = make_two(i < 3 ? now : next, (i + 1) % 4);
                    float of_states[4], by_c[2] = {now.c.values[0], now.c.values[1]}, products[4] = {};
#pragma unroll
                    for (int s = 0; s < OWN_STATES; ++s) {
                        float before = fmaf(two.decays[0][s], state[s], two.input[s]);
                        state[s] = fmaf(two.decays[1][s], before, two.input[2 + s]);
                        of_states[2 * s] = before;
                        of_states[2 * s + 1] = state[s];
                    }
                    multiply_tf32(products, of_states, by_c);
                    if (i > 0) look(i - 1, to + row_of(g * EIGHT));
                    else if (g > 0 || chunk > 0) look(3, last_sums);
#pragma unroll
                    for (int n = 0; n < 4; ++n) last[n] = products[n];
                    two = two_next;
                }
                now = next;
                last_sums = to + row_of(g * EIGHT);
            }
        }
        look(3, last_sums);
        __syncthreads();
        if (!state_out.data || !there || part.after > 0 || segment.slot >= slots_out) return;
#pragma unroll
        for (int s = 0; s < OWN_STATES; ++s) state_out.row(segment.slot)[value + s] = state[s];
        return;
    }

    int t = role.thread * SHARE / TILE, first_own = role.thread % (TILE / SHARE) * SHARE, channel = tile.channel + first_own;
    float skip[SHARE], bias[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; ++i) {
        skip[i] = d ? d[channel + i] / UNCUT : 0.0f;
        bias[i] = delta_bias ? delta_bias[channel + i] : 0.0f;
    }
    Moving<T_OUT> out_at(out, segment.start + t, channel, STEPS);
    // What a thread copies: of every second kind, the values of one token.
    int copied = role.thread % COPYING, of_token = copied * COPIED / TILE, from_value = copied * COPIED % TILE;
    bool odd = role.thread >= COPYING;
    long long first = segment.start + of_token;
    int of_channels = tile.channel + from_value;
    Moving<const Half> sources[3] = {odd ? halves(delta, first, of_channels, STEPS) : halves(u, first, of_channels, STEPS),
                                     odd ? halves(b, first, tile.b + from_value, STEPS) : halves(z, first, of_channels, STEPS),
                                     halves(c, first, tile.c + from_value, STEPS)};
    unsigned char* raw = shared + TILES * A_TILE + role.tile * (A_KIND / TILES);
    auto fetch = [&](int chunk) {
        unsigned char* to = raw + (chunk & (CHUNKS_HELD - 1)) * KINDS * A_KIND + odd * A_KIND + copied * 16;
        bool inside = chunk * STEPS + of_token < len;
#pragma unroll
        for (int k = 0; k < 3; ++k)
            if (2 * k < KINDS - odd) copy_async(shared_address(to + 2 * k * A_KIND), sources[k][inside ? chunk : 0], inside);
        commit_copies();
    };
    // This thread's values of a kind.
    auto values_of = [&](int chunk, int kind) {
        return raw + ((chunk & (CHUNKS_HELD - 1)) * KINDS + kind) * A_KIND + role.thread * SHARE * 2;
    };
    auto prepare = [&](int chunk) {
        Raw<T_U, SHARE> of_u;
        Raw<T_DELTA, SHARE> of_delta;
        Raw<T_P, SHARE> of_b, of_c;
        of_u.load_from(values_of(chunk, OF_U));
        of_delta.load_from(values_of(chunk, OF_DELTA));
        of_b.load_from(values_of(chunk, OF_B_VALUES));
        of_c.load_from(values_of(chunk, OF_C_VALUES));
        unsigned char* to = memory + (chunk & 1) * HALF;
        int pair = t % EIGHT / 2, second = t % 2;
        unsigned char* dts = to + OF_DT + t / 4 * PIECE_ROW + piece_of(first_own) + t % 4 * 4;
        unsigned char* inputs = to + INPUTS + t / EIGHT * INPUT_ROW + input_of(first_own) + second * 32 + pair * 4;
        unsigned char* bs = to + OF_B + t / EIGHT * B_ROW + b_of(first_own) + second * 16 + pair * 4;
        // A token past the end changes no state.
        bool inside = chunk * STEPS + t < len;
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            float dt = softplus_of(of_delta[i] + bias[i]);
            if (!inside) dt = 0.0f;
            float input = dt * of_u[i], first_bits = masked(input, ~0x1fffu);
            at<1>(dts + i * 16) = {dt};
            at<1>(inputs + i * 64) = {first_bits};
            at<1>(inputs + i * 64 + 16) = {input - first_bits};
            at<1>(bs + i * 32) = {of_b[i]};
        }
        unsigned char* cs = to + OF_C + row_of(t) + first_own * 4;
#pragma unroll
        for (int k = 0; k < SHARE; k += 4) at<4>(cs + k * 4) = {of_c[k], of_c[k + 1], of_c[k + 2], of_c[k + 3]};
    };
    auto finish = [&](int chunk) {
        Raw<T_U, SHARE> of_u;
        Raw<T_P, SHARE> of_z;
        of_u.load_from(values_of(chunk, OF_U));
        of_z.load_from(values_of(chunk, OF_Z));
        unsigned char* sums = memory + SUMS + (chunk & (SUMS_HELD - 1)) * 2 * A_SUM + row_of(t) + first_own * 4;
        float y[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            float one = at<4>(sums + i / 4 * 16).values[i % 4], other = at<4>(sums + A_SUM + i / 4 * 16).values[i % 4];
            // UNCUT · silu(z).
            float gate = of_z[i] * reciprocal_fast(fmaf(exp2_fast(-LOG2_E * of_z[i]), 1.0f / UNCUT, 1.0f / UNCUT));
            y[i] = (fmaf(skip[i], of_u[i], one) + other) * gate;
        }
        store_valid<SHARE>(out_at[chunk], y, there && chunk * STEPS + t < len);
    };
    // A chunk's values have come before the barrier behind which threads other than those that copied them read them.
#pragma unroll
    for (int i = 0; i < COMING; ++i) fetch(i);
    wait_copies<COMING - 1>();
    __syncthreads();
    for (int chunk = 0; chunk < chunks + 2; ++chunk) {
        if (chunk > 2) finish(chunk - 3);
        if (chunk < chunks) prepare(chunk);
        fetch(chunk + COMING);
        wait_copies<COMING - 1>();
        __syncthreads();
    }
    finish(chunks - 1);
}
