//! Choosing the next token.

use ndarray::{ArrayView1, ArrayView2};

use crate::Real;

/// The index of the largest logit of each row, the lowest where several are equal: logits `[rows, vocab]` → `[rows]`.
/// NaN never wins; a row of nothing else gives 0.
pub fn argmax<T: Real>(logits: ArrayView2<T>) -> Vec<u32> {
    logits.rows().into_iter().map(argmax_of_row).collect()
}

fn argmax_of_row<T: Real>(logits: ArrayView1<T>) -> u32 {
    let (best, _) =
        logits.iter().enumerate().fold(
            (0, T::neg_infinity()),
            |(best, max), (index, &logit)| {
                if logit > max { (index, logit) } else { (best, max) }
            },
        );
    best as u32
}

/// One token a row from `softmax(logits / temperature)`: logits `[rows, vocab]`, temperatures `[rows]`, at least 0, uniforms
/// `[rows]` in [0, 1) → `[rows]`.
///
/// Inverse of the cumulative distribution in the order of indices: the first index whose cumulative probability exceeds the
/// row's uniform number. A row of temperature 0 is its [`argmax`].
pub fn sample<T: Real>(logits: ArrayView2<T>, temperatures: &[T], uniforms: &[T]) -> Vec<u32> {
    let rows = logits.nrows();
    assert!(temperatures.len() == rows && uniforms.len() == rows, "sample: a temperature and a uniform number a row");
    let numbers = temperatures.iter().zip(uniforms);
    logits.rows().into_iter().zip(numbers).map(|(row, (&t, &uniform))| sample_of_row(row, t, uniform)).collect()
}

fn sample_of_row<T: Real>(logits: ArrayView1<T>, temperature: T, uniform: T) -> u32 {
    if temperature == T::zero() {
        return argmax_of_row(logits);
    }
    let max = logits.iter().copied().fold(T::neg_infinity(), T::max);
    let weights: Vec<T> = logits.iter().map(|&logit| ((logit - max) / temperature).exp()).collect();
    let target = uniform * weights.iter().copied().sum::<T>();
    let mut cumulative = T::zero();
    for (index, &weight) in weights.iter().enumerate() {
        cumulative += weight;
        if cumulative > target {
            return index as u32;
        }
    }
    // A uniform number that rounds up to 1 in `T` passes every sum.
    weights.iter().rposition(|&weight| weight > T::zero()).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, array};
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn evenly_spaced_numbers_draw_each_token_as_often_as_its_probability(
            vocab in size(), temperature in 0.3..3.0, seed: u64,
        ) {
            const DRAWS: usize = 1000;
            let row: Array2<f64> = Noise(seed).array((1, vocab));
            let uniform: Vec<f64> = (0..DRAWS).map(|i| (i as f64 + 0.5) / DRAWS as f64).collect();
            let drawn = sample(row.broadcast((DRAWS, vocab)).unwrap(), &[temperature; DRAWS], &uniform);
            assert!(drawn.is_sorted(), "in the order of indices");
            let weights = row.mapv(|logit| (logit / temperature).exp());
            for (token, weight) in weights.iter().enumerate() {
                let count = drawn.iter().filter(|&&drawn| drawn as usize == token).count();
                let want = weight / weights.sum() * DRAWS as f64;
                assert!((count as f64 - want).abs() <= 1.0, "{count} {want}");
            }
        }

        #[test]
        fn temperature_zero_is_argmax_whatever_the_number_and_the_other_rows(
            vocab in size(), uniform in 0.0..1.0, seed: u64,
        ) {
            let logits: Array2<f64> = Noise(seed).array((2, vocab));
            let best = argmax(logits.view());
            assert_eq!(sample(logits.view(), &[0.0, 0.0], &[uniform, 0.0]), best);
            assert_eq!(sample(logits.view(), &[1.0, 0.0], &[uniform, uniform])[1], best[1]);
            for (row, &best) in logits.rows().into_iter().zip(&best) {
                assert!(row.iter().all(|&logit| logit <= row[best as usize]));
            }
        }
    }

    #[test]
    fn the_lowest_index_wins_a_tie() {
        let logits = array![[1.0f32, 3.0, 3.0], [f32::NAN, 2.0, 1.0], [f32::NAN, f32::NAN, f32::NAN]];
        assert_eq!(argmax(logits.view()), [1, 1, 0]);
    }

    #[test]
    fn a_token_without_probability_is_never_drawn() {
        let logits = array![[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]];
        for uniform in [0.0, 0.5, 1.0 - f32::EPSILON, 1.0] {
            assert_eq!(sample(logits.view(), &[1.0], &[uniform]), [1]);
        }
    }
}
