//! What the tests of all ops share: noise, awkward sizes, and the certificate of a gradient.

use ndarray::{Array, Dimension, ShapeBuilder};
use proptest::prelude::*;

use crate::Segment;

/// Numbers that depend on the seed alone (SplitMix64).
pub struct Noise(pub u64);

impl Noise {
    /// The next number of [low, high).
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        low + (high - low) * (bits >> 11) as f64 / (1u64 << 53) as f64
    }

    /// An array of [-1.5, 1.5).
    pub fn array<D: Dimension>(&mut self, shape: impl ShapeBuilder<Dim = D>) -> Array<f64, D> {
        self.array_in(shape, -1.5, 1.5)
    }

    /// An array of [low, high).
    pub fn array_in<D: Dimension>(&mut self, shape: impl ShapeBuilder<Dim = D>, low: f64, high: f64) -> Array<f64, D> {
        Array::from_shape_simple_fn(shape, || self.uniform(low, high))
    }

    /// A whole number of 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        self.uniform(0.0, n as f64) as usize
    }
}

/// 1 and the first primes.
pub fn size() -> impl Strategy<Value = usize> {
    prop::sample::select(vec![1, 2, 3, 5])
}

/// Up to four segments end to end, some empty, some with a past.
pub fn segments() -> impl Strategy<Value = Vec<Segment>> {
    let lengths = prop::sample::select(vec![0, 1, 2, 3, 7]);
    prop::collection::vec((lengths, 0..4usize), 1..=4).prop_map(|parts| {
        let mut start = 0;
        let place = |(len, past)| {
            let segment = Segment { start, len, past };
            start += len;
            segment
        };
        parts.into_iter().map(place).collect()
    })
}

/// One sequence from its beginning.
pub fn whole(len: usize) -> Vec<Segment> {
    vec![Segment { start: 0, len, past: 0 }]
}

/// The rows that the segments cover.
pub fn tokens(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.len).sum()
}

/// `Σ output * weights`: what turns an op into a function that has a gradient. Random weights leave no error where to hide.
pub fn project<D: Dimension>(output: &Array<f64, D>, weights: &Array<f64, D>) -> f64 {
    assert_eq!(output.shape(), weights.shape());
    output.iter().zip(weights).map(|(output, weight)| output * weight).sum()
}

fn norm<D: Dimension>(x: &Array<f64, D>) -> f64 {
    x.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Holds `got` to `want` within `tolerance` of the norm of `want`, and of one thousandth where that is smaller.
#[track_caller]
pub fn assert_close<D: Dimension>(what: &str, got: &Array<f64, D>, want: &Array<f64, D>, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{what}: shapes");
    let error = norm(&(got - want));
    assert!(error <= tolerance * norm(want).max(1e-3), "{what}: off by {error:e} of {:e}", norm(want));
}

/// Certifies a gradient of `f` at `at`: central differences of fourth order in f64 agree within 1e-6 of its norm.
#[track_caller]
pub fn assert_gradient<D: Dimension>(
    what: &str,
    at: &Array<f64, D>,
    gradient: &Array<f64, D>,
    f: impl Fn(&Array<f64, D>) -> f64,
) {
    const STEP: f64 = 1e-3;
    let mut x = at.as_standard_layout().into_owned();
    let mut value = |index: usize, by: f64| {
        let centre = x.as_slice_mut().unwrap()[index];
        x.as_slice_mut().unwrap()[index] = centre + by;
        let value = f(&x);
        x.as_slice_mut().unwrap()[index] = centre;
        value
    };
    let mut difference = |index| {
        let (near, far) =
            (value(index, STEP) - value(index, -STEP), value(index, 2.0 * STEP) - value(index, -2.0 * STEP));
        (8.0 * near - far) / (12.0 * STEP)
    };
    let differences = (0..at.len()).map(&mut difference).collect();
    let differences = Array::from_shape_vec(at.raw_dim(), differences).unwrap();
    assert_close(what, gradient, &differences, 1e-6);
}
