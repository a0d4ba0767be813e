// The gradients of the selective scan (selective_scan.cu). With g = dout·silu(z) and e = exp(dt·A), the gradient h of the
// state runs backwards in time: h += g·C, then dC += g·s_t, w = h·e·s_{t−1}, dA += dt·w, ddt = Σ_m (A·w + h·B·u),
// du = dt·Σ_m h·B + g·D, dB += dt·u·h, and it goes on as h·e. dz needs the ungated output, which is computed again.
//
// A block has one segment, or a part of one, and one tile of channels (scan.cuh) and takes chunks of STEPS tokens from the last to the
// first, with those before on their way into shared memory. It runs through a chunk from the saved state and leaves the
// state before every token in shared memory; then it goes back, GROUP tokens in one stretch of code, so that all but
// the steps of h can overlap. Sums over states go through the lanes of a channel; sums over channels through the lanes
// of a warp, then over the block's warps, in order. At last the threads store what they know of their tokens.
// dB and dC of a tile go where B and C are if the tile is the whole group, else to `partial_b`, `partial_c`,
// [tokens][tiles][D_STATE], and dA, dD and the bias of a part go to `partial_a`,
// [parts][channels·D_STATE], and `partial_d`, [parts][2][channels], for scan_sums.cu.
//
// Shared memory: backward_shared_bytes in mixers/scan.rs, 75 KiB for D_STATE 16 and bf16. Macros: those of scan.cuh,
// T_DOUT, T_DU, T_DDELTA, T_DP, GROUP (a power of two, at most STEPS). Source: Gu and Dao, arXiv:2312.00752.
#include "scan.cuh"

#define WARPS (THREADS / WARP)
// Sums over channels of a token and lane: dB and dC of its states, up to a power of two.
#define SUMMED (STATES == 1 ? 2 : STATES == 2 ? 4 : STATES <= 4 ? 8 : 16)
#define KEPT (SUMMED / WARP_CHANNELS > 0 ? SUMMED / WARP_CHANNELS : 1)
// Neighbouring states of dB and dC that a thread stores.
#define SHARE (D_STATE % 4 == 0 ? 4 : 1)

struct alignas(16) Step {
    float dt, input, gradient, unused;
};

struct Stage {
    T_U u[STEPS * TILE];
    T_DELTA delta[STEPS * TILE];
    T_DOUT dout[STEPS * TILE];
    T_P z[STEPS * TILE], b[STEPS * D_STATE], c[STEPS * D_STATE];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selective_scan_backward(SCAN_INPUTS, SCAN_PARTS, Rows<const float> saved, long long saved_rows, Rows<const T_DOUT> dout,
                            Rows<const float> dstate_out, long long dstate_slots, Rows<T_DU> du,
                            Rows<T_DDELTA> ddelta, Rows<T_DP> dz, Rows<T_DP> db, Rows<T_DP> dc, float* partial_b,
                            float* partial_c, float* partial_a, float* partial_d, int channels,
                            Rows<float> dstate_in, long long slots_out) {
    H1_DYNAMIC_SHARED(shared);
    Stage* stages = reinterpret_cast<Stage*>(shared);
    Step* steps = reinterpret_cast<Step*>(stages + STAGES);
    float* shared_b = reinterpret_cast<float*>(steps + STEPS * STEP_ROW);
    float* shared_c = shared_b + STEPS * PADDED;
    float* states = shared_c + STEPS * PADDED;                   // [STEPS][THREADS][STATES]
    float* by_states = states + STEPS * THREADS * STATES;        // [3][STEPS][SUM_ROW]
    float* by_channels = by_states + 3 * STEPS * SUM_ROW;        // [2][WARPS][GROUP][2][PADDED]

    Part part(segments, count, part_tokens, tokens, blockIdx.y);
    Segment segment = part.segment;
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Tile tile(blockIdx.x, run, per_b, per_c);
    b.data += tile.b;
    c.data += tile.c;
    u.data += tile.channel;
    delta.data += tile.channel;
    dout.data += tile.channel;
    if (z.data) z.data += tile.channel;
    int warp = threadIdx.x / WARP, in_warp = threadIdx.x % WARP_CHANNELS, lane = threadIdx.x % WARP / WARP_CHANNELS;
    int in_tile = warp * WARP_CHANNELS + in_warp, channel = tile.channel + in_tile;
    bool valid = in_tile < tile.channels;
    float decay[STATES], h[STATES], da[STATES] = {};
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        int n = lane * STATES + s;
        decay[s] = valid && n < D_STATE ? a.row(channel)[n] * LOG2_E : 0.0f;
    }
    unsigned entry = part.entry(blockIdx.y);
    bool ends = dstate_out.data && entry < dstate_slots;
    load_states(dstate_out.row(ends ? entry : 0), channel, lane * STATES, valid && ends, 1.0f, h);

    // The channels and the token of each STEPS that this thread prepares and stores.
    int own = threadIdx.x * OWN % TILE, own_step = threadIdx.x * OWN / TILE;
    int own_channel = tile.channel + own, own_count = max(0, min(OWN, tile.channels - own));
    float skip[OWN], bias[OWN], dd[OWN] = {}, dbias[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        skip[i] = d && i < own_count ? d[own_channel + i] : 0.0f;
        bias[i] = delta_bias && i < own_count ? delta_bias[own_channel + i] : 0.0f;
    }
    auto fetch = [&](long long chunk, Stage& stage) {
        if (chunk >= 0) {
            long long first = segment.start + chunk * STEPS;
            int rows = min((long long)STEPS, segment.len - chunk * STEPS);
            fetch_rows<TILE>(stage.u, u, first, rows, tile.channels);
            fetch_rows<TILE>(stage.delta, delta, first, rows, tile.channels);
            fetch_rows<TILE>(stage.dout, dout, first, rows, tile.channels);
            if (z.data) fetch_rows<TILE>(stage.z, z, first, rows, tile.channels);
            fetch_rows<D_STATE>(stage.b, b, first, rows, D_STATE);
            fetch_rows<D_STATE>(stage.c, c, first, rows, D_STATE);
        }
        commit_copies();
    };
    long long saved_first = segment.start / SCAN_CHUNK + part.of_segment;
    auto load_saved = [&](long long chunk, float* to) {
        long long row = saved_first + chunk * (STEPS / SCAN_CHUNK);
        bool there = chunk >= 0 && row < saved_rows;
        load_states(saved.row(there ? row : 0), channel, lane * STATES, valid && there, 1.0f, to);
    };
    long long last_chunk = (segment.len - 1) / STEPS;
    float state[STATES], next_state[STATES];
    load_saved(last_chunk, next_state);
#pragma unroll
    for (int i = 0; i < STAGES; ++i) fetch(last_chunk - i, stages[i]);
    wait_copies<STAGES - 1>();
    __syncthreads();
    int at_stage = 0;
    for (long long chunk = last_chunk; chunk >= 0; --chunk) {
        long long first = segment.start + chunk * STEPS;
        int rows = min((long long)STEPS, segment.len - chunk * STEPS), last = (rows - 1) / GROUP * GROUP;
        Stage& stage = stages[at_stage];
        at_stage = at_stage + 1 == STAGES ? 0 : at_stage + 1;
        int mine = own_step * TILE + own;
        {
            Pack<T_U, OWN> own_u = load_pack<OWN>(stage.u + mine, OWN);
            Pack<T_DELTA, OWN> own_delta = load_pack<OWN>(stage.delta + mine, OWN);
            Pack<T_DOUT, OWN> own_dout = load_pack<OWN>(stage.dout + mine, OWN);
            Pack<T_P, OWN> own_z = load_pack<OWN>(stage.z + mine, z.data ? OWN : 0);
            float dt[OWN], gradient[OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                dt[i] = load(&own_delta.values[i]) + bias[i];
                gradient[i] = load(&own_dout.values[i]);
            }
            if (softplus) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) dt[i] = softplus_of(dt[i]);
            }
            if (z.data) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    float gate = load(&own_z.values[i]);
                    gradient[i] *= gate * sigmoid(gate);
                }
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                // A token past the end changes nothing.
                if (own_step >= rows) dt[i] = 0.0f;
                steps[own_step * STEP_ROW + own + i] = {dt[i], dt[i] * load(&own_u.values[i]), gradient[i], 0.0f};
            }
        }
        widen(shared_b, stage.b);
        widen(shared_c, stage.c);
#pragma unroll
        for (int s = 0; s < STATES; ++s) state[s] = next_state[s];
        load_saved(chunk - 1, next_state);
        __syncthreads();

#pragma unroll 1
        for (int group = 0; group <= last; group += GROUP) {
            Together<STATES> before[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                int t = group + i;
                Step step = steps[t * STEP_ROW + in_tile];
                Together<STATES> by_b = together<STATES>(shared_b + t * PADDED + lane * STATES);
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    before[i].values[s] = state[s];
                    state[s] = fmaf(exp2_fast(step.dt * decay[s]), state[s], step.input * by_b.values[s]);
                }
            }
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
                together<STATES>(states + ((group + i) * THREADS + threadIdx.x) * STATES) = before[i];
        }
#pragma unroll 1
        for (int group = last; group >= 0; group -= GROUP) {
            float y[GROUP], by_decay[GROUP], by_input[GROUP], kept[GROUP][KEPT];
#pragma unroll
            for (int i = GROUP - 1; i >= 0; --i) {
                int t = group + i;
                Step step = steps[t * STEP_ROW + in_tile];
                Together<STATES> by_b = together<STATES>(shared_b + t * PADDED + lane * STATES);
                Together<STATES> by_c = together<STATES>(shared_c + t * PADDED + lane * STATES);
                Together<STATES> before = together<STATES>(states + (t * THREADS + threadIdx.x) * STATES);
                float shares[SUMMED] = {};
                y[i] = by_decay[i] = by_input[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    h[s] = fmaf(step.gradient, by_c.values[s], h[s]);
                    y[i] = fmaf(state[s], by_c.values[s], y[i]);
                    shares[s] = step.input * h[s];
                    shares[STATES + s] = step.gradient * state[s];
                    by_input[i] = fmaf(h[s], by_b.values[s], by_input[i]);
                    h[s] *= exp2_fast(step.dt * decay[s]);
                    float w = h[s] * before.values[s];
                    da[s] = fmaf(step.dt, w, da[s]);
                    by_decay[i] = fmaf(decay[s], w, by_decay[i]);
                    state[s] = before.values[s];
                }
                lane_sums<WARP_CHANNELS, 1>(shares, in_warp);
#pragma unroll
                for (int k = 0; k < KEPT; ++k) kept[i][k] = shares[k];
            }
            lane_sums<LANES, WARP_CHANNELS>(y, lane);
            lane_sums<LANES, WARP_CHANNELS>(by_decay, lane);
            lane_sums<LANES, WARP_CHANNELS>(by_input, lane);
#pragma unroll
            for (int i = 0; i < GROUP; i += LANES) {
                if (lane >= GROUP) continue;
                float* to = by_states + (group + i + lane) * SUM_ROW + in_tile;
                to[0] = y[i / LANES];
                to[STEPS * SUM_ROW] = by_decay[i / LANES];
                to[2 * STEPS * SUM_ROW] = by_input[i / LANES];
            }
            float* sums = by_channels + group / GROUP % 2 * WARPS * GROUP * 2 * PADDED;
#pragma unroll
            for (int k = 0; k < KEPT; ++k) {
                int value = k * WARP_CHANNELS + in_warp, at = value / STATES * PADDED + lane * STATES + value % STATES;
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
                    if (value < 2 * STATES) sums[(warp * GROUP + i) * 2 * PADDED + at] = kept[i][k];
            }
            __syncthreads();
            for (int i = threadIdx.x * SHARE; i < GROUP * 2 * PADDED; i += THREADS * SHARE) {
                int t = group + i / (2 * PADDED), n = i % PADDED;
                bool of_c = i / PADDED % 2 != 0;
                Together<SHARE> total = together<SHARE>(sums + i);
#pragma unroll
                for (int w = 1; w < WARPS; ++w) {
                    Together<SHARE> more = together<SHARE>(sums + w * GROUP * 2 * PADDED + i);
#pragma unroll
                    for (int k = 0; k < SHARE; ++k) total.values[k] += more.values[k];
                }
                if (t >= rows || n >= D_STATE) continue;
                float* partial = of_c ? partial_c : partial_b;
                Rows<T_DP> whole = of_c ? dc : db;
                if (partial) {
                    store_pack<SHARE>(partial + ((first + t) * gridDim.x + blockIdx.x) * D_STATE + n, total.values, SHARE);
                } else {
                    store_pack<SHARE>(whole.row(first + t) + (of_c ? tile.c : tile.b) + n, total.values, SHARE);
                }
            }
        }

        if (own_step < rows) {
            Pack<T_U, OWN> own_u = load_pack<OWN>(stage.u + mine, OWN);
            Pack<T_DELTA, OWN> own_delta = load_pack<OWN>(stage.delta + mine, OWN);
            Pack<T_DOUT, OWN> own_dout = load_pack<OWN>(stage.dout + mine, OWN);
            Pack<T_P, OWN> own_z = load_pack<OWN>(stage.z + mine, z.data ? OWN : 0);
            float du_own[OWN], ddelta_own[OWN], dz_own[OWN];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                float u_value = load(&own_u.values[i]), gate = load(&own_z.values[i]), s = sigmoid(gate);
                Step step = steps[own_step * STEP_ROW + own + i];
                const float* sums = by_states + own_step * SUM_ROW + own + i;
                float y = fmaf(skip[i], u_value, sums[0]), by_input = sums[2 * STEPS * SUM_ROW];
                dz_own[i] = load(&own_dout.values[i]) * y * s * (1.0f + gate * (1.0f - s));
                du_own[i] = fmaf(step.dt, by_input, step.gradient * skip[i]);
                ddelta_own[i] = fmaf(u_value, by_input, LN_2 * sums[STEPS * SUM_ROW]);
                dd[i] = fmaf(step.gradient, u_value, dd[i]);
            }
            if (softplus) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) ddelta_own[i] *= sigmoid(load(&own_delta.values[i]) + bias[i]);
            }
#pragma unroll
            for (int i = 0; i < OWN; ++i) dbias[i] += ddelta_own[i];
            long long t = first + own_step;
            store_pack<OWN>(du.row(t) + own_channel, du_own, own_count);
            store_pack<OWN>(ddelta.row(t) + own_channel, ddelta_own, own_count);
            if (z.data) store_pack<OWN>(dz.row(t) + own_channel, dz_own, own_count);
        }
        __syncthreads();
        fetch(chunk - STAGES, stage);
        wait_copies<STAGES - 1>();
        __syncthreads();
    }
    if (dstate_in.data && part.before == 0 && segment.slot < slots_out) {
#pragma unroll
        for (int s = 0; s < STATES; ++s) h[s] = segment.past > 0 ? h[s] : 0.0f;
        store_states(dstate_in.row(segment.slot), channel, lane * STATES, valid, h);
    }
    store_states(partial_a + blockIdx.y * (long long)channels * D_STATE, channel, lane * STATES, valid, da);
    // The channels' sums over tokens: a thread a token of STEPS and OWN channels, added in the order of the tokens.
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        by_states[(own_step * TILE + own + i) * 2] = dd[i];
        by_states[(own_step * TILE + own + i) * 2 + 1] = dbias[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * tile.channels; i += THREADS) {
        float total = 0.0f;
        for (int step = 0; step < STEPS; ++step) total += by_states[(step * TILE + i / 2) * 2 + i % 2];
        partial_d[(blockIdx.y * 2 + i % 2) * (long long)channels + tile.channel + i / 2] = total;
    }
}
