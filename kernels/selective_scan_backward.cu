// The gradients of the selective scan (selective_scan.cu). With g = dout·silu(z) and e = exp(dt·A), the gradient h of the
// state runs backwards in time: h += g·C, then dC += g·s_t, w = h·e·s_{t−1}, dA += dt·w, ddt = Σ_m (A·w + h·B·u),
// du = dt·Σ_m h·B + g·D, dB += dt·u·h, and it goes on as h·e. dz needs the ungated output, which is computed again.
//
// A block has one segment and one tile of channels (scan.cuh) and takes the chunks of SCAN_CHUNK tokens from the last to
// the first. Of a chunk it loads everything into shared memory and runs from the saved state to leave the state before
// every HELD tokens; then, from the last HELD tokens to the first, it keeps their states and decays in registers and
// goes back through them. Sums over states are left as shares a lane in shared memory and added by the threads that
// store; sums over channels go through shuffles and then over the block's warps, in order.
// dB and dC of a tile go where B and C are if the tile is the whole group, else to `partial_b`, `partial_c`,
// [tokens][tiles][D_STATE], and dA, dD and the bias of a segment go to `partial_a`,
// [segments][channels·D_STATE], and `partial_d`, [segments][2][channels], for scan_sums.cu.
//
// Shared memory: see scan_backward_shared_bytes in mixers/scan.rs. Macros: those of scan.cuh, T_DOUT, T_DU, T_DDELTA,
// T_DP, HELD. Source: Gu and Dao, arXiv:2312.00752.
#include "scan.cuh"

#define WARPS (THREADS / WARP)
#define WARP_CHANNELS (WARP / LANES)

struct Step {
    float dt, input;
};

// What the threads that load know of a token and channel, and the results that take its place.
struct Token {
    float u, gradient, raw, gate;
};

// The sum of each of STATES values over the channels of a warp, in every lane.
H1_DEVICE void channel_sums(float* values) {
#pragma unroll
    for (int offset = LANES; offset < WARP; offset *= 2)
#pragma unroll
        for (int s = 0; s < STATES; ++s) values[s] += __shfl_xor_sync(WHOLE_WARP, values[s], offset);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selective_scan_backward(SCAN_INPUTS, Rows<const float> saved, long long saved_rows, Rows<const T_DOUT> dout,
                            Rows<const float> dstate_out, long long dstate_slots, Rows<T_DU> du,
                            Rows<T_DDELTA> ddelta, Rows<T_DP> dz, Rows<T_DP> db, Rows<T_DP> dc, float* partial_b,
                            float* partial_c, float* partial_a, float* partial_d, int channels,
                            Rows<float> dstate_in, long long slots_out) {
    H1_DYNAMIC_SHARED(shared);
    Step* steps = reinterpret_cast<Step*>(shared);
    float* gradients = reinterpret_cast<float*>(steps + SCAN_CHUNK * TILE);
    float* shared_b = gradients + SCAN_CHUNK * TILE;
    float* shared_c = shared_b + SCAN_CHUNK * PADDED;
    float* starts = shared_c + SCAN_CHUNK * PADDED;
    float* shares = starts + SCAN_CHUNK / HELD * STATES * THREADS;
    float* sums = shares + 3 * HELD * THREADS;

    Segment segment = segments[blockIdx.y];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Tile tile(blockIdx.x, run, per_b, per_c);
    b.data += tile.b;
    c.data += tile.c;
    int lane = threadIdx.x % LANES, in_tile = threadIdx.x / LANES, channel = tile.channel + in_tile;
    int warp = threadIdx.x / WARP;
    bool valid = in_tile < tile.channels;
    float decay[STATES], h[STATES], da[STATES] = {};
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        int n = lane * STATES + s;
        decay[s] = valid && n < D_STATE ? a.row(channel)[n] * LOG2_E : 0.0f;
    }
    bool ends = dstate_out.data && segment.slot < dstate_slots;
    load_states(dstate_out.row(ends ? segment.slot : 0), channel, lane * STATES, valid && ends, 1.0f, h);
    float dd[OWN] = {}, dbias[OWN] = {};
    int own = threadIdx.x * OWN % TILE, own_step = threadIdx.x * OWN / TILE;
    int own_channel = tile.channel + own, own_count = max(0, min(OWN, tile.channels - own));

    for (long long chunk = (segment.len - 1) / SCAN_CHUNK; chunk >= 0; --chunk) {
        long long first = segment.start + chunk * SCAN_CHUNK;
        int rows = min((long long)SCAN_CHUNK, segment.len - chunk * SCAN_CHUNK);
        Token known[SCAN_CHUNK / STEPS][OWN];
        __syncthreads();
#pragma unroll
        for (int part = 0; part < SCAN_CHUNK / STEPS; ++part) {
            int step = part * STEPS + own_step, count = step < rows ? own_count : 0;
            long long t = first + step;
            Pack<T_U, OWN> pack_u = load_pack<OWN>(u.row(t) + own_channel, count);
            Pack<T_DELTA, OWN> pack_delta = load_pack<OWN>(delta.row(t) + own_channel, count);
            Pack<T_DOUT, OWN> pack_dout = load_pack<OWN>(dout.row(t) + own_channel, count);
            Pack<T_P, OWN> pack_z = {};
            if (z.data) pack_z = load_pack<OWN>(z.row(t) + own_channel, count);
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                bool inside = i < count;
                Token& token = known[part][i];
                token.u = load(&pack_u.values[i]);
                token.gradient = load(&pack_dout.values[i]);
                token.gate = load(&pack_z.values[i]);
                token.raw = load(&pack_delta.values[i]) + (delta_bias && inside ? delta_bias[own_channel + i] : 0.0f);
                float dt = inside ? step_size(token.raw, softplus) : 0.0f;
                steps[step * TILE + own + i] = {dt, dt * token.u};
                gradients[step * TILE + own + i] = z.data ? token.gradient * token.gate * sigmoid_fast(token.gate) : token.gradient;
            }
            Projection<T_P> next_b, next_c;
            int left = max(0, rows - part * STEPS);
            next_b.fetch(b, first + part * STEPS, left);
            next_c.fetch(c, first + part * STEPS, left);
            next_b.put(shared_b + part * STEPS * PADDED, b, first + part * STEPS, left);
            next_c.put(shared_c + part * STEPS * PADDED, c, first + part * STEPS, left);
        }
        float state[STATES];
        long long row = segment.start / SCAN_CHUNK + blockIdx.y + chunk;
        load_states(saved.row(row < saved_rows ? row : 0), channel, lane * STATES, valid && row < saved_rows, 1.0f, state);
        __syncthreads();

        // The states before every HELD tokens.
        int last = (rows - 1) / HELD;
        for (int held = 0; held <= last; ++held) {
#pragma unroll
            for (int s = 0; s < STATES; ++s) starts[(held * STATES + s) * THREADS + threadIdx.x] = state[s];
            if (held == last) break;
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                int t = held * HELD + i;
                Step step = steps[t * TILE + in_tile];
#pragma unroll
                for (int s = 0; s < STATES; ++s)
                    state[s] = fmaf(exp2_fast(step.dt * decay[s]), state[s],
                                    step.input * shared_b[t * PADDED + lane * STATES + s]);
            }
        }
        for (int held = last; held >= 0; --held) {
            float before[HELD][STATES], decays[HELD][STATES], after[STATES];
#pragma unroll
            for (int s = 0; s < STATES; ++s) after[s] = starts[(held * STATES + s) * THREADS + threadIdx.x];
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                int t = held * HELD + i;
                Step step = steps[t * TILE + in_tile];
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    before[i][s] = after[s];
                    decays[i][s] = exp2_fast(step.dt * decay[s]);
                    after[s] = fmaf(decays[i][s], after[s], step.input * shared_b[t * PADDED + lane * STATES + s]);
                }
            }
#pragma unroll
            for (int i = HELD - 1; i >= 0; --i) {
                int t = held * HELD + i;
                Step step = steps[t * TILE + in_tile];
                float gradient = gradients[t * TILE + in_tile];
                float y = 0.0f, by_decay = 0.0f, by_input = 0.0f, db_share[STATES], dc_share[STATES];
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    int n = t * PADDED + lane * STATES + s;
                    float by_c = shared_c[n];
                    h[s] = fmaf(gradient, by_c, h[s]);
                    y = fmaf(after[s], by_c, y);
                    dc_share[s] = gradient * after[s];
                    db_share[s] = step.input * h[s];
                    by_input = fmaf(h[s], shared_b[n], by_input);
                    h[s] *= decays[i][s];
                    float w = h[s] * before[i][s];
                    da[s] = fmaf(step.dt, w, da[s]);
                    by_decay = fmaf(decay[s], w, by_decay);
                    after[s] = before[i][s];
                }
                shares[(0 * HELD + i) * THREADS + threadIdx.x] = y;
                shares[(1 * HELD + i) * THREADS + threadIdx.x] = by_decay;
                shares[(2 * HELD + i) * THREADS + threadIdx.x] = by_input;
                channel_sums(db_share);
                channel_sums(dc_share);
                if (threadIdx.x % WARP < LANES) {
                    float* to = sums + (warp * HELD + i) * 2 * PADDED + lane * STATES;
#pragma unroll
                    for (int s = 0; s < STATES; ++s) {
                        to[s] = db_share[s];
                        to[PADDED + s] = dc_share[s];
                    }
                }
            }
            __syncthreads();
            // Results take the places of what they were made from.
            for (int i = threadIdx.x; i < HELD * TILE; i += THREADS) {
                float total[3] = {};
#pragma unroll
                for (int k = 0; k < 3; ++k)
#pragma unroll
                    for (int l = 0; l < LANES; ++l)
                        total[k] += shares[(k * HELD + i / TILE) * THREADS + i % TILE * LANES + l];
                int at = held * HELD * TILE + i;
                gradients[at] = total[0];
                steps[at] = {LN_2 * total[1], total[2]};
            }
            for (int i = threadIdx.x; i < HELD * 2 * PADDED; i += THREADS) {
                int t = held * HELD + i / (2 * PADDED), n = i % PADDED;
                bool of_c = i / PADDED % 2 != 0;
                float total = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) total += sums[w * HELD * 2 * PADDED + i];
                if (t >= rows || n >= D_STATE) continue;
                float* partial = of_c ? partial_c : partial_b;
                Rows<T_DP> whole = of_c ? dc : db;
                if (partial) {
                    partial[((first + t) * gridDim.x + blockIdx.x) * D_STATE + n] = total;
                } else {
                    store(whole.row(first + t) + (of_c ? tile.c : tile.b) + n, total);
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int part = 0; part < SCAN_CHUNK / STEPS; ++part) {
            int step = part * STEPS + own_step;
            float du_own[OWN], ddelta_own[OWN], dz_own[OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                bool inside = i < own_count && step < rows;
                Token token = known[part][i];
                int at = step * TILE + own + i;
                float skip = d && inside ? d[own_channel + i] : 0.0f;
                float dt = step_size(token.raw, softplus), y = fmaf(skip, token.u, gradients[at]);
                float s = sigmoid_fast(token.gate);
                float g = z.data ? token.gradient * token.gate * s : token.gradient;
                dz_own[i] = token.gradient * y * s * (1.0f + token.gate * (1.0f - s));
                du_own[i] = fmaf(dt, steps[at].input, g * skip);
                ddelta_own[i] = fmaf(token.u, steps[at].input, steps[at].dt) * step_derivative(token.raw, softplus);
                dd[i] += inside ? g * token.u : 0.0f;
                dbias[i] += inside ? ddelta_own[i] : 0.0f;
            }
            if (step >= rows) continue;
            long long t = first + step;
            store_pack<OWN>(du.row(t) + own_channel, du_own, own_count);
            store_pack<OWN>(ddelta.row(t) + own_channel, ddelta_own, own_count);
            if (z.data) store_pack<OWN>(dz.row(t) + own_channel, dz_own, own_count);
        }
    }
    if (dstate_in.data && segment.slot < slots_out) {
#pragma unroll
        for (int s = 0; s < STATES; ++s) h[s] = segment.past > 0 ? h[s] : 0.0f;
        store_states(dstate_in.row(segment.slot), channel, lane * STATES, valid, h);
    }
    store_states(partial_a + blockIdx.y * (long long)channels * D_STATE, channel, lane * STATES, valid, da);
    // The channels' sums over tokens: a thread a token of STEPS and OWN channels, added in the order of the tokens.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        shares[(own_step * TILE + own + i) * 2] = dd[i];
        shares[(own_step * TILE + own + i) * 2 + 1] = dbias[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * tile.channels; i += THREADS) {
        float total = 0.0f;
        for (int step = 0; step < STEPS; ++step) total += shares[(step * TILE + i / 2) * 2 + i % 2];
        partial_d[(blockIdx.y * 2 + i % 2) * (long long)channels + tile.channel + i / 2] = total;
    }
}
