// out[rows[i]] += src[i]; no row comes twice.
//
// A matrix that is larger than a binding comes in parts of `count` rows from row `first` on; each row of src is added by the
// part that holds its destination, and one past the end of out goes nowhere. A workgroup takes 64 columns at a time of one
// row of src, and goes on by the size of the grid.

struct Parameters {
    src: vec2<u32>,
    rows: vec2<u32>,
    out: vec2<u32>,
    n: u32,
    width: u32,
    first: u32,
    count: u32,
}

@group(0) @binding(0) var<storage, read> src: array<Value>; // [n, width]
@group(0) @binding(1) var<storage, read> rows: array<u32>; // [1, n]
@group(0) @binding(2) var<storage, read_write> out: array<Value>; // [count, width]: the part
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn scatter_add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.n; row += groups.y) {
        // Below `first` this wraps to a number past every count.
        let to_row = rows[p.rows.x + row] - p.first;
        if to_row < p.count {
            for (var col = id.x; col < p.width; col += 64u * groups.x) {
                let to = at(p.out, to_row, col);
                out[to] = Value(f32(out[to]) + f32(src[at(p.src, row, col)]));
            }
        }
    }
}
