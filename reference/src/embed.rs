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
