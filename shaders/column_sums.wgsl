// out[c] += Σ_r weights[r]·values[r, c], rows in order; rows of weight 0 are passed over, whatever they hold.
//
// A workgroup takes 64 columns of a run of 128 rows. One run adds to out; several leave their sums in scratch, which the
// host gives in again as values without weights, until one run is left.

override ADD: bool = false;
override WEIGHTED: bool = false;

const RUN: u32 = 128u;

struct Parameters {
    values: vec2<u32>,
    weights: vec2<u32>,
    out: vec2<u32>,
    rows: u32,
    cols: u32,
}

@group(0) @binding(0) var<storage, read> values: array<Value>; // [rows, cols]
@group(0) @binding(1) var<storage, read> weights: array<f32>; // [1, rows]
@group(0) @binding(2) var<storage, read_write> out: array<f32>; // [runs, cols]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn column_sums(@builtin(global_invocation_id) id: vec3<u32>, @builtin(workgroup_id) group: vec3<u32>) {
    let col = id.x;
    if col >= p.cols {
        return;
    }
    var sum = 0.0;
    for (var row = group.y * RUN; row < min(p.rows, (group.y + 1u) * RUN); row++) {
        if WEIGHTED {
            let weight = weights[p.weights.x + row];
            if weight != 0.0 {
                sum = fma(weight, f32(values[at(p.values, row, col)]), sum);
            }
        } else {
            sum += f32(values[at(p.values, row, col)]);
        }
    }
    let to = at(p.out, group.y, col);
    if ADD {
        out[to] += sum;
    } else {
        out[to] = sum;
    }
}
