// x = factor·x, in place.
//
// A workgroup takes 64 columns at a time of one row, and goes on by the size of the grid.

struct Parameters {
    x: vec2<u32>,
    rows: u32,
    cols: u32,
    factor: f32,
}

@group(0) @binding(0) var<storage, read_write> x: array<Value>; // [rows, cols]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn scale(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.rows; row += groups.y) {
        for (var col = id.x; col < p.cols; col += 64u * groups.x) {
            let i = at(p.x, row, col);
            x[i] = Value(p.factor * f32(x[i]));
        }
    }
}
