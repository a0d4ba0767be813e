//! [`Lanes`] as four NEON registers. Every aarch64 machine has NEON with fused multiply-add.

use super::{Kernel, LANES, Lanes, Mask, operators};
use half::{bf16, f16};
use std::arch::aarch64::*;

/// Runs `kernel` with NEON.
#[inline(never)]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Neon>()
}

/// Lanes 4i..4i+4 in register i.
#[derive(Clone, Copy)]
pub(super) struct Neon([float32x4_t; 4]);

/// A lane-wise function of four-lane registers as a method.
macro_rules! lanewise {
    ($($name:ident($($other:ident),*) = $f:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self $(, $other: Self)*) -> Self {
                // SAFETY: every aarch64 machine has NEON.
                Self(std::array::from_fn(|i| unsafe { $f(self.0[i] $(, $other.0[i])*) }))
            }
        )*
    };
}

/// A lane-wise comparison as a method.
macro_rules! compare {
    ($($name:ident = $f:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self, other: Self) -> Mask4 {
                // SAFETY: every aarch64 machine has NEON.
                Mask4(std::array::from_fn(|i| unsafe { $f(self.0[i], other.0[i]) }))
            }
        )*
    };
}

impl Neon {
    lanewise! {
        add_lanes(other) = vaddq_f32;
        sub_lanes(other) = vsubq_f32;
        mul_lanes(other) = vmulq_f32;
        div_lanes(other) = vdivq_f32;
        neg_lanes() = vnegq_f32;
    }
}

operators!(Neon);

impl Lanes for Neon {
    type Mask = Mask4;
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: every aarch64 machine has NEON.
        Self([unsafe { vdupq_n_f32(x) }; 4])
    }
    #[inline(always)]
    fn from_array(x: [f32; LANES]) -> Self {
        // SAFETY: the array has 16 values.
        unsafe { Self::load_ptr(x.as_ptr()) }
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut x = [0.0; LANES];
        // SAFETY: the array has 16 values.
        unsafe { self.store_ptr(x.as_mut_ptr()) };
        x
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: as the caller promises.
        Self(std::array::from_fn(|i| unsafe { vld1q_f32(p.add(4 * i)) }))
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(p: *const bf16) -> Self {
        // SAFETY: as the caller promises.
        Self(std::array::from_fn(|i| unsafe {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast::<u16>().add(4 * i))))
        }))
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(p: *const f16) -> Self {
        // SAFETY: as the caller promises.
        Self(std::array::from_fn(|i| unsafe { widen_f16(vld1_u16(p.cast::<u16>().add(4 * i))) }))
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32) {
        for (i, x) in self.0.into_iter().enumerate() {
            // SAFETY: as the caller promises.
            unsafe { vst1q_f32(p.add(4 * i), x) }
        }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(p: *const f32, n: usize) -> Self {
        let mut x = [0.0; LANES];
        // SAFETY: as the caller promises.
        unsafe { p.copy_to_nonoverlapping(x.as_mut_ptr(), n) };
        Self::from_array(x)
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, p: *mut f32, n: usize) {
        // SAFETY: as the caller promises.
        unsafe { self.to_array().as_ptr().copy_to_nonoverlapping(p, n) }
    }

    lanewise! {
        mul_add(b, c) = |a, b, c| vfmaq_f32(c, a, b);
        neg_mul_add(b, c) = |a, b, c| vfmsq_f32(c, a, b);
        abs() = vabsq_f32;
        sqrt() = vsqrtq_f32;
        round() = vrndnq_f32;
        floor() = vrndmq_f32;
        min(other) = |a, b| vbslq_f32(vcltq_f32(a, b), a, b);
        max(other) = |a, b| vbslq_f32(vcgtq_f32(a, b), a, b);
        scale2(n) = scale4;
    }
    #[inline(always)]
    fn split2(self) -> (Self, Self) {
        // SAFETY: every aarch64 machine has NEON.
        let parts = self.0.map(|x| unsafe { split4(x) });
        (Self(parts.map(|(mantissa, _)| mantissa)), Self(parts.map(|(_, exponent)| exponent)))
    }

    compare! {
        lt = vcltq_f32;
        le = vcleq_f32;
        eq = vceqq_f32;
    }
    #[inline(always)]
    fn select(mask: Mask4, yes: Self, no: Self) -> Self {
        // SAFETY: every aarch64 machine has NEON.
        Self(std::array::from_fn(|i| unsafe { vbslq_f32(mask.0[i], yes.0[i], no.0[i]) }))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        reduce(self.to_array(), |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        reduce(self.to_array(), |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn call<K: Kernel>(kernel: K) -> K::Output {
        run(kernel)
    }
}

/// The tree of [`Lanes::sum`].
#[inline(always)]
fn reduce(mut x: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            x[i] = f(x[i], x[i + half]);
        }
    }
    x[0]
}

/// All bits of a lane set where true.
#[derive(Clone, Copy)]
pub(super) struct Mask4([uint32x4_t; 4]);

impl Mask for Mask4 {
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        // SAFETY: every aarch64 machine has NEON.
        Self(std::array::from_fn(|i| unsafe { vandq_u32(self.0[i], other.0[i]) }))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        // SAFETY: every aarch64 machine has NEON.
        Self(std::array::from_fn(|i| unsafe { vorrq_u32(self.0[i], other.0[i]) }))
    }
    #[inline(always)]
    fn any(self) -> bool {
        // SAFETY: every aarch64 machine has NEON.
        self.0.into_iter().any(|mask| unsafe { vmaxvq_u32(mask) } != 0)
    }
}

/// Moves exponent and mantissa to their f32 places and mends the exponent's bias by an exact product, which also
/// normalises denormals; the exponent of infinities and NaN is set again.
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let bits = vmovl_u16(bits);
        let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
        let magnitude = vandq_u32(bits, vdupq_n_u32(0x7fff));
        let special = vandq_u32(vcgeq_u32(magnitude, vdupq_n_u32(0x7c00)), vdupq_n_u32(0x7f80_0000));
        let moved = vreinterpretq_f32_u32(vshlq_n_u32::<13>(magnitude));
        let scaled = vmulq_f32(moved, vdupq_n_f32(f32::from_bits((127 + 112) << 23)));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), special), sign))
    }
}

/// x·2^n as two products by powers of two, the first of which is exact.
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn scale4(x: float32x4_t, n: float32x4_t) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe {
        let n = vcvtq_s32_f32(n);
        let half = vshrq_n_s32::<1>(n);
        vmulq_f32(vmulq_f32(x, pow2(half)), pow2(vsubq_s32(n, half)))
    }
}

/// 2^n for n within the normal exponents.
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn pow2(n: int32x4_t) -> float32x4_t {
    // SAFETY: as the caller promises.
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)))) }
}

/// Mantissa in [1, 2) and exponent; a denormal is scaled up first.
/// # Safety
/// NEON.
#[inline(always)]
unsafe fn split4(x: float32x4_t) -> (float32x4_t, float32x4_t) {
    // SAFETY: as the caller promises.
    unsafe {
        let small = vcltq_f32(x, vdupq_n_f32(f32::MIN_POSITIVE));
        let scaled = vmulq_f32(x, vdupq_n_f32((1u32 << 23) as f32));
        let bits = vreinterpretq_u32_f32(vbslq_f32(small, scaled, x));
        let bias = vbslq_f32(small, vdupq_n_f32(150.0), vdupq_n_f32(127.0));
        let exponent = vsubq_f32(vcvtq_f32_u32(vshrq_n_u32::<23>(bits)), bias);
        let mantissa = vorrq_u32(vandq_u32(bits, vdupq_n_u32(0x007f_ffff)), vdupq_n_u32(0x3f80_0000));
        (vreinterpretq_f32_u32(mantissa), exponent)
    }
}
