// The gradients of the selective scan. The gradient h of the state runs from the last row to the first; with
// dy = dout·silu(z) and e = exp(dt A), at row t it gains dy C, and then
//   dA += h dt e s_{t−1}      d(dt) = Σ_m h (A e s_{t−1} + u B)      du = dt Σ_m h B + dy D      dz = dout y silu'(z)
//   dB = Σ_c h dt u           dC = Σ_c dy s_t                         dD += dy u                  h goes on as h e
// where y is the output before the gate; ddelta is d(dt) times the derivative of the softplus.
// Source: the formulas of Gu and Dao, arXiv:2312.00752, differentiated; the tiling is our own.
//
// A workgroup takes a block of up to CHANNELS channels that share both groups, in one segment, and goes through its tiles of
// TILE rows from the last to the first: invocation (channel, quad) holds four states of a channel. In each tile
//   1. dt, u, dy, B and C come into workgroup memory;
//   2. states are computed again from the saved one at the tile's start, and kept in workgroup memory;
//   3. invocations are (row, channel) for dz, then (row, quad) for dC, and sum over what they are not;
//   4. h runs back over the tile; each h takes the place of the state after its row;
//   5. invocations are (row, channel) for du and ddelta, then (row, quad) for dB;
//   6. the first quad of each channel goes on with the sums of dD and ddelta_bias.
// So every sum has an order that the sizes fix, and nothing is atomic. What several workgroups add to (dB and dC of a group
// of more than one block, the parameters' sums of several segments) goes to `sums`, and `reduce_groups` and
// `reduce_parameters` add it up.
//
// A row of a channel costs 2 d_state exponentials and about 25 d_state operations for 8 values of memory and d_state / TILE
// of `saved`: bound by operations and, as in forward, by the latency of a step where the blocks are few.

@group(0) @binding(7) var<storage, read> saved: array<f32>; // [tokens / TILE + segments, channels·d_state]
@group(0) @binding(8) var<storage, read> dout: array<Value>; // [tokens, channels]
@group(0) @binding(9) var<storage, read> dstate_out: array<f32>; // [slots, channels·d_state]
@group(0) @binding(10) var<storage, read_write> du: array<Value>; // [tokens, channels]
@group(0) @binding(11) var<storage, read_write> ddelta: array<Value>; // [tokens, channels]
@group(0) @binding(12) var<storage, read_write> dprojected: array<Value>; // [tokens, columns]
@group(0) @binding(13) var<storage, read_write> dstate_in: array<f32>; // [slots, channels·d_state]
// One after the other: for each segment and channel d_state sums of dA, one of dD, one of ddelta_bias; where a group of B has
// several blocks, [tokens, blocks, d_state] parts of dB; the same of dC.
@group(0) @binding(14) var<storage, read_write> sums: array<f32>;

struct Parameters {
    segments: vec2<u32>,
    u: vec2<u32>,
    delta: vec2<u32>,
    a: vec2<u32>,
    projected: vec2<u32>,
    d: vec2<u32>,
    delta_bias: vec2<u32>,
    saved: vec2<u32>,
    dout: vec2<u32>,
    dstate_out: vec2<u32>,
    du: vec2<u32>,
    ddelta: vec2<u32>,
    dprojected: vec2<u32>,
    dstate_in: vec2<u32>,
    sums: vec2<u32>,
    tokens: u32,
    channels: u32,
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
    /// Where the parts of dB and of dC start in `sums`; 0 where they go to `dprojected` at once.
    b_parts: u32,
    c_parts: u32,
    /// What there is, 0 or 1.
    has_z: u32,
    has_d: u32,
    has_bias: u32,
    softplus: u32,
    has_dstate_out: u32,
    has_dstate_in: u32,
}
@group(1) @binding(0) var<uniform> p: Parameters;

var<workgroup> u_tile: array<f32, TILE * CHANNELS>;
var<workgroup> dy_tile: array<f32, TILE * CHANNELS>;
/// The states after each row; h of a row from the moment it is known.
var<workgroup> states: array<vec4<f32>, TILE * LANES>;
/// Σ h A e s_{t−1} over a quad; then ddelta at the first quad of a channel.
var<workgroup> moved: array<f32, TILE * LANES>;

/// Four values of dB or dC of a row: to their columns, or to the parts of a block.
fn store_group(four: vec4<f32>, row: u32, col: u32, m: u32, parts: u32, block: u32, blocks: u32) {
    for (var e = 0u; e < min(p.d_state - min(m, p.d_state), 4u); e++) {
        if parts == 0u {
            dprojected[at(p.dprojected, row, col + m + e)] = Value(four[e]);
        } else {
            sums[p.sums.x + parts + (row * blocks + block) * p.d_state + m + e] = four[e];
        }
    }
}

@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let owner = segment(p.segments, group.y, p.tokens);
    if owner.len == 0u {
        return;
    }
    let block = block_of(group.x);
    let first = block.first;
    let count = block.count;
    let slot = min(owner.slot, p.slots - 1u);

    let channel = lane / QUADS;
    let quad = lane % QUADS;
    let place = (first + channel) * p.d_state + quad * 4u;
    // States of the quad that there are.
    let own = select(0u, min(p.d_state - min(quad * 4u, p.d_state), 4u), channel < count);
    var decay = vec4<f32>();
    var h = vec4<f32>();
    for (var e = 0u; e < own; e++) {
        decay[e] = a[at(p.a, first + channel, quad * 4u + e)];
        if p.has_dstate_out != 0u {
            h[e] = dstate_out[at(p.dstate_out, slot, place + e)];
        }
    }
    var da = vec4<f32>();
    var dd = 0.0;
    var dbias = 0.0;

    let tiles = (owner.len + TILE - 1u) / TILE;
    for (var back = 0u; back < tiles; back++) {
        let tile = tiles - 1u - back;
        let rows = min(TILE, owner.len - tile * TILE);
        let row = owner.start + tile * TILE;
        workgroupBarrier();
        for (var i = lane; i < rows * CHANNELS; i += LANES) {
            let c = i % CHANNELS;
            var step = 0.0;
            var input = 0.0;
            var dy = 0.0;
            if c < count {
                step = step_of(row + i / CHANNELS, first + c);
                input = f32(u[at(p.u, row + i / CHANNELS, first + c)]);
                dy = f32(dout[at(p.dout, row + i / CHANNELS, first + c)]);
                if p.has_z != 0u {
                    dy *= silu(f32(projected[at(p.projected, row + i / CHANNELS, p.z_col + first + c)]));
                }
            }
            step_tile[i] = step;
            u_tile[i] = input;
            dy_tile[i] = dy;
        }
        load_groups(row, rows, block, lane);
        let source = min(owner.start / TILE + group.y + tile, p.saved_rows - 1u);
        var start = vec4<f32>();
        for (var e = 0u; e < own; e++) {
            start[e] = saved[at(p.saved, source, place + e)];
        }
        workgroupBarrier();

        var state = start;
        for (var t = 0u; t < rows; t++) {
            let step = step_tile[t * CHANNELS + channel];
            let input = step * u_tile[t * CHANNELS + channel];
            state = fma(exponentials(step * decay), state, input * b_tile[t * QUADS + quad]);
            states[t * LANES + lane] = state;
        }
        workgroupBarrier();

        if p.has_z != 0u {
            for (var i = lane; i < rows * CHANNELS; i += LANES) {
                let t = i / CHANNELS;
                let c = i % CHANNELS;
                if c < count {
                    var y = 0.0;
                    for (var q = 0u; q < QUADS; q++) {
                        y += dot(states[t * LANES + c * QUADS + q], c_tile[t * QUADS + q]);
                    }
                    if p.has_d != 0u {
                        y = fma(d[at(p.d, 0u, first + c)], u_tile[i], y);
                    }
                    let z = f32(projected[at(p.projected, row + t, p.z_col + first + c)]);
                    let dz = f32(dout[at(p.dout, row + t, first + c)]) * y * silu_derivative(z);
                    dprojected[at(p.dprojected, row + t, p.z_col + first + c)] = Value(dz);
                }
            }
        }
        for (var i = lane; i < rows * QUADS; i += LANES) {
            let t = i / QUADS;
            let q = i % QUADS;
            var four = vec4<f32>();
            for (var c = 0u; c < count; c++) {
                four = fma(vec4<f32>(dy_tile[t * CHANNELS + c]), states[t * LANES + c * QUADS + q], four);
            }
            store_group(four, row + t, block.c_col, q * 4u, p.c_parts, group.x, groups.x);
        }
        workgroupBarrier();

        for (var t = rows; t > 0u; t--) {
            let i = (t - 1u) * CHANNELS + channel;
            let step = step_tile[i];
            var before = start;
            if t > 1u {
                before = states[(t - 2u) * LANES + lane];
            }
            h = fma(vec4<f32>(dy_tile[i]), c_tile[(t - 1u) * QUADS + quad], h);
            let e = exponentials(step * decay);
            let kept = h * e * before;
            da = fma(vec4<f32>(step), kept, da);
            moved[(t - 1u) * LANES + lane] = dot(kept, decay);
            states[(t - 1u) * LANES + lane] = h;
            h *= e;
        }
        workgroupBarrier();

        for (var i = lane; i < rows * CHANNELS; i += LANES) {
            let t = i / CHANNELS;
            let c = i % CHANNELS;
            if c < count {
                var hb = 0.0;
                var through_decay = 0.0;
                for (var q = 0u; q < QUADS; q++) {
                    hb += dot(states[t * LANES + c * QUADS + q], b_tile[t * QUADS + q]);
                    through_decay += moved[t * LANES + c * QUADS + q];
                }
                var into_u = step_tile[i] * hb;
                if p.has_d != 0u {
                    into_u = fma(dy_tile[i], d[at(p.d, 0u, first + c)], into_u);
                }
                var into_delta = fma(u_tile[i], hb, through_decay);
                if p.softplus != 0u {
                    into_delta *= sigmoid(raw_step(row + t, first + c));
                }
                du[at(p.du, row + t, first + c)] = Value(into_u);
                ddelta[at(p.ddelta, row + t, first + c)] = Value(into_delta);
                moved[t * LANES + c * QUADS] = into_delta;
            }
        }
        for (var i = lane; i < rows * QUADS; i += LANES) {
            let t = i / QUADS;
            let q = i % QUADS;
            var four = vec4<f32>();
            for (var c = 0u; c < count; c++) {
                let input = step_tile[t * CHANNELS + c] * u_tile[t * CHANNELS + c];
                four = fma(vec4<f32>(input), states[t * LANES + c * QUADS + q], four);
            }
            store_group(four, row + t, block.b_col, q * 4u, p.b_parts, group.x, groups.x);
        }
        workgroupBarrier();

        if own > 0u && quad == 0u {
            for (var t = rows; t > 0u; t--) {
                let i = (t - 1u) * CHANNELS + channel;
                dd = fma(dy_tile[i], u_tile[i], dd);
                dbias += moved[(t - 1u) * LANES + lane];
            }
        }
    }

    let to = p.sums.x + (group.y * p.channels + first + channel) * (p.d_state + 2u);
    for (var e = 0u; e < own; e++) {
        sums[to + quad * 4u + e] = da[e];
        if p.has_dstate_in != 0u {
            dstate_in[at(p.dstate_in, slot, place + e)] = select(0.0, h[e], owner.past > 0u);
        }
    }
    if own > 0u && quad == 0u {
        sums[to + p.d_state] = dd;
        sums[to + p.d_state + 1u] = dbias;
    }
}

@group(0) @binding(1) var<storage, read> given: array<f32>; // `sums`

struct Parts {
    segments: vec2<u32>,
    given: vec2<u32>,
    da: vec2<u32>,
    dd: vec2<u32>,
    ddelta_bias: vec2<u32>,
    capacity: u32,
    tokens: u32,
    channels: u32,
    d_state: u32,
    has_dd: u32,
    has_bias: u32,
}
@group(1) @binding(0) var<uniform> s: Parts;
@group(0) @binding(2) var<storage, read_write> da: array<f32>; // [channels, d_state]
@group(0) @binding(3) var<storage, read_write> dd: array<f32>; // [1, channels]
@group(0) @binding(4) var<storage, read_write> ddelta_bias: array<f32>; // [1, channels]

// dA, dD and ddelta_bias: an invocation sums a value over the segments, first to last. dA replaces, the others add.
@compute @workgroup_size(64)
fn reduce_parameters(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = s.d_state + 2u;
    let channel = id.x / width;
    let m = id.x % width;
    if channel >= s.channels {
        return;
    }
    var sum = 0.0;
    for (var i = 0u; i < s.capacity; i++) {
        if segment(s.segments, i, s.tokens).len > 0u {
            sum += given[s.given.x + i * s.channels * width + id.x];
        }
    }
    if m < s.d_state {
        da[at(s.da, channel, m)] = sum;
    } else if m == s.d_state {
        if s.has_dd != 0u {
            dd[at(s.dd, 0u, channel)] += sum;
        }
    } else if s.has_bias != 0u {
        ddelta_bias[at(s.ddelta_bias, 0u, channel)] += sum;
    }
}

struct Groups {
    given: vec2<u32>,
    dgroups: vec2<u32>,
    tokens: u32,
    d_state: u32,
    groups: u32,
    /// Where the parts start.
    parts: u32,
    /// Blocks in all, and those of a group.
    blocks: u32,
    group_blocks: u32,
}
@group(1) @binding(0) var<uniform> g: Groups;
@group(0) @binding(0) var<storage, read> group_parts: array<f32>; // `sums`
@group(0) @binding(1) var<storage, read_write> dgroups: array<Value>; // [tokens, groups·d_state]: columns of dprojected

// dB or dC: an invocation sums a value over the blocks of a group, first to last.
@compute @workgroup_size(64)
fn reduce_groups(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>) {
    let col = id.x;
    if col >= g.groups * g.d_state {
        return;
    }
    for (var row = id.y; row < g.tokens; row += grid.y) {
        var sum = 0.0;
        for (var i = 0u; i < g.group_blocks; i++) {
            let block = col / g.d_state * g.group_blocks + i;
            sum += group_parts[g.given.x + g.parts + (row * g.blocks + block) * g.d_state + col % g.d_state];
        }
        dgroups[at(g.dgroups, row, col)] = Value(sum);
    }
}
