// Which rows belong to which sequence: what shaders over segments begin with, after the prelude. Such a shader binds the
// table of segments `[capacity, 5]` u32 as `segments`; rows of it past the last segment have length 0.
//
// The table is data, so nothing of it is trusted: rows are cut to `tokens`, and who uses a slot or a key's row cuts it to
// what there is.

/// Rows `start..start + len` of one sequence, which has seen `past` tokens and owns `slot`; its first key lies in row `keys`
/// where keys lie one segment after the other.
struct Segment {
    start: u32,
    len: u32,
    past: u32,
    slot: u32,
    keys: u32,
}

fn segment(table: vec2<u32>, index: u32, tokens: u32) -> Segment {
    let row = at(table, index, 0u);
    let start = min(segments[row], tokens);
    let len = min(segments[row + 1u], tokens - start);
    return Segment(start, len, min(segments[row + 2u], 0x3fffffffu), segments[row + 3u], segments[row + 4u]);
}

/// A run of rows of one segment.
struct Chunk {
    /// The segment, or the capacity of the table where there is no such chunk.
    index: u32,
    /// First row, counted from the segment's first.
    first: u32,
    /// Rows, at most the length of a chunk.
    count: u32,
    owner: Segment,
}

/// Chunk `wanted` of all: those of `length` rows of the first segment, the last one shorter, then those of the second, ….
fn chunk(table: vec2<u32>, capacity: u32, tokens: u32, length: u32, wanted: u32) -> Chunk {
    var left = wanted;
    for (var i = 0u; i < capacity; i++) {
        let owner = segment(table, i, tokens);
        let chunks = (owner.len + length - 1u) / length;
        if left < chunks {
            let first = left * length;
            return Chunk(i, first, min(owner.len - first, length), owner);
        }
        left -= chunks;
    }
    return Chunk(capacity, 0u, 0u, Segment(0u, 0u, 0u, 0u, 0u));
}

/// Whether the query at a position sees a key: those after position − window, or all up to it with a window of 0.
fn sees(key: u32, position: u32, window: u32) -> bool {
    return key <= position && (window == 0u || key + window > position);
}
