// out = src, or out += src, from one storage type to another.
//
// A workgroup takes 64 columns at a time of one row, and goes on by the size of the grid.

override ADD: bool = false;

struct Parameters {
    src: vec2<u32>,
    out: vec2<u32>,
    rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<storage, read> src: array<AnyFrom>; // [rows, cols]
@group(0) @binding(1) var<storage, read_write> out: array<AnyTo>; // [rows, cols]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn copy(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.rows; row += groups.y) {
        for (var col = id.x; col < p.cols; col += 64u * groups.x) {
            let value = src[at(p.src, row, col)];
            let to = at(p.out, row, col);
            if ADD {
                out[to] = AnyTo(f32(out[to]) + f32(value));
            } else {
                out[to] = AnyTo(value);
            }
        }
    }
}
