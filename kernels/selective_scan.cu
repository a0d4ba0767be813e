// The selective scan of Mamba-1 over segments, forward. With dt = softplus(delta + delta_bias), for channel c, state m:
// s_t[c, m] = exp(dt·A[c, m])·s_{t−1}[c, m] + dt·u_t[c]·B_t[m], out_t[c] = (Σ_m s_t[c, m]·C_t[m] + D[c]·u_t[c])·silu(z_t[c]).
//
// A block has one segment, or a part of one, and one tile of channels (scan.cuh), whose B and C it reads once. It goes through
// time STEPS tokens at a time, with the next STAGES times STEPS on their way into shared memory: the threads make dt, dt·u, B
// and C as f32; each lane runs its states through them, GROUP tokens in one stretch of code, so that all but the additions to
// a state can overlap; the lanes of a channel add their shares of y; then the threads gate and store.
// Every SCAN_CHUNK tokens the state is saved for backward.
//
// Shared memory: forward_shared_bytes in mixers/scan.rs, 28 KiB for D_STATE 16 and bf16.
// Macros: those of scan.cuh, T_OUT, GROUP (a power of two, at most SCAN_CHUNK).
// Source: Gu and Dao, arXiv:2312.00752; one block a head: the floors of this scan.
#include "scan.cuh"

struct Step {
    float dt, input;
};

struct Stage {
    T_U u[STEPS * TILE];
    T_DELTA delta[STEPS * TILE];
    T_P z[STEPS * TILE], b[STEPS * D_STATE], c[STEPS * D_STATE];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selective_scan(SCAN_INPUTS, SCAN_PARTS, Rows<float> state_out, long long slots_out, Rows<float> saved,
                   long long saved_rows, Rows<T_OUT> out) {
    H1_DYNAMIC_SHARED(shared);
    Stage* stages = reinterpret_cast<Stage*>(shared);
    Step* steps = reinterpret_cast<Step*>(stages + STAGES);
    float* shared_b = reinterpret_cast<float*>(steps + STEPS * STEP_ROW);
    float* shared_c = shared_b + STEPS * PADDED;
    float* shared_y = shared_c + STEPS * PADDED;

    Part part(segments, count, part_tokens, tokens, blockIdx.y);
    Segment segment = part.segment;
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Tile tile(blockIdx.x, run, per_b, per_c);
    b.data += tile.b;
    c.data += tile.c;
    u.data += tile.channel;
    delta.data += tile.channel;
    if (z.data) z.data += tile.channel;
    int lane = threadIdx.x % WARP / WARP_CHANNELS;
    int in_tile = threadIdx.x / WARP * WARP_CHANNELS + threadIdx.x % WARP_CHANNELS, channel = tile.channel + in_tile;
    bool valid = in_tile < tile.channels;
    float decay[STATES], state[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        int n = lane * STATES + s;
        decay[s] = valid && n < D_STATE ? a.row(channel)[n] * LOG2_E : 0.0f;
    }
    unsigned entry = part.entry(blockIdx.y);
    bool goes_on = (CUT || segment.past > 0) && state_in.data && entry < slots;
    load_states(state_in.row(goes_on ? entry : 0), channel, lane * STATES, valid && goes_on, 1.0f, state);

    // The channels and the token of each STEPS that this thread prepares and stores.
    int own = threadIdx.x * OWN % TILE, own_step = threadIdx.x * OWN / TILE;
    int own_channel = tile.channel + own, own_count = max(0, min(OWN, tile.channels - own));
    float skip[OWN], bias[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        skip[i] = d && i < own_count ? d[own_channel + i] : 0.0f;
        bias[i] = delta_bias && i < own_count ? delta_bias[own_channel + i] : 0.0f;
    }
    auto fetch = [&](long long done, Stage& stage) {
        if (done < segment.len) {
            long long first = segment.start + done;
            int rows = min((long long)STEPS, segment.len - done);
            fetch_rows<TILE>(stage.u, u, first, rows, tile.channels);
            fetch_rows<TILE>(stage.delta, delta, first, rows, tile.channels);
            if (z.data) fetch_rows<TILE>(stage.z, z, first, rows, tile.channels);
            fetch_rows<D_STATE>(stage.b, b, first, rows, D_STATE);
            fetch_rows<D_STATE>(stage.c, c, first, rows, D_STATE);
        }
        commit_copies();
    };
#pragma unroll
    for (int i = 0; i < STAGES; ++i) fetch(i * STEPS, stages[i]);
    wait_copies<STAGES - 1>();
    __syncthreads();
    int at_stage = 0;
    for (long long done = 0; done < segment.len; done += STEPS) {
        int rows = min((long long)STEPS, segment.len - done);
        Stage& stage = stages[at_stage];
        at_stage = at_stage + 1 == STAGES ? 0 : at_stage + 1;
        int mine = own_step * TILE + own;
        Pack<T_U, OWN> own_u = load_pack<OWN>(stage.u + mine, OWN);
        Pack<T_P, OWN> own_z = load_pack<OWN>(stage.z + mine, z.data ? OWN : 0);
        Pack<T_DELTA, OWN> own_delta = load_pack<OWN>(stage.delta + mine, OWN);
        float dt[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) dt[i] = load(&own_delta.values[i]) + bias[i];
        if (softplus) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) dt[i] = softplus_of(dt[i]);
        }
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            // A token past the end changes no state.
            if (own_step >= rows) dt[i] = 0.0f;
            steps[own_step * STEP_ROW + own + i] = {dt[i], dt[i] * load(&own_u.values[i])};
        }
        widen(shared_b, stage.b);
        widen(shared_c, stage.c);
        __syncthreads();
        fetch(done + STAGES * STEPS, stage);
#pragma unroll 1
        for (int group = 0; group < rows; group += GROUP) {
            if (saved.data && group % SCAN_CHUNK == 0) {
                long long row = segment.start / SCAN_CHUNK + part.of_segment + (done + group) / SCAN_CHUNK;
                store_states(saved.row(row), channel, lane * STATES, valid && row < saved_rows, state);
            }
            float shares[GROUP];
#pragma unroll
            for (int i = 0; i < GROUP; ++i) {
                int t = group + i;
                Step step = steps[t * STEP_ROW + in_tile];
                Together<STATES> by_b = together<STATES>(shared_b + t * PADDED + lane * STATES);
                Together<STATES> by_c = together<STATES>(shared_c + t * PADDED + lane * STATES);
                shares[i] = 0.0f;
#pragma unroll
                for (int s = 0; s < STATES; ++s) {
                    state[s] = fmaf(exp2_fast(step.dt * decay[s]), state[s], step.input * by_b.values[s]);
                    shares[i] = fmaf(state[s], by_c.values[s], shares[i]);
                }
            }
            lane_sums<LANES, WARP_CHANNELS>(shares, lane);
#pragma unroll
            for (int i = 0; i < GROUP; i += LANES)
                if (lane < GROUP) shared_y[(group + i + lane) * SUM_ROW + in_tile] = shares[i / LANES];
        }
        wait_copies<STAGES - 1>();
        __syncthreads();
        float y[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            float gate = load(&own_z.values[i]);
            y[i] = fmaf(skip[i], load(&own_u.values[i]), shared_y[own_step * SUM_ROW + own + i]);
            if (z.data) y[i] *= gate * sigmoid(gate);
        }
        if (own_step < rows) store_pack<OWN>(out.row(segment.start + done + own_step) + own_channel, y, own_count);
    }
    if (state_out.data && part.after == 0 && segment.slot < slots_out)
        store_states(state_out.row(segment.slot), channel, lane * STATES, valid, state);
}
