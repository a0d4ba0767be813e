//! Sixteen f32 lanes on every machine, and the choice of instructions made once.
//!
//! A kernel is written once, generic over [`Lanes`], as the [`Kernel::run`] of a small struct of its arguments.
//! [`Simd::run`] instantiates it for each instruction set and calls the one that the machine has. A value always has 16
//! lanes (one AVX-512 register, two of AVX2, four of NEON), every operation acts lane by lane and rounds once, and
//! the horizontal ones have one fixed tree, so a kernel's bits do not depend on the instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;

use half::{bf16, f16};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// The number of lanes of every [`Lanes`].
pub const LANES: usize = 16;

/// Sixteen f32 values. NaN payloads and signs are the only bits that may differ between instruction sets.
pub trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// One truth value a lane.
    type Mask: Mask;
    /// How many values the register file holds, for the choice of a register tile.
    const REGISTERS: usize;

    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// Lane i from `x[i]`.
    fn from_array(x: [f32; LANES]) -> Self;
    /// `x[i]` from lane i.
    fn to_array(self) -> [f32; LANES];

    /// The 16 values at `p`.
    /// # Safety
    /// 16 values at `p` are readable; no alignment is needed.
    unsafe fn load_ptr(p: *const f32) -> Self;
    /// The 16 bf16 values at `p`, widened.
    /// # Safety
    /// 16 values at `p` are readable; no alignment is needed.
    unsafe fn load_bf16_ptr(p: *const bf16) -> Self;
    /// The 16 f16 values at `p`, widened.
    /// # Safety
    /// 16 values at `p` are readable; no alignment is needed.
    unsafe fn load_f16_ptr(p: *const f16) -> Self;
    /// Writes the 16 values to `p`.
    /// # Safety
    /// 16 values at `p` are writable; no alignment is needed.
    unsafe fn store_ptr(self, p: *mut f32);
    /// The `n` values at `p`, then zeros.
    /// # Safety
    /// `n` is at most 16 and `n` values at `p` are readable.
    unsafe fn load_first_ptr(p: *const f32, n: usize) -> Self;
    /// Writes the first `n` lanes to `p`.
    /// # Safety
    /// `n` is at most 16 and `n` values at `p` are writable.
    unsafe fn store_first_ptr(self, p: *mut f32, n: usize);

    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// The absolute value.
    fn abs(self) -> Self;
    /// The correctly rounded square root.
    fn sqrt(self) -> Self;
    /// The nearest integer, ties to even.
    fn round(self) -> Self;
    /// The greatest integer not above.
    fn floor(self) -> Self;
    /// `if self < other { self } else { other }`: a NaN in either gives `other`.
    fn min(self, other: Self) -> Self;
    /// `if self > other { self } else { other }`: a NaN in either gives `other`.
    fn max(self, other: Self) -> Self;
    /// `self * 2^n`, rounded once, for `self` in [0.5, 2] and an integral `n` within ±250 (or a NaN in either).
    fn scale2(self, n: Self) -> Self;
    /// `(m, e)` with `self = m * 2^e` and m in [1, 2). Unspecified lanes where `self` is not positive and finite.
    fn split2(self) -> (Self, Self);

    /// `self < other`.
    fn lt(self, other: Self) -> Self::Mask;
    /// `self <= other`.
    fn le(self, other: Self) -> Self::Mask;
    /// `self == other`.
    fn eq(self, other: Self) -> Self::Mask;
    /// `if mask { yes } else { no }`.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;

    /// The sum of the lanes: i with i + 8, then + 4, + 2, + 1.
    fn sum(self) -> f32;
    /// The largest lane, by the same tree of [`Lanes::max`].
    fn max_lane(self) -> f32;
    /// Runs `kernel` with this instruction set, out of line: for a large body with many callers.
    fn call<K: Kernel>(kernel: K) -> K::Output;
    /// Lane j of value i becomes lane i of value j.
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let rows = rows.map(Self::to_array);
        std::array::from_fn(|j| Self::from_array(std::array::from_fn(|i| rows[i][j])))
    }
    /// Lane i is [`Lanes::sum`] of value i.
    #[inline(always)]
    fn sum_each(rows: [Self; LANES]) -> Self {
        let mut x = Self::transpose(rows);
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                x[i] = x[i] + x[i + half];
            }
        }
        x[0]
    }

    /// All lanes zero.
    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }
    /// The first 16 values of `x`; panics on a shorter slice.
    #[inline(always)]
    fn load(x: &[f32]) -> Self {
        let x = &x[..LANES];
        // SAFETY: `x` has 16 values.
        unsafe { Self::load_ptr(x.as_ptr()) }
    }
    /// Writes to the first 16 values of `x`; panics on a shorter slice.
    #[inline(always)]
    fn store(self, x: &mut [f32]) {
        let x = &mut x[..LANES];
        // SAFETY: `x` has 16 values.
        unsafe { self.store_ptr(x.as_mut_ptr()) }
    }
    /// The first 16 values of `x`, or all of a shorter slice and then zeros.
    #[inline(always)]
    fn load_first(x: &[f32]) -> Self {
        // SAFETY: no more values than the slice has.
        unsafe { Self::load_first_ptr(x.as_ptr(), x.len().min(LANES)) }
    }
    /// Writes to the first 16 values of `x`, or to all of a shorter slice.
    #[inline(always)]
    fn store_first(self, x: &mut [f32]) {
        // SAFETY: no more values than the slice has.
        unsafe { self.store_first_ptr(x.as_mut_ptr(), x.len().min(LANES)) }
    }
}

/// One truth value a lane.
pub trait Mask: Copy {
    /// Where both are true.
    fn and(self, other: Self) -> Self;
    /// Where either is true.
    fn or(self, other: Self) -> Self;
    /// Whether any lane is true.
    fn any(self) -> bool;
}

/// A storage type that widens exactly to f32 as it is loaded.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Whether nothing is to be widened.
    const IS_F32: bool;
    /// The 16 values at `p`, widened.
    /// # Safety
    /// 16 values at `p` are readable; no alignment is needed.
    unsafe fn load_ptr<L: Lanes>(p: *const Self) -> L;
    /// The value itself, widened.
    fn widen(self) -> f32;
}

impl Element for f32 {
    const IS_F32: bool = true;
    #[inline(always)]
    unsafe fn load_ptr<L: Lanes>(p: *const f32) -> L {
        // SAFETY: as the caller promises.
        unsafe { L::load_ptr(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;
    #[inline(always)]
    unsafe fn load_ptr<L: Lanes>(p: *const bf16) -> L {
        // SAFETY: as the caller promises.
        unsafe { L::load_bf16_ptr(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f16 {
    const IS_F32: bool = false;
    #[inline(always)]
    unsafe fn load_ptr<L: Lanes>(p: *const f16) -> L {
        // SAFETY: as the caller promises.
        unsafe { L::load_f16_ptr(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// A computation written once over lanes. Its struct holds the arguments.
pub trait Kernel {
    /// What the computation gives.
    type Output;
    /// The computation. Must be `#[inline(always)]`, and so must every generic function that it calls: only then is it
    /// compiled with the instruction set of its caller.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

impl Simd {
    /// The widest instruction set of this machine.
    pub fn detect() -> Simd {
        let mut best = Simd(Level::Portable);
        Simd::each(|simd| {
            if best.0 == Level::Portable {
                best = simd;
            }
        });
        best
    }

    /// Every instruction set of this machine, the widest first.
    pub fn all() -> Vec<Simd> {
        let mut all = Vec::new();
        Simd::each(|simd| all.push(simd));
        all
    }

    fn each(mut f: impl FnMut(Simd)) {
        #[cfg(target_arch = "x86_64")]
        {
            // The standard library caches what it finds, so this costs a few loads.
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                f(Simd(Level::Avx512));
            }
            if avx2 {
                f(Simd(Level::Avx2));
            }
        }
        #[cfg(target_arch = "aarch64")]
        f(Simd(Level::Neon));
        f(Simd(Level::Portable));
    }

    /// The name of the instruction set, for people.
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "NEON",
            Level::Portable => "portable",
        }
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: a `Simd` of this level is made only after the features were found.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::run(kernel) },
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::run(kernel),
            Level::Portable => portable::run(kernel),
        }
    }
}

/// Asks for the cache line at `p`, which need not exist, to be brought into the second-level cache.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program can see, and every x86-64 has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch reads nothing that the program can see.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) p, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// The operators of a `Lanes` type from its inherent `add`, `sub`, `mul`, `div`, `neg`.
macro_rules! operators {
    ($lanes:ty) => {
        impl std::ops::Add for $lanes {
            type Output = Self;
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.add_lanes(other)
            }
        }
        impl std::ops::Sub for $lanes {
            type Output = Self;
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.sub_lanes(other)
            }
        }
        impl std::ops::Mul for $lanes {
            type Output = Self;
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.mul_lanes(other)
            }
        }
        impl std::ops::Div for $lanes {
            type Output = Self;
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                self.div_lanes(other)
            }
        }
        impl std::ops::Neg for $lanes {
            type Output = Self;
            #[inline(always)]
            fn neg(self) -> Self {
                self.neg_lanes()
            }
        }
    };
}
use operators;
