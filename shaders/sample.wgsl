// The choice of a token from each row of logits: the largest, the lowest of equals; or the first index, in order, whose
// cumulative probability in softmax(logits / temperature) passes the row's uniform number. Temperature 0 takes the largest.
// NaN is never chosen; a row of nothing else gives 0.
//
// A workgroup of 256 takes a row, and each of its lanes a run of columns that lie together.

const LANES: u32 = 256u;
const LOWEST: f32 = -3.40282347e38;

struct Largest {
    logits: vec2<u32>,
    out: vec2<u32>,
    rows: u32,
    vocabulary: u32,
}

struct Drawn {
    logits: vec2<u32>,
    temperatures: vec2<u32>,
    uniforms: vec2<u32>,
    out: vec2<u32>,
    rows: u32,
    vocabulary: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<Value>; // [rows, vocabulary]
@group(0) @binding(1) var<storage, read_write> largest: array<u32>; // [1, rows]
@group(1) @binding(0) var<uniform> p: Largest;

@group(0) @binding(1) var<storage, read> temperatures: array<f32>; // [1, rows]
@group(0) @binding(2) var<storage, read> uniforms: array<f32>; // [1, rows]
@group(0) @binding(3) var<storage, read_write> drawn: array<u32>; // [1, rows]
@group(1) @binding(0) var<uniform> d: Drawn;

var<workgroup> values: array<f32, LANES>;
var<workgroup> indices: array<u32, LANES>;

/// The index of the largest of a row of logits for each lane, and its value in `values[0]`; `none` where no logit is above
/// -∞.
fn largest_of_row(view: vec2<u32>, row: u32, vocabulary: u32, lane: u32) -> u32 {
    var best = vocabulary;
    var most = 0.0;
    for (var col = lane; col < vocabulary; col += LANES) {
        let logit = f32(logits[at(view, row, col)]);
        if logit >= LOWEST && (best == vocabulary || logit > most) {
            best = col;
            most = logit;
        }
    }
    values[lane] = most;
    indices[lane] = best;
    workgroupBarrier();
    for (var width = LANES / 2u; width > 0u; width /= 2u) {
        if lane < width {
            let other = indices[lane + width];
            let mine = indices[lane];
            let ahead = values[lane + width] > values[lane] || (values[lane + width] == values[lane] && other < mine);
            if other != vocabulary && (mine == vocabulary || ahead) {
                indices[lane] = other;
                values[lane] = values[lane + width];
            }
        }
        workgroupBarrier();
    }
    return indices[0];
}

@compute @workgroup_size(LANES)
fn argmax(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    for (var row = group.x; row < p.rows; row += groups.x) {
        let best = largest_of_row(p.logits, row, p.vocabulary, lane);
        if lane == 0u {
            largest[p.out.x + row] = select(best, 0u, best == p.vocabulary);
        }
        workgroupBarrier();
    }
}

/// The share of a logit before it is divided by the sum, 0 for NaN.
fn mass(logit: f32, most: f32, temperature: f32) -> f32 {
    return select(0.0, exponential((logit - most) / temperature), logit >= LOWEST);
}

@compute @workgroup_size(LANES)
fn sample(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let run = (d.vocabulary + LANES - 1u) / LANES;
    for (var row = group.x; row < d.rows; row += groups.x) {
        let best = largest_of_row(d.logits, row, d.vocabulary, lane);
        let most = values[0];
        let temperature = temperatures[d.temperatures.x + row];
        workgroupBarrier();
        let first = min(lane * run, d.vocabulary);
        let end = min(first + run, d.vocabulary);
        var sum = 0.0;
        if temperature != 0.0 {
            for (var col = first; col < end; col++) {
                sum += mass(f32(logits[at(d.logits, row, col)]), most, temperature);
            }
        }
        values[lane] = sum;
        workgroupBarrier();
        if lane == 0u {
            var token = select(best, 0u, best == d.vocabulary);
            if temperature != 0.0 && best != d.vocabulary {
                var total = 0.0;
                for (var i = 0u; i < LANES; i++) {
                    total += values[i];
                }
                let wanted = uniforms[d.uniforms.x + row] * total;
                // The run in which the sum passes what is wanted, or the last one with any mass.
                var before = 0.0;
                var start = 0.0;
                var chosen = 0u;
                for (var i = 0u; i < LANES; i++) {
                    if values[i] > 0.0 {
                        chosen = i;
                        start = before;
                        if before + values[i] > wanted {
                            break;
                        }
                    }
                    before += values[i];
                }
                var cumulative = start;
                for (var col = chosen * run; col < min((chosen + 1u) * run, d.vocabulary); col++) {
                    let share = mass(f32(logits[at(d.logits, row, col)]), most, temperature);
                    cumulative += share;
                    if share > 0.0 {
                        token = col;
                        if cumulative > wanted {
                            break;
                        }
                    }
                }
            }
            drawn[d.out.x + row] = token;
        }
        workgroupBarrier();
    }
}
