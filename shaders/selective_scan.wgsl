// The selective scan of Mamba-1 with the M1 mixer's groups, over segments, forward. With dt = softplus(delta + delta_bias)
// (or the sum itself), for channel c and state m, B and C those of the channel's groups:
//   s_t[c, m] = exp(dt_t[c] A[c, m]) s_{t−1}[c, m] + dt_t[c] u_t[c] B_t[m]
//   out_t[c] = (Σ_m s_t[c, m] C_t[m] + D[c] u_t[c]) silu(z_t[c])
// Source: Gu and Dao, "Mamba", arXiv:2312.00752; groups: jxiw/M1 `mamba/hybrid_mamba_layer.py`.
//
// A workgroup takes a block of up to CHANNELS channels that share both groups, in one segment: invocation (channel, quad)
// holds four states of a channel in registers. It goes through time in tiles of TILE rows: dt, dt·u, B and C of a tile are
// made once in workgroup memory; each invocation runs its four states over the tile and leaves its part of Σ_m there; then
// invocations are (row, channel), add the parts in order, and write. Where `saved` is wanted, the states at the start of
// each tile go there for backward.
//
// A row of a channel costs d_state exponentials and 4 d_state other operations for 4 values of memory and a share of B and C:
// bound by exponentials where channels · d_state / 4 invocations fill the device, by the latency of a step below that.

@group(0) @binding(7) var<storage, read> state_in: array<f32>; // [slots, channels·d_state]
@group(0) @binding(8) var<storage, read_write> state_out: array<f32>; // [slots, channels·d_state]
@group(0) @binding(9) var<storage, read_write> saved: array<f32>; // [tokens / TILE + segments, channels·d_state]
@group(0) @binding(10) var<storage, read_write> out: array<Value>; // [tokens, channels]

struct Parameters {
    segments: vec2<u32>,
    u: vec2<u32>,
    delta: vec2<u32>,
    a: vec2<u32>,
    projected: vec2<u32>,
    d: vec2<u32>,
    delta_bias: vec2<u32>,
    state_in: vec2<u32>,
    state_out: vec2<u32>,
    saved: vec2<u32>,
    out: vec2<u32>,
    tokens: u32,
    d_state: u32,
    /// The columns of `projected` where B, C and z start.
    b_col: u32,
    c_col: u32,
    z_col: u32,
    /// Channels of a group of B, of a group of C, and neighbours that share both.
    per_b: u32,
    per_c: u32,
    run: u32,
    slots: u32,
    saved_rows: u32,
    /// What there is, 0 or 1.
    has_z: u32,
    has_d: u32,
    has_bias: u32,
    softplus: u32,
    has_state_in: u32,
    has_state_out: u32,
    /// The state before is what lies at `state_out`.
    in_place: u32,
    has_saved: u32,
}
@group(1) @binding(0) var<uniform> p: Parameters;

var<workgroup> input_tile: array<f32, TILE * CHANNELS>; // dt·u
var<workgroup> parts: array<f32, TILE * LANES>;

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let owner = segment(p.segments, group.y, p.tokens);
    if owner.len == 0u {
        return;
    }
    let block = block_of(group.x);
    let first = block.first;
    let count = block.count;
    let slot = min(owner.slot, p.slots - 1u);

    let quad = lane % QUADS;
    let place = (first + lane / QUADS) * p.d_state + quad * 4u;
    // States of the quad that there are.
    let own = select(0u, min(p.d_state - min(quad * 4u, p.d_state), 4u), lane / QUADS < count);
    var decay = vec4<f32>();
    var state = vec4<f32>();
    for (var e = 0u; e < own; e++) {
        decay[e] = a[at(p.a, first + lane / QUADS, quad * 4u + e)];
        if p.has_state_in != 0u && owner.past > 0u {
            if p.in_place != 0u {
                state[e] = state_out[at(p.state_out, slot, place + e)];
            } else {
                state[e] = state_in[at(p.state_in, slot, place + e)];
            }
        }
    }

    for (var start = 0u; start < owner.len; start += TILE) {
        let rows = min(TILE, owner.len - start);
        let row = owner.start + start;
        workgroupBarrier();
        for (var i = lane; i < rows * CHANNELS; i += LANES) {
            let c = i % CHANNELS;
            var step = 0.0;
            var input = 0.0;
            if c < count {
                step = step_of(row + i / CHANNELS, first + c);
                input = step * f32(u[at(p.u, row + i / CHANNELS, first + c)]);
            }
            step_tile[i] = step;
            input_tile[i] = input;
        }
        load_groups(row, rows, block, lane);
        if p.has_saved != 0u {
            let to = min(owner.start / TILE + group.y + start / TILE, p.saved_rows - 1u);
            for (var e = 0u; e < own; e++) {
                saved[at(p.saved, to, place + e)] = state[e];
            }
        }
        workgroupBarrier();

        let channel = lane / QUADS;
        for (var t = 0u; t < rows; t++) {
            let step = step_tile[t * CHANNELS + channel];
            let input = input_tile[t * CHANNELS + channel];
            state = fma(exponentials(step * decay), state, input * b_tile[t * QUADS + quad]);
            parts[t * LANES + lane] = dot(state, c_tile[t * QUADS + quad]);
        }
        workgroupBarrier();

        for (var i = lane; i < rows * CHANNELS; i += LANES) {
            let t = i / CHANNELS;
            let c = i % CHANNELS;
            if c < count {
                var y = 0.0;
                for (var q = 0u; q < QUADS; q++) {
                    y += parts[t * LANES + c * QUADS + q];
                }
                if p.has_d != 0u {
                    y = fma(d[at(p.d, 0u, first + c)], f32(u[at(p.u, row + t, first + c)]), y);
                }
                if p.has_z != 0u {
                    y *= silu(f32(projected[at(p.projected, row + t, p.z_col + first + c)]));
                }
                out[at(p.out, row + t, first + c)] = Value(y);
            }
        }
    }
    if p.has_state_out != 0u {
        for (var e = 0u; e < own; e++) {
            state_out[at(p.state_out, slot, place + e)] = state[e];
        }
    }
}
