// out = silu(gate) ⊙ up, and its gradients dgate = dout ⊙ up ⊙ silu'(gate), dup = dout ⊙ silu(gate).
// Source: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
//
// A workgroup takes 64 columns at a time of one row, and goes on by the size of the grid.

struct Forward {
    gate: vec2<u32>,
    up: vec2<u32>,
    out: vec2<u32>,
    tokens: u32,
    width: u32,
}

struct Backward {
    gate: vec2<u32>,
    up: vec2<u32>,
    dout: vec2<u32>,
    dgate: vec2<u32>,
    dup: vec2<u32>,
    tokens: u32,
    width: u32,
}

@group(0) @binding(0) var<storage, read> gate: array<Value>; // [tokens, width]
@group(0) @binding(1) var<storage, read> up: array<Value>; // [tokens, width]
@group(0) @binding(2) var<storage, read_write> out: array<Value>; // [tokens, width]
@group(1) @binding(0) var<uniform> p: Forward;

@group(0) @binding(2) var<storage, read> dout: array<Value>; // [tokens, width]
@group(0) @binding(3) var<storage, read_write> dgate: array<Value>; // [tokens, width]
@group(0) @binding(4) var<storage, read_write> dup: array<Value>; // [tokens, width]
@group(1) @binding(0) var<uniform> b: Backward;

@compute @workgroup_size(64)
fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.tokens; row += groups.y) {
        for (var col = id.x; col < p.width; col += 64u * groups.x) {
            let g = f32(gate[at(p.gate, row, col)]);
            out[at(p.out, row, col)] = Value(silu(g) * f32(up[at(p.up, row, col)]));
        }
    }
}

@compute @workgroup_size(64)
fn backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < b.tokens; row += groups.y) {
        for (var col = id.x; col < b.width; col += 64u * groups.x) {
            let g = f32(gate[at(b.gate, row, col)]);
            let d = f32(dout[at(b.dout, row, col)]);
            dup[at(b.dup, row, col)] = Value(d * silu(g));
            dgate[at(b.dgate, row, col)] = Value(d * f32(up[at(b.up, row, col)]) * silu_derivative(g));
        }
    }
}
