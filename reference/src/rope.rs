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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    const THETA: f64 = 1e4;

    fn positions(noise: &mut Noise, tokens: usize) -> Vec<u32> {
        (0..tokens).map(|_| noise.below(5000) as u32).collect()
    }

    proptest! {
        #[test]
        fn inverse_is_the_gradient_and_undoes_the_rotation(tokens in 0..4usize, heads in size(), half in size(), seed: u64) {
            let mut noise = Noise(seed);
            let (head_dim, width) = (2 * half, heads * 2 * half);
            let (frequencies, positions) = (inv_freq(head_dim, THETA), positions(&mut noise, tokens));
            let (x, dy) = (noise.array((tokens, width)), noise.array((tokens, width)));
            let forward = |x: &Array2<f64>| rope(x.view(), head_dim, &positions, &frequencies);
            let backward = |y: &Array2<f64>| rope_inverse(y.view(), head_dim, &positions, &frequencies);
            assert_gradient("dx", &x, &backward(&dy), |x| project(&forward(x), &dy));
            assert_close("x", &backward(&forward(&x)), &x, 1e-12);
        }

        #[test]
        fn norms_stay_and_products_depend_on_relative_positions_only(half in size(), shift in 1..1000u32, seed: u64) {
            let mut noise = Noise(seed);
            let (head_dim, tokens) = (2 * half, 3);
            let (frequencies, positions) = (inv_freq(head_dim, THETA), positions(&mut noise, tokens));
            let shifted: Vec<u32> = positions.iter().map(|position| position + shift).collect();
            let x = noise.array((tokens, head_dim));
            let products = |positions: &[u32]| {
                let y = rope(x.view(), head_dim, positions, &frequencies);
                y.dot(&y.t())
            };
            assert_close("products", &products(&shifted), &products(&positions), 1e-10);
            assert_close("norms", &products(&positions).diag().to_owned(), &x.dot(&x.t()).diag().to_owned(), 1e-12);
        }

        #[test]
        fn position_zero_changes_nothing(tokens in size(), half in size(), seed: u64) {
            let x = Noise(seed).array((tokens, 2 * half));
            let y = rope(x.view(), 2 * half, &vec![0; tokens], &inv_freq(2 * half, THETA));
            assert_eq!(y, x);
        }

        #[test]
        fn llama3_scaling_keeps_short_waves_stretches_long_ones_and_falls_between(half in size(), factor in 1.0..32.0) {
            let scaling = Llama3Scaling {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 512.0,
            };
            let plain = inv_freq(2 * half + 32, 5e5);
            let scaled = scaling.apply(&plain);
            for (&plain, &scaled) in plain.iter().zip(&scaled) {
                let wavelength = TAU / plain;
                if wavelength > 512.0 {
                    assert_eq!(scaled, plain / factor);
                } else if wavelength < 128.0 {
                    assert_eq!(scaled, plain);
                } else {
                    assert!(plain / factor <= scaled * (1.0 + 1e-12) && scaled <= plain * (1.0 + 1e-12));
                }
            }
            assert!(scaled.windows(2).all(|pair| pair[0] > pair[1]), "frequencies stay in order");
        }
    }

    #[test]
    fn llama3_scaling_mixes_evenly_in_the_middle_and_has_no_jump() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 512.0,
        };
        let scaled = |wavelength: f64| scaling.apply(&[TAU / wavelength])[0] * wavelength / TAU;
        // Halfway between the factors, M / w = 2.5: the mean of f / 8 and f.
        assert!((scaled(512.0 / 2.5) - 0.5625).abs() < 1e-12);
        for edge in [128.0, 512.0] {
            assert!((scaled(edge * (1.0 + 1e-9)) - scaled(edge * (1.0 - 1e-9))).abs() < 1e-7);
        }
    }

    #[test]
    fn frequencies_fall_geometrically_from_one() {
        let frequencies = inv_freq(8, 1e4);
        for (got, want) in frequencies.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - want).abs() < 1e-15, "{got} {want}");
        }
        assert_eq!(frequencies.len(), 4);
    }

    #[test]
    fn a_quarter_turn_takes_the_first_half_to_the_second() {
        let y = rope(ndarray::array![[1.0f64, 0.0]].view(), 2, &[1], &[TAU / 4.0]);
        assert!(y[[0, 0]].abs() < 1e-15 && (y[[0, 1]] - 1.0).abs() < 1e-15);
    }
}
