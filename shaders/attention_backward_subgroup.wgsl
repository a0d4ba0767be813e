// The gradients of attention over segments (attention_backward.wgsl) for an adapter that is a CPU: a workgroup is one subgroup,
// whose lanes are the lanes of a SIMD register there.
//
// `queries` makes dq: a workgroup takes one head of LANES rows of a segment, a lane a row, and lets the keys pass by, LANES at
// a time. `keys` makes dk and dv: a workgroup takes one key head of LANES keys, and lets the queries that see them pass by. A
// lane loads the columns of one of what passes by, and each value is handed to all lanes by a shuffle, which costs there what
// a multiplication costs. No workgroup memory and no barrier, as in products_subgroup.wgsl.
//
// Loads and flops: LANES keys take 3 head_dim loads, each a gather that costs some 15 multiply-adds of a register, for
// 3 head_dim LANES multiply-adds, and LANES queries 4 head_dim loads for 4 head_dim LANES: 2:1 with 8 lanes, bound by the loads.

override LANES: u32 = 8;

/// Columns of a head at most. Loops over them are not unrolled: the arrays lie on the stack, a register a column.
const MOST_WIDTH = 256u;
const MOST_LANES = 16u;

@compute @workgroup_size(LANES)
fn queries(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = chunk(p.segments, p.capacity, p.tokens, LANES, group.x);
    if tile.index == p.capacity {
        return;
    }
    let head = group.y;
    let row = tile.owner.start + tile.first + min(lane, tile.count - 1u);
    let is_query = lane < tile.count;
    let first_position = tile.owner.past + tile.first;
    let position = first_position + lane;
    let columns = head * p.head_dim;
    let key_columns = head / p.group * p.head_dim;

    var own_q: array<f32, MOST_WIDTH>;
    var own_dout: array<f32, MOST_WIDTH>;
    var sum: array<f32, MOST_WIDTH>;
    var d = 0.0;
    for (var i = 0u; i < p.head_dim; i++) {
        let col = columns + i;
        own_q[i] = p.scale * f32(q[at(p.q, row, col)]);
        own_dout[i] = f32(dout[at(p.dout, row, col)]);
        d = fma(own_dout[i], f32(out[at(p.sixth, row, col)]), d);
        sum[i] = 0.0;
    }
    let own_lse = lse[at(p.lse, row, head)];
    if is_query {
        inner[at(p.eighth, row, head)] = d;
    }

    let end = first_position + tile.count;
    let oldest = select(first_position - min(p.window - 1u, first_position), 0u, p.window == 0u);
    for (var start = oldest / LANES * LANES; start < end; start += LANES) {
        let key = min(tile.owner.keys + min(start + lane, end - 1u), p.keys - 1u);
        let from_k = at(p.k, key, key_columns);
        let from_v = at(p.v, key, key_columns);
        var score: array<f32, MOST_LANES>;
        var ds: array<f32, MOST_LANES>;
        for (var j = 0u; j < LANES; j++) {
            score[j] = 0.0;
            ds[j] = 0.0;
        }
        for (var i = 0u; i < p.head_dim; i++) {
            let of_k = f32(k[from_k + i]);
            let of_v = f32(v[from_v + i]);
            for (var j = 0u; j < LANES; j++) {
                score[j] = fma(own_q[i], subgroupShuffle(of_k, j), score[j]);
                ds[j] = fma(own_dout[i], subgroupShuffle(of_v, j), ds[j]);
            }
        }
        for (var j = 0u; j < LANES; j++) {
            let seen = is_query && start + j < end && sees(start + j, position, p.window);
            ds[j] = select(0.0, exp(score[j] - own_lse) * (ds[j] - d), seen);
        }
        for (var i = 0u; i < p.head_dim; i++) {
            let of_k = select(0.0, f32(k[from_k + i]), start + lane < end);
            for (var j = 0u; j < LANES; j++) {
                sum[i] = fma(ds[j], subgroupShuffle(of_k, j), sum[i]);
            }
        }
    }

    if is_query {
        for (var i = 0u; i < p.head_dim; i++) {
            dq[at(p.seventh, row, columns + i)] = Value(p.scale * sum[i]);
        }
    }
}

@compute @workgroup_size(LANES)
fn keys(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = key_rows(LANES, group.x);
    if tile.count == 0u {
        return;
    }
    let key_head = group.y;
    let row = tile.row + min(lane, tile.count - 1u);
    let is_key = lane < tile.count;
    let position = tile.first + lane;
    let key_columns = key_head * p.head_dim;

    var own_k: array<f32, MOST_WIDTH>;
    var own_v: array<f32, MOST_WIDTH>;
    var sum_k: array<f32, MOST_WIDTH>;
    var sum_v: array<f32, MOST_WIDTH>;
    for (var i = 0u; i < p.head_dim; i++) {
        let col = key_columns + i;
        own_k[i] = p.scale * f32(k[at(p.k, row, col)]);
        own_v[i] = f32(v[at(p.v, row, col)]);
        sum_k[i] = 0.0;
        sum_v[i] = 0.0;
    }

    // Queries, counted from the segment's first row: from the one that sits on the first key to the last that sees the last.
    let past = tile.owner.past;
    let begin = max(tile.first, past) - past;
    let after = tile.first + tile.count + p.window;
    let end = select(min(tile.owner.len, max(after, past + 1u) - past - 1u), tile.owner.len, p.window == 0u);
    for (var member = 0u; member < p.group; member++) {
        let head = key_head * p.group + member;
        let columns = head * p.head_dim;
        for (var start = begin / LANES * LANES; start < end; start += LANES) {
            let inside = start + lane < end;
            let query = tile.owner.start + min(start + lane, end - 1u);
            let from_q = at(p.q, query, columns);
            let from_dout = at(p.dout, query, columns);
            let lane_lse = lse[at(p.lse, query, head)];
            let lane_d = given_inner[at(p.sixth, query, head)];
            var probability: array<f32, MOST_LANES>;
            var ds: array<f32, MOST_LANES>;
            for (var j = 0u; j < LANES; j++) {
                probability[j] = 0.0;
                ds[j] = 0.0;
            }
            for (var i = 0u; i < p.head_dim; i++) {
                let of_q = f32(q[from_q + i]);
                let of_dout = f32(dout[from_dout + i]);
                for (var j = 0u; j < LANES; j++) {
                    probability[j] = fma(own_k[i], subgroupShuffle(of_q, j), probability[j]);
                    ds[j] = fma(own_v[i], subgroupShuffle(of_dout, j), ds[j]);
                }
            }
            for (var j = 0u; j < LANES; j++) {
                let seen = is_key && start + j < end && sees(position, start + j + past, p.window);
                let share = exp(probability[j] - subgroupShuffle(lane_lse, j));
                ds[j] = select(0.0, share * (ds[j] - subgroupShuffle(lane_d, j)), seen);
                probability[j] = select(0.0, share, seen);
            }
            for (var i = 0u; i < p.head_dim; i++) {
                let of_q = select(0.0, f32(q[from_q + i]), inside);
                let of_dout = select(0.0, f32(dout[from_dout + i]), inside);
                for (var j = 0u; j < LANES; j++) {
                    sum_k[i] = fma(ds[j], subgroupShuffle(of_q, j), sum_k[i]);
                    sum_v[i] = fma(probability[j], subgroupShuffle(of_dout, j), sum_v[i]);
                }
            }
        }
    }

    if is_key {
        for (var i = 0u; i < p.head_dim; i++) {
            dk[at(p.seventh, row, key_columns + i)] = Value(p.scale * sum_k[i]);
            dv[at(p.eighth, row, key_columns + i)] = Value(sum_v[i]);
        }
    }
}
