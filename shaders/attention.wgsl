// Causal grouped-query attention over segments, forward: out = Σ_j p_j v_j with p_j = exp(scale q·k_j − lse) over the keys j
// that a query sees, and lse = ln Σ_j exp(scale q·k_j), which backward needs. Scores are never all there: keys pass by in
// tiles, and the maximum and the sum so far are corrected as they grow.
// Source: Dao et al., "FlashAttention", arXiv:2205.14135; the running softmax: Milakov and Gimelshein, arXiv:1805.02867.
//
// A workgroup takes one query head of ROWS rows of one segment: invocation (row, part) holds a query's columns of its
// part, a PARTS-th of the head, and the same columns of its output in registers. A tile of KEYS keys and values lies in
// workgroup memory, where all rows read the same value at a time; the parts of a score meet there too. Rows of queries are
// independent, so nothing is summed across workgroups.
//
// Per workgroup and key: 2 head_dim reads of memory for 4 head_dim ROWS operations, and 2 head_dim ROWS / 4 reads of
// workgroup memory of 16 bytes: bound by operations and by the workgroup memory's reads, not by bytes.

@group(0) @binding(1) var<storage, read> q: array<Value>; // [tokens, heads·head_dim]
@group(0) @binding(2) var<storage, read> k: array<Key>; // [keys, kv_heads·head_dim]
@group(0) @binding(3) var<storage, read> v: array<Key>; // [keys, kv_heads·head_dim]
@group(0) @binding(5) var<storage, read_write> out: array<Value>; // [tokens, heads·head_dim]

/// Columns of a part, in vectors of four; the last part may be padded with zeros.
override WIDTH: u32 = 8;
/// Parts of a head.
override PARTS: u32 = 1;

/// Rows of a workgroup.
override ROWS: u32 = 64;

const MOST_WIDTH = 8u;
/// Keys of a tile.
const KEYS = 8u;
/// Below every score.
const NONE = -3.0e38;

var<workgroup> key_tile: array<vec4<f32>, KEYS * WIDTH * PARTS>;
var<workgroup> value_tile: array<vec4<f32>, KEYS * WIDTH * PARTS>;
var<workgroup> scores: array<f32, KEYS * ROWS * PARTS>;

@compute @workgroup_size(ROWS, PARTS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let tile = chunk(p.segments, p.capacity, p.tokens, ROWS, group.x);
    if tile.index == p.capacity {
        return;
    }
    let head = group.y;
    let part = select(local.y, 0u, PARTS == 1u);
    let row = tile.owner.start + tile.first + local.x;
    let is_query = local.x < tile.count;
    let first_position = tile.owner.past + tile.first;
    let position = first_position + local.x;
    let columns = head * p.head_dim;
    let key_columns = head / p.group * p.head_dim;

    var query: array<vec4<f32>, MOST_WIDTH>;
    var sum: array<vec4<f32>, MOST_WIDTH>;
    for (var i = 0u; i < WIDTH; i++) {
        var four = vec4<f32>();
        for (var e = 0u; e < 4u; e++) {
            let col = (part * WIDTH + i) * 4u + e;
            if is_query && col < p.head_dim {
                four[e] = p.scale * f32(q[at(p.q, row, columns + col)]);
            }
        }
        query[i] = four;
        sum[i] = vec4<f32>();
    }
    var largest = NONE;
    var total = 0.0;

    let end = first_position + tile.count;
    // Tiles start at multiples of KEYS, so that a query's sum has the same order however its sequence is cut.
    let oldest = select(first_position - min(p.window - 1u, first_position), 0u, p.window == 0u);
    for (var start = oldest / KEYS * KEYS; start < end; start += KEYS) {
        workgroupBarrier();
        for (var i = local.y * ROWS + local.x; i < 4u * KEYS * WIDTH * PARTS; i += ROWS * PARTS) {
            let at_key = start + i / (4u * WIDTH * PARTS);
            let col = i % (4u * WIDTH * PARTS);
            var of_k = 0.0;
            var of_v = 0.0;
            if at_key < end && col < p.head_dim {
                let key = key_row(tile.owner, at_key);
                of_k = f32(k[at(p.k, key, key_columns + col)]);
                of_v = f32(v[at(p.v, key, key_columns + col)]);
            }
            key_tile[i / 4u][i % 4u] = of_k;
            value_tile[i / 4u][i % 4u] = of_v;
        }
        workgroupBarrier();

        // Loops of constant length over arrays of the same length are unrolled, which keeps the arrays in registers.
        var score: array<f32, KEYS>;
        for (var j = 0u; j < KEYS; j++) {
            let at_key = (j * PARTS + part) * WIDTH;
            var products = vec4<f32>();
            for (var i = 0u; i < WIDTH; i++) {
                products = fma(query[i], key_tile[at_key + i], products);
            }
            score[j] = (products.x + products.y) + (products.z + products.w);
        }
        if PARTS > 1u {
            for (var j = 0u; j < KEYS; j++) {
                scores[(j * PARTS + part) * ROWS + local.x] = score[j];
            }
            workgroupBarrier();
            for (var j = 0u; j < KEYS; j++) {
                score[j] = 0.0;
                for (var other = 0u; other < PARTS; other++) {
                    score[j] += scores[(j * PARTS + other) * ROWS + local.x];
                }
            }
        }
        var next = largest;
        for (var j = 0u; j < KEYS; j++) {
            score[j] = select(NONE, score[j], sees(start + j, position, p.window));
            next = max(next, score[j]);
        }
        let correction = exp(largest - next);
        largest = next;
        total *= correction;
        for (var j = 0u; j < KEYS; j++) {
            score[j] = select(0.0, exp(score[j] - largest), score[j] > NONE);
            total += score[j];
        }
        for (var i = 0u; i < WIDTH; i++) {
            var four = sum[i] * correction;
            for (var j = 0u; j < KEYS; j++) {
                four = fma(vec4<f32>(score[j]), value_tile[(j * PARTS + part) * WIDTH + i], four);
            }
            sum[i] = four;
        }
    }

    if is_query {
        for (var i = 0u; i < WIDTH; i++) {
            let four = sum[i] / total;
            for (var e = 0u; e < 4u; e++) {
                let col = (part * WIDTH + i) * 4u + e;
                if col < p.head_dim {
                    out[at(p.out, row, columns + col)] = Value(four[e]);
                }
            }
        }
        if p.has_lse != 0u && local.y == 0u {
            lse[at(p.lse, row, head)] = largest + logarithm(total);
        }
    }
}
