// out[0] += Σ x².
//
// `partial`: lanes of 256 take every value of the grid's stride in turn, a tree sums the lanes, and each workgroup leaves
// one sum. `total`: one workgroup adds up the sums and adds to out. The grid follows from the number of values alone.

const LANES: u32 = 256u;

struct Partial {
    x: vec2<u32>,
    sums: vec2<u32>,
    n: u32,
}

struct Total {
    sums: vec2<u32>,
    out: vec2<u32>,
    n: u32,
}

@group(0) @binding(0) var<storage, read> x: array<f32>; // [1, n]
@group(0) @binding(1) var<storage, read_write> sums: array<f32>; // [1, workgroups]
@group(1) @binding(0) var<uniform> p: Partial;

@group(0) @binding(0) var<storage, read> of_groups: array<f32>; // [1, n]
@group(0) @binding(1) var<storage, read_write> out: array<f32>; // [1, 1]
@group(1) @binding(0) var<uniform> t: Total;

var<workgroup> of_lanes: array<f32, LANES>;

/// The sum of all lanes' values, for lane 0.
fn sum_of_lanes(value: f32, lane: u32) -> f32 {
    of_lanes[lane] = value;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane < width {
            of_lanes[lane] += of_lanes[lane + width];
        }
        workgroupBarrier();
    }
    return of_lanes[0];
}

@compute @workgroup_size(LANES)
fn partial(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    var sum = 0.0;
    for (var i = group.x * LANES + lane; i < p.n; i += groups.x * LANES) {
        let value = x[p.x.x + i];
        sum = fma(value, value, sum);
    }
    let all = sum_of_lanes(sum, lane);
    if lane == 0u {
        sums[p.sums.x + group.x] = all;
    }
}

@compute @workgroup_size(LANES)
fn total(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var i = lane; i < t.n; i += LANES) {
        sum += of_groups[t.sums.x + i];
    }
    let all = sum_of_lanes(sum, lane);
    if lane == 0u {
        out[t.out.x] += all;
    }
}
