// Attention over segments, forward (attention.wgsl), for an adapter that is a CPU: a workgroup is one subgroup, whose lanes
// are the lanes of a SIMD register there.
//
// A workgroup takes one query head of LANES rows of one segment, a lane a row: its query and its output. LANES keys pass by at
// a time, a lane loads the columns of one of them, and each value is handed to all lanes by a shuffle, which costs there what
// a multiplication costs. No workgroup memory and no barrier, as in products_subgroup.wgsl.
//
// Loads and flops: LANES keys take 2 head_dim loads, each a gather that costs some 15 multiply-adds of a register, for
// 2 head_dim LANES multiply-adds: 2:1 with 8 lanes, bound by the loads. Query and output, 2 head_dim registers, lie on the
// stack.

@group(0) @binding(1) var<storage, read> q: array<Value>; // [tokens, heads·head_dim]
@group(0) @binding(2) var<storage, read> k: array<Key>; // [keys, kv_heads·head_dim]
@group(0) @binding(3) var<storage, read> v: array<Key>; // [keys, kv_heads·head_dim]
@group(0) @binding(5) var<storage, read_write> out: array<Value>; // [tokens, heads·head_dim]

override LANES: u32 = 8;

/// Columns of a head at most. Loops over them are not unrolled: the arrays lie on the stack, a register a column.
const MOST_WIDTH = 256u;
const MOST_LANES = 16u;
/// Below every score.
const NONE = -3.0e38;

@compute @workgroup_size(LANES)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let tile = chunk(p.segments, p.capacity, p.tokens, LANES, group.x);
    if tile.index == p.capacity {
        return;
    }
    let head = group.y;
    let row = tile.owner.start + tile.first + min(lane, tile.count - 1u);
    let first_position = tile.owner.past + tile.first;
    let position = first_position + lane;
    let columns = head * p.head_dim;
    let key_columns = head / p.group * p.head_dim;

    var query: array<f32, MOST_WIDTH>;
    var sum: array<f32, MOST_WIDTH>;
    for (var i = 0u; i < p.head_dim; i++) {
        query[i] = p.scale * f32(q[at(p.q, row, columns + i)]);
        sum[i] = 0.0;
    }
    var largest = NONE;
    var total = 0.0;

    let end = first_position + tile.count;
    // Tiles start at multiples of LANES, so that a query's sum has the same order however its sequence is cut.
    let oldest = select(first_position - min(p.window - 1u, first_position), 0u, p.window == 0u);
    for (var start = oldest / LANES * LANES; start < end; start += LANES) {
        let key = key_row(tile.owner, min(start + lane, end - 1u));
        let from_k = at(p.k, key, key_columns);
        let from_v = at(p.v, key, key_columns);
        var score: array<f32, MOST_LANES>;
        for (var j = 0u; j < LANES; j++) {
            score[j] = 0.0;
        }
        for (var i = 0u; i < p.head_dim; i++) {
            let of_k = f32(k[from_k + i]);
            for (var j = 0u; j < LANES; j++) {
                score[j] = fma(query[i], subgroupShuffle(of_k, j), score[j]);
            }
        }
        var next = largest;
        for (var j = 0u; j < LANES; j++) {
            score[j] = select(NONE, score[j], sees(start + j, position, p.window));
            next = max(next, score[j]);
        }
        let correction = exp(largest - next);
        largest = next;
        total *= correction;
        for (var j = 0u; j < LANES; j++) {
            score[j] = select(0.0, exp(score[j] - largest), score[j] > NONE);
            total += score[j];
        }
        for (var i = 0u; i < p.head_dim; i++) {
            let of_v = select(0.0, f32(v[from_v + i]), start + lane < end);
            var one = sum[i] * correction;
            for (var j = 0u; j < LANES; j++) {
                one = fma(score[j], subgroupShuffle(of_v, j), one);
            }
            sum[i] = one;
        }
    }

    if lane < tile.count {
        for (var i = 0u; i < p.head_dim; i++) {
            out[at(p.out, row, columns + i)] = Value(sum[i] / total);
        }
        if p.has_lse != 0u {
            lse[at(p.lse, row, head)] = largest + logarithm(total);
        }
    }
}
