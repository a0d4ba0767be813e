//! Causal depthwise convolution over segments with a repeat of heads and silu, as in M1's Mamba mixer
//! (jxiw/M1 `mamba/hybrid_mamba_layer.py`; the convolution itself: Dao-AILab/causal-conv1d).

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, Axis, s};

use crate::{Real, Segment, silu, silu_derivative};

/// Whether heads are repeated before the convolution, which then has a filter for each of the repeats, or after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepeatOrder {
    /// `repeat_kv_before_conv` true: weight has `in_channels * repeat` rows.
    BeforeConv,
    /// `repeat_kv_before_conv` false: weight has `in_channels` rows.
    AfterConv,
}

/// The convolution's parameters and its repeat of heads. Output channel `c` of `in_channels * repeat` reads the input channel
/// `(c / (head * repeat)) * head + c % head`: each head of `head` channels stands `repeat` times in a row.
#[derive(Clone, Copy, Debug)]
pub struct Conv1d<'a, T> {
    /// Filters `[channels, W]`, the last column for the current token; `channels` as [`RepeatOrder`] says.
    pub weight: ArrayView2<'a, T>,
    /// `[channels]`.
    pub bias: Option<ArrayView1<'a, T>>,
    /// Channels of a head; divides `in_channels`.
    pub head: usize,
    /// How often each head occurs in the output; 1 for a plain convolution.
    pub repeat: usize,
    /// Where the repeat is.
    pub order: RepeatOrder,
}

impl<T: Real> Conv1d<'_, T> {
    /// For each output channel: the input channel and the filter.
    fn wiring(&self, in_channels: usize) -> Vec<(usize, usize)> {
        assert_eq!(in_channels % self.head, 0, "conv1d: input in whole heads");
        let channels = in_channels * self.repeat;
        let wiring: Vec<(usize, usize)> = (0..channels)
            .map(|channel| {
                let input = channel / (self.head * self.repeat) * self.head + channel % self.head;
                let filter = match self.order {
                    RepeatOrder::BeforeConv => channel,
                    RepeatOrder::AfterConv => input,
                };
                (input, filter)
            })
            .collect();
        let filters = wiring.iter().map(|&(_, filter)| filter + 1).max().unwrap_or(0);
        assert_eq!(filters, self.weight.nrows(), "conv1d: one filter a channel");
        wiring
    }

    /// The convolution of a segment before silu: inputs `[W + len, in_channels]` → `[len, channels]`. Row `t` reads the inputs
    /// `t + 1 ..= t + W`, of which the last is its own.
    fn preactivation(&self, inputs: ArrayView2<T>) -> Array2<T> {
        let taps = self.weight.ncols();
        let wiring = self.wiring(inputs.ncols());
        Array2::from_shape_fn((inputs.nrows() - taps, wiring.len()), |(t, channel)| {
            let (input, filter) = wiring[channel];
            let bias = self.bias.map_or(T::zero(), |bias| bias[filter]);
            bias + (0..taps).map(|k| self.weight[[filter, k]] * inputs[[t + 1 + k, input]]).sum::<T>()
        })
    }
}

/// The last W inputs before a segment, then its own: `[W + len, in_channels]`.
fn with_history<T: Real>(
    x: ArrayView2<T>,
    segment: &Segment,
    state_in: Option<ArrayView3<T>>,
    index: usize,
    taps: usize,
) -> Array2<T> {
    let history = match state_in {
        Some(state) => state.index_axis(Axis(0), index).t().to_owned(),
        None => Array2::zeros((taps, x.ncols())),
    };
    let mut inputs = Array2::zeros((taps + segment.len, x.ncols()));
    inputs.slice_mut(s![..taps, ..]).assign(&history);
    inputs.slice_mut(s![taps.., ..]).assign(&x.slice(s![segment.rows(), ..]));
    inputs
}

/// (y `[tokens, in_channels * repeat]`, state_out `[segments, in_channels, W]`) of x `[tokens, in_channels]`.
///
/// `y_t[c] = silu(bias + Σ_k weight[filter, k] x_{t-W+1+k}[input])`, where inputs before the segment come from state_in
/// `[segments, in_channels, W]` (zeros without it): the last W inputs before the repeat, oldest first, zeros where fewer were
/// seen. state_out is the same after the segment.
pub fn conv1d<T: Real>(
    x: ArrayView2<T>,
    op: &Conv1d<T>,
    state_in: Option<ArrayView3<T>>,
    segments: &[Segment],
) -> (Array2<T>, Array3<T>) {
    let taps = op.weight.ncols();
    let mut y = Array2::zeros((x.nrows(), x.ncols() * op.repeat));
    let mut state_out = Array3::zeros((segments.len(), x.ncols(), taps));
    for (index, segment) in segments.iter().enumerate() {
        let inputs = with_history(x, segment, state_in, index, taps);
        y.slice_mut(s![segment.rows(), ..]).assign(&op.preactivation(inputs.view()).mapv(silu));
        state_out.index_axis_mut(Axis(0), index).assign(&inputs.slice(s![segment.len.., ..]).t());
    }
    (y, state_out)
}

/// What [`conv1d_backward`] returns, each in the shape of what it is the gradient of.
#[derive(Clone, Debug)]
pub struct Conv1dGradients<T> {
    /// `[tokens, in_channels]`.
    pub dx: Array2<T>,
    /// `[channels, W]`.
    pub dweight: Array2<T>,
    /// `[channels]`; also without a bias.
    pub dbias: Array1<T>,
    /// `[segments, in_channels, W]`; also without a state_in, which is then zeros.
    pub dstate_in: Array3<T>,
}

/// The gradients of [`conv1d`] from dy `[tokens, in_channels * repeat]` and, where the state went on, dstate_out
/// `[segments, in_channels, W]`. With `da = dy * silu'(a)` of the preactivation `a`, `dinput` and `dweight` are the products of
/// `da` with the other factor of each tap.
pub fn conv1d_backward<T: Real>(
    x: ArrayView2<T>,
    op: &Conv1d<T>,
    state_in: Option<ArrayView3<T>>,
    dy: ArrayView2<T>,
    dstate_out: Option<ArrayView3<T>>,
    segments: &[Segment],
) -> Conv1dGradients<T> {
    let taps = op.weight.ncols();
    let wiring = op.wiring(x.ncols());
    let mut gradients = Conv1dGradients {
        dx: Array2::zeros(x.dim()),
        dweight: Array2::zeros(op.weight.dim()),
        dbias: Array1::zeros(op.weight.nrows()),
        dstate_in: Array3::zeros((segments.len(), x.ncols(), taps)),
    };
    for (index, segment) in segments.iter().enumerate() {
        let inputs = with_history(x, segment, state_in, index, taps);
        let preactivation = op.preactivation(inputs.view());
        let mut dinputs = Array2::<T>::zeros(inputs.dim());
        if let Some(dstate) = dstate_out {
            dinputs.slice_mut(s![segment.len.., ..]).assign(&dstate.index_axis(Axis(0), index).t());
        }
        for ((t, channel), &a) in preactivation.indexed_iter() {
            let (input, filter) = wiring[channel];
            let da = dy[[segment.start + t, channel]] * silu_derivative(a);
            gradients.dbias[filter] += da;
            for k in 0..taps {
                gradients.dweight[[filter, k]] += da * inputs[[t + 1 + k, input]];
                dinputs[[t + 1 + k, input]] += da * op.weight[[filter, k]];
            }
        }
        gradients.dstate_in.index_axis_mut(Axis(0), index).assign(&dinputs.slice(s![..taps, ..]).t());
        gradients.dx.slice_mut(s![segment.rows(), ..]).assign(&dinputs.slice(s![taps.., ..]));
    }
    gradients
}
