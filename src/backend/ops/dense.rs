//! Embedding, norm, products, gated activation.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Out, Result, View};

/// `out[t] = weight[ids[t]]`.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    /// `[1, tokens]` u32, each below the vocabulary (the host checks it).
    pub ids: View,
    /// `[vocabulary, hidden]`, weight order.
    pub weight: View,
    /// `[tokens, hidden]`.
    pub out: View,
}

impl Checked for Embed {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("embed", device);
        check.ids("ids", self.ids, 1, self.out.rows)?;
        check.weight("weight", self.weight, self.weight.rows, self.out.cols)?;
        check.output("out", self.out, self.out.rows, self.out.cols)?;
        check.finish()
    }
}

/// `dweight[ids[t]] += dout[t]`, in the order of the rows.
#[derive(Clone, Copy, Debug)]
pub struct EmbedBackward {
    /// `[1, tokens]` u32.
    pub ids: View,
    /// `[tokens, hidden]`.
    pub dout: View,
    /// `[vocabulary, hidden]` f32, weight order; adds.
    pub dweight: View,
}

impl Checked for EmbedBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("embed_backward", device);
        check.ids("ids", self.ids, 1, self.dout.rows)?;
        check.input("dout", self.dout, self.dout.rows, self.dout.cols)?;
        check.weight_grad("dweight", self.dweight, self.dweight.rows, self.dout.cols)?;
        check.finish()
    }
}

/// `out = weight ⊙ x / sqrt(mean(x²) + eps)`, statistics in f32.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// `[tokens, hidden]`.
    pub x: View,
    /// `[1, hidden]`.
    pub weight: View,
    /// Added to the mean square.
    pub eps: f32,
    /// `[tokens, hidden]`.
    pub out: View,
    /// `[1, tokens]` f32: 1 / sqrt(mean(x²) + eps), kept for backward.
    pub inv_rms: Option<View>,
}

impl Checked for RmsNorm {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (tokens, hidden) = (self.x.rows, self.x.cols);
        let mut check = Check::new("rms_norm", device);
        check.input("x", self.x, tokens, hidden)?;
        check.input("weight", self.weight, 1, hidden)?;
        check.output("out", self.out, tokens, hidden)?;
        check.maybe_output("inv_rms", self.inv_rms, 1, tokens)?;
        check.finish()
    }
}

/// The gradients of [`RmsNorm`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBackward {
    /// `[tokens, hidden]`.
    pub x: View,
    /// `[1, hidden]`.
    pub weight: View,
    /// `[1, tokens]`, from forward.
    pub inv_rms: View,
    /// `[tokens, hidden]`.
    pub dout: View,
    /// `[tokens, hidden]`.
    pub dx: Out,
    /// `[1, hidden]` f32; adds.
    pub dweight: Option<View>,
}

impl Checked for RmsNormBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (tokens, hidden) = (self.x.rows, self.x.cols);
        let mut check = Check::new("rms_norm_backward", device);
        check.input("x", self.x, tokens, hidden)?;
        check.input("weight", self.weight, 1, hidden)?;
        check.input("inv_rms", self.inv_rms, 1, tokens)?;
        check.input("dout", self.dout, tokens, hidden)?;
        check.out("dx", self.dx, tokens, hidden)?;
        check.maybe_output("dweight", self.dweight, 1, hidden)?;
        check.finish()
    }
}

/// `out = x·weightᵀ (+ bias)`, or added to what is there.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[tokens, in]`; the rows are all that backward needs.
    pub x: View,
    /// `[out, in]`, weight order.
    pub weight: View,
    /// `[1, out]`.
    pub bias: Option<View>,
    /// `[tokens, out]`.
    pub out: Out,
}

impl Checked for Linear {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("linear", device);
        check.input("x", self.x, self.x.rows, self.weight.cols)?;
        check.weight("weight", self.weight, self.weight.rows, self.weight.cols)?;
        check.maybe("bias", self.bias, 1, self.weight.rows)?;
        check.out("out", self.out, self.x.rows, self.weight.rows)?;
        check.finish()
    }
}

/// `dx = dout·weight`.
#[derive(Clone, Copy, Debug)]
pub struct LinearBackwardInput {
    /// `[tokens, out]`.
    pub dout: View,
    /// `[out, in]`, weight order.
    pub weight: View,
    /// `[tokens, in]`.
    pub dx: Out,
}

impl Checked for LinearBackwardInput {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("linear_backward_input", device);
        check.input("dout", self.dout, self.dout.rows, self.weight.rows)?;
        check.weight("weight", self.weight, self.weight.rows, self.weight.cols)?;
        check.out("dx", self.dx, self.dout.rows, self.weight.cols)?;
        check.finish()
    }
}

/// `dweight += doutᵀ·x`, `dbias += Σ_t dout[t]`.
#[derive(Clone, Copy, Debug)]
pub struct LinearBackwardWeight {
    /// `[tokens, in]`.
    pub x: View,
    /// `[tokens, out]`.
    pub dout: View,
    /// `[out, in]` f32, weight order; adds, and leaves padding rows at 0.
    pub dweight: View,
    /// `[1, out]` f32; adds.
    pub dbias: Option<View>,
}

impl Checked for LinearBackwardWeight {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("linear_backward_weight", device);
        check.input("x", self.x, self.x.rows, self.dweight.cols)?;
        check.input("dout", self.dout, self.x.rows, self.dweight.rows)?;
        check.weight_grad("dweight", self.dweight, self.dweight.rows, self.dweight.cols)?;
        check.maybe_output("dbias", self.dbias, 1, self.dweight.rows)?;
        check.finish()
    }
}

/// `out = silu(gate) ⊙ up`, `silu(a) = a·sigmoid(a)`.
#[derive(Clone, Copy, Debug)]
pub struct Swiglu {
    /// `[tokens, width]`, kept for backward.
    pub gate: View,
    /// `[tokens, width]`, kept for backward.
    pub up: View,
    /// `[tokens, width]`.
    pub out: View,
}

impl Checked for Swiglu {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (tokens, width) = (self.gate.rows, self.gate.cols);
        let mut check = Check::new("swiglu", device);
        check.input("gate", self.gate, tokens, width)?;
        check.input("up", self.up, tokens, width)?;
        check.output("out", self.out, tokens, width)?;
        check.finish()
    }
}

/// [`Linear`], then [`Swiglu`] of columns of what it writes.
#[derive(Clone, Copy, Debug)]
pub struct LinearSwiglu {
    /// Writes gate and up; replaces.
    pub linear: Linear,
    /// Reads gate and up there.
    pub swiglu: Swiglu,
    /// Whether gate and up are kept for backward; else what `linear` writes may hold anything afterwards.
    pub keeps: bool,
}

impl Checked for LinearSwiglu {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (Linear { x, weight, bias, out }, swiglu) = (self.linear, self.swiglu);
        self.linear.check(device)?;
        swiglu.check(device)?;
        let mut check = Check::new("linear_swiglu", device);
        let columns = swiglu.gate.col_in(out.view).is_some() && swiglu.up.col_in(out.view).is_some();
        check.require(columns && !out.add, || "gate and up are no columns of a product that replaces".into())?;
        check.input("x", x, x.rows, x.cols)?;
        check.weight("weight", weight, weight.rows, weight.cols)?;
        check.maybe("bias", bias, 1, weight.rows)?;
        check.out("gate and up", out, x.rows, weight.rows)?;
        check.output("out", swiglu.out, x.rows, swiglu.out.cols)?;
        check.finish()
    }
}

/// The gradients of [`Swiglu`].
#[derive(Clone, Copy, Debug)]
pub struct SwigluBackward {
    /// `[tokens, width]`.
    pub gate: View,
    /// `[tokens, width]`.
    pub up: View,
    /// `[tokens, width]`.
    pub dout: View,
    /// `[tokens, width]`.
    pub dgate: View,
    /// `[tokens, width]`.
    pub dup: View,
}

impl Checked for SwigluBackward {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (tokens, width) = (self.gate.rows, self.gate.cols);
        let mut check = Check::new("swiglu_backward", device);
        check.input("gate", self.gate, tokens, width)?;
        check.input("up", self.up, tokens, width)?;
        check.input("dout", self.dout, tokens, width)?;
        check.output("dgate", self.dgate, tokens, width)?;
        check.output("dup", self.dup, tokens, width)?;
        check.finish()
    }
}
