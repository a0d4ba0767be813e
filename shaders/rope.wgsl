// Rotary positions, "rotate half", in place: with x1, x2 the halves of a head and a = position·inv_freq[j],
// (x1 cos a − x2 sin a, x2 cos a + x1 sin a); the other way where `inverse`. Source: Su et al., arXiv:2104.09864.
//
// A position times a frequency leaves an f32 no digits at long contexts, and the sine of a driver may be off by 2⁻¹¹. So
// whole turns are taken off in integers, and sine and cosine are polynomials (Cephes). An invocation takes one pair j of
// one token, and all of its heads.

override INVERSE: bool = false;

struct Parameters {
    positions: vec2<u32>,
    inv_freq: vec2<u32>,
    x: vec2<u32>,
    tokens: u32,
    heads: u32,
    half: u32,
}

@group(0) @binding(0) var<storage, read> positions: array<u32>; // [1, tokens]
@group(0) @binding(1) var<storage, read> inv_freq: array<f32>; // [1, half]
@group(0) @binding(2) var<storage, read_write> x: array<Value>; // [tokens, heads·2·half]
@group(1) @binding(0) var<uniform> p: Parameters;

/// The product of two u32: low word, high word.
fn multiply(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return vec2(a * b, (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u));
}

/// The sum of two u32 and its carry.
fn add(a: u32, b: u32) -> vec2<u32> {
    let sum = a + b;
    return vec2(sum, u32(sum < a));
}

/// position·frequency in units of 2⁻³² turns, whole turns taken off. The frequency is m 2^(e − 150) with a mantissa m of
/// 24 bits, and 1 / 2π a whole number of 2⁻⁹⁶; their product, shifted down by 182 − e, is turns in units of 2⁻⁶⁴.
fn turns(position: u32, frequency: f32) -> u32 {
    let bits = bitcast<u32>(frequency);
    let m = (bits & 0x7fffffu) | 0x800000u;
    let low = multiply(m, 0x7f09d5f4u);
    let middle = multiply(m, 0x9391054au);
    let high = multiply(m, 0x28be60dbu);
    let second = add(low.y, middle.x);
    // The high words have 24 bits at most, so that a carry into them is no new one.
    let third = add(middle.y + second.y, high.x);
    var words = array<u32, 7>(low.x, second.x, third.x, high.y + third.y, 0u, 0u, 0u);
    let shift = clamp(182 - i32(bits >> 23u), 32, 127);
    let word = u32(shift) / 32u;
    let bit = u32(shift) % 32u;
    let lower = (words[word] >> bit) | ((words[word + 1u] << 1u) << (31u - bit));
    let upper = (words[word + 1u] >> bit) | ((words[word + 2u] << 1u) << (31u - bit));
    return position * upper + multiply(position, lower).y;
}

/// Sine and cosine of an angle in units of 2⁻³² turns.
fn sine_and_cosine(angle: u32) -> vec2<f32> {
    let quarter = (angle + 0x20000000u) >> 30u;
    // 2π / 2³² of what is left, within ±π/4.
    let r = f32(bitcast<i32>(angle - (quarter << 30u))) * 1.46291808e-9;
    let z = r * r;
    let s = fma(fma(fma(-1.9515296e-4, z, 8.332161e-3), z, -1.6666655e-1), z * r, r);
    let c = fma(fma(fma(2.4433157e-5, z, -1.3887316e-3), z, 4.1666646e-2), z * z, fma(-0.5, z, 1.0));
    let turned = select(vec2(s, c), vec2(c, -s), (quarter & 1u) == 1u);
    return select(turned, -turned, (quarter & 2u) == 2u);
}

@compute @workgroup_size(64)
fn rope(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var token = id.y; token < p.tokens; token += groups.y) {
        for (var j = id.x; j < p.half; j += 64u * groups.x) {
            let of_angle = sine_and_cosine(turns(positions[p.positions.x + token], inv_freq[p.inv_freq.x + j]));
            let s = select(of_angle.x, -of_angle.x, INVERSE);
            let c = of_angle.y;
            for (var head = 0u; head < p.heads; head++) {
                let first = at(p.x, token, head * 2u * p.half + j);
                let second = first + p.half;
                let x1 = f32(x[first]);
                let x2 = f32(x[second]);
                x[first] = Value(x1 * c - x2 * s);
                x[second] = Value(x2 * c + x1 * s);
            }
        }
    }
}
