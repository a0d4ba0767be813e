//! The last norm and the head, never whole: chosen rows are gathered and normed, and logits exist a chunk at a time.

use super::decoder::Model;
use super::scratch::{Column, Rows};
use super::weights::Gradients;
use crate::backend::ops::{
    Argmax, Fill, Gather, HeadLoss, HeadLossGradient, Linear, LinearBackwardInput, LinearBackwardWeight, LossWeights,
    RmsNorm, RmsNormBackward, STATISTICS, Scaling, ScatterAdd, WeightedSum,
};
use crate::backend::{Buffer, DType, Device, Error, HostSlice, Largest, Out, Result, View};

/// Rows that a chunk has whatever the vocabulary.
const CHUNK_ROWS: usize = 64;

/// Rows of a chunk of at most about `values` logits over `vocabulary`, for calls of up to `rows` rows.
pub fn chunk_rows(values: usize, vocabulary: usize, rows: usize) -> usize {
    (values / vocabulary.max(1) / CHUNK_ROWS * CHUNK_ROWS).max(CHUNK_ROWS).min(rows.max(1))
}

/// Chosen rows of a residual stream, through the last norm.
#[derive(Debug)]
pub struct FinalNorm {
    chosen: Column,
    gathered: Rows,
    normed: Rows,
    inv_rms: Column,
}

impl FinalNorm {
    /// Memory for up to `rows` rows.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &Model, rows: usize) -> Result<Self> {
        FinalNorm::stored_as(model.activations(), model, rows)
    }

    fn stored_as(dtype: DType, model: &Model, rows: usize) -> Result<Self> {
        let (device, hidden) = (model.device(), model.config().hidden_size);
        Ok(FinalNorm {
            chosen: Column::new(device, DType::U32, rows)?,
            gathered: Rows::new(device, dtype, rows, hidden)?,
            normed: Rows::new(device, dtype, rows, hidden)?,
            inv_rms: Column::new(device, DType::F32, rows)?,
        })
    }

    /// The rows `chosen` of `stream`, normed: `[chosen, hidden]`.
    ///
    /// # Errors
    /// When there are more than it was made for.
    pub fn forward(&self, model: &Model, stream: View, chosen: &[u32]) -> Result<View> {
        self.choose(model.device(), chosen)?;
        self.launch(model, stream, chosen.len())
    }

    /// The first half of [`Self::forward`]: writes which rows are chosen.
    ///
    /// # Errors
    /// When there are more than it was made for.
    pub fn choose(&self, device: &Device, chosen: &[u32]) -> Result<()> {
        device.write(HostSlice::U32(chosen), self.chosen.of(chosen.len())?)
    }

    /// The second half: launches alone, for the `n` rows chosen last.
    ///
    /// # Errors
    /// When there are more than it was made for, or the device fails.
    pub fn launch(&self, model: &Model, stream: View, n: usize) -> Result<View> {
        let device = model.device();
        let (rows, gathered, out) = (self.chosen.of(n)?, self.gathered.of(n)?, self.normed.of(n)?);
        device.gather(&Gather { src: stream, rows, out: gathered })?;
        let (weight, inv_rms) = (model.weights().view(model.ids().norm)?, Some(self.inv_rms.of(n)?));
        device.rms_norm(&RmsNorm { x: gathered, weight, eps: model.config().rms_norm_eps as f32, out, inv_rms })?;
        Ok(out)
    }

    /// From the gradient of the normed rows to that of the stream, whose other rows become 0. `dgathered` is scratch.
    fn backward(
        &self,
        model: &Model,
        gradients: &Gradients,
        (dnormed, dgathered): (View, View),
        dstream: View,
    ) -> Result<()> {
        let (device, n, norm) = (model.device(), dnormed.rows, model.ids().norm);
        device.rms_norm_backward(&RmsNormBackward {
            x: self.gathered.of(n)?,
            weight: model.weights().view(norm)?,
            inv_rms: self.inv_rms.of(n)?,
            dout: dnormed,
            dx: Out::assign(dgathered),
            dweight: gradients.of(norm)?,
        })?;
        device.fill(&Fill { value: 0.0, out: dstream })?;
        device.scatter_add(&ScatterAdd { src: dgathered, rows: self.chosen.of(n)?, out: dstream })
    }
}

/// Logits of normed rows, for whoever needs them whole: decoding and evaluation.
#[derive(Debug)]
pub struct Logits(Rows);

impl Logits {
    /// Memory for up to `rows` rows of logits.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &Model, rows: usize) -> Result<Self> {
        Rows::new(model.device(), DType::F32, rows, model.config().vocab_size).map(Logits)
    }

    /// `[normed rows, vocabulary]`.
    ///
    /// # Errors
    /// When there are more rows than it was made for.
    pub fn forward(&self, model: &Model, normed: View) -> Result<View> {
        let logits = self.0.of(normed.rows)?;
        project(model, normed, logits)?;
        Ok(logits)
    }
}

fn project(model: &Model, x: View, logits: View) -> Result<()> {
    let weight = model.weights().view(model.ids().head)?;
    model.device().linear(&Linear { x, weight, bias: None, out: Out::assign(logits) })
}

/// The rows of a call that count, with what they are to predict.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// Rows of the stream, ascending.
    pub rows: &'a [u32],
    /// The token that each of them is to predict; `u32::MAX` for none.
    pub labels: &'a [u32],
    /// The weight of each in the loss: 1 / divisor.
    pub weights: &'a [f32],
}

/// A teacher and its normed hidden states of the rows that count, `[rows, its hidden]`.
pub type TeacherRows<'a> = (&'a Model, View);

/// What to compute of a loss.
#[derive(Clone, Copy, Debug)]
pub struct LossKind {
    /// Weights of the three losses.
    pub weights: LossWeights,
    /// What logits are multiplied by.
    pub scaling: Scaling,
}

/// The loss through the chunked head.
#[derive(Debug)]
pub struct LossHead {
    chunk: usize,
    norm: FinalNorm,
    student: Rows,
    teacher: Option<Rows>,
    /// The gradient of a chunk of logits as the other gradients are stored, where these are not f32.
    dlogits: Option<Rows>,
    dnormed: Rows,
    dgathered: Rows,
    statistics: Rows,
    losses: Rows,
    labels: Column,
    weights: Column,
    choices: Option<[Column; 2]>,
    /// `[1, 3]`: the weighted sums of reverse KL, forward KL and cross-entropy since they were last cleared.
    totals: Buffer,
}

impl LossHead {
    /// Memory for up to `rows` rows; with a teacher if there is one, and with the models' choices if `choices`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &Model, teacher: Option<&Model>, rows: usize, choices: bool) -> Result<Self> {
        let (device, config) = (model.device(), model.config());
        if let Some(other) = teacher.map(Model::config).filter(|other| other.vocab_size != config.vocab_size) {
            let what = format!("the teacher has {} tokens, the student {}", other.vocab_size, config.vocab_size);
            return Err(Error::Argument { op: "head loss", what });
        }
        let chunk = chunk_rows(device.info().chunk_values, config.vocab_size, rows);
        let of = |rows, width| Rows::new(device, DType::F32, rows, width);
        let column = |dtype| Column::new(device, dtype, rows);
        let stored = model.gradients();
        let gradient = |rows, width| Rows::new(device, stored, rows, width);
        let (logits, converted) = (chunk * config.vocab_size, model.converted(stored));
        device.reserve(&Largest { logits, tokens: rows, converted, ..Largest::default() })?;
        Ok(LossHead {
            chunk,
            norm: FinalNorm::stored_as(stored, model, rows)?,
            student: of(chunk, config.vocab_size)?,
            teacher: teacher.map(|_| of(chunk, config.vocab_size)).transpose()?,
            dlogits: (stored != DType::F32).then(|| gradient(chunk, config.vocab_size)).transpose()?,
            dnormed: gradient(rows, config.hidden_size)?,
            dgathered: gradient(rows, config.hidden_size)?,
            statistics: of(chunk, STATISTICS)?,
            losses: of(rows, 3)?,
            labels: column(DType::U32)?,
            weights: column(DType::F32)?,
            choices: if choices { Some([column(DType::U32)?, column(DType::U32)?]) } else { None },
            totals: device.alloc(DType::F32, 1, 3)?,
        })
    }

    /// `[1, 3]`: Σ weight·(reverse KL, forward KL, cross-entropy) of all rows since [`Self::clear`].
    pub fn totals(&self) -> View {
        self.totals.view()
    }

    /// Sets the totals to 0.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&self, device: &Device) -> Result<()> {
        device.fill(&Fill { value: 0.0, out: self.totals.view() })
    }

    /// `[rows, 3]`: reverse KL, forward KL and cross-entropy of each row of the last call, not weighted.
    ///
    /// # Errors
    /// When it was made for fewer rows.
    pub fn losses(&self, rows: usize) -> Result<View> {
        self.losses.of(rows)
    }

    /// `[1, rows]` u32 each: the student's and the teacher's likeliest tokens in the last call.
    ///
    /// # Errors
    /// When it was made without choices, or for fewer rows.
    pub fn choices(&self, rows: usize) -> Result<[View; 2]> {
        match &self.choices {
            Some([student, teacher]) => Ok([student.of(rows)?, teacher.of(rows)?]),
            None => Err(Error::Argument { op: "head loss", what: "it was made without choices".into() }),
        }
    }

    /// The losses of the rows that count; with `gradients`, their gradient too: into the head, the last norm, and the
    /// stream's gradient `dstream` (replaced). A row of weight 0 adds nothing to totals and gradients.
    ///
    /// # Errors
    /// When there are more rows than it was made for, or the device fails.
    pub fn run(
        &self,
        model: &Model,
        stream: View,
        targets: &Targets,
        teacher: Option<TeacherRows>,
        kind: LossKind,
        gradients: Option<(&Gradients, View)>,
    ) -> Result<()> {
        self.prepare(model.device(), targets)?;
        self.launch(model, (stream, targets.rows.len()), teacher, kind, gradients)
    }

    /// The first half of [`Self::run`]: writes what the rows that count are.
    ///
    /// # Errors
    /// When there are more than it was made for.
    pub fn prepare(&self, device: &Device, targets: &Targets) -> Result<()> {
        let n = targets.rows.len();
        self.norm.choose(device, targets.rows)?;
        device.write(HostSlice::U32(targets.labels), self.labels.of(n)?)?;
        device.write(HostSlice::F32(targets.weights), self.weights.of(n)?)
    }

    /// The second half: launches alone, for the `n` rows written last.
    ///
    /// # Errors
    /// When there are more rows than it was made for, or the device fails.
    pub fn launch(
        &self,
        model: &Model,
        (stream, n): (View, usize),
        teacher: Option<TeacherRows>,
        kind: LossKind,
        gradients: Option<(&Gradients, View)>,
    ) -> Result<()> {
        let normed = self.norm.launch(model, stream, n)?;
        for first in (0..n).step_by(self.chunk) {
            let rows = self.chunk.min(n - first);
            self.chunk(model, teacher, kind, gradients.map(|(gradients, _)| gradients), normed, (first, rows))?;
        }
        let (values, weights) = (self.losses.of(n)?, self.weights.of(n)?);
        model.device().weighted_sum(&WeightedSum { values, weights, out: self.totals.view() })?;
        match gradients {
            Some((gradients, dstream)) => {
                self.norm.backward(model, gradients, (self.dnormed.of(n)?, self.dgathered.of(n)?), dstream)
            }
            None => Ok(()),
        }
    }

    fn chunk(
        &self,
        model: &Model,
        teacher: Option<TeacherRows>,
        kind: LossKind,
        gradients: Option<&Gradients>,
        normed: View,
        (first, rows): (usize, usize),
    ) -> Result<()> {
        let (device, scaling) = (model.device(), kind.scaling);
        let x = normed.row_range(first, rows)?;
        let (student, statistics) = (self.student.of(rows)?, self.statistics.of(rows)?);
        project(model, x, student)?;
        let teacher = match (&self.teacher, teacher) {
            (Some(logits), Some((teacher, normed))) => {
                let logits = logits.of(rows)?;
                project(teacher, normed.row_range(first, rows)?, logits)?;
                Some(logits)
            }
            _ => None,
        };
        if let Some([chosen, teachers]) = &self.choices {
            device.argmax(&Argmax { logits: student, out: chosen.range(first, rows)? })?;
            if let Some(logits) = teacher {
                device.argmax(&Argmax { logits, out: teachers.range(first, rows)? })?;
            }
        }
        let labels = Some(self.labels.range(first, rows)?);
        let dlogits = self.dlogits.as_ref().map(|dlogits| dlogits.of(rows)).transpose()?;
        device.head_loss(&HeadLoss { student, teacher, labels, scaling, statistics })?;
        device.head_loss_gradient(&HeadLossGradient {
            student,
            gradient: dlogits,
            teacher,
            labels,
            scaling,
            statistics,
            row_weights: self.weights.range(first, rows)?,
            weights: gradients.map(|_| kind.weights),
            losses: self.losses.of(first + rows)?.row_range(first, rows)?,
        })?;
        let Some(gradients) = gradients else { return Ok(()) };
        let (head, dx) = (model.ids().head, self.dnormed.of(first + rows)?.row_range(first, rows)?);
        let dout = dlogits.unwrap_or(student);
        if let Some(dweight) = gradients.of(head)? {
            device.linear_backward_weight(&LinearBackwardWeight { x, dout, dweight, dbias: None })?;
        }
        let weight = model.weights().view(head)?;
        device.linear_backward_input(&LinearBackwardInput { dout, weight, dx: Out::assign(dx) })
    }
}
