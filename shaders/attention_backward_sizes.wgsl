// What the shaders of attention's backward begin with, after the segments: bindings, sizes, and whose a row of k is. A row of
// q and of its gradients has `head_dim` columns a head; query head h reads key head h / group.

@group(0) @binding(0) var<storage, read> segments: array<u32>; // [capacity, 5]
@group(0) @binding(1) var<storage, read> q: array<Value>; // [tokens, heads·head_dim]
@group(0) @binding(2) var<storage, read> k: array<Value>; // [keys, kv_heads·head_dim]
@group(0) @binding(3) var<storage, read> v: array<Value>; // [keys, kv_heads·head_dim]
@group(0) @binding(4) var<storage, read> lse: array<f32>; // [tokens, heads]
@group(0) @binding(5) var<storage, read> dout: array<Value>; // [tokens, heads·head_dim]

@group(0) @binding(6) var<storage, read> out: array<Value>; // [tokens, heads·head_dim]
@group(0) @binding(7) var<storage, read_write> dq: array<Value>; // [tokens, heads·head_dim]
@group(0) @binding(8) var<storage, read_write> inner: array<f32>; // [tokens, heads]: D, for `keys`

@group(0) @binding(6) var<storage, read> given_inner: array<f32>; // [tokens, heads]: D, from `queries`
@group(0) @binding(7) var<storage, read_write> dk: array<Value>; // [keys, kv_heads·head_dim]
@group(0) @binding(8) var<storage, read_write> dv: array<Value>; // [keys, kv_heads·head_dim]

/// Of both passes: those of `keys` have the places of given_inner, dk and dv for those of out, dq and inner.
struct Parameters {
    segments: vec2<u32>,
    q: vec2<u32>,
    k: vec2<u32>,
    v: vec2<u32>,
    lse: vec2<u32>,
    dout: vec2<u32>,
    sixth: vec2<u32>,
    seventh: vec2<u32>,
    eighth: vec2<u32>,
    capacity: u32,
    tokens: u32,
    /// Query heads of a key head.
    group: u32,
    head_dim: u32,
    /// Rows of k and of v.
    keys: u32,
    /// A query at position p sees the keys after p − window; 0 is none.
    window: u32,
    scale: f32,
}
@group(1) @binding(0) var<uniform> p: Parameters;

/// Some keys of a segment; or rows that are keys of none, and get no gradient.
struct KeyRows {
    /// First row of k, and the segment's key that lies there.
    row: u32,
    first: u32,
    count: u32,
    owner: Segment,
}

/// Run `wanted` of all, each of `length` keys or what is left of a segment's.
fn key_rows(length: u32, wanted: u32) -> KeyRows {
    var left = wanted;
    var rest = 0u;
    for (var i = 0u; i <= p.capacity; i++) {
        var owner = Segment(0u, 0u, 0u, 0u, rest);
        var of_owner = p.keys - rest;
        if i < p.capacity {
            owner = segment(p.segments, i, p.tokens);
            owner.keys = min(owner.keys, p.keys);
            of_owner = min(owner.past + owner.len, p.keys - owner.keys);
            rest = max(rest, owner.keys + of_owner);
        }
        let tiles = (of_owner + length - 1u) / length;
        if left < tiles {
            let first = left * length;
            return KeyRows(owner.keys + first, first, min(of_owner - first, length), owner);
        }
        left -= tiles;
    }
    return KeyRows(0u, 0u, 0u, Segment(0u, 0u, 0u, 0u, 0u));
}
