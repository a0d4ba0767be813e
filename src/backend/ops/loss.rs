//! The loss over a chunk of logits, and the choice of a token.

use crate::backend::check::{Check, Checked};
use crate::backend::{DeviceId, Result, View};

/// How the temperature enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Temperature {
    /// Both models' logits are divided by it (the paper's formula).
    Both,
    /// Only the teacher's are (Fast-LLM's spelling).
    TeacherOnly,
}

/// What logits are multiplied by before the softmax.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Multiplies both models' logits.
    pub logits_scale: f32,
    /// Divides logits as `spelling` says.
    pub temperature: f32,
    /// Whose logits the temperature divides.
    pub spelling: Temperature,
}

impl Default for Scaling {
    fn default() -> Self {
        Scaling { logits_scale: 1.0, temperature: 1.0, spelling: Temperature::Both }
    }
}

impl Scaling {
    /// The student's factor.
    pub fn student(&self) -> f32 {
        match self.spelling {
            Temperature::Both => self.logits_scale / self.temperature,
            Temperature::TeacherOnly => self.logits_scale,
        }
    }

    /// The teacher's factor.
    pub fn teacher(&self) -> f32 {
        self.logits_scale / self.temperature
    }
}

/// Weights of the losses in their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossWeights {
    /// KL(student ‖ teacher) = Σ p (ln p − ln q).
    pub reverse_kl: f32,
    /// KL(teacher ‖ student) = Σ q (ln q − ln p).
    pub forward_kl: f32,
    /// `−ln p[label]`.
    pub cross_entropy: f32,
}

/// Columns of the row statistics. With zs, zt the scaled logits of a row: 0 max zs, 1 Σ exp(zs − max zs), 2 max zt,
/// 3 Σ exp(zt − max zt), 4 Σ exp(zs − max zs)(zs − zt), 5 Σ exp(zt − max zt)(zt − zs), 6 `zs[label]` (0 where the label
/// lies in another part). Without a teacher 2 to 5 are 0.
/// Two parts of a split vocabulary merge by rescaling to the larger maximum and adding.
pub const STATISTICS: usize = 7;

/// The statistics of each row of logits.
#[derive(Clone, Copy, Debug)]
pub struct HeadLoss {
    /// `[rows, vocabulary]` f32.
    pub student: View,
    /// `[rows, vocabulary]` f32.
    pub teacher: Option<View>,
    /// `[1, rows]` u32; a label outside the vocabulary is none.
    pub labels: Option<View>,
    /// What logits are multiplied by.
    pub scaling: Scaling,
    /// `[rows, STATISTICS]` f32.
    pub statistics: View,
}

impl Checked for HeadLoss {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (rows, vocabulary) = (self.student.rows, self.student.cols);
        let mut check = Check::new("head_loss", device);
        check.input("student", self.student, rows, vocabulary)?;
        check.maybe("teacher", self.teacher, rows, vocabulary)?;
        self.labels.map_or(Ok(()), |labels| check.ids("labels", labels, 1, rows))?;
        check.output("statistics", self.statistics, rows, STATISTICS)?;
        check.finish()
    }
}

/// The gradient of `Σ_rows row_weight · Σ_kinds weight · loss` in the student's logits, in their place or beside them, and
/// the losses of each row. A kind whose weight is 0 has no part in the gradient; one that lacks its teacher or its label
/// has loss 0.
#[derive(Clone, Copy, Debug)]
pub struct HeadLossGradient {
    /// `[rows, vocabulary]` f32, read; the gradient takes its place where there is no `gradient`.
    pub student: View,
    /// `[rows, vocabulary]`, f32 or as the device stores gradients; not written where `weights` is `None`.
    pub gradient: Option<View>,
    /// `[rows, vocabulary]` f32.
    pub teacher: Option<View>,
    /// `[1, rows]` u32.
    pub labels: Option<View>,
    /// What logits are multiplied by.
    pub scaling: Scaling,
    /// `[rows, STATISTICS]` f32, over the whole vocabulary.
    pub statistics: View,
    /// `[1, rows]` f32: 1 / divisor for rows that count, 0 for those that do not.
    pub row_weights: View,
    /// Weights of the kinds; `None` for the losses alone.
    pub weights: Option<LossWeights>,
    /// `[rows, 3]` f32: reverse KL, forward KL, cross-entropy of each row, not yet weighted.
    pub losses: View,
}

impl Checked for HeadLossGradient {
    fn check(&self, device: DeviceId) -> Result<()> {
        let (rows, vocabulary) = (self.student.rows, self.student.cols);
        let mut check = Check::new("head_loss_gradient", device);
        check.maybe("teacher", self.teacher, rows, vocabulary)?;
        self.labels.map_or(Ok(()), |labels| check.ids("labels", labels, 1, rows))?;
        check.input("statistics", self.statistics, rows, STATISTICS)?;
        check.input("row_weights", self.row_weights, 1, rows)?;
        match self.gradient {
            None => check.output("student", self.student, rows, vocabulary)?,
            Some(gradient) => {
                check.input("student", self.student, rows, vocabulary)?;
                check.output("gradient", gradient, rows, vocabulary)?;
            }
        }
        check.output("losses", self.losses, rows, 3)?;
        check.finish()
    }
}

/// The index of each row's largest logit, the lowest of equals.
#[derive(Clone, Copy, Debug)]
pub struct Argmax {
    /// `[rows, vocabulary]`.
    pub logits: View,
    /// `[1, rows]` u32.
    pub out: View,
}

impl Checked for Argmax {
    fn check(&self, device: DeviceId) -> Result<()> {
        let mut check = Check::new("argmax", device);
        check.input("logits", self.logits, self.logits.rows, self.logits.cols)?;
        check.ids_output("out", self.out, 1, self.logits.rows)?;
        check.finish()
    }
}

/// Draws a token from `softmax(logits / temperature)`: the first index, in order, whose cumulative probability passes
/// the uniform number. Temperature 0 takes the largest logit.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// `[rows, vocabulary]`.
    pub logits: View,
    /// `[1, rows]` f32, ≥ 0.
    pub temperatures: View,
    /// `[1, rows]` f32 in [0, 1).
    pub uniforms: View,
    /// `[1, rows]` u32.
    pub out: View,
}

impl Checked for Sample {
    fn check(&self, device: DeviceId) -> Result<()> {
        let rows = self.logits.rows;
        let mut check = Check::new("sample", device);
        check.input("logits", self.logits, rows, self.logits.cols)?;
        check.input("temperatures", self.temperatures, 1, rows)?;
        check.input("uniforms", self.uniforms, 1, rows)?;
        check.ids_output("out", self.out, 1, rows)?;
        check.finish()
    }
}
