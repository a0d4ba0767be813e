// The products of a linear layer (product.wgsl) from registers.
//
// A workgroup takes a tile of TILE × TILE values of C, an invocation 8 × 8 of them: four rows and four columns, and again
// half a tile further on. Runs of 16 values of k come into workgroup memory, k by k, so that a step of an invocation is
// four vector loads and 64 multiplications. Each value of C is one chain of fused multiply-adds over k, in order.
//
// Bytes and flops: a tile of 128 reads 2·128·16·4 bytes for 2·128²·16 flops, 32 flops a byte of global memory, and 4 vector
// loads of workgroup memory for 128 flops: bound by arithmetic where there are workgroups enough to hide the latency of the
// loads, two for each multiprocessor. With fewer it is bound by latency, and k is split.

override TILE: u32 = 64;
override INVOCATIONS: u32 = 64; // (TILE / 8)²

const RUN: u32 = 16u;
/// Vectors from one k to the next: a tile of 128, and one more against bank conflicts.
const PITCH: u32 = 33u;

@group(0) @binding(0) var<storage, read> a: array<Left>; // [m, k], or [k, m]
@group(0) @binding(1) var<storage, read> b: array<Right>; // [k, n], or [n, k]

var<workgroup> a_run: array<vec4<f32>, RUN * PITCH>; // [k][rows of the tile]
var<workgroup> b_run: array<vec4<f32>, RUN * PITCH>; // [k][columns of the tile]

fn a_at(row: u32, k: u32) -> f32 {
    if row >= p.m || k >= p.k {
        return 0.0;
    }
    if A_TRANSPOSED {
        return f32(a[at(p.a, k, row)]);
    }
    return f32(a[at(p.a, row, k)]);
}

fn b_at(k: u32, col: u32) -> f32 {
    if col >= p.n || k >= p.k {
        return 0.0;
    }
    if B_TRANSPOSED {
        return f32(b[at(p.b, col, k)]);
    }
    return f32(b[at(p.b, k, col)]);
}

fn store_row(split: u32, row: u32, col: u32, near: vec4<f32>, far: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        store(split, row, col + i, near[i]);
        store(split, row, col + TILE / 2u + i, far[i]);
    }
}

@compute @workgroup_size(INVOCATIONS)
fn product(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let side = TILE / 8u;
    let tx = lane % side;
    let ty = lane / side;
    let row = group.y * TILE;
    let col = group.x * TILE;
    var near0 = vec4(0.0);
    var near1 = vec4(0.0);
    var near2 = vec4(0.0);
    var near3 = vec4(0.0);
    var near4 = vec4(0.0);
    var near5 = vec4(0.0);
    var near6 = vec4(0.0);
    var near7 = vec4(0.0);
    var far0 = vec4(0.0);
    var far1 = vec4(0.0);
    var far2 = vec4(0.0);
    var far3 = vec4(0.0);
    var far4 = vec4(0.0);
    var far5 = vec4(0.0);
    var far6 = vec4(0.0);
    var far7 = vec4(0.0);
    let end = min(p.k, (group.z + 1u) * p.span);
    for (var first = group.z * p.span; first < end; first += RUN) {
        for (var i = lane; i < TILE * RUN; i += INVOCATIONS) {
            // Neighbouring invocations load neighbouring values.
            if A_TRANSPOSED {
                let m = i % TILE;
                let k = i / TILE;
                a_run[k * PITCH + m / 4u][m % 4u] = a_at(row + m, first + k);
            } else {
                let m = i / RUN;
                let k = i % RUN;
                a_run[k * PITCH + m / 4u][m % 4u] = a_at(row + m, first + k);
            }
            if B_TRANSPOSED {
                let n = i / RUN;
                let k = i % RUN;
                b_run[k * PITCH + n / 4u][n % 4u] = b_at(first + k, col + n);
            } else {
                let n = i % TILE;
                let k = i / TILE;
                b_run[k * PITCH + n / 4u][n % 4u] = b_at(first + k, col + n);
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < RUN; k++) {
            let upper = a_run[k * PITCH + ty];
            let lower = a_run[k * PITCH + side + ty];
            let near = b_run[k * PITCH + tx];
            let far = b_run[k * PITCH + side + tx];
            near0 = fma(vec4(upper.x), near, near0);
            near1 = fma(vec4(upper.y), near, near1);
            near2 = fma(vec4(upper.z), near, near2);
            near3 = fma(vec4(upper.w), near, near3);
            near4 = fma(vec4(lower.x), near, near4);
            near5 = fma(vec4(lower.y), near, near5);
            near6 = fma(vec4(lower.z), near, near6);
            near7 = fma(vec4(lower.w), near, near7);
            far0 = fma(vec4(upper.x), far, far0);
            far1 = fma(vec4(upper.y), far, far1);
            far2 = fma(vec4(upper.z), far, far2);
            far3 = fma(vec4(upper.w), far, far3);
            far4 = fma(vec4(lower.x), far, far4);
            far5 = fma(vec4(lower.y), far, far5);
            far6 = fma(vec4(lower.z), far, far6);
            far7 = fma(vec4(lower.w), far, far7);
        }
        workgroupBarrier();
    }
    let upper_row = row + 4u * ty;
    let lower_row = upper_row + TILE / 2u;
    let near_col = col + 4u * tx;
    store_row(group.z, upper_row, near_col, near0, far0);
    store_row(group.z, upper_row + 1u, near_col, near1, far1);
    store_row(group.z, upper_row + 2u, near_col, near2, far2);
    store_row(group.z, upper_row + 3u, near_col, near3, far3);
    store_row(group.z, lower_row, near_col, near4, far4);
    store_row(group.z, lower_row + 1u, near_col, near5, far5);
    store_row(group.z, lower_row + 2u, near_col, near6, far6);
    store_row(group.z, lower_row + 3u, near_col, near7, far7);
}

@group(0) @binding(0) var<storage, read> splits: array<f32>; // [splits·m, n]

/// C from the sums of the splits: `a` is the place of these, `k` their number.
@compute @workgroup_size(64)
fn add_splits(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var row = id.y; row < p.m; row += groups.y) {
        for (var col = id.x; col < p.n; col += 64u * groups.x) {
            var sum = 0.0;
            for (var split = 0u; split < p.k; split++) {
                sum += splits[at(p.a, split * p.m + row, col)];
            }
            store(0u, row, col, sum);
        }
    }
}
