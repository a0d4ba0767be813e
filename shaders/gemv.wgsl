// out = x·weightᵀ (+ bias), or added to what is there, for a few rows of x: bound by reading the weight.
//
// A workgroup of 128 takes eight outputs of one row, 16 lanes each. A lane sums every 16th value of k, and a tree sums the
// 16 lanes.

override ADD: bool = false;
override BIAS: bool = false;

const OUTPUTS: u32 = 8u;
const LANES: u32 = 16u;

struct Parameters {
    x: vec2<u32>,
    weight: vec2<u32>,
    bias: vec2<u32>,
    out: vec2<u32>,
    n: u32,
    k: u32,
}

@group(0) @binding(0) var<storage, read> x: array<Left>; // [rows, k]
@group(0) @binding(1) var<storage, read> weight: array<Right>; // [n, k]
@group(0) @binding(2) var<storage, read> bias: array<Bias>; // [1, n]
@group(0) @binding(3) var<storage, read_write> out: array<Out>; // [rows, n]
@group(1) @binding(0) var<uniform> p: Parameters;

var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn gemv(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let col = group.x * OUTPUTS + lane / LANES;
    var sum = 0.0;
    if col < p.n {
        for (var k = lane % LANES; k < p.k; k += LANES) {
            sum = fma(f32(x[at(p.x, row, k)]), f32(weight[at(p.weight, col, k)]), sum);
        }
    }
    sums[lane] = sum;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane % LANES < width {
            sums[lane] += sums[lane + width];
        }
        workgroupBarrier();
    }
    if lane % LANES == 0u && col < p.n {
        var all = sums[lane];
        if BIAS {
            all += f32(bias[p.bias.x + col]);
        }
        let to = at(p.out, row, col);
        if ADD {
            all += f32(out[to]);
        }
        out[to] = Out(all);
    }
}
