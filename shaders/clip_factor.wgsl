// norm = √squared_norm and clip = min(1, max_norm / (norm + 1e-6)) into the control numbers. A norm that is not
// finite makes the clip NaN, so that the update is skipped.
//
// One invocation.

// Columns of the control numbers.
const NORM: u32 = 3u;
const CLIP: u32 = 4u;

struct Parameters {
    squared_norm: vec2<u32>,
    control: vec2<u32>,
    max_norm: f32,
}

@group(0) @binding(0) var<storage, read> squared_norm: array<f32>; // [1, 1]
@group(0) @binding(1) var<storage, read_write> control: array<f32>; // [1, 5]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(1)
fn clip_factor() {
    let squared = squared_norm[p.squared_norm.x];
    var norm = squared;
    // The bits of NaN, whether it is NaN or infinite.
    var clip = bitcast<f32>(bitcast<u32>(squared) | 0x7fc00000u);
    if finite(squared) {
        norm = sqrt(squared);
        clip = min(1.0, p.max_norm / (norm + 1e-6));
    }
    control[p.control.x + NORM] = norm;
    control[p.control.x + CLIP] = clip;
}
