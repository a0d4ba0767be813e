// The gradients of attention over segments from the log-sum-exp that forward left. With p = exp(scale q·k − lse) for each
// query and key that it sees, D = dout·out of the query's head and ds = p (dout·v − D):
//   dq = scale Σ_keys ds k      dk = scale Σ_queries ds q      dv = Σ_queries p dout
// the sums over queries with all heads of the key head's group. Scores are made again, a tile at a time, never all of them.
// Source: Dao et al., "FlashAttention", arXiv:2205.14135, appendix B; two passes as in FlashAttention-2, arXiv:2307.08691.
//
// `queries` makes dq: a workgroup takes one head of ROWS rows of a segment and lets the keys pass by. `keys` makes dk and dv:
// a workgroup takes one key head of ROWS keys of a segment and lets the queries that see them pass by, head after head of the
// group. So each gradient is summed by one invocation in one order, without atomics. Both do the same inside: invocation
// (row, part) holds the columns of its part, a PARTS-th of the head, of two rows `own` (q and dout, or k and v) and of its
// sums in registers; a tile of TILE rows of the two others lies in workgroup memory, where all rows read the same value at a
// time; the parts of a product meet there too.
//
// `queries` does 6 head_dim operations for a pair of a query and a key, `keys` 8: bound by operations and by the reads of
// workgroup memory, 16 bytes for every four multiply-adds.

/// Columns of a part, in vectors of four; the last part may be padded with zeros.
override WIDTH: u32 = 8;
/// Parts of a head.
override PARTS: u32 = 1;
/// Rows of a workgroup.
override ROWS: u32 = 64;
/// Rows of a tile.
override TILE: u32 = 16;

const MOST_WIDTH = 8u;

var<workgroup> first_tile: array<vec4<f32>, TILE * WIDTH * PARTS>; // of k, or of q times the scale
var<workgroup> second_tile: array<vec4<f32>, TILE * WIDTH * PARTS>; // of v, or of dout
var<workgroup> row_tile: array<vec2<f32>, TILE>; // lse and D of the queries of a tile
var<workgroup> parts: array<vec2<f32>, TILE * ROWS * PARTS>;

var<private> first_own: array<vec4<f32>, MOST_WIDTH>;
var<private> second_own: array<vec4<f32>, MOST_WIDTH>;

/// (own · first, own · second) of a row of the tile, over the columns of a part.
fn products(j: u32, part: u32) -> vec2<f32> {
    let place = (j * PARTS + part) * WIDTH;
    var first = vec4<f32>();
    var second = vec4<f32>();
    for (var i = 0u; i < WIDTH; i++) {
        first = fma(first_own[i], first_tile[place + i], first);
        second = fma(second_own[i], second_tile[place + i], second);
    }
    return vec2<f32>((first.x + first.y) + (first.z + first.w), (second.x + second.y) + (second.z + second.w));
}

/// The sum over the parts of what each left for row j of the tile.
fn over_parts(j: u32, row: u32) -> vec2<f32> {
    var sum = parts[j * PARTS * ROWS + row];
    for (var part = 1u; part < PARTS; part++) {
        sum += parts[(j * PARTS + part) * ROWS + row];
    }
    return sum;
}

@compute @workgroup_size(ROWS, PARTS)
fn queries(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
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

    var sum: array<vec4<f32>, MOST_WIDTH>;
    var own_inner = vec4<f32>();
    for (var i = 0u; i < WIDTH; i++) {
        var q_four = vec4<f32>();
        var dout_four = vec4<f32>();
        var out_four = vec4<f32>();
        for (var e = 0u; e < 4u; e++) {
            let col = (part * WIDTH + i) * 4u + e;
            if is_query && col < p.head_dim {
                q_four[e] = p.scale * f32(q[at(p.q, row, columns + col)]);
                dout_four[e] = f32(dout[at(p.dout, row, columns + col)]);
                out_four[e] = f32(out[at(p.sixth, row, columns + col)]);
            }
        }
        first_own[i] = q_four;
        second_own[i] = dout_four;
        own_inner = fma(dout_four, out_four, own_inner);
        sum[i] = vec4<f32>();
    }
    var d = (own_inner.x + own_inner.y) + (own_inner.z + own_inner.w);
    if PARTS > 1u {
        parts[part * ROWS + local.x] = vec2<f32>(d);
        workgroupBarrier();
        d = over_parts(0u, local.x).x;
    }
    var own_lse = 0.0;
    if is_query {
        own_lse = lse[at(p.lse, row, head)];
        if local.y == 0u {
            inner[at(p.eighth, row, head)] = d;
        }
    }

    let end = first_position + tile.count;
    let oldest = select(first_position - min(p.window - 1u, first_position), 0u, p.window == 0u);
    for (var start = oldest / TILE * TILE; start < end; start += TILE) {
        workgroupBarrier();
        for (var i = local.y * ROWS + local.x; i < 4u * TILE * WIDTH * PARTS; i += ROWS * PARTS) {
            let at_key = start + i / (4u * WIDTH * PARTS);
            let col = i % (4u * WIDTH * PARTS);
            var of_k = 0.0;
            var of_v = 0.0;
            if at_key < end && col < p.head_dim {
                let key = min(tile.owner.keys + at_key, p.keys - 1u);
                of_k = f32(k[at(p.k, key, key_columns + col)]);
                of_v = f32(v[at(p.v, key, key_columns + col)]);
            }
            first_tile[i / 4u][i % 4u] = of_k;
            second_tile[i / 4u][i % 4u] = of_v;
        }
        workgroupBarrier();

        for (var j = 0u; j < TILE; j++) {
            parts[(j * PARTS + part) * ROWS + local.x] = products(j, part);
        }
        if PARTS > 1u {
            workgroupBarrier();
        }
        for (var j = 0u; j < TILE; j++) {
            let both = over_parts(j, local.x);
            let ds = select(0.0, exp(both.x - own_lse) * (both.y - d), is_query && sees(start + j, position, p.window));
            for (var i = 0u; i < WIDTH; i++) {
                sum[i] = fma(vec4<f32>(ds), first_tile[(j * PARTS + part) * WIDTH + i], sum[i]);
            }
        }
    }

    if is_query {
        for (var i = 0u; i < WIDTH; i++) {
            for (var e = 0u; e < 4u; e++) {
                let col = (part * WIDTH + i) * 4u + e;
                if col < p.head_dim {
                    dq[at(p.seventh, row, columns + col)] = Value(p.scale * sum[i][e]);
                }
            }
        }
    }
}

@compute @workgroup_size(ROWS, PARTS)
fn keys(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let tile = key_rows(ROWS, group.x);
    if tile.count == 0u {
        return;
    }
    let key_head = group.y;
    let part = select(local.y, 0u, PARTS == 1u);
    let row = tile.row + local.x;
    let is_key = local.x < tile.count;
    let position = tile.first + local.x;
    let key_columns = key_head * p.head_dim;

    var k_sum: array<vec4<f32>, MOST_WIDTH>;
    var v_sum: array<vec4<f32>, MOST_WIDTH>;
    for (var i = 0u; i < WIDTH; i++) {
        var k_four = vec4<f32>();
        var v_four = vec4<f32>();
        for (var e = 0u; e < 4u; e++) {
            let col = (part * WIDTH + i) * 4u + e;
            if is_key && col < p.head_dim {
                k_four[e] = f32(k[at(p.k, row, key_columns + col)]);
                v_four[e] = f32(v[at(p.v, row, key_columns + col)]);
            }
        }
        first_own[i] = k_four;
        second_own[i] = v_four;
        k_sum[i] = vec4<f32>();
        v_sum[i] = vec4<f32>();
    }

    // Queries, counted from the segment's first row: from the one that sits on the first key to the last that sees the last.
    let past = tile.owner.past;
    let begin = max(tile.first, past) - past;
    let after = tile.first + tile.count + p.window;
    let end = select(min(tile.owner.len, max(after, past + 1u) - past - 1u), tile.owner.len, p.window == 0u);
    for (var member = 0u; member < p.group; member++) {
        let head = key_head * p.group + member;
        let columns = head * p.head_dim;
        for (var start = begin / TILE * TILE; start < end; start += TILE) {
            workgroupBarrier();
            for (var i = local.y * ROWS + local.x; i < 4u * TILE * WIDTH * PARTS; i += ROWS * PARTS) {
                let query = start + i / (4u * WIDTH * PARTS);
                let col = i % (4u * WIDTH * PARTS);
                var of_q = 0.0;
                var of_dout = 0.0;
                if query < end && col < p.head_dim {
                    of_q = p.scale * f32(q[at(p.q, tile.owner.start + query, columns + col)]);
                    of_dout = f32(dout[at(p.dout, tile.owner.start + query, columns + col)]);
                }
                first_tile[i / 4u][i % 4u] = of_q;
                second_tile[i / 4u][i % 4u] = of_dout;
            }
            for (var i = local.y * ROWS + local.x; i < TILE; i += ROWS * PARTS) {
                if start + i < end {
                    let query = tile.owner.start + start + i;
                    row_tile[i] = vec2<f32>(lse[at(p.lse, query, head)], given_inner[at(p.sixth, query, head)]);
                }
            }
            workgroupBarrier();

            for (var j = 0u; j < TILE; j++) {
                parts[(j * PARTS + part) * ROWS + local.x] = products(j, part);
            }
            if PARTS > 1u {
                workgroupBarrier();
            }
            for (var j = 0u; j < TILE; j++) {
                let both = over_parts(j, local.x);
                let seen = is_key && start + j < end && sees(position, start + j + past, p.window);
                let probability = select(0.0, exp(both.x - row_tile[j].x), seen);
                let ds = select(0.0, probability * (both.y - row_tile[j].y), seen);
                for (var i = 0u; i < WIDTH; i++) {
                    let place = (j * PARTS + part) * WIDTH + i;
                    k_sum[i] = fma(vec4<f32>(ds), first_tile[place], k_sum[i]);
                    v_sum[i] = fma(vec4<f32>(probability), second_tile[place], v_sum[i]);
                }
            }
        }
    }

    if is_key {
        for (var i = 0u; i < WIDTH; i++) {
            for (var e = 0u; e < 4u; e++) {
                let col = (part * WIDTH + i) * 4u + e;
                if col < p.head_dim {
                    dk[at(p.seventh, row, key_columns + col)] = Value(k_sum[i][e]);
                    dv[at(p.eighth, row, key_columns + col)] = Value(v_sum[i][e]);
                }
            }
        }
    }
}
