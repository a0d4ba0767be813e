//! [`Lanes`] as two AVX2 registers, with FMA and F16C.
//!
//! The intrinsics are unsafe here because their callers are compiled without the features; `run` below is the only way
//! in, and everything between is inlined into it.

use super::{Kernel, LANES, Lanes, Mask, operators};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Runs `kernel` with AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// A lane-wise intrinsic as a method. Values of `Avx2` exist only inside [`run`].
macro_rules! lanewise {
    ($($name:ident($($other:ident),*) = $intrinsic:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self $(, $other: Self)*) -> Self {
                // SAFETY: the features are there (see the top of the file).
                unsafe { Self($intrinsic(self.0 $(, $other.0)*), $intrinsic(self.1 $(, $other.1)*)) }
            }
        )*
    };
}

impl Avx2 {
    lanewise! {
        add_lanes(other) = _mm256_add_ps;
        sub_lanes(other) = _mm256_sub_ps;
        mul_lanes(other) = _mm256_mul_ps;
        div_lanes(other) = _mm256_div_ps;
    }

    #[inline(always)]
    fn neg_lanes(self) -> Self {
        let sign = Self::splat(-0.0);
        // SAFETY: the features are there.
        unsafe { Self(_mm256_xor_ps(self.0, sign.0), _mm256_xor_ps(self.1, sign.1)) }
    }
}

operators!(Avx2);

impl Lanes for Avx2 {
    type Mask = Mask2;
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: the features are there.
        let x = unsafe { _mm256_set1_ps(x) };
        Self(x, x)
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
        unsafe { Self(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(p: *const bf16) -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self(widen_bf16(p), widen_bf16(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(p: *const f16) -> Self {
        // SAFETY: as the caller promises.
        unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast()))) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe {
            _mm256_storeu_ps(p, self.0);
            _mm256_storeu_ps(p.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(p: *const f32, n: usize) -> Self {
        let (low, high) = first(n);
        // SAFETY: as the caller promises; a masked load touches the first n values alone.
        unsafe { Self(_mm256_maskload_ps(p, low), _mm256_maskload_ps(p.wrapping_add(8), high)) }
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, p: *mut f32, n: usize) {
        let (low, high) = first(n);
        // SAFETY: as the caller promises; a masked store touches the first n values alone.
        unsafe {
            _mm256_maskstore_ps(p, low, self.0);
            _mm256_maskstore_ps(p.wrapping_add(8), high, self.1);
        }
    }

    lanewise! {
        mul_add(b, c) = _mm256_fmadd_ps;
        neg_mul_add(b, c) = _mm256_fnmadd_ps;
        abs() = abs8;
        sqrt() = _mm256_sqrt_ps;
        round() = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>;
        floor() = _mm256_round_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>;
        min(other) = _mm256_min_ps;
        max(other) = _mm256_max_ps;
        scale2(n) = scale8;
    }
    #[inline(always)]
    fn split2(self) -> (Self, Self) {
        // SAFETY: the features are there.
        let ((m0, e0), (m1, e1)) = unsafe { (split8(self.0), split8(self.1)) };
        (Self(m0, m1), Self(e0, e1))
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Mask2 {
        // SAFETY: the features are there.
        unsafe { Mask2(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0), _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, other.1)) }
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask2 {
        // SAFETY: the features are there.
        unsafe { Mask2(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, other.0), _mm256_cmp_ps::<_CMP_LE_OQ>(self.1, other.1)) }
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask2 {
        // SAFETY: the features are there.
        unsafe { Mask2(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0), _mm256_cmp_ps::<_CMP_EQ_OQ>(self.1, other.1)) }
    }
    #[inline(always)]
    fn select(mask: Mask2, yes: Self, no: Self) -> Self {
        // SAFETY: the features are there.
        unsafe { Self(_mm256_blendv_ps(no.0, yes.0, mask.0), _mm256_blendv_ps(no.1, yes.1, mask.1)) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: the features are there.
        sum8(unsafe { _mm256_add_ps(self.0, self.1) })
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: the features are there.
        max8(unsafe { _mm256_max_ps(self.0, self.1) })
    }
    #[inline(always)]
    fn call<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the features are there.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut columns = rows;
        for i in 0..8 {
            // Four blocks of 8 by 8; the two off the diagonal change places.
            columns[i] = Self(rows[i].0, rows[i + 8].0);
            columns[i + 8] = Self(rows[i].1, rows[i + 8].1);
        }
        for half in columns.chunks_exact_mut(8) {
            // Loops, since a closure over registers may be left out of line.
            let (mut low, mut high) = ([half[0].0; 8], [half[0].1; 8]);
            for i in 0..8 {
                (low[i], high[i]) = (half[i].0, half[i].1);
            }
            // SAFETY: the features are there.
            let (low, high) = unsafe { (transpose8(low), transpose8(high)) };
            for i in 0..8 {
                half[i] = Self(low[i], high[i]);
            }
        }
        columns
    }
}

/// Pairs of rows, then fours, are interleaved inside the halves of a register; then halves move.
/// # Safety
/// AVX.
#[inline(always)]
unsafe fn transpose8(r: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: as the caller promises.
    unsafe {
        // Half h of fours[4 i + j]: column 4 h + j of rows 4 i to 4 i + 3.
        let mut fours = r;
        for i in [0, 4] {
            let low = |a, b| _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
            let high = |a, b| _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
            let (a, b) = (low(r[i], r[i + 1]), low(r[i + 2], r[i + 3]));
            let (c, d) = (high(r[i], r[i + 1]), high(r[i + 2], r[i + 3]));
            fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
            fours[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
            fours[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
        }
        let mut columns = r;
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
            columns[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
        }
        columns
    }
}

/// All bits of a lane set where true.
#[derive(Clone, Copy)]
pub(super) struct Mask2(__m256, __m256);

impl Mask for Mask2 {
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        // SAFETY: the features are there.
        unsafe { Self(_mm256_and_ps(self.0, other.0), _mm256_and_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        // SAFETY: the features are there.
        unsafe { Self(_mm256_or_ps(self.0, other.0), _mm256_or_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn any(self) -> bool {
        // SAFETY: the features are there.
        unsafe { _mm256_movemask_ps(_mm256_or_ps(self.0, self.1)) != 0 }
    }
}

/// Sixteen set words and sixteen clear ones: 16 - n words in begins the mask of the first n lanes.
static FIRST: [i32; 32] = {
    let mut words = [0; 32];
    let mut i = 0;
    while i < LANES {
        words[i] = -1;
        i += 1;
    }
    words
};

/// The mask of the first `n` lanes, `n` at most 16.
#[inline(always)]
fn first(n: usize) -> (__m256i, __m256i) {
    let words = &FIRST[LANES - n..][..LANES];
    // SAFETY: 16 words.
    unsafe { (_mm256_loadu_si256(words.as_ptr().cast()), _mm256_loadu_si256(words.as_ptr().add(8).cast())) }
}

/// # Safety
/// AVX2, and 8 readable values at `p`.
#[inline(always)]
unsafe fn widen_bf16(p: *const bf16) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

/// # Safety
/// AVX.
#[inline(always)]
unsafe fn abs8(x: __m256) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
}

/// x·2^n as two products by powers of two, the first of which is exact.
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn scale8(x: __m256, n: __m256) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        _mm256_mul_ps(_mm256_mul_ps(x, pow2(half)), pow2(_mm256_sub_epi32(n, half)))
    }
}

/// 2^n for n within the normal exponents.
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn pow2(n: __m256i) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)))) }
}

/// Mantissa in [1, 2) and exponent; a denormal is scaled up first.
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn split8(x: __m256) -> (__m256, __m256) {
    // SAFETY: as the caller promises.
    unsafe {
        let small = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(f32::MIN_POSITIVE));
        let scaled = _mm256_mul_ps(x, _mm256_set1_ps((1u32 << 23) as f32));
        let bits = _mm256_castps_si256(_mm256_blendv_ps(x, scaled, small));
        let bias = _mm256_blendv_ps(_mm256_set1_ps(127.0), _mm256_set1_ps(150.0), small);
        let exponent = _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32::<23>(bits)), bias);
        let mantissa =
            _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007f_ffff)), _mm256_set1_epi32(0x3f80_0000));
        (_mm256_castsi256_ps(mantissa), exponent)
    }
}

/// The last three levels of [`Lanes::sum`].
#[inline(always)]
pub(super) fn sum8(x: __m256) -> f32 {
    // SAFETY: a caller that has a `__m256` of this module runs inside `run`.
    unsafe {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// The last three levels of [`Lanes::max_lane`].
#[inline(always)]
pub(super) fn max8(x: __m256) -> f32 {
    // SAFETY: a caller that has a `__m256` of this module runs inside `run`.
    unsafe {
        let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
    }
}
