//! [`Lanes`] as an array, for a machine without the vector instructions that the other files use.

use super::{Kernel, LANES, Lanes, Mask, operators};
use half::{bf16, f16};
use std::array::from_fn;

/// Runs `kernel` with what every machine of this kind has.
#[inline(never)]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Portable>()
}

/// Sixteen lanes in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(from_fn(|i| f(self.0[i], other.0[i])))
    }
    #[inline(always)]
    fn compare(self, other: Self, f: impl Fn(f32, f32) -> bool) -> Bools {
        Bools(from_fn(|i| f(self.0[i], other.0[i])))
    }
    #[inline(always)]
    fn reduce(self, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut x = self.0;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] = f(x[i], x[i + half]);
            }
        }
        x[0]
    }
    #[inline(always)]
    fn add_lanes(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub_lanes(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul_lanes(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div_lanes(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn neg_lanes(self) -> Self {
        self.map(|a| -a)
    }
}

operators!(Portable);

impl Lanes for Portable {
    type Mask = Bools;
    const REGISTERS: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    fn from_array(x: [f32; LANES]) -> Self {
        Self(x)
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        self.0
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(p: *const bf16) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32))
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(p: *const f16) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32))
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(p: *const f32, n: usize) -> Self {
        let mut x = [0.0; LANES];
        // SAFETY: as the caller promises.
        unsafe { p.copy_to_nonoverlapping(x.as_mut_ptr(), n) };
        Self(x)
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, p: *mut f32, n: usize) {
        // SAFETY: as the caller promises.
        unsafe { self.0.as_ptr().copy_to_nonoverlapping(p, n) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Self, c: Self) -> Self {
        Self(from_fn(|i| (-self.0[i]).mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        self.map(f32::abs)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        self.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self) -> Self {
        self.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn floor(self) -> Self {
        self.map(f32::floor)
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, greater)
    }
    #[inline(always)]
    fn scale2(self, n: Self) -> Self {
        // Two products by powers of two, the first of which is exact.
        self.zip(n, |x, n| {
            let n = n as i32;
            let half = n >> 1;
            x * pow2(half) * pow2(n - half)
        })
    }
    #[inline(always)]
    fn split2(self) -> (Self, Self) {
        let (mut mantissa, mut exponent) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..LANES {
            let x = self.0[i];
            let (x, bias) = if x < f32::MIN_POSITIVE { (x * (1u32 << 23) as f32, 150.0) } else { (x, 127.0) };
            exponent[i] = (x.to_bits() >> 23) as f32 - bias;
            mantissa[i] = f32::from_bits(x.to_bits() & 0x007f_ffff | 0x3f80_0000);
        }
        (Self(mantissa), Self(exponent))
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Bools {
        self.compare(other, |a, b| a < b)
    }
    #[inline(always)]
    fn le(self, other: Self) -> Bools {
        self.compare(other, |a, b| a <= b)
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Bools {
        self.compare(other, |a, b| a == b)
    }
    #[inline(always)]
    fn select(mask: Bools, yes: Self, no: Self) -> Self {
        Self(from_fn(|i| if mask.0[i] { yes.0[i] } else { no.0[i] }))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.reduce(|a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.reduce(greater)
    }
    #[inline(always)]
    fn call<K: Kernel>(kernel: K) -> K::Output {
        run(kernel)
    }
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// 2^n for n within the normal exponents.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// One truth value a lane.
#[derive(Clone, Copy)]
pub(super) struct Bools([bool; LANES]);

impl Mask for Bools {
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] & other.0[i]))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(from_fn(|i| self.0[i] | other.0[i]))
    }
    #[inline(always)]
    fn any(self) -> bool {
        self.0.contains(&true)
    }
}
