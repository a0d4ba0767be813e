// a = −exp(a_log), and its gradient da_log += da ⊙ a.
//
// A workgroup takes 64 columns at a time of one row, and goes on by the size of the grid.

struct Forward {
    a_log: vec2<u32>,
    a: vec2<u32>,
    channels: u32,
    d_state: u32,
}

struct Backward {
    a: vec2<u32>,
    da: vec2<u32>,
    da_log: vec2<u32>,
    channels: u32,
    d_state: u32,
}

@group(0) @binding(0) var<storage, read> a_log: array<Weight>; // [channels, d_state]
@group(0) @binding(1) var<storage, read_write> a: array<f32>; // [channels, d_state]
@group(1) @binding(0) var<uniform> p: Forward;

@group(0) @binding(0) var<storage, read> of_forward: array<f32>; // [channels, d_state]: a
@group(0) @binding(1) var<storage, read> da: array<f32>; // [channels, d_state]
@group(0) @binding(2) var<storage, read_write> da_log: array<f32>; // [channels, d_state]
@group(1) @binding(0) var<uniform> b: Backward;

@compute @workgroup_size(64)
fn forward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.channels; row += groups.y) {
        for (var col = id.x; col < p.d_state; col += 64u * groups.x) {
            a[at(p.a, row, col)] = -exponential(f32(a_log[at(p.a_log, row, col)]));
        }
    }
}

@compute @workgroup_size(64)
fn backward(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < b.channels; row += groups.y) {
        for (var col = id.x; col < b.d_state; col += 64u * groups.x) {
            da_log[at(b.da_log, row, col)] += da[at(b.da, row, col)] * of_forward[at(b.a, row, col)];
        }
    }
}
