// Causal depthwise convolution over time with a repeat of heads and silu, over segments, forward and backward:
// out_t[c] = silu(a_t[c]), a_t[c] = bias[f] + Σ_k weight[f, k] x_{t − width + 1 + k}[i], where output channel c reads input
// channel i = (c / (head·repeat))·head + c % head through filter f = c (repeat first) or f = i. Inputs before a segment come
// from its state, the last `width` inputs, or are 0.
// Source: jxiw/M1 `mamba/hybrid_mamba_layer.py`; the convolution itself: Dao-AILab/causal-conv1d.
//
// A workgroup takes 64 input channels of a chunk of rows of one segment: an invocation goes through the rows of its channel
// once a repeat, with the last `width` inputs and a filter in registers. A chunk has at least `width` rows, so only the
// invocation of a segment's first chunk reads its state, and it writes the state after the segment too: both may be one.
//
// Forward moves (1 + 2 repeat) values of memory, most of the reads out of a cache, for 2 width + 6 operations an output: bound
// by bytes. Backward does twice the work.

@group(0) @binding(0) var<storage, read> segments: array<u32>; // [capacity, 5]
@group(0) @binding(1) var<storage, read> x: array<Value>; // [tokens, channels]: columns of the input projection
@group(0) @binding(2) var<storage, read> weight: array<Weight>; // [filters, width]
@group(0) @binding(3) var<storage, read> bias: array<Weight>; // [1, filters]
@group(0) @binding(4) var<storage, read> state_in: array<f32>; // [slots, channels·width], oldest first

// Forward.
@group(0) @binding(5) var<storage, read_write> state_out: array<f32>; // [slots, channels·width]
@group(0) @binding(6) var<storage, read_write> out: array<Value>; // [tokens, channels·repeat]

// Backward. A row of `partials` is a chunk: the sums of its rows for each filter's taps and bias.
@group(0) @binding(5) var<storage, read> dout: array<Value>; // [tokens, channels·repeat]
@group(0) @binding(6) var<storage, read> dstate_out: array<f32>; // [slots, channels·width]
@group(0) @binding(7) var<storage, read_write> dx: array<Value>; // [tokens, channels]
@group(0) @binding(8) var<storage, read_write> dstate_in: array<f32>; // [slots, channels·width]
@group(0) @binding(9) var<storage, read_write> partials: array<f32>; // [chunks, filters·(width + 1)]

// The sums of all chunks.
@group(0) @binding(1) var<storage, read> chunk_sums: array<f32>; // [chunks, filters·(width + 1)]
@group(0) @binding(2) var<storage, read_write> dweight: array<f32>; // [filters, width]
@group(0) @binding(3) var<storage, read_write> dbias: array<f32>; // [1, filters]

struct Forward {
    segments: vec2<u32>,
    x: vec2<u32>,
    weight: vec2<u32>,
    bias: vec2<u32>,
    state_in: vec2<u32>,
    state_out: vec2<u32>,
    out: vec2<u32>,
    capacity: u32,
    tokens: u32,
    channels: u32,
    head: u32,
    repeat: u32,
    slots: u32,
    /// What there is, 0 or 1.
    repeat_first: u32,
    has_bias: u32,
    has_state_in: u32,
    has_state_out: u32,
    /// The state before is what lies at `state_out`.
    in_place: u32,
}

struct Backward {
    segments: vec2<u32>,
    x: vec2<u32>,
    weight: vec2<u32>,
    bias: vec2<u32>,
    state_in: vec2<u32>,
    dout: vec2<u32>,
    dstate_out: vec2<u32>,
    dx: vec2<u32>,
    dstate_in: vec2<u32>,
    partials: vec2<u32>,
    capacity: u32,
    tokens: u32,
    channels: u32,
    head: u32,
    repeat: u32,
    slots: u32,
    /// What there is, 0 or 1.
    repeat_first: u32,
    has_bias: u32,
    has_state_in: u32,
    has_dstate_out: u32,
    has_dstate_in: u32,
}

struct Sum {
    segments: vec2<u32>,
    chunk_sums: vec2<u32>,
    dweight: vec2<u32>,
    dbias: vec2<u32>,
    capacity: u32,
    tokens: u32,
    filters: u32,
    /// What is wanted, 0 or 1.
    has_dweight: u32,
    has_dbias: u32,
}

@group(1) @binding(0) var<uniform> p: Forward;
@group(1) @binding(0) var<uniform> b: Backward;
@group(1) @binding(0) var<uniform> s: Sum;

/// Taps, at most 16 and at most CHUNK.
override WIDTH: u32 = 4;
/// Rows of a chunk.
override CHUNK: u32 = 32;
const MOST_WIDTH = 16u;

/// The output channel of repeat r of an input channel.
fn output_channel(channel: u32, head: u32, repeat: u32, r: u32) -> u32 {
    return (channel / head * repeat + r) * head + channel % head;
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(global_invocation_id) id: vec3<u32>) {
    let part = chunk(p.segments, p.capacity, p.tokens, CHUNK, group.y);
    let channel = id.x;
    if part.index == p.capacity || channel >= p.channels {
        return;
    }
    let start = part.owner.start + part.first;
    let slot = min(part.owner.slot, p.slots - 1u);
    // The inputs before the chunk: the last WIDTH, oldest first.
    var before: array<f32, MOST_WIDTH>;
    for (var k = 0u; k < WIDTH; k++) {
        before[k] = 0.0;
        if part.first > 0u {
            before[k] = f32(x[at(p.x, start - WIDTH + k, channel)]);
        } else if p.has_state_in != 0u && part.owner.past > 0u {
            if p.in_place != 0u {
                before[k] = state_out[at(p.state_out, slot, channel * WIDTH + k)];
            } else {
                before[k] = state_in[at(p.state_in, slot, channel * WIDTH + k)];
            }
        }
    }
    for (var r = 0u; r < p.repeat; r++) {
        let to = output_channel(channel, p.head, p.repeat, r);
        let filter_row = select(channel, to, p.repeat_first != 0u);
        var taps: array<f32, MOST_WIDTH>;
        var inputs: array<f32, MOST_WIDTH>;
        for (var k = 0u; k < WIDTH; k++) {
            taps[k] = f32(weight[at(p.weight, filter_row, k)]);
            inputs[k] = before[k];
        }
        var offset = 0.0;
        if p.has_bias != 0u {
            offset = f32(bias[at(p.bias, 0u, filter_row)]);
        }
        for (var t = 0u; t < part.count; t++) {
            var a = offset;
            for (var k = 0u; k + 1u < WIDTH; k++) {
                inputs[k] = inputs[k + 1u];
                a = fma(taps[k], inputs[k], a);
            }
            inputs[WIDTH - 1u] = f32(x[at(p.x, start + t, channel)]);
            a = fma(taps[WIDTH - 1u], inputs[WIDTH - 1u], a);
            out[at(p.out, start + t, to)] = Value(silu(a));
        }
    }
    if p.has_state_out != 0u && part.first == 0u {
        for (var k = 0u; k < WIDTH; k++) {
            // The last WIDTH of the inputs before and the segment's own.
            let place = part.owner.len + k;
            var value = 0.0;
            if place >= WIDTH {
                value = f32(x[at(p.x, part.owner.start + place - WIDTH, channel)]);
            } else {
                value = before[place];
            }
            state_out[at(p.state_out, slot, channel * WIDTH + k)] = value;
        }
    }
}

/// The gradients of the chunk's inputs, a column an invocation: those of the WIDTH inputs before it come first.
var<workgroup> dinputs: array<f32, (CHUNK + WIDTH) * 64u>;

// dx_t = Σ_k weight[f, k] da_{t + width − 1 − k} with da = dout·silu'(a), summed over the repeats: rows after the chunk, as far
// as its inputs reach, are computed again.
@compute @workgroup_size(64)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let part = chunk(b.segments, b.capacity, b.tokens, CHUNK, group.y);
    let channel = id.x;
    if part.index == b.capacity || channel >= b.channels {
        return;
    }
    let start = part.owner.start + part.first;
    let slot = min(part.owner.slot, b.slots - 1u);
    let rest = part.owner.len - part.first;
    for (var i = 0u; i < CHUNK + WIDTH; i++) {
        dinputs[i * 64u + lane] = 0.0;
    }
    var sums: array<f32, MOST_WIDTH>;
    var bias_sum = 0.0;
    for (var k = 0u; k < WIDTH; k++) {
        sums[k] = 0.0;
    }
    for (var r = 0u; r < b.repeat; r++) {
        let to = output_channel(channel, b.head, b.repeat, r);
        let filter_row = select(channel, to, b.repeat_first != 0u);
        var taps: array<f32, MOST_WIDTH>;
        var inputs: array<f32, MOST_WIDTH>;
        for (var k = 0u; k < WIDTH; k++) {
            taps[k] = f32(weight[at(b.weight, filter_row, k)]);
            inputs[k] = 0.0;
            if part.first > 0u {
                inputs[k] = f32(x[at(b.x, start - WIDTH + k, channel)]);
            } else if b.has_state_in != 0u && part.owner.past > 0u {
                inputs[k] = state_in[at(b.state_in, slot, channel * WIDTH + k)];
            }
        }
        var offset = 0.0;
        if b.has_bias != 0u {
            offset = f32(bias[at(b.bias, 0u, filter_row)]);
        }
        for (var t = 0u; t < min(part.count + WIDTH - 1u, rest); t++) {
            var a = offset;
            for (var k = 0u; k + 1u < WIDTH; k++) {
                inputs[k] = inputs[k + 1u];
                a = fma(taps[k], inputs[k], a);
            }
            inputs[WIDTH - 1u] = f32(x[at(b.x, start + t, channel)]);
            a = fma(taps[WIDTH - 1u], inputs[WIDTH - 1u], a);
            let da = f32(dout[at(b.dout, start + t, to)]) * silu_derivative(a);
            for (var k = 0u; k < WIDTH; k++) {
                if t + k + 1u < CHUNK + WIDTH {
                    let place = (t + k + 1u) * 64u + lane;
                    dinputs[place] = fma(taps[k], da, dinputs[place]);
                }
                if t < part.count {
                    sums[k] = fma(inputs[k], da, sums[k]);
                }
            }
            bias_sum += select(0.0, da, t < part.count);
        }
        if b.repeat_first != 0u || r + 1u == b.repeat {
            for (var k = 0u; k < WIDTH; k++) {
                partials[at(b.partials, group.y, filter_row * (WIDTH + 1u) + k)] = sums[k];
                sums[k] = 0.0;
            }
            partials[at(b.partials, group.y, filter_row * (WIDTH + 1u) + WIDTH)] = bias_sum;
            bias_sum = 0.0;
        }
    }
    for (var t = 0u; t < part.count; t++) {
        var d = dinputs[(WIDTH + t) * 64u + lane];
        let from_end = rest - t;
        if b.has_dstate_out != 0u && from_end <= WIDTH {
            d += dstate_out[at(b.dstate_out, slot, channel * WIDTH + WIDTH - from_end)];
        }
        dx[at(b.dx, start + t, channel)] = Value(d);
    }
    if b.has_dstate_in != 0u && part.first == 0u {
        for (var k = 0u; k < WIDTH; k++) {
            var d = 0.0;
            if part.owner.past > 0u {
                d = dinputs[k * 64u + lane];
                if b.has_dstate_out != 0u && k >= part.owner.len {
                    d += dstate_out[at(b.dstate_out, slot, channel * WIDTH + k - part.owner.len)];
                }
            }
            dstate_in[at(b.dstate_in, slot, channel * WIDTH + k)] = d;
        }
    }
}

// The gradients of the parameters, which add: an invocation sums a value over the chunks, first to last.
@compute @workgroup_size(64)
fn reduce(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.x / (WIDTH + 1u);
    let k = id.x % (WIDTH + 1u);
    if row >= s.filters {
        return;
    }
    var chunks = 0u;
    for (var i = 0u; i < s.capacity; i++) {
        chunks += (segment(s.segments, i, s.tokens).len + CHUNK - 1u) / CHUNK;
    }
    var sum = 0.0;
    for (var i = 0u; i < chunks; i++) {
        sum += chunk_sums[at(s.chunk_sums, i, id.x)];
    }
    if s.has_dweight != 0u && k < WIDTH {
        dweight[at(s.dweight, row, k)] += sum;
    }
    if s.has_dbias != 0u && k == WIDTH {
        dbias[at(s.dbias, 0u, row)] += sum;
    }
}
