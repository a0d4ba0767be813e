//! Sixteen values at a time along a slice, and sums along it whose shape depends on the length alone.

use super::simd::{LANES, Lanes};

/// The values from `i` on, then zeros where the slice ends within 16.
#[inline(always)]
pub(super) fn load<L: Lanes>(x: &[f32], i: usize) -> L {
    let rest = &x[i..];
    // SAFETY: as many values as are there.
    if rest.len() >= LANES { unsafe { L::load_ptr(rest.as_ptr()) } } else { L::load_first(rest) }
}

/// Writes the values from `i` on, those that the slice has.
#[inline(always)]
pub(super) fn store<L: Lanes>(value: L, x: &mut [f32], i: usize) {
    let rest = &mut x[i..];
    // SAFETY: as many values as are there.
    if rest.len() >= LANES { unsafe { value.store_ptr(rest.as_mut_ptr()) } } else { value.store_first(rest) }
}

/// As [`store`], or added to what is there.
#[inline(always)]
pub(super) fn put<L: Lanes>(value: L, x: &mut [f32], i: usize, add: bool) {
    let value = if add { load::<L>(x, i) + value } else { value };
    store(value, x, i);
}

/// A sum along a row in four chains of 16 lanes: value i goes to lane i % 16 of chain i / 16 % 4.
#[derive(Clone, Copy)]
pub(super) struct Sum<L>([L; 4]);

impl<L: Lanes> Sum<L> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self([L::zero(); 4])
    }

    /// Adds `a·b` of the 16 values from `i` on, `i` a multiple of 16.
    #[inline(always)]
    pub(super) fn mul_add(&mut self, i: usize, a: L, b: L) {
        let chain = &mut self.0[i / LANES % 4];
        *chain = a.mul_add(b, *chain);
    }

    #[inline(always)]
    pub(super) fn total(self) -> f32 {
        let [a, b, c, d] = self.0;
        ((a + b) + (c + d)).sum()
    }
}
