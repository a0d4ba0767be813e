//! The optimiser's step over ranges of the flat spaces.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Result, View};

/// The numbers of a step that live on the device, one f32 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Learning rate; the host writes it.
    LearningRate,
    /// 1 − β₁^step; the host writes it.
    Correction1,
    /// 1 − β₂^step; the host writes it.
    Correction2,
    /// Gradient norm; [`ClipFactor`] writes it.
    Norm,
    /// Factor of the gradients; [`ClipFactor`] writes it.
    Clip,
}

/// Columns of a control view.
pub const CONTROL: usize = 5;

/// `out[0] += Σ x²`, in an order fixed by the size alone.
#[derive(Clone, Copy, Debug)]
pub struct SquaredNorm {
    /// `[1, n]` f32: a range of a flat space.
    pub x: View,
    /// `[1, 1]` f32; adds.
    pub out: View,
}

impl Checked for SquaredNorm {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("squared_norm", device);
        check.input("x", self.x, 1, self.x.cols)?;
        check.output("out", self.out, 1, 1)?;
        check.finish()
    }
}

/// `norm = √squared_norm`, `clip = min(1, max_norm / (norm + 1e-6))`, into `control`. A norm that is not finite gives a
/// clip that is not finite.
#[derive(Clone, Copy, Debug)]
pub struct ClipFactor {
    /// `[1, 1]` f32.
    pub squared_norm: View,
    /// The largest norm let through; infinity for no clipping.
    pub max_norm: f32,
    /// `[1, CONTROL]` f32; `Norm` and `Clip` are written.
    pub control: View,
}

impl Checked for ClipFactor {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("clip_factor", device);
        check.input("squared_norm", self.squared_norm, 1, 1)?;
        check.output("control", self.control, 1, CONTROL)?;
        check.finish()
    }
}

/// One AdamW update over a range: with `g = clip·grad`, `p ← p·(1 − lr·weight_decay)`, `m ← β₁m + (1−β₁)g`,
/// `v ← β₂v + (1−β₂)g²`, `p ← p − lr·(m/correction1) / (√(v/correction2) + eps)`.
/// Nothing changes when one of the control's numbers is not finite.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// `[1, n]` f32: the (master) weights.
    pub param: View,
    /// `[1, n]` f32.
    pub grad: View,
    /// `[1, n]` f32: first moment.
    pub moment1: View,
    /// `[1, n]` f32: second moment.
    pub moment2: View,
    /// `[1, n]`: a copy of the weights in their storage dtype, where masters are kept apart.
    pub stored: Option<View>,
    /// `[1, CONTROL]` f32.
    pub control: View,
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Decay, 0 for tensors that have none.
    pub weight_decay: f32,
}

impl Checked for AdamW {
    fn check(&self, device: DeviceId) -> Result<()> {
        let n = self.param.cols;
        let mut check = Check::new("adamw", device);
        check.input("grad", self.grad, 1, n)?;
        check.input("control", self.control, 1, CONTROL)?;
        check.output("param", self.param, 1, n)?;
        check.output("moment1", self.moment1, 1, n)?;
        check.output("moment2", self.moment2, 1, n)?;
        check.maybe_output("stored", self.stored, 1, n)?;
        check.finish()
    }
}
