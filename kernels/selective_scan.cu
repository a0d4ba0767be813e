// The selective scan of Mamba-1 over segments, forward. With dt = softplus(delta + delta_bias), for channel c, state m:
// s_t[c, m] = exp(dt·A[c, m])·s_{t−1}[c, m] + dt·u_t[c]·B_t[m], out_t[c] = (Σ_m s_t[c, m]·C_t[m] + D[c]·u_t[c])·silu(z_t[c]).
//
// A block has one segment and one tile of channels (scan.cuh), whose B and C it reads once. It goes through time STEPS
// tokens at a time: dt, dt·u, B and C of these lie in shared memory as f32 while the next ones are on their way; each
// lane runs its states through them and leaves its share of every y; then the threads add the shares and gate them.
// Every SCAN_CHUNK tokens the state is saved for backward.
//
// Shared memory: 4·STEPS·(2·TILE + 2·PADDED + TILE·LANES) bytes, 16 KiB for D_STATE 16. Registers: at most 128.
// Macros: those of scan.cuh, T_OUT. Source: Gu and Dao, arXiv:2312.00752; one block a head: the floors of this scan.
#include "scan.cuh"

struct Step {
    float dt, input;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    selective_scan(SCAN_INPUTS, Rows<float> state_out, long long slots_out, Rows<float> saved, long long saved_rows,
                   Rows<T_OUT> out) {
    H1_DYNAMIC_SHARED(shared);
    Step* steps = reinterpret_cast<Step*>(shared);
    float* shared_b = reinterpret_cast<float*>(steps + STEPS * TILE);
    float* shared_c = shared_b + STEPS * PADDED;
    float* shares = shared_c + STEPS * PADDED;

    Segment segment = segments[blockIdx.y];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    Tile tile(blockIdx.x, run, per_b, per_c);
    b.data += tile.b;
    c.data += tile.c;
    int lane = threadIdx.x % LANES, in_tile = threadIdx.x / LANES, channel = tile.channel + in_tile;
    bool valid = in_tile < tile.channels;
    float decay[STATES], state[STATES];
#pragma unroll
    for (int s = 0; s < STATES; ++s) {
        int n = lane * STATES + s;
        decay[s] = valid && n < D_STATE ? a.row(channel)[n] * LOG2_E : 0.0f;
    }
    bool goes_on = segment.past > 0 && state_in.data && segment.slot < slots;
    load_states(state_in.row(goes_on ? segment.slot : 0), channel, lane * STATES, valid && goes_on, 1.0f, state);

    // The channels and the token of each STEPS that this thread loads and stores.
    int own = threadIdx.x * OWN % TILE, own_step = threadIdx.x * OWN / TILE;
    int own_channel = tile.channel + own, own_count = max(0, min(OWN, tile.channels - own));
    float skip[OWN], bias[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        skip[i] = d && i < own_count ? d[own_channel + i] : 0.0f;
        bias[i] = delta_bias && i < own_count ? delta_bias[own_channel + i] : 0.0f;
    }
    Pack<T_U, OWN> next_u;
    Pack<T_DELTA, OWN> next_delta;
    Pack<T_P, OWN> next_z = {};
    Projection<T_P> next_b, next_c;
    auto fetch = [&](long long done) {
        long long first = segment.start + done, t = first + own_step;
        int rows = min((long long)STEPS, segment.len - done), count = own_step < rows ? own_count : 0;
        next_u = load_pack<OWN>(u.row(t) + own_channel, count);
        next_delta = load_pack<OWN>(delta.row(t) + own_channel, count);
        if (z.data) next_z = load_pack<OWN>(z.row(t) + own_channel, count);
        next_b.fetch(b, first, rows);
        next_c.fetch(c, first, rows);
    };
    fetch(0);
    for (long long done = 0; done < segment.len; done += STEPS) {
        long long first = segment.start + done;
        int rows = min((long long)STEPS, segment.len - done);
        float own_u[OWN], gate[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            own_u[i] = load(&next_u.values[i]);
            float z_value = load(&next_z.values[i]);
            gate[i] = z.data ? z_value * sigmoid_fast(z_value) : 1.0f;
            float dt = step_size(load(&next_delta.values[i]) + bias[i], softplus);
            steps[own_step * TILE + own + i] = {dt, dt * own_u[i]};
        }
        next_b.put(shared_b, b, first, rows);
        next_c.put(shared_c, c, first, rows);
        if (done + STEPS < segment.len) fetch(done + STEPS);
        if (saved.data && done % SCAN_CHUNK == 0) {
            long long row = segment.start / SCAN_CHUNK + blockIdx.y + done / SCAN_CHUNK;
            store_states(saved.row(row), channel, lane * STATES, valid && row < saved_rows, state);
        }
        __syncthreads();
#pragma unroll 4
        for (int t = 0; t < rows; ++t) {
            Step step = steps[t * TILE + in_tile];
            float share = 0.0f;
#pragma unroll
            for (int s = 0; s < STATES; ++s) {
                int n = t * PADDED + lane * STATES + s;
                state[s] = fmaf(exp2_fast(step.dt * decay[s]), state[s], step.input * shared_b[n]);
                share = fmaf(state[s], shared_c[n], share);
            }
            shares[t * THREADS + threadIdx.x] = share;
        }
        __syncthreads();
        float y[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            y[i] = 0.0f;
#pragma unroll
            for (int l = 0; l < LANES; ++l) y[i] += shares[own_step * THREADS + (own + i) * LANES + l];
            y[i] = fmaf(skip[i], own_u[i], y[i]) * gate[i];
        }
        if (own_step < rows) store_pack<OWN>(out.row(first + own_step) + own_channel, y, own_count);
    }
    if (state_out.data && segment.slot < slots_out)
        store_states(state_out.row(segment.slot), channel, lane * STATES, valid, state);
}
