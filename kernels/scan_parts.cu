// What enters the parts of segments (Part in scan.cuh), so that they can be scanned side by side: forward the states before
// each, backward the gradients of the states after it.
//
// scan_parts makes what each of STRETCHES stretches of a part passes on by itself, [parts][STRETCHES][channels][D_STATE]: forward
// the states after it if it begins with none, by u and B; backward the gradients of the states before it if it ends with none,
// by dout and C. And the sum of its dt, `spans`, [parts][STRETCHES][channels]: what comes from beyond decays by exp(A·Σ dt) in it.
// A block has one stretch and WARP_CHANNELS channels, a lane up to 8 states of one; each of WARPS warps goes through its share
// of the tokens, AHEAD at a time that are loaded together, and then the block joins them. With 8 exponentials a lane and
// token it issues about as long as the exponential unit works. scan_enter goes from stretch to stretch.
//
// Macros: T_X (of u, or of dout), T_DELTA, T_P, D_STATE, BACK (whether backward), VECTOR (whether rows of B, or C, are aligned
// such that a lane's values are one load). Source: Gu and Dao, arXiv:2312.00752.
#define LANES (D_STATE <= 8 ? 1 : D_STATE <= 16 ? 2 : D_STATE <= 32 ? 4 : D_STATE <= 64 ? 8 : D_STATE <= 128 ? 16 : 32)
#define TILE 1
#define CUT 1
#include "scan.cuh"

#define STRETCHES 4
#define WARPS 8
#define AHEAD 2

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 4)
    scan_parts(Rows<const T_X> x, Rows<const T_DELTA> delta, Rows<const float> a, Rows<const T_P> by, Rows<const T_P> z,
               const float* delta_bias, int softplus, const Segment* segments, long long tokens, int per_group, SCAN_PARTS,
               int channels, float* passed, float* spans) {
    __shared__ float states[WARPS][WARP_CHANNELS * PADDED], of_warps[WARPS][WARP_CHANNELS];
    Part part(segments, count, part_tokens, tokens, blockIdx.y / STRETCHES);
    // Of the last part, or the first, nothing is passed on.
    if (part.segment.len == 0 || (BACK ? part.before : part.after) == 0) return;
    int warp = threadIdx.x / WARP, in_warp = threadIdx.x % WARP_CHANNELS;
    int first_state = threadIdx.x % WARP / WARP_CHANNELS * STATES, first_channel = blockIdx.x * WARP_CHANNELS;
    // Lanes past the last channel have it too.
    int channel = min(first_channel + in_warp, channels - 1);
    float decay[STATES], state[STATES] = {}, span = 0.0f, bias = delta_bias ? delta_bias[channel] : 0.0f;
    load_states(a.row(channel), 0, first_state, true, LOG2_E, decay);
    int len = part.segment.len, share = (len + STRETCHES * WARPS - 1) / (STRETCHES * WARPS);
    int begin = min((int(blockIdx.y) % STRETCHES * WARPS + warp) * share, len), left = min(share, len - begin);
    // The values of AHEAD tokens, each from the place of the one before on.
    long long first = part.segment.start + (BACK ? begin + max(left - 1, 0) : begin);
    const T_X* x_at = x.row(first) + channel;
    const T_DELTA* delta_at = delta.row(first) + channel;
    const T_P* z_at = BACK && z.data ? z.row(first) + channel : nullptr;
    const T_P* by_at = by.row(first) + channel / per_group * D_STATE + first_state;
    constexpr int STEP = BACK ? -1 : 1;
    struct Tokens {
        T_X x[AHEAD];
        T_DELTA delta[AHEAD];
        T_P z[AHEAD];
        Pack<T_P, STATES> by[AHEAD];
    };
    auto fetch = [&](int count) {
        Tokens tokens = {};
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (i >= count) break;
            tokens.x[i] = *x_at;
            tokens.delta[i] = *delta_at;
            if (BACK && z.data) {
                tokens.z[i] = *z_at;
                z_at += STEP * z.stride;
            }
            tokens.by[i] = load_pack<STATES>(by_at, min(STATES, D_STATE - first_state));
            x_at += STEP * x.stride;
            delta_at += STEP * delta.stride;
            by_at += STEP * by.stride;
        }
        return tokens;
    };
    auto go_on = [&](const Tokens& tokens, int count) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (i >= count) break;
            float dt = load(&tokens.delta[i]) + bias, input = load(&tokens.x[i]);
            if (softplus) dt = softplus_of(dt);
            if (!BACK) input *= dt;
            if (BACK && z.data) input *= silu(load(&tokens.z[i]));
            span += dt;
#pragma unroll
            for (int s = 0; s < STATES; ++s) {
                float e = exp2_fast(dt * decay[s]), added = input * load(&tokens.by[i].values[s]);
                state[s] = BACK ? (state[s] + added) * e : fmaf(e, state[s], added);
            }
        }
    };
    for (; left >= AHEAD; left -= AHEAD) go_on(fetch(AHEAD), AHEAD);
    for (; left > 0; --left) go_on(fetch(1), 1);
#pragma unroll
    for (int s = 0; s < STATES; ++s) states[warp][in_warp * PADDED + first_state + s] = state[s];
    of_warps[warp][in_warp] = span;
    __syncthreads();
    for (int i = threadIdx.x; i < WARP_CHANNELS * PADDED; i += WARPS * WARP) {
        int of_block = i / PADDED, n = i % PADDED;
        channel = first_channel + of_block;
        if (channel >= channels || n >= D_STATE) continue;
        float by_span = a.row(channel)[n] * LOG2_E, total = 0.0f, whole = 0.0f;
#pragma unroll
        for (int k = 0; k < WARPS; ++k) {
            int w = BACK ? WARPS - 1 - k : k;
            total = fmaf(exp2_fast(of_warps[w][of_block] * by_span), total, states[w][i]);
            whole += of_warps[w][of_block];
        }
        long long row = (long long)blockIdx.y * channels + channel;
        passed[row * D_STATE + n] = total;
        if (n == 0) spans[row] = whole;
    }
}

// A thread a state of a channel of a segment. `state` is what the segment begins with, or backward what follows it: a row a slot,
// or absent. `entering`: [parts][channels][D_STATE].
extern "C" __global__ void scan_enter(Rows<const float> a, const Segment* segments, long long tokens, SCAN_PARTS,
                                      int channels, const float* passed, const float* spans, Rows<const float> state,
                                      long long slots, float* entering) {
    int value = blockIdx.x * blockDim.x + threadIdx.x, channel = value / D_STATE, of_segment = blockIdx.y;
    Segment segment = segments[of_segment];
    int parts = segment.parts(tokens, part_tokens), first = 0;
    if (channel >= channels || parts == 0) return;
    for (int s = 0; s < of_segment; ++s) first += segments[s].parts(tokens, part_tokens);
    bool given = (BACK || segment.past > 0) && state.data && segment.slot < slots;
    float total = given ? state.row(segment.slot)[value] : 0.0f, decay = a.row(channel)[value % D_STATE] * LOG2_E;
    long long values = (long long)channels * D_STATE;
    for (int p = 0; p < parts; ++p) {
        long long item = first + (BACK ? parts - 1 - p : p);
        entering[item * values + value] = total;
        if (p == parts - 1) break;
#pragma unroll
        for (int k = 0; k < STRETCHES; ++k) {
            long long stretch = item * STRETCHES + (BACK ? STRETCHES - 1 - k : k);
            float span = spans[stretch * channels + channel];
            total = fmaf(exp2_fast(span * decay), total, passed[stretch * values + value]);
        }
    }
}
