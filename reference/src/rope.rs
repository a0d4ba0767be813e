//! Rotary position embedding, "rotate half" (Su et al., arXiv:2104.09864, in the layout of transformers' `modeling_llama.py`).

use std::f64::consts::TAU;

use ndarray::{Array2, ArrayView2};

use crate::Real;

/// Frequencies `theta^(-2j / head_dim)` for `j` in `0..head_dim / 2`, in radians a token.
pub fn inv_freq(head_dim: usize, theta: f64) -> Vec<f64> {
    (0..head_dim / 2).map(|j| theta.powf(-2.0 * j as f64 / head_dim as f64)).collect()
}

/// Llama 3's stretching of long wavelengths (`rope_scaling` with `rope_type` "llama3", transformers' `modeling_rope_utils.py`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3Scaling {
    /// `factor`: how much the longest wavelengths are stretched.
    pub factor: f64,
    /// `low_freq_factor`.
    pub low_freq_factor: f64,
    /// `high_freq_factor`.
    pub high_freq_factor: f64,
    /// `original_max_position_embeddings`, in tokens.
    pub original_max_position_embeddings: f64,
}

impl Llama3Scaling {
    /// The scaled frequencies. With the wavelength `w = 2π/f`, the original length `M` and the factors `s`, `low`, `high`:
    /// `f/s` where `w > M/low`, `f` where `w < M/high`, and between them `(1-m)·f/s + m·f` with `m = (M/w - low)/(high - low)`.
    pub fn apply(&self, inv_freq: &[f64]) -> Vec<f64> {
        let length = self.original_max_position_embeddings;
        let scale = |frequency: f64| {
            let wavelength = TAU / frequency;
            if wavelength > length / self.low_freq_factor {
                frequency / self.factor
            } else if wavelength < length / self.high_freq_factor {
                frequency
            } else {
                let mix = (length / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
                (1.0 - mix) * frequency / self.factor + mix * frequency
            }
        };
        inv_freq.iter().map(|&frequency| scale(frequency)).collect()
    }
}

/// Rotates each head of each row by its position.
///
/// x `[tokens, heads * head_dim]`, positions `[tokens]`, inv_freq `[head_dim / 2]` → the same shape as x. With the first half
/// `a` and the second half `b` of a head and the angle `φ = position * inv_freq`: `(a cos φ - b sin φ, b cos φ + a sin φ)`.
/// Angles are taken in f64 whatever `T`, since a position times a frequency leaves f32 no digits at long contexts.
pub fn rope<T: Real>(x: ArrayView2<T>, head_dim: usize, positions: &[u32], inv_freq: &[f64]) -> Array2<T> {
    rotate(x, head_dim, positions, inv_freq, 1.0)
}

/// The inverse rotation, which is also the backward of [`rope`]: give it `dy` for `dx`.
pub fn rope_inverse<T: Real>(y: ArrayView2<T>, head_dim: usize, positions: &[u32], inv_freq: &[f64]) -> Array2<T> {
    rotate(y, head_dim, positions, inv_freq, -1.0)
}

fn rotate<T: Real>(x: ArrayView2<T>, head_dim: usize, positions: &[u32], inv_freq: &[f64], sign: f64) -> Array2<T> {
    let half = head_dim / 2;
    assert_eq!(half * 2, head_dim, "rope: head_dim must be even");
    assert_eq!(half, inv_freq.len(), "rope: one frequency for two dimensions of a head");
    assert_eq!(positions.len(), x.nrows(), "rope: one position a row");
    assert_eq!(x.ncols() % head_dim, 0, "rope: whole heads");
    let mut y = Array2::zeros(x.dim());
    for (t, &position) in positions.iter().enumerate() {
        for head in (0..x.ncols()).step_by(head_dim) {
            for (j, frequency) in inv_freq.iter().enumerate() {
                let (sin, cos) = (sign * f64::from(position) * frequency).sin_cos();
                let (sin, cos) = (T::of(sin), T::of(cos));
                let (first, second) = (head + j, head + half + j);
                y[[t, first]] = x[[t, first]] * cos - x[[t, second]] * sin;
                y[[t, second]] = x[[t, second]] * cos + x[[t, first]] * sin;
            }
        }
    }
    y
}
