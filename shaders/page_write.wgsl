// The row of each token into the page of its slot: position p of slot s goes to row
// `pages[s, p / page_size]·page_size + p % page_size` of out.
//
// What leads outside of a table or of out goes nowhere. Matrices that are larger than a binding come in parts: `count` tokens
// from `first` on, `part_rows` rows of out from `part_first` on. A workgroup takes 64 columns at a time of one token, and
// goes on by the size of the grid.

struct Parameters {
    rows: vec2<u32>,
    segments: vec2<u32>,
    pages: vec2<u32>,
    out: vec2<u32>,
    tokens: u32,
    width: u32,
    capacity: u32,
    slots: u32,
    pages_a_slot: u32,
    page_size: u32,
    total: u32,
    first: u32,
    count: u32,
    part_first: u32,
    part_rows: u32,
}

@group(0) @binding(0) var<storage, read> rows: array<Value>; // [count, width]: the part
@group(0) @binding(1) var<storage, read> segments: array<u32>; // [capacity, 5]
@group(0) @binding(2) var<storage, read> pages: array<u32>; // [slots, pages_a_slot]
@group(0) @binding(3) var<storage, read_write> out: array<Key>; // [part_rows, width]: the part of [total, width]
@group(1) @binding(0) var<uniform> p: Parameters;

/// The row of out that a token goes to, or one past all.
fn place(token: u32) -> u32 {
    for (var i = 0u; i < p.capacity; i++) {
        let owner = segment(p.segments, i, p.tokens);
        let within = token - owner.start;
        if token >= owner.start && within < owner.len {
            let position = owner.past + within;
            let page = position / p.page_size;
            if owner.slot >= p.slots || page >= p.pages_a_slot {
                return p.total;
            }
            let of_pool = pages[at(p.pages, owner.slot, page)];
            if of_pool >= (p.total + p.page_size - 1u) / p.page_size {
                return p.total;
            }
            return min(of_pool * p.page_size + position % p.page_size, p.total);
        }
    }
    return p.total;
}

@compute @workgroup_size(64)
fn page_write(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var token = id.y; token < p.count; token += groups.y) {
        let to_row = place(p.first + token);
        // Below the part's first row this wraps to a number past every count.
        let within = to_row - p.part_first;
        if to_row < p.total && within < p.part_rows {
            for (var col = id.x; col < p.width; col += 64u * groups.x) {
                out[at(p.out, within, col)] = Key(rows[at(p.rows, token, col)]);
            }
        }
    }
}
