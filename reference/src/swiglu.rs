//! SwiGLU (Shazeer, arXiv:2002.05202).

use ndarray::{Array2, ArrayView2, Zip};

use crate::{Real, silu, silu_derivative};

/// `y = silu(gate) * up`, elementwise; all `[tokens, width]`.
pub fn swiglu<T: Real>(gate: ArrayView2<T>, up: ArrayView2<T>) -> Array2<T> {
    Zip::from(&gate).and(&up).map_collect(|&gate, &up| silu(gate) * up)
}

/// (dgate, dup): `dgate = dy * up * silu'(gate)`, `dup = dy * silu(gate)`.
pub fn swiglu_backward<T: Real>(gate: ArrayView2<T>, up: ArrayView2<T>, dy: ArrayView2<T>) -> (Array2<T>, Array2<T>) {
    let dgate = Zip::from(&gate).and(&up).and(&dy).map_collect(|&gate, &up, &dy| dy * up * silu_derivative(gate));
    let dup = Zip::from(&gate).and(&dy).map_collect(|&gate, &dy| dy * silu(gate));
    (dgate, dup)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::*;

    proptest! {
        #[test]
        fn gradients_are_certified(tokens in 0..4usize, width in size(), seed: u64) {
            let mut noise = Noise(seed);
            let (gate, up) = (noise.array((tokens, width)) * 3.0, noise.array((tokens, width)));
            let dy = noise.array((tokens, width));
            let (dgate, dup) = swiglu_backward(gate.view(), up.view(), dy.view());
            assert_gradient("dgate", &gate, &dgate, |gate| project(&swiglu(gate.view(), up.view()), &dy));
            assert_gradient("dup", &up, &dup, |up| project(&swiglu(gate.view(), up.view()), &dy));
        }
    }
}
