//! Elementary functions of [`Lanes`], ours so that their bits are the same on every machine.
//!
//! Each is a fixed chain of lane-wise operations that round once (exponent and mantissa arithmetic is exact). Errors are in units in
//! the last place of the exact result; `tests` holds them. The polynomials are those of the Cephes library (S. L. Moshier),
//! evaluated with fused multiply-adds.

use super::simd::{Lanes, Mask};
use std::f32::consts::{FRAC_2_PI, LOG2_E};

#[cfg(test)]
mod tests;

/// ln 2 as the sum of two f32, nearest first.
const LN_2: [f32; 2] = [std::f32::consts::LN_2, -1.904_654_2e-9];
/// π/2 as the sum of three f32, nearest first.
const FRAC_PI_2: [f32; 3] = [std::f32::consts::FRAC_PI_2, -4.371_139e-8, -1.715_124_5e-15];

/// Horner's rule, the highest coefficient first.
#[inline(always)]
fn polynomial<L: Lanes, const N: usize>(x: L, coefficients: [f32; N]) -> L {
    let mut sum = L::splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = sum.mul_add(x, L::splat(c));
    }
    sum
}

/// e^x, within 1 ulp (denormal results included); 0 and ∞ beyond the range, NaN of NaN.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2, and e^x = 2^n e^r.
#[inline(always)]
pub fn exp<L: Lanes>(x: L) -> L {
    // In this order a NaN passes both bounds. The bounds themselves give 0 and ∞.
    let x = L::splat(-104.0).max(x);
    let x = L::splat(89.0).min(x);
    let n = (x * L::splat(LOG2_E)).round();
    let r = n.neg_mul_add(L::splat(LN_2[0]), x);
    let r = n.neg_mul_add(L::splat(LN_2[1]), r);
    let p = polynomial(r, [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
    let p = p.mul_add(r * r, r) + L::splat(1.0);
    p.scale2(n)
}

/// ln u + c for u > 0 and a small c, by u = m 2^e with m in [√½, √2); and the special values of ln u.
#[inline(always)]
fn ln_plus<L: Lanes>(u: L, c: L) -> L {
    let one = L::splat(1.0);
    let (m, e) = u.split2();
    let large = L::splat(std::f32::consts::SQRT_2).le(m);
    let m = L::select(large, m * L::splat(0.5), m);
    let e = L::select(large, e + one, e);
    let f = m - one;
    let square = f * f;
    let p = polynomial(
        f,
        [
            7.037_683_6e-2,
            -1.151_461e-1,
            1.167_699_9e-1,
            -1.242_014_1e-1,
            1.424_932_3e-1,
            -1.666_805_8e-1,
            2.000_071_5e-1,
            -2.499_999_4e-1,
            3.333_333e-1,
        ],
    );
    let low = (p * f).mul_add(square, e.mul_add(L::splat(LN_2[1]), c));
    let low = square.neg_mul_add(L::splat(0.5), low);
    let result = e.mul_add(L::splat(LN_2[0]), f + low);

    let infinity = L::splat(f32::INFINITY);
    let result = L::select(u.lt(infinity), result, infinity);
    let result = L::select(u.eq(L::zero()), -infinity, result);
    L::select(L::zero().le(u), result, L::splat(f32::NAN))
}

/// ln x, within 1 ulp, denormals included; -∞ of 0, NaN below.
#[inline(always)]
pub fn ln<L: Lanes>(x: L) -> L {
    ln_plus(x, L::zero())
}

/// ln(1 + x), within 1 ulp; -∞ of -1, NaN below.
///
/// With u = 1 + x rounded, ln(1 + x) = ln u + (x - (u - 1)) / u, and the difference is exact where it counts.
#[inline(always)]
pub fn log1p<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    let u = one + x;
    let rest = (x - (u - one)) / u;
    // At -1 and ∞ there is no rest.
    let rest = L::select(rest.eq(rest), rest, L::zero());
    ln_plus(u, rest)
}

/// 1 / (1 + e^-x), within 2.5 ulp, and as well where it is tiny: for a negative x it is e^x / (1 + e^x).
#[inline(always)]
pub fn sigmoid<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    let e = exp(-x.abs());
    let numerator = L::select(x.lt(L::zero()), e, one);
    numerator / (one + e)
}

/// x·sigmoid(x), within 3 ulp, or 1e-42 where the sigmoid is denormal.
#[inline(always)]
pub fn silu<L: Lanes>(x: L) -> L {
    x * sigmoid(x)
}

/// d silu(x) / dx = s (1 + x (1 - s)) with s = sigmoid(x).
#[inline(always)]
pub fn silu_derivative<L: Lanes>(x: L) -> L {
    let one = L::splat(1.0);
    let s = sigmoid(x);
    s * x.mul_add(one - s, one)
}

/// ln(1 + e^x), and x itself above 20; within 2 ulp. Its derivative is [`sigmoid`].
#[inline(always)]
pub fn softplus<L: Lanes>(x: L) -> L {
    let twenty = L::splat(20.0);
    L::select(twenty.lt(x), x, log1p(exp(twenty.min(x))))
}

/// (sin x, cos x), each within 1.5 ulp, whatever the size of x; NaN of ±∞.
///
/// x = q π/2 + r with |r| ≤ π/4, and the quadrant q mod 4 says which of ±sin r, ±cos r each is.
#[inline(always)]
pub fn sin_cos<L: Lanes>(x: L) -> (L, L) {
    // Up to here q has few enough bits for the three-part π/2.
    let near = L::splat(262_144.0);
    let q = (x * L::splat(FRAC_2_PI)).round();
    let r = q.neg_mul_add(L::splat(FRAC_PI_2[0]), x);
    let r = q.neg_mul_add(L::splat(FRAC_PI_2[1]), r);
    let r = q.neg_mul_add(L::splat(FRAC_PI_2[2]), r);
    let q = (q * L::splat(0.25)).floor().neg_mul_add(L::splat(4.0), q);
    let far = near.lt(x.abs());
    let (q, r) = if far.any() { reduce_far(x, q, r, near) } else { (q, r) };

    let square = r * r;
    let s = polynomial(square, [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]);
    let s = (s * square).mul_add(r, r);
    let c = polynomial(square, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]);
    let c = c.mul_add(square * square, square.neg_mul_add(L::splat(0.5), L::splat(1.0)));

    let (one, two, three) = (L::splat(1.0), L::splat(2.0), L::splat(3.0));
    let odd = q.eq(one).or(q.eq(three));
    let sin = L::select(odd, c, s);
    let cos = L::select(odd, s, c);
    (L::select(two.le(q), -sin, sin), L::select(q.eq(one).or(q.eq(two)), -cos, cos))
}

/// Puts the exact quadrant and rest into the lanes beyond `near`.
#[inline(always)]
fn reduce_far<L: Lanes>(x: L, q: L, r: L, near: L) -> (L, L) {
    let (x, mut q, mut r, near) = (x.to_array(), q.to_array(), r.to_array(), near.to_array()[0]);
    for i in 0..x.len() {
        if near < x[i].abs() {
            (q[i], r[i]) = reduce(x[i]);
        }
    }
    (L::from_array(q), L::from_array(r))
}

/// Quadrant 0..4 and rest of a large x by integer arithmetic (Payne and Hanek): |x| = m 2^e, and of 2/π only the bits count whose product with
/// m 2^e is below 4.
fn reduce(x: f32) -> (f32, f32) {
    // 32 zeros, then the first bits of 2/π after the point.
    const FRAC_2_PI_BITS: [u32; 8] =
        [0, 0xa2f9_836e, 0x4e44_1529, 0xfc27_57d1, 0xf534_ddc0, 0xdb62_9599, 0x3c43_9041, 0xfe51_63ab];
    if !x.is_finite() {
        return (0.0, f32::NAN);
    }
    let bits = x.abs().to_bits();
    let m = u128::from(bits & 0x007f_ffff | 0x0080_0000);
    let e = (bits >> 23) as i32 - 150;
    // The first bit kept has weight 2 after the product with 2^e.
    let start = (e + 30) as usize;
    let (word, shift) = (start / 32, start % 32);
    let window = FRAC_2_PI_BITS[word..word + 4].iter().fold(0, |w, &b| w << 32 | u128::from(b));
    let window = (window << shift) >> 32;
    let turns = (m * window) & ((1 << 96) - 1);
    // Two bits of quadrant, 94 of the fraction; round to the nearest quadrant.
    let q = ((turns + (1 << 93)) >> 94) as i32;
    let rest = (turns as i128 - ((q as i128) << 94)) as f64 * (std::f64::consts::FRAC_PI_2 / (1u128 << 94) as f64);
    let (q, rest) = if x < 0.0 { (-q, -rest) } else { (q, rest) };
    (q.rem_euclid(4) as f32, rest as f32)
}
