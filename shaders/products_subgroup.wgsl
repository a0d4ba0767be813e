// The products of a linear layer (product.wgsl) for an adapter that is a CPU: a workgroup is one subgroup, whose lanes are
// the lanes of a SIMD register there.
//
// A workgroup takes ROWS × GROUPS·LANES values of C: a lane ROWS rows of every LANES-th column. A lane loads values of A
// that its neighbours need as well, and each is handed to all of them by a shuffle, which costs there what a multiplication
// costs. There is no workgroup memory and no barrier: there a barrier saves and restores the registers of every invocation.
// Each value of C is one chain of fused multiply-adds over k, in order, whatever ROWS is.
//
// Loads and flops: on such an adapter a load is a gather, lane by lane, and costs some 15 multiply-adds of a register
// whether its address is the same in all lanes or not. LANES values of k take ROWS + LANES·GROUPS loads for
// LANES·ROWS·GROUPS multiply-adds: 24 for 128 with 8 rows and 2 groups of 8 lanes, bound by the loads and the arithmetic
// alike. More rows or groups would save loads, but not fit into 16 registers.

override LANES: u32 = 8;
override ROWS: u32 = 8; // a multiple of LANES if A is transposed
override GROUPS: u32 = 2;

const MOST_ROWS = 16u;
const MOST_GROUPS = 2u;

@group(0) @binding(0) var<storage, read> a: array<Left>; // [m, k], or [k, m]
@group(0) @binding(1) var<storage, read> b: array<Right>; // [k, n], or [n, k]

@compute @workgroup_size(LANES)
fn product(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * ROWS;
    let col = group.x * (LANES * GROUPS) + lane;
    let b_step = select(p.b.y, 1u, B_TRANSPOSED);
    var b_from: array<u32, MOST_GROUPS>;
    for (var j = 0u; j < GROUPS; j++) {
        let of_b = min(col + j * LANES, p.n - 1u);
        b_from[j] = p.b.x + of_b * select(1u, p.b.y, B_TRANSPOSED);
    }
    // Loops of constant length over arrays are unrolled, which keeps the arrays in registers.
    var sum: array<f32, MOST_ROWS * MOST_GROUPS>;
    for (var i = 0u; i < ROWS * GROUPS; i++) {
        sum[i] = 0.0;
    }
    for (var k = 0u; k < p.k; k += LANES) {
        // Not transposed: of row r, the lane's k. Transposed: of the r-th LANES rows, the lane's row.
        var of_a: array<f32, MOST_ROWS>;
        if !A_TRANSPOSED {
            for (var r = 0u; r < ROWS; r++) {
                let place = at(p.a, min(row + r, p.m - 1u), min(k + lane, p.k - 1u));
                of_a[r] = select(0.0, f32(a[place]), k + lane < p.k);
            }
        }
        for (var i = 0u; i < LANES; i++) {
            let inside = k + i < p.k;
            let at_k = min(k + i, p.k - 1u);
            var of_b: array<f32, MOST_GROUPS>;
            for (var j = 0u; j < GROUPS; j++) {
                of_b[j] = select(0.0, f32(b[b_from[j] + at_k * b_step]), inside);
            }
            if A_TRANSPOSED {
                for (var r = 0u; r < ROWS / LANES; r++) {
                    let place = at(p.a, at_k, min(row + r * LANES + lane, p.m - 1u));
                    of_a[r] = select(0.0, f32(a[place]), inside);
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                var one: f32;
                if A_TRANSPOSED {
                    one = subgroupShuffle(of_a[r / LANES], r % LANES);
                } else {
                    one = subgroupShuffle(of_a[r], i);
                }
                for (var j = 0u; j < GROUPS; j++) {
                    sum[r * GROUPS + j] = fma(one, of_b[j], sum[r * GROUPS + j]);
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        for (var j = 0u; j < GROUPS; j++) {
            store(0u, row + r, col + j * LANES, sum[r * GROUPS + j]);
        }
    }
}
