//! Causal depthwise convolution over time with its head repeat and silu.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Result, SegmentsView, View};

/// The sizes of the convolution. Output channel `c` of `channels_in·repeat` reads input channel
/// `(c / (head·repeat))·head + c % head`: each head of `head` channels is repeated `repeat` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Channels of x, a multiple of `head`.
    pub channels_in: usize,
    /// Channels of a head.
    pub head: usize,
    /// Times each head is repeated.
    pub repeat: usize,
    /// Taps; the last one multiplies the current token.
    pub width: usize,
    /// The repeat comes first, so that every output channel has taps of its own; else input channels have.
    pub repeat_first: bool,
}

impl ConvShape {
    /// Channels of the output.
    pub fn channels_out(&self) -> usize {
        self.channels_in * self.repeat
    }

    /// Rows of the weight.
    pub fn filters(&self) -> usize {
        if self.repeat_first { self.channels_out() } else { self.channels_in }
    }

    /// Values of one sequence's state: the last `width` inputs before the repeat, `[channels_in, width]`, oldest
    /// first, 0 where fewer tokens were seen.
    pub fn state(&self) -> usize {
        self.channels_in * self.width
    }

    fn check(&self, check: &Check, projected: View, x_col: usize) -> Result<()> {
        let heads = self.head > 0 && self.channels_in.is_multiple_of(self.head) && self.repeat > 0 && self.width > 0;
        check.require(heads, || format!("{self:?} is no whole number of heads and taps"))?;
        let inside = x_col.checked_add(self.channels_in).is_some_and(|end| end <= projected.cols);
        let cols = projected.cols;
        check.require(inside, || format!("x at column {x_col} does not lie in {cols} columns"))
    }
}

/// `out = silu(bias + Σ_k weight[·, k]·x[t − width + 1 + k])`, each segment from its state or from zeros.
#[derive(Clone, Copy, Debug)]
pub struct Conv1d {
    /// Sizes.
    pub shape: ConvShape,
    /// `[tokens, ≥ x_col + channels_in]`: the whole output of the input projection; kept for backward.
    pub projected: View,
    /// The column where x starts.
    pub x_col: usize,
    /// `[filters, width]`.
    pub weight: View,
    /// `[1, filters]`.
    pub bias: Option<View>,
    /// Who belongs to whom.
    pub segments: SegmentsView,
    /// `[slots, channels_in·width]` f32: the state before the segment, read where past > 0.
    pub state_in: Option<View>,
    /// `[slots, channels_in·width]` f32: the state after the segment; the same view as `state_in`, or another buffer.
    pub state_out: Option<View>,
    /// `[tokens, channels_in·repeat]`.
    pub out: View,
}

impl Checked for Conv1d {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (shape, tokens) = (&self.shape, self.projected.rows);
        let mut check = Check::new("conv1d", device);
        shape.check(&check, self.projected, self.x_col)?;
        check.input("projected", self.projected, tokens, self.projected.cols)?;
        check.input("weight", self.weight, shape.filters(), shape.width)?;
        check.maybe("bias", self.bias, 1, shape.filters())?;
        check.segments(&self.segments, tokens)?;
        check.state(self.state_in, self.state_out, shape.state())?;
        check.output("out", self.out, tokens, shape.channels_out())?;
        check.finish()
    }
}

/// The gradients of [`Conv1d`]; what the silu needs is computed again.
#[derive(Clone, Copy, Debug)]
pub struct Conv1dBackward {
    /// Sizes.
    pub shape: ConvShape,
    /// As in forward.
    pub projected: View,
    /// As in forward.
    pub x_col: usize,
    /// As in forward.
    pub weight: View,
    /// As in forward.
    pub bias: Option<View>,
    /// As in forward.
    pub segments: SegmentsView,
    /// As in forward, with what it held before.
    pub state_in: Option<View>,
    /// `[tokens, channels_in·repeat]`.
    pub dout: View,
    /// `[slots, channels_in·width]` f32: the gradient of the state after each segment.
    pub dstate_out: Option<View>,
    /// The shape of `projected`; only the columns of x are written.
    pub dprojected: View,
    /// `[filters, width]` f32; adds.
    pub dweight: Option<View>,
    /// `[1, filters]` f32; adds.
    pub dbias: Option<View>,
    /// `[slots, channels_in·width]` f32: the gradient of the state before each segment, 0 where past = 0.
    pub dstate_in: Option<View>,
}

impl Checked for Conv1dBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (shape, tokens) = (&self.shape, self.projected.rows);
        let mut check = Check::new("conv1d_backward", device);
        shape.check(&check, self.projected, self.x_col)?;
        check.input("projected", self.projected, tokens, self.projected.cols)?;
        check.input("weight", self.weight, shape.filters(), shape.width)?;
        check.maybe("bias", self.bias, 1, shape.filters())?;
        check.segments(&self.segments, tokens)?;
        check.state(self.state_in, None, shape.state())?;
        check.input("dout", self.dout, tokens, shape.channels_out())?;
        check.state_grads(self.dstate_out, self.dstate_in, shape.state())?;
        check.output("dprojected", self.dprojected, tokens, self.projected.cols)?;
        check.maybe_output("dweight", self.dweight, shape.filters(), shape.width)?;
        check.maybe_output("dbias", self.dbias, 1, shape.filters())?;
        check.finish()
    }
}
