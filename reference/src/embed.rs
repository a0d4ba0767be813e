//! Token embedding.

use ndarray::{Array2, ArrayView2};

use crate::{Real, gather, scatter_add};

/// `y[t] = weight[ids[t]]`: ids `[tokens]`, weight `[vocab, width]` → y `[tokens, width]`.
pub fn embed<T: Real>(ids: &[u32], weight: ArrayView2<T>) -> Array2<T> {
    gather(weight, ids)
}

/// dweight `[vocab, width]`: `dweight[v]` is the sum of `dy[t]` over the tokens with `ids[t] = v`, in the order of tokens.
pub fn embed_backward<T: Real>(ids: &[u32], dy: ArrayView2<T>, vocab_size: usize) -> Array2<T> {
    let mut dweight = Array2::zeros((vocab_size, dy.ncols()));
    scatter_add(dweight.view_mut(), ids, dy);
    dweight
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn gradient_is_certified(vocab in size(), width in size(), n in 0..6usize, seed: u64) {
            let mut noise = Noise(seed);
            let ids: Vec<u32> = (0..n).map(|_| noise.below(vocab) as u32).collect();
            let (weight, dy) = (noise.array((vocab, width)), noise.array((n, width)));
            let dweight = embed_backward(&ids, dy.view(), vocab);
            assert_gradient("dweight", &weight, &dweight, |weight| project(&embed(&ids, weight.view()), &dy));
        }
    }
}
