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

/// One token a row from `softmax(logits / temperature)`: logits `[rows, vocab]`, uniform `[rows]` in [0, 1) → `[rows]`.
///
/// Inverse of the cumulative distribution in the order of indices: the first index whose cumulative probability exceeds the
/// row's uniform number. Temperature 0 is [`argmax`].
pub fn sample<T: Real>(logits: ArrayView2<T>, temperature: f64, uniform: &[T]) -> Vec<u32> {
    if temperature == 0.0 {
        return argmax(logits);
    }
    assert_eq!(uniform.len(), logits.nrows(), "sample: one uniform number a row");
    logits
        .rows()
        .into_iter()
        .zip(uniform)
        .map(|(row, &uniform)| sample_of_row(row, T::of(temperature), uniform))
        .collect()
}

fn sample_of_row<T: Real>(logits: ArrayView1<T>, temperature: T, uniform: T) -> u32 {
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
