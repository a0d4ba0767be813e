// dweight[ids[t]] += dout[t], in the order of the rows.
//
// A workgroup of 64 columns at a time belongs to one token. The first token of an id adds all of them, so that each row
// of dweight has one writer and one order; the others leave. A dweight that is larger than a binding comes in parts of
// `count` rows from row `first` on.

struct Parameters {
    ids: vec2<u32>,
    dout: vec2<u32>,
    dweight: vec2<u32>,
    first: u32,
    count: u32,
    tokens: u32,
    hidden: u32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>; // [1, tokens]
@group(0) @binding(1) var<storage, read> dout: array<Value>; // [tokens, hidden]
@group(0) @binding(2) var<storage, read_write> dweight: array<f32>; // [count, hidden]: the part
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(64)
fn embed_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var token = group.x; token < p.tokens; token += groups.x) {
        let id = ids[p.ids.x + token];
        // An id below `first` wraps to a number past every count.
        var mine = id - p.first < p.count;
        for (var before = 0u; mine && before < token; before++) {
            mine = ids[p.ids.x + before] != id;
        }
        for (var other = token; mine && other < p.tokens; other++) {
            if ids[p.ids.x + other] == id {
                for (var col = lane; col < p.hidden; col += 64u) {
                    dweight[at(p.dweight, id - p.first, col)] += f32(dout[at(p.dout, other, col)]);
                }
            }
        }
    }
}
