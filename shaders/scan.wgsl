// What the shaders of the selective scan begin with, after the segments: what both read, the blocks of channels that
// workgroups take, and the tiles of dt, B and C in workgroup memory.

@group(0) @binding(0) var<storage, read> segments: array<u32>; // [capacity, 5]
@group(0) @binding(1) var<storage, read> u: array<Value>; // [tokens, channels]
@group(0) @binding(2) var<storage, read> delta: array<Value>; // [tokens, channels]
@group(0) @binding(3) var<storage, read> a: array<f32>; // [channels, d_state]
@group(0) @binding(4) var<storage, read> projected: array<Value>; // [tokens, columns]: B, C and z at columns of it
@group(0) @binding(5) var<storage, read> d: array<f32>; // [1, channels]
@group(0) @binding(6) var<storage, read> delta_bias: array<f32>; // [1, channels]

/// Vectors of four states of a channel, a power of two; what d_state lacks is 0.
override QUADS: u32 = 4;
/// Channels of a block.
override CHANNELS: u32 = 16; // LANES / QUADS

const LANES = 64u;
const TILE = 16u;

var<workgroup> step_tile: array<f32, TILE * CHANNELS>; // dt
var<workgroup> b_tile: array<vec4<f32>, TILE * QUADS>;
var<workgroup> c_tile: array<vec4<f32>, TILE * QUADS>;

/// Channels that a workgroup takes: neighbours that share a group of B and one of C.
struct Block {
    first: u32,
    count: u32,
    /// The columns of `projected` where its B and its C start.
    b_col: u32,
    c_col: u32,
}

fn block_of(index: u32) -> Block {
    let blocks = (p.run + CHANNELS - 1u) / CHANNELS;
    let inside = index % blocks * CHANNELS;
    let first = index / blocks * p.run + inside;
    let count = min(CHANNELS, p.run - inside);
    return Block(first, count, p.b_col + first / p.per_b * p.d_state, p.c_col + first / p.per_c * p.d_state);
}

/// What dt is a softplus of.
fn raw_step(row: u32, channel: u32) -> f32 {
    var step = f32(delta[at(p.delta, row, channel)]);
    if p.has_bias != 0u {
        step += delta_bias[at(p.delta_bias, 0u, channel)];
    }
    return step;
}

/// dt of a row and channel.
fn step_of(row: u32, channel: u32) -> f32 {
    let step = raw_step(row, channel);
    return select(step, softplus(step), p.softplus != 0u);
}

/// B and C of `rows` rows into workgroup memory.
fn load_groups(row: u32, rows: u32, block: Block, lane: u32) {
    for (var i = lane; i < rows * 4u * QUADS; i += LANES) {
        let m = i % (4u * QUADS);
        var of_b = 0.0;
        var of_c = 0.0;
        if m < p.d_state {
            of_b = f32(projected[at(p.projected, row + i / (4u * QUADS), block.b_col + m)]);
            of_c = f32(projected[at(p.projected, row + i / (4u * QUADS), block.c_col + m)]);
        }
        b_tile[i / 4u][i % 4u] = of_b;
        c_tile[i / 4u][i % 4u] = of_c;
    }
}
