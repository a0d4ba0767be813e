//! [`Lanes`] as one AVX-512 register.
//!
//! The intrinsics are unsafe here because their callers are compiled without the features; `run` below is the only way
//! in, and everything between is inlined into it.

use super::{Kernel, LANES, Lanes, Mask, operators};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Runs `kernel` with AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// Sixteen lanes in one register.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Avx512(__m512);

/// A lane-wise intrinsic as a method. Values of `Avx512` exist only inside [`run`].
macro_rules! lanewise {
    ($($name:ident($($other:ident),*) = $intrinsic:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self $(, $other: Self)*) -> Self {
                // SAFETY: the features are there (see the top of the file).
                Self(unsafe { $intrinsic(self.0 $(, $other.0)*) })
            }
        )*
    };
}

impl Avx512 {
    lanewise! {
        add_lanes(other) = _mm512_add_ps;
        sub_lanes(other) = _mm512_sub_ps;
        mul_lanes(other) = _mm512_mul_ps;
        div_lanes(other) = _mm512_div_ps;
    }

    #[inline(always)]
    fn neg_lanes(self) -> Self {
        // SAFETY: the features are there.
        Self(unsafe { _mm512_xor_ps(self.0, _mm512_set1_ps(-0.0)) })
    }

    /// Lanes 0..8 and 8..16.
    #[inline(always)]
    fn halves(self) -> (__m256, __m256) {
        // SAFETY: the features are there.
        unsafe { (_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0)) }
    }
}

operators!(Avx512);

impl Lanes for Avx512 {
    type Mask = Mask512;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: the features are there.
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn from_array(x: [f32; LANES]) -> Self {
        // SAFETY: the array has 16 values.
        Self(unsafe { _mm512_loadu_ps(x.as_ptr()) })
    }
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut x = [0.0; LANES];
        // SAFETY: the array has 16 values.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), self.0) };
        x
    }
    #[inline(always)]
    unsafe fn load_ptr(p: *const f32) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr(p: *const bf16) -> Self {
        // SAFETY: as the caller promises.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_ptr(p: *const f16) -> Self {
        // SAFETY: as the caller promises.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32) {
        // SAFETY: as the caller promises.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first_ptr(p: *const f32, n: usize) -> Self {
        // SAFETY: as the caller promises; a masked load touches the first n values alone.
        Self(unsafe { _mm512_maskz_loadu_ps(first(n), p) })
    }
    #[inline(always)]
    unsafe fn store_first_ptr(self, p: *mut f32, n: usize) {
        // SAFETY: as the caller promises; a masked store touches the first n values alone.
        unsafe { _mm512_mask_storeu_ps(p, first(n), self.0) }
    }

    lanewise! {
        mul_add(b, c) = _mm512_fmadd_ps;
        neg_mul_add(b, c) = _mm512_fnmadd_ps;
        abs() = _mm512_abs_ps;
        sqrt() = _mm512_sqrt_ps;
        round() = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>;
        floor() = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>;
        min(other) = _mm512_min_ps;
        max(other) = _mm512_max_ps;
        scale2(n) = _mm512_scalef_ps;
    }
    #[inline(always)]
    fn split2(self) -> (Self, Self) {
        // SAFETY: the features are there.
        unsafe {
            (Self(_mm512_getmant_ps::<_MM_MANT_NORM_1_2, _MM_MANT_SIGN_SRC>(self.0)), Self(_mm512_getexp_ps(self.0)))
        }
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Mask512 {
        // SAFETY: the features are there.
        Mask512(unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask512 {
        // SAFETY: the features are there.
        Mask512(unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask512 {
        // SAFETY: the features are there.
        Mask512(unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0) })
    }
    #[inline(always)]
    fn select(mask: Mask512, yes: Self, no: Self) -> Self {
        // SAFETY: the features are there.
        Self(unsafe { _mm512_mask_blend_ps(mask.0, no.0, yes.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let (low, high) = self.halves();
        // SAFETY: the features are there.
        super::avx2::sum8(unsafe { _mm256_add_ps(low, high) })
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        let (low, high) = self.halves();
        // SAFETY: the features are there.
        super::avx2::max8(unsafe { _mm256_max_ps(low, high) })
    }
    #[inline(always)]
    fn call<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the features are there.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        // SAFETY: `Avx512` is a transparent `__m512`, and the features are there.
        unsafe { std::mem::transmute(transpose16(std::mem::transmute::<[Self; LANES], [__m512; LANES]>(rows))) }
    }
    #[inline(always)]
    fn sum_each(rows: [Self; LANES]) -> Self {
        let mut registers = [rows[0].0; LANES];
        for (register, row) in registers.iter_mut().zip(rows) {
            *register = row.0;
        }
        // SAFETY: the features are there.
        Self(unsafe { sum16(registers) })
    }
}

/// The tree of [`Lanes::sum`] over 16 rows at once: each level adds halves and puts two rows into one register.
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn sum16(mut r: [__m512; LANES]) -> __m512 {
    // SAFETY: as the caller promises.
    unsafe {
        for i in 0..8 {
            // Rows i, i + 8 by eights.
            let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(r[i], r[i + 8]);
            let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(r[i], r[i + 8]);
            r[i] = _mm512_add_ps(low, high);
        }
        for i in 0..4 {
            // Rows i, i + 8, i + 4, i + 12 by fours.
            let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(r[i], r[i + 4]);
            let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(r[i], r[i + 4]);
            r[i] = _mm512_add_ps(low, high);
        }
        for i in 0..2 {
            // In each quarter rows + 0 and + 2 by twos.
            let low = _mm512_shuffle_ps::<0b01_00_01_00>(r[i], r[i + 2]);
            let high = _mm512_shuffle_ps::<0b11_10_11_10>(r[i], r[i + 2]);
            r[i] = _mm512_add_ps(low, high);
        }
        // In each quarter rows + 0, + 2, + 1, + 3.
        let low = _mm512_shuffle_ps::<0b10_00_10_00>(r[0], r[1]);
        let high = _mm512_shuffle_ps::<0b11_01_11_01>(r[0], r[1]);
        let order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
        _mm512_permutexvar_ps(order, _mm512_add_ps(low, high))
    }
}

/// Pairs of rows, then fours, are interleaved inside the quarters of a register; then quarters move.
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn transpose16(r: [__m512; LANES]) -> [__m512; LANES] {
    // SAFETY: as the caller promises.
    unsafe {
        // Quarter q of fours[4 i + j]: column 4 q + j of rows 4 i to 4 i + 3.
        let mut fours = r;
        for i in (0..LANES).step_by(4) {
            let low = |a, b| _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
            let high = |a, b| _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
            let (a, b) = (low(r[i], r[i + 1]), low(r[i + 2], r[i + 3]));
            let (c, d) = (high(r[i], r[i + 1]), high(r[i + 2], r[i + 3]));
            fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
            fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
        }
        let mut columns = r;
        for j in 0..4 {
            const EVEN: i32 = 0b10_00_10_00;
            const ODD: i32 = 0b11_01_11_01;
            let (top, bottom) = ((fours[j], fours[4 + j]), (fours[8 + j], fours[12 + j]));
            let (a, b) = (_mm512_shuffle_f32x4::<EVEN>(top.0, top.1), _mm512_shuffle_f32x4::<ODD>(top.0, top.1));
            let c = _mm512_shuffle_f32x4::<EVEN>(bottom.0, bottom.1);
            let d = _mm512_shuffle_f32x4::<ODD>(bottom.0, bottom.1);
            columns[j] = _mm512_shuffle_f32x4::<EVEN>(a, c);
            columns[4 + j] = _mm512_shuffle_f32x4::<EVEN>(b, d);
            columns[8 + j] = _mm512_shuffle_f32x4::<ODD>(a, c);
            columns[12 + j] = _mm512_shuffle_f32x4::<ODD>(b, d);
        }
        columns
    }
}

/// The mask of the first `n` lanes, `n` at most 16.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// One bit a lane.
#[derive(Clone, Copy)]
pub(super) struct Mask512(__mmask16);

impl Mask for Mask512 {
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    #[inline(always)]
    fn any(self) -> bool {
        self.0 != 0
    }
}
