// out[i] = src[rows[i]]: rows of activations, and the embedding of token ids.
//
// A table that is larger than a binding comes in parts of `count` rows from row `first` on; each row of out is written
// by the part that holds its source. A row past the table's end is its last. A workgroup takes 64 columns at a time of
// one row, and goes on by the size of the grid.

struct Parameters {
    src: vec2<u32>,
    rows: vec2<u32>,
    out: vec2<u32>,
    first: u32,
    count: u32,
    total: u32,
    n: u32,
    width: u32,
}

@group(0) @binding(0) var<storage, read> src: array<Stored>; // [count, width]: the part
@group(0) @binding(1) var<storage, read> rows: array<u32>; // [1, n]
@group(0) @binding(2) var<storage, read_write> out: array<Value>; // [n, width]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn gather(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.n; row += groups.y) {
        // Below `first` this wraps to a number past every count.
        let from_row = min(rows[p.rows.x + row], p.total - 1u) - p.first;
        if from_row < p.count {
            for (var col = id.x; col < p.width; col += 64u * groups.x) {
                out[at(p.out, row, col)] = Value(src[at(p.src, from_row, col)]);
            }
        }
    }
}
