// What every shader begins with: where a value lies, and elementary functions of f32.
//
// The host puts this file before each shader, and before it one `alias` for each storage type that the shader leaves open
// (`alias Weight = f16;`). Nothing else is added, so a shader is this text and its own.
//
// Laws of all shaders:
// - `@group(0)` holds the op's tensors in the order of its calls of `read` and `write`; `@group(1) @binding(0)` one uniform
//   block `p`: a `vec2<u32>` for each tensor (the place of its first value in the binding, and the values from row to row),
//   then the sizes, then the factors.
// - Sizes were checked by the host, and nothing checks an index again: whatever comes out of a buffer and becomes an index
//   or a bound (ids, segments, pages) is first clamped to what the sizes allow.
// - A workgroup is the unit of a sum; its order is fixed by the sizes. There are no atomics.

/// Where the value of a row and column lies.
fn at(view: vec2<u32>, row: u32, col: u32) -> u32 {
    return view.x + row * view.y + col;
}

/// Whether a number is neither infinite nor NaN, by its bits: a driver may take it for granted.
fn finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

/// 2^n for whole n of -126..=127.
fn power_of_two(n: i32) -> f32 {
    return bitcast<f32>(u32(n + 127) << 23u);
}

/// e^x within 2 ulp: x = n ln 2 + r with |r| ≤ ln 2 / 2, and e^x = 2^n e^r. Polynomial of Cephes (S. L. Moshier). 0 below
/// -104, ∞ above 88.8, NaN of NaN.
fn exponential(x: f32) -> f32 {
    var y = select(x, -104.0, x < -104.0);
    y = select(y, 89.0, y > 89.0);
    let n = round(y * 1.44269504);
    let r = fma(n, 1.9046542e-9, fma(n, -0.693147182, y));
    var q = fma(1.9875691e-4, r, 1.3981999e-3);
    q = fma(q, r, 8.333452e-3);
    q = fma(q, r, 4.1665796e-2);
    q = fma(q, r, 1.6666665e-1);
    q = fma(q, r, 0.5);
    q = fma(q, r * r, r) + 1.0;
    let half = i32(n) / 2;
    return q * power_of_two(half) * power_of_two(i32(n) - half);
}

/// `exponential` of each: a driver's exp may be off by 3 + 2|x| ulp, too much for a gradient that it is a factor of.
fn exponentials(x: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(exponential(x.x), exponential(x.y), exponential(x.z), exponential(x.w));
}

/// ln x within 2 ulp, for x > 0 and not denormal: x = m 2^e with m in [√½, √2). Polynomial of Cephes. ∞ and NaN stay what
/// they are.
fn logarithm(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    var e = f32(i32(bits >> 23u) - 126);
    var m = bitcast<f32>((bits & 0x7fffffu) | 0x3f000000u);
    if m < 0.70710678 {
        m = m + m;
        e = e - 1.0;
    }
    let f = m - 1.0;
    let square = f * f;
    var q = fma(7.0376836e-2, f, -1.151461e-1);
    q = fma(q, f, 1.1676999e-1);
    q = fma(q, f, -1.2420141e-1);
    q = fma(q, f, 1.4249323e-1);
    q = fma(q, f, -1.6668058e-1);
    q = fma(q, f, 2.0000715e-1);
    q = fma(q, f, -2.4999994e-1);
    q = fma(q, f, 3.333333e-1);
    let low = fma(-0.5, square, fma(q * f, square, e * -1.9046542e-9));
    return select(x, fma(e, 0.693147182, f + low), finite(x));
}

/// ln(1 + x) for 0 ≤ x ≤ 1, as well where x is tiny: 2 artanh s with s = x / (2 + x) ≤ 1/3, by its series.
fn logarithm_of_1_plus(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let square = s * s;
    var q = fma(square, 0.0769230769, 0.0909090909);
    q = fma(q, square, 0.111111111);
    q = fma(q, square, 0.142857143);
    q = fma(q, square, 0.2);
    q = fma(q, square, 0.333333333);
    return 2.0 * fma(q * square, s, s);
}

/// 1 / (1 + e^-x), and as well where it is tiny: for a negative x it is e^x / (1 + e^x).
fn sigmoid(x: f32) -> f32 {
    let e = exponential(-abs(x));
    return select(1.0, e, x < 0.0) / (1.0 + e);
}

/// x·sigmoid(x).
fn silu(x: f32) -> f32 {
    return x * sigmoid(x);
}

/// The derivative of silu, σ (1 + x (1 − σ)).
fn silu_derivative(x: f32) -> f32 {
    let s = sigmoid(x);
    return s * fma(x, 1.0 - s, 1.0);
}

/// ln(1 + e^x), the argument itself above 20.
fn softplus(x: f32) -> f32 {
    let soft = max(x, 0.0) + logarithm_of_1_plus(exponential(-abs(x)));
    return select(soft, x, x > 20.0);
}
