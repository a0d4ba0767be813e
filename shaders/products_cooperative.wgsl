// The products of a linear layer (product.wgsl) of f16 values by cooperative matrices: 16 × 16 × 16, f16 in, sums in f32.
//
// A workgroup of four subgroups of 32 takes a tile of TILE × TILE values of C, a subgroup a quarter of it: 64 × 64 or 32 × 32
// values, 4 × 4 or 2 × 2 matrices. Each has a name of its own: in an array they would not stay in registers. Runs of 32 values
// of k come into workgroup memory as they lie in A and in B, and a matrix is loaded from there row by row or column by column;
// the loads of the next run are under way meanwhile. Rows of A and of B start at multiples of four values and have a
// multiple of four.
//
// Bytes and flops: a tile of 128 reads 2·128·32·2 bytes for 2·128²·32 flops, 64 flops a byte of global memory. A subgroup loads
// 8 matrices of 512 bytes for 16 products of 8192 flops: 32 flops a byte of workgroup memory, and with its 128 bytes a cycle
// and multiprocessor 4096 flops a cycle, as much as the tensor cores of an H100 do. So it is bound by workgroup memory and by
// the waits for it.

override TILE: u32 = 64;
override WIDE: bool = false; // TILE is 128

const INVOCATIONS = 128u;
const RUN = 32u;
/// Vectors of four from row to row where rows run along k, eight values more than a run against bank conflicts.
const K_PITCH = 10u;

@group(0) @binding(0) var<storage, read> a: array<vec4<f16>>; // [m, k], or [k, m]
@group(0) @binding(1) var<storage, read> b: array<vec4<f16>>; // [k, n], or [n, k]

var<workgroup> a_run: array<vec4<f16>, TILE * K_PITCH>; // [m][k], or [k][m] with a pitch of TILE / 4 + 2
var<workgroup> b_run: array<vec4<f16>, TILE * K_PITCH>; // [n][k], or [k][n]
var<workgroup> left: array<f32, 4u * 256u>; // a matrix of each subgroup

/// Vector `index` of a run of A, zero outside of it.
fn a_at(row: u32, first: u32, index: u32) -> vec4<f16> {
    var m = row + index / 8u;
    var k = first + index % 8u * 4u;
    if A_TRANSPOSED {
        m = row + index % (TILE / 4u) * 4u;
        k = first + index / (TILE / 4u);
    }
    var four = vec4<f16>();
    if m < p.m && k < p.k {
        four = a[(p.a.x + select(m, k, A_TRANSPOSED) * p.a.y + select(k, m, A_TRANSPOSED)) / 4u];
    }
    return four;
}

/// The same of B.
fn b_at(col: u32, first: u32, index: u32) -> vec4<f16> {
    var n = col + index % (TILE / 4u) * 4u;
    var k = first + index / (TILE / 4u);
    if B_TRANSPOSED {
        n = col + index / 8u;
        k = first + index % 8u * 4u;
    }
    var four = vec4<f16>();
    if n < p.n && k < p.k {
        four = b[(p.b.x + select(k, n, B_TRANSPOSED) * p.b.y + select(n, k, B_TRANSPOSED)) / 4u];
    }
    return four;
}

/// Where vector `index` lies in workgroup memory.
fn place(index: u32, along_k: bool) -> u32 {
    if along_k {
        return index / 8u * K_PITCH + index % 8u;
    }
    return index / (TILE / 4u) * (TILE / 4u + 2u) + index % (TILE / 4u);
}

/// Rows `row..row + 16` of A's run, columns `k..k + 16`.
fn of_a(k: u32, row: u32) -> coop_mat16x16<f16, A> {
    var matrix: coop_mat16x16<f16, A>;
    if A_TRANSPOSED {
        matrix = coopLoad<coop_mat16x16<f16, A>>(&a_run[k * (TILE / 4u + 2u) + row / 4u], TILE / 4u + 2u);
    } else {
        matrix = coopLoadT<coop_mat16x16<f16, A>>(&a_run[row * K_PITCH + k / 4u], K_PITCH);
    }
    return matrix;
}

/// Rows `k..k + 16` of B's run, columns `col..col + 16`.
fn of_b(k: u32, col: u32) -> coop_mat16x16<f16, B> {
    var matrix: coop_mat16x16<f16, B>;
    if B_TRANSPOSED {
        matrix = coopLoad<coop_mat16x16<f16, B>>(&b_run[col * K_PITCH + k / 4u], K_PITCH);
    } else {
        matrix = coopLoadT<coop_mat16x16<f16, B>>(&b_run[k * (TILE / 4u + 2u) + col / 4u], TILE / 4u + 2u);
    }
    return matrix;
}

/// Stores a matrix of C, through workgroup memory: C may end anywhere.
fn leave(sum: coop_mat16x16<f32, C>, split: u32, row: u32, col: u32, subgroup: u32, lane: u32) {
    workgroupBarrier();
    coopStoreT(sum, &left[subgroup * 256u], 16u);
    workgroupBarrier();
    for (var i = lane; i < 256u; i += 32u) {
        store(split, row + i / 16u, col + i % 16u, left[subgroup * 256u + i]);
    }
}

@compute @workgroup_size(INVOCATIONS)
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) sublane: u32,
) {
    let sub_row = subgroup % 2u * (TILE / 2u);
    let sub_col = subgroup / 2u * (TILE / 2u);
    let begin = group.z * p.span;
    let end = min(p.k, begin + p.span);
    var sum00: coop_mat16x16<f32, C>;
    var sum01: coop_mat16x16<f32, C>;
    var sum02: coop_mat16x16<f32, C>;
    var sum03: coop_mat16x16<f32, C>;
    var sum10: coop_mat16x16<f32, C>;
    var sum11: coop_mat16x16<f32, C>;
    var sum12: coop_mat16x16<f32, C>;
    var sum13: coop_mat16x16<f32, C>;
    var sum20: coop_mat16x16<f32, C>;
    var sum21: coop_mat16x16<f32, C>;
    var sum22: coop_mat16x16<f32, C>;
    var sum23: coop_mat16x16<f32, C>;
    var sum30: coop_mat16x16<f32, C>;
    var sum31: coop_mat16x16<f32, C>;
    var sum32: coop_mat16x16<f32, C>;
    var sum33: coop_mat16x16<f32, C>;
    var a_next: array<vec4<f16>, 8>;
    var b_next: array<vec4<f16>, 8>;
    for (var i = 0u; i < TILE / 16u; i++) {
        a_next[i] = a_at(group.y * TILE, begin, i * INVOCATIONS + lane);
        b_next[i] = b_at(group.x * TILE, begin, i * INVOCATIONS + lane);
    }
    for (var first = begin; first < end; first += RUN) {
        workgroupBarrier();
        for (var i = 0u; i < TILE / 16u; i++) {
            a_run[place(i * INVOCATIONS + lane, !A_TRANSPOSED)] = a_next[i];
            b_run[place(i * INVOCATIONS + lane, B_TRANSPOSED)] = b_next[i];
        }
        workgroupBarrier();
        for (var i = 0u; i < TILE / 16u; i++) {
            a_next[i] = a_at(group.y * TILE, first + RUN, i * INVOCATIONS + lane);
            b_next[i] = b_at(group.x * TILE, first + RUN, i * INVOCATIONS + lane);
        }
        for (var k = 0u; k < RUN; k += 16u) {
            let a0 = of_a(k, sub_row + 0u);
            let a1 = of_a(k, sub_row + 16u);
            let b0 = of_b(k, sub_col + 0u);
            let b1 = of_b(k, sub_col + 16u);
            sum00 = coopMultiplyAdd(a0, b0, sum00);
            sum01 = coopMultiplyAdd(a0, b1, sum01);
            sum10 = coopMultiplyAdd(a1, b0, sum10);
            sum11 = coopMultiplyAdd(a1, b1, sum11);
            if WIDE {
                let a2 = of_a(k, sub_row + 32u);
                let a3 = of_a(k, sub_row + 48u);
                let b2 = of_b(k, sub_col + 32u);
                let b3 = of_b(k, sub_col + 48u);
                sum02 = coopMultiplyAdd(a0, b2, sum02);
                sum03 = coopMultiplyAdd(a0, b3, sum03);
                sum12 = coopMultiplyAdd(a1, b2, sum12);
                sum13 = coopMultiplyAdd(a1, b3, sum13);
                sum20 = coopMultiplyAdd(a2, b0, sum20);
                sum21 = coopMultiplyAdd(a2, b1, sum21);
                sum22 = coopMultiplyAdd(a2, b2, sum22);
                sum23 = coopMultiplyAdd(a2, b3, sum23);
                sum30 = coopMultiplyAdd(a3, b0, sum30);
                sum31 = coopMultiplyAdd(a3, b1, sum31);
                sum32 = coopMultiplyAdd(a3, b2, sum32);
                sum33 = coopMultiplyAdd(a3, b3, sum33);
            }
        }
    }
    let row = group.y * TILE + sub_row;
    let col = group.x * TILE + sub_col;
    leave(sum00, group.z, row + 0u, col + 0u, subgroup, sublane);
    leave(sum01, group.z, row + 0u, col + 16u, subgroup, sublane);
    leave(sum10, group.z, row + 16u, col + 0u, subgroup, sublane);
    leave(sum11, group.z, row + 16u, col + 16u, subgroup, sublane);
    if WIDE {
        leave(sum02, group.z, row + 0u, col + 32u, subgroup, sublane);
        leave(sum03, group.z, row + 0u, col + 48u, subgroup, sublane);
        leave(sum12, group.z, row + 16u, col + 32u, subgroup, sublane);
        leave(sum13, group.z, row + 16u, col + 48u, subgroup, sublane);
        leave(sum20, group.z, row + 32u, col + 0u, subgroup, sublane);
        leave(sum21, group.z, row + 32u, col + 16u, subgroup, sublane);
        leave(sum22, group.z, row + 32u, col + 32u, subgroup, sublane);
        leave(sum23, group.z, row + 32u, col + 48u, subgroup, sublane);
        leave(sum30, group.z, row + 48u, col + 0u, subgroup, sublane);
        leave(sum31, group.z, row + 48u, col + 16u, subgroup, sublane);
        leave(sum32, group.z, row + 48u, col + 32u, subgroup, sublane);
        leave(sum33, group.z, row + 48u, col + 48u, subgroup, sublane);
    }
}
