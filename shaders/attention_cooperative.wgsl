// Attention over segments, forward (attention.wgsl), of f16 values by cooperative matrices: 16 × 16 × 16, f16 in, sums in f32.
//
// A workgroup of four subgroups of 32 takes one query head of 64 rows of one segment, a subgroup 16 rows. Keys pass by in tiles
// of 32, twice: first for the largest score of each row, then for the shares and the output, which so never has to be corrected
// and stays in registers as matrices. Scores go through workgroup memory to the two lanes that a row has, and come back as
// shares in f16. Matrices of the output have a name each: in an array they would not stay in registers.
//
// Bytes and flops: 6 head_dim·64·32 flops for a tile of keys, of which 64 rows share every load of a key: bound neither by
// memory nor by the tensor cores but by workgroup memory, 4 + 4 + 2 bytes for a score and its share, and by the barriers
// between these steps, six for a tile.

@group(0) @binding(1) var<storage, read> q: array<vec4<f16>>; // [tokens, heads·head_dim]
@group(0) @binding(2) var<storage, read> k: array<vec4<f16>>; // [keys, kv_heads·head_dim]
@group(0) @binding(3) var<storage, read> v: array<vec4<f16>>; // [keys, kv_heads·head_dim]
@group(0) @binding(5) var<storage, read_write> out: array<f16>; // [tokens, heads·head_dim]

/// Matrices of 16 columns of a head, at most 8.
override WIDTH: u32 = 4;

const ROWS = 64u;
const KEYS = 32u;
const INVOCATIONS = 128u;
/// Values from row to row of the scores and vectors of four of the shares, more than a tile has against bank conflicts.
const SCORE_PITCH = 36u;
const SHARE_PITCH = 10u;
/// Below every score.
const NONE = -3.0e38;

/// First the queries, then the keys of a tile and after them its values, with a pitch of 4 WIDTH + 2 vectors.
var<workgroup> rows: array<vec4<f16>, ROWS * (4u * WIDTH + 2u)>;
var<workgroup> scores: array<f32, ROWS * SCORE_PITCH>;
var<workgroup> shares: array<vec4<f16>, ROWS * SHARE_PITCH>;

/// Keys of a tile into workgroup memory, zeros past the end.
fn load_keys(owner: Segment, start: u32, end: u32, columns: u32, lane: u32) {
    for (var i = lane; i < KEYS * 4u * WIDTH; i += INVOCATIONS) {
        let key = start + i / (4u * WIDTH);
        var four = vec4<f16>();
        if key < end {
            four = k[at(p.k, key_row(owner, key), columns) / 4u + i % (4u * WIDTH)];
        }
        rows[i / (4u * WIDTH) * (4u * WIDTH + 2u) + i % (4u * WIDTH)] = four;
    }
}

/// And its values, behind the keys.
fn load_values(owner: Segment, start: u32, end: u32, columns: u32, lane: u32) {
    for (var i = lane; i < KEYS * 4u * WIDTH; i += INVOCATIONS) {
        let key = start + i / (4u * WIDTH);
        var four = vec4<f16>();
        if key < end {
            four = v[at(p.v, key_row(owner, key), columns) / 4u + i % (4u * WIDTH)];
        }
        rows[(KEYS + i / (4u * WIDTH)) * (4u * WIDTH + 2u) + i % (4u * WIDTH)] = four;
    }
}

/// Columns 16 i..16 i + 16 of the subgroup's queries.
fn of_q(subgroup: u32, i: u32) -> coop_mat16x16<f16, A> {
    return coopLoadT<coop_mat16x16<f16, A>>(&rows[subgroup * 16u * (4u * WIDTH + 2u) + 4u * i], 4u * WIDTH + 2u);
}

/// The same columns of 16 keys, transposed.
fn of_k(h: u32, i: u32) -> coop_mat16x16<f16, B> {
    return coopLoad<coop_mat16x16<f16, B>>(&rows[h * 16u * (4u * WIDTH + 2u) + 4u * i], 4u * WIDTH + 2u);
}

/// And of their values.
fn of_v(h: u32, i: u32) -> coop_mat16x16<f16, B> {
    return coopLoadT<coop_mat16x16<f16, B>>(&rows[(KEYS + h * 16u) * (4u * WIDTH + 2u) + 4u * i], 4u * WIDTH + 2u);
}

/// Leaves the scores of the tile's keys for the subgroup's rows.
fn leave_scores(
    q0: coop_mat16x16<f16, A>,
    q1: coop_mat16x16<f16, A>,
    q2: coop_mat16x16<f16, A>,
    q3: coop_mat16x16<f16, A>,
    q4: coop_mat16x16<f16, A>,
    q5: coop_mat16x16<f16, A>,
    q6: coop_mat16x16<f16, A>,
    q7: coop_mat16x16<f16, A>,
    subgroup: u32,
) {
    var near: coop_mat16x16<f32, C>;
    var far: coop_mat16x16<f32, C>;
    near = coopMultiplyAdd(q0, of_k(0u, 0u), near);
    far = coopMultiplyAdd(q0, of_k(1u, 0u), far);
    if WIDTH > 1u {
        near = coopMultiplyAdd(q1, of_k(0u, 1u), near);
        far = coopMultiplyAdd(q1, of_k(1u, 1u), far);
    }
    if WIDTH > 2u {
        near = coopMultiplyAdd(q2, of_k(0u, 2u), near);
        far = coopMultiplyAdd(q2, of_k(1u, 2u), far);
    }
    if WIDTH > 3u {
        near = coopMultiplyAdd(q3, of_k(0u, 3u), near);
        far = coopMultiplyAdd(q3, of_k(1u, 3u), far);
    }
    if WIDTH > 4u {
        near = coopMultiplyAdd(q4, of_k(0u, 4u), near);
        far = coopMultiplyAdd(q4, of_k(1u, 4u), far);
    }
    if WIDTH > 5u {
        near = coopMultiplyAdd(q5, of_k(0u, 5u), near);
        far = coopMultiplyAdd(q5, of_k(1u, 5u), far);
    }
    if WIDTH > 6u {
        near = coopMultiplyAdd(q6, of_k(0u, 6u), near);
        far = coopMultiplyAdd(q6, of_k(1u, 6u), far);
    }
    if WIDTH > 7u {
        near = coopMultiplyAdd(q7, of_k(0u, 7u), near);
        far = coopMultiplyAdd(q7, of_k(1u, 7u), far);
    }
    coopStoreT(near, &scores[subgroup * 16u * SCORE_PITCH], SCORE_PITCH);
    coopStoreT(far, &scores[subgroup * 16u * SCORE_PITCH + 16u], SCORE_PITCH);
}

/// Stores columns 16 i..16 i + 16 of the output of the subgroup's rows.
fn leave(
    sum: coop_mat16x16<f32, C>, i: u32, row: u32, columns: u32, subgroup: u32, sublane: u32, count: u32, total: f32,
) {
    workgroupBarrier();
    coopStoreT(sum, &scores[subgroup * 16u * SCORE_PITCH], SCORE_PITCH);
    workgroupBarrier();
    let own = subgroup * 16u + sublane / 2u;
    if own < count {
        for (var j = sublane % 2u * 8u; j < sublane % 2u * 8u + 8u; j++) {
            out[at(p.out, row, columns + 16u * i + j)] = f16(scores[own * SCORE_PITCH + j] / total);
        }
    }
}

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) sublane: u32,
) {
    let tile = chunk(p.segments, p.capacity, p.tokens, ROWS, group.x);
    let head = group.y;
    let columns = head * p.head_dim;
    let key_columns = head / p.group * p.head_dim;
    let first_row = tile.owner.start + tile.first;
    let first_position = tile.owner.past + tile.first;
    // No keys where there is no such tile.
    let count = select(tile.count, 0u, tile.index == p.capacity);
    let end = select(first_position + tile.count, 0u, count == 0u);
    let oldest = select(first_position - min(p.window - 1u, first_position), 0u, p.window == 0u) / KEYS * KEYS;
    for (var i = lane; i < ROWS * 4u * WIDTH; i += INVOCATIONS) {
        let row = i / (4u * WIDTH);
        var four = vec4<f16>();
        if row < count {
            four = q[at(p.q, first_row + row, columns) / 4u + i % (4u * WIDTH)];
        }
        rows[row * (4u * WIDTH + 2u) + i % (4u * WIDTH)] = four;
    }
    workgroupBarrier();
    let q0 = of_q(subgroup, 0u);
    var q1: coop_mat16x16<f16, A>;
    if WIDTH > 1u {
        q1 = of_q(subgroup, 1u);
    }
    var q2: coop_mat16x16<f16, A>;
    if WIDTH > 2u {
        q2 = of_q(subgroup, 2u);
    }
    var q3: coop_mat16x16<f16, A>;
    if WIDTH > 3u {
        q3 = of_q(subgroup, 3u);
    }
    var q4: coop_mat16x16<f16, A>;
    if WIDTH > 4u {
        q4 = of_q(subgroup, 4u);
    }
    var q5: coop_mat16x16<f16, A>;
    if WIDTH > 5u {
        q5 = of_q(subgroup, 5u);
    }
    var q6: coop_mat16x16<f16, A>;
    if WIDTH > 6u {
        q6 = of_q(subgroup, 6u);
    }
    var q7: coop_mat16x16<f16, A>;
    if WIDTH > 7u {
        q7 = of_q(subgroup, 7u);
    }
    // A row has two lanes, half of the keys each.
    let own = subgroup * 16u + sublane / 2u;
    let half = sublane % 2u * 16u;
    let position = first_position + own;
    let out_row = first_row + own;
    var largest = NONE;
    for (var start = oldest; start < end; start += KEYS) {
        workgroupBarrier();
        load_keys(tile.owner, start, end, key_columns, lane);
        workgroupBarrier();
        leave_scores(q0, q1, q2, q3, q4, q5, q6, q7, subgroup);
        workgroupBarrier();
        for (var j = half; j < half + 16u; j++) {
            let score = p.scale * scores[own * SCORE_PITCH + j];
            largest = max(largest, select(NONE, score, sees(start + j, position, p.window)));
        }
    }
    largest = max(largest, subgroupShuffleXor(largest, 1u));

    var total = 0.0;
    var sum0: coop_mat16x16<f32, C>;
    var sum1: coop_mat16x16<f32, C>;
    var sum2: coop_mat16x16<f32, C>;
    var sum3: coop_mat16x16<f32, C>;
    var sum4: coop_mat16x16<f32, C>;
    var sum5: coop_mat16x16<f32, C>;
    var sum6: coop_mat16x16<f32, C>;
    var sum7: coop_mat16x16<f32, C>;
    for (var start = oldest; start < end; start += KEYS) {
        workgroupBarrier();
        load_keys(tile.owner, start, end, key_columns, lane);
        load_values(tile.owner, start, end, key_columns, lane);
        workgroupBarrier();
        leave_scores(q0, q1, q2, q3, q4, q5, q6, q7, subgroup);
        workgroupBarrier();
        for (var j = half; j < half + 16u; j += 4u) {
            var four: vec4<f32>;
            for (var e = 0u; e < 4u; e++) {
                let score = p.scale * scores[own * SCORE_PITCH + j + e];
                four[e] = select(0.0, exp(score - largest), sees(start + j + e, position, p.window));
            }
            total += (four.x + four.y) + (four.z + four.w);
            shares[own * SHARE_PITCH + j / 4u] = vec4<f16>(four);
        }
        workgroupBarrier();
        for (var h = 0u; h < 2u; h++) {
            let shares_of =
                coopLoadT<coop_mat16x16<f16, A>>(&shares[subgroup * 16u * SHARE_PITCH + 4u * h], SHARE_PITCH);
            sum0 = coopMultiplyAdd(shares_of, of_v(h, 0u), sum0);
            if WIDTH > 1u {
                sum1 = coopMultiplyAdd(shares_of, of_v(h, 1u), sum1);
            }
            if WIDTH > 2u {
                sum2 = coopMultiplyAdd(shares_of, of_v(h, 2u), sum2);
            }
            if WIDTH > 3u {
                sum3 = coopMultiplyAdd(shares_of, of_v(h, 3u), sum3);
            }
            if WIDTH > 4u {
                sum4 = coopMultiplyAdd(shares_of, of_v(h, 4u), sum4);
            }
            if WIDTH > 5u {
                sum5 = coopMultiplyAdd(shares_of, of_v(h, 5u), sum5);
            }
            if WIDTH > 6u {
                sum6 = coopMultiplyAdd(shares_of, of_v(h, 6u), sum6);
            }
            if WIDTH > 7u {
                sum7 = coopMultiplyAdd(shares_of, of_v(h, 7u), sum7);
            }
        }
    }
    total += subgroupShuffleXor(total, 1u);
    leave(sum0, 0u, out_row, columns, subgroup, sublane, count, total);
    if WIDTH > 1u {
        leave(sum1, 1u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 2u {
        leave(sum2, 2u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 3u {
        leave(sum3, 3u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 4u {
        leave(sum4, 4u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 5u {
        leave(sum5, 5u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 6u {
        leave(sum6, 6u, out_row, columns, subgroup, sublane, count, total);
    }
    if WIDTH > 7u {
        leave(sum7, 7u, out_row, columns, subgroup, sublane, count, total);
    }
    if p.has_lse != 0u && own < count && half == 0u {
        lse[at(p.lse, out_row, head)] = largest + logarithm(total);
    }
}
