// One AdamW update over a range: with g = clip·grad, p ← p (1 − lr·weight_decay), m ← β₁m + (1 − β₁) g,
// v ← β₂v + (1 − β₂) g², p ← p − lr (m / correction1) / (√(v / correction2) + eps). Nothing changes when one of the control
// numbers is not finite. Source: Loshchilov and Hutter, arXiv:1711.05101.
//
// A workgroup takes 256 values at a time, and goes on by the size of the grid.

override STORED: bool = false;

const LANES: u32 = 256u;

struct Parameters {
    grad: vec2<u32>,
    control: vec2<u32>,
    param: vec2<u32>,
    moment1: vec2<u32>,
    moment2: vec2<u32>,
    stored: vec2<u32>,
    n: u32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
}

@group(0) @binding(0) var<storage, read> grad: array<f32>; // [1, n]
@group(0) @binding(1) var<storage, read> control: array<f32>; // [1, 5]: lr, correction1, correction2, norm, clip
@group(0) @binding(2) var<storage, read_write> param: array<f32>; // [1, n]
@group(0) @binding(3) var<storage, read_write> moment1: array<f32>; // [1, n]
@group(0) @binding(4) var<storage, read_write> moment2: array<f32>; // [1, n]
@group(0) @binding(5) var<storage, read_write> stored: array<Weight>; // [1, n]
@group(1) @binding(0) var<uniform> p: Parameters;

@compute @workgroup_size(LANES)
fn adamw(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    var sound = true;
    for (var i = 0u; i < 5u; i++) {
        sound = sound && finite(control[p.control.x + i]);
    }
    if !sound {
        return;
    }
    let lr = control[p.control.x];
    let correction1 = control[p.control.x + 1u];
    let correction2 = control[p.control.x + 2u];
    let clip = control[p.control.x + 4u];
    for (var i = id.x; i < p.n; i += groups.x * LANES) {
        let g = clip * grad[p.grad.x + i];
        let m = fma(p.beta1, moment1[p.moment1.x + i], (1.0 - p.beta1) * g);
        let v = fma(p.beta2, moment2[p.moment2.x + i], (1.0 - p.beta2) * g * g);
        let decayed = param[p.param.x + i] * (1.0 - lr * p.weight_decay);
        let updated = decayed - lr * (m / correction1) / (sqrt(v / correction2) + p.eps);
        moment1[p.moment1.x + i] = m;
        moment2[p.moment2.x + i] = v;
        param[p.param.x + i] = updated;
        if STORED {
            stored[p.stored.x + i] = Weight(updated);
        }
    }
}
