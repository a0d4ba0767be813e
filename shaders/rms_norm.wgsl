// out = weight ⊙ x / sqrt(mean(x²) + eps), and its gradients: with n = x·inv_rms and g = dout ⊙ weight,
// dx = inv_rms (g − n mean(g ⊙ n)), dweight += Σ_t dout[t] ⊙ n[t]. Source: Zhang and Sennrich, arXiv:1910.07467.
//
// `forward`, `backward`: a workgroup of 128 takes a row; its lanes sum every 128th column, and a tree sums the lanes.
// `dweight`: a workgroup takes 64 columns of a run of 128 rows, in their order; one run adds to dweight, several leave
// their sums to `column_sums.wgsl`.

override ADD: bool = false;
override KEEP: bool = false;

const LANES: u32 = 128u;
const RUN: u32 = 128u;

struct Forward {
    x: vec2<u32>,
    weight: vec2<u32>,
    out: vec2<u32>,
    inv_rms: vec2<u32>,
    tokens: u32,
    hidden: u32,
    eps: f32,
}

struct Backward {
    x: vec2<u32>,
    weight: vec2<u32>,
    inv_rms: vec2<u32>,
    dout: vec2<u32>,
    dx: vec2<u32>,
    tokens: u32,
    hidden: u32,
}

struct WeightGradient {
    x: vec2<u32>,
    inv_rms: vec2<u32>,
    dout: vec2<u32>,
    sums: vec2<u32>,
    tokens: u32,
    hidden: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Value>; // [tokens, hidden]
@group(0) @binding(1) var<storage, read> weight: array<Weight>; // [1, hidden]
@group(0) @binding(2) var<storage, read_write> out: array<Value>; // [tokens, hidden]
@group(0) @binding(3) var<storage, read_write> inv_rms_out: array<f32>; // [1, tokens]
@group(1) @binding(0) var<uniform> p: Forward;

@group(0) @binding(2) var<storage, read> inv_rms: array<f32>; // [1, tokens]
@group(0) @binding(3) var<storage, read> dout: array<Value>; // [tokens, hidden]
@group(0) @binding(4) var<storage, read_write> dx: array<Value>; // [tokens, hidden]
@group(1) @binding(0) var<uniform> b: Backward;

@group(0) @binding(1) var<storage, read> inv_rms_of_rows: array<f32>; // [1, tokens]
@group(0) @binding(2) var<storage, read> dout_of_rows: array<Value>; // [tokens, hidden]
@group(0) @binding(3) var<storage, read_write> sums: array<f32>; // [runs, hidden], or dweight
@group(1) @binding(0) var<uniform> w: WeightGradient;

var<workgroup> partial: array<f32, LANES>;

/// The sum of all lanes' values, for each of them.
fn sum_of_lanes(value: f32, lane: u32) -> f32 {
    partial[lane] = value;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane < width {
            partial[lane] += partial[lane + width];
        }
        workgroupBarrier();
    }
    let sum = partial[0];
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(LANES)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < p.tokens; row += groups.x) {
        var squares = 0.0;
        for (var col = lane; col < p.hidden; col += LANES) {
            let value = f32(x[at(p.x, row, col)]);
            squares = fma(value, value, squares);
        }
        let inverse = 1.0 / sqrt(sum_of_lanes(squares, lane) / f32(p.hidden) + p.eps);
        for (var col = lane; col < p.hidden; col += LANES) {
            let normed = f32(x[at(p.x, row, col)]) * inverse;
            out[at(p.out, row, col)] = Value(normed * f32(weight[p.weight.x + col]));
        }
        if KEEP && lane == 0u {
            inv_rms_out[p.inv_rms.x + row] = inverse;
        }
    }
}

@compute @workgroup_size(LANES)
fn backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < b.tokens; row += groups.x) {
        let inverse = inv_rms[b.inv_rms.x + row];
        var products = 0.0;
        for (var col = lane; col < b.hidden; col += LANES) {
            let g = f32(dout[at(b.dout, row, col)]) * f32(weight[b.weight.x + col]);
            products = fma(g, f32(x[at(b.x, row, col)]) * inverse, products);
        }
        let mean = sum_of_lanes(products, lane) / f32(b.hidden);
        for (var col = lane; col < b.hidden; col += LANES) {
            let g = f32(dout[at(b.dout, row, col)]) * f32(weight[b.weight.x + col]);
            let n = f32(x[at(b.x, row, col)]) * inverse;
            let gradient = inverse * (g - n * mean);
            let to = at(b.dx, row, col);
            if ADD {
                dx[to] = Value(f32(dx[to]) + gradient);
            } else {
                dx[to] = Value(gradient);
            }
        }
    }
}

@compute @workgroup_size(64)
fn dweight(@builtin(global_invocation_id) id: vec3<u32>, @builtin(workgroup_id) group: vec3<u32>) {
    let col = id.x;
    if col >= w.hidden {
        return;
    }
    var sum = 0.0;
    for (var row = group.y * RUN; row < min(w.tokens, (group.y + 1u) * RUN); row++) {
        let n = f32(x[at(w.x, row, col)]) * inv_rms_of_rows[w.inv_rms.x + row];
        sum = fma(f32(dout_of_rows[at(w.dout, row, col)]), n, sum);
    }
    let to = at(w.sums, group.y, col);
    if ADD {
        sums[to] += sum;
    } else {
        sums[to] = sum;
    }
}
