// What the shaders of attention begin with, after the segments: the sizes, and where a key lies. A row of q, k, v and out has
// `head_dim` columns a head; query head h reads key head h / group.

@group(0) @binding(0) var<storage, read> segments: array<u32>; // [capacity, 5]
@group(0) @binding(4) var<storage, read> pages: array<u32>; // [slots, pages_a_slot]
@group(0) @binding(6) var<storage, read_write> lse: array<f32>; // [tokens, heads]

struct Parameters {
    segments: vec2<u32>,
    q: vec2<u32>,
    k: vec2<u32>,
    v: vec2<u32>,
    pages: vec2<u32>,
    out: vec2<u32>,
    lse: vec2<u32>,
    capacity: u32,
    tokens: u32,
    heads: u32,
    group: u32,
    head_dim: u32,
    /// Rows of k and of v.
    keys: u32,
    slots: u32,
    pages_a_slot: u32,
    /// Where keys lie in pages, position p of a slot is row `pages[slot, p / page_size]·page_size + p % page_size`; else 0.
    page_size: u32,
    /// A query at position p sees the keys after p − window; 0 is none.
    window: u32,
    /// Whether the log-sum-exp is wanted, 0 or 1.
    has_lse: u32,
    scale: f32,
}
@group(1) @binding(0) var<uniform> p: Parameters;

/// The row of a segment's key.
fn key_row(owner: Segment, position: u32) -> u32 {
    var row = owner.keys + position;
    if p.page_size > 0u {
        let page = min(position / p.page_size, p.pages_a_slot - 1u);
        row = pages[at(p.pages, min(owner.slot, p.slots - 1u), page)] * p.page_size + position % p.page_size;
    }
    return min(row, p.keys - 1u);
}
