//! AdamW over ranges of the flat spaces, clipped by the norm of all of them; no number comes back on the way.

use std::ops::Range;

use crate::backend::ops::{self, CONTROL, ClipFactor, Control, Fill, SquaredNorm};
use crate::backend::{Buffer, DType, Device, Error, HostSlice, Result, View};
use crate::model::decoder::Model;
use crate::model::parameters::{Parameter, ParameterId, Part, Space};
use crate::model::weights::Gradients;

/// Which parameters a run trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trained {
    /// All of them.
    #[default]
    All,
    /// Those of the Mamba mixers alone.
    Mixers,
}

impl Trained {
    /// Whether it holds for a parameter.
    pub fn includes(self, parameter: &Parameter) -> bool {
        // The mixers of attention blocks have tensors of other names.
        self == Trained::All || (parameter.spec.mixer && parameter.spec.name.contains(".mixer."))
    }
}

/// The numbers of AdamW (Loshchilov and Hutter, arXiv:1711.05101) that stay the same from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the first and of the second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of what [`TensorSpec::decayed`](crate::model::tensors::TensorSpec::decayed) says.
    pub weight_decay: f64,
    /// Whether biases decay too, as Fast-LLM's do by default.
    pub decay_biases: bool,
    /// The largest norm of all gradients that is let through; infinity for no clipping.
    pub max_norm: f64,
}

impl Default for AdamWOptions {
    /// Fast-LLM's numbers, with biases left out of the decay.
    fn default() -> Self {
        AdamWOptions { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, decay_biases: false, max_norm: 1.0 }
    }
}

/// Neighbouring parameters of one space that are updated together.
#[derive(Debug)]
struct Group {
    part: Part,
    range: Range<usize>,
    decayed: bool,
    moments: [Buffer; 2],
    /// f32 weights, where those of the model are stored in less.
    master: Option<Buffer>,
}

/// A value that the optimiser keeps for every trained parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The weight in f32, where the model's is stored in less.
    Master,
    /// First moment.
    Moment1,
    /// Second moment.
    Moment2,
}

impl Kept {
    /// All of them.
    pub const ALL: [Kept; 3] = [Kept::Master, Kept::Moment1, Kept::Moment2];

    /// What stands before a parameter's name in a checkpoint.
    pub fn prefix(self) -> &'static str {
        match self {
            Kept::Master => "master.",
            Kept::Moment1 => "moment1.",
            Kept::Moment2 => "moment2.",
        }
    }
}

/// The optimiser of a model: its state, and the numbers of a step on the device.
#[derive(Debug)]
pub struct AdamW {
    device: Device,
    options: AdamWOptions,
    groups: Vec<Group>,
    squared_norm: Buffer,
    control: Buffer,
}

impl AdamW {
    /// Zero moments for the parameters that `gradients` trains, and masters of them as they are now.
    ///
    /// # Errors
    /// When nothing trains, or the device has no room.
    pub fn new(model: &Model, gradients: &Gradients, options: AdamWOptions) -> Result<Self> {
        let (device, table) = (model.device(), model.weights().table());
        let trained = |p: &Parameter| table.find(&p.spec.name).is_some_and(|id| gradients.trains(id));
        let bias = |p: &Parameter| options.decay_biases && p.spec.name.ends_with(".bias");
        let mut ranges = table.ranges(|p| trained(p) && !bias(p));
        ranges.extend(table.ranges(|p| trained(p) && bias(p)).into_iter().map(|(part, range, _)| (part, range, true)));
        if ranges.is_empty() {
            return Err(Error::Argument { op: "adamw", what: "the model has none of the parameters to train".into() });
        }
        let group = |(part, range, decayed): (Part, Range<usize>, bool)| {
            let zeros = || device.alloc(DType::F32, 1, range.len());
            let weights = model.weights().range(part, &range)?;
            let apart = matches!(weights.dtype, DType::Bf16 | DType::F16);
            let master = if apart { Some(zeros()?) } else { None };
            if let Some(master) = &master {
                device.copy(&ops::Copy { src: weights, out: crate::backend::Out::assign(master.view()) })?;
            }
            Ok(Group { part, decayed, moments: [zeros()?, zeros()?], master, range })
        };
        Ok(AdamW {
            device: device.clone(),
            options,
            groups: ranges.into_iter().map(group).collect::<Result<_>>()?,
            squared_norm: device.alloc(DType::F32, 1, 1)?,
            control: device.alloc(DType::F32, 1, CONTROL)?,
        })
    }

    /// Sets the gradients of what it trains to 0.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&self, gradients: &Gradients) -> Result<()> {
        self.groups.iter().try_for_each(|group| {
            let out = gradients.space().range(group.part, &group.range)?;
            self.device.fill(&Fill { value: 0.0, out })
        })
    }

    /// The gradients of what it trains, flat.
    pub(super) fn gradients<'a>(&'a self, gradients: &'a Gradients) -> impl Iterator<Item = Result<View>> + 'a {
        self.groups.iter().map(|group| gradients.space().range(group.part, &group.range))
    }

    /// The first half of an update: writes its learning rate `rate`, and what follows from its number `step`, counted
    /// from 1.
    ///
    /// # Errors
    /// When the device fails.
    pub fn prepare(&self, rate: f64, step: u64) -> Result<()> {
        let correction = |beta: f64| (1.0 - beta.powf(step as f64)) as f32;
        let [correction1, correction2] = self.options.betas.map(correction);
        let mut numbers = [0.0; CONTROL];
        numbers[Control::LearningRate as usize] = rate as f32;
        numbers[Control::Correction1 as usize] = correction1;
        numbers[Control::Correction2 as usize] = correction2;
        self.device.write(HostSlice::F32(&numbers), self.control.view())
    }

    /// The second half: launches alone, the same at every step. In this order: the norm of all gradients, the factor
    /// `min(1, max_norm / (norm + 1e-6))`, decay, the update with its bias corrections. A norm that is not finite
    /// leaves weights and moments as they are.
    ///
    /// # Errors
    /// When the device fails.
    pub fn launch(&self, weights: &Space, gradients: &Gradients) -> Result<()> {
        let AdamWOptions { betas: [beta1, beta2], eps, weight_decay, max_norm, .. } = self.options;
        let (device, control, squared_norm) = (&self.device, self.control.view(), self.squared_norm.view());
        device.fill(&Fill { value: 0.0, out: squared_norm })?;
        for group in &self.groups {
            let x = gradients.space().range(group.part, &group.range)?;
            device.squared_norm(&SquaredNorm { x, out: squared_norm })?;
        }
        device.clip_factor(&ClipFactor { squared_norm, max_norm: max_norm as f32, control })?;
        for group in &self.groups {
            let stored = weights.range(group.part, &group.range)?;
            device.adamw(&ops::AdamW {
                param: group.master.as_ref().map_or(stored, Buffer::view),
                grad: gradients.space().range(group.part, &group.range)?,
                moment1: group.moments[0].view(),
                moment2: group.moments[1].view(),
                stored: group.master.as_ref().map(|_| stored),
                control,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                eps: eps as f32,
                weight_decay: if group.decayed { weight_decay as f32 } else { 0.0 },
            })?;
        }
        Ok(())
    }

    /// `[1, 1]`: the norm of all gradients before clipping, of the last step.
    ///
    /// # Errors
    /// Never for a control buffer of its size.
    pub fn norm(&self) -> Result<View> {
        self.control.view().col_range(Control::Norm as usize, 1)
    }

    /// What is kept for a parameter, as a view of its shape; `None` where that is not kept.
    ///
    /// # Errors
    /// When the id is of another table.
    pub fn kept(&self, weights: &Space, id: ParameterId, kept: Kept) -> Result<Option<View>> {
        let parameter = weights.table().get(id);
        let holds = |group: &&Group| {
            group.part == parameter.part
                && group.range.start <= parameter.range.start
                && parameter.range.end <= group.range.end
        };
        let Some(group) = self.groups.iter().find(holds) else { return Ok(None) };
        let buffer = match kept {
            Kept::Master => group.master.as_ref(),
            Kept::Moment1 => group.moments.first(),
            Kept::Moment2 => group.moments.last(),
        };
        let like = weights.view(id)?;
        let first = parameter.range.start - group.range.start;
        buffer.map(|buffer| buffer.view().matrix(first, like.rows, like.cols, like.order)).transpose()
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        let of = |group: &Group| group.moments.iter().chain(&group.master).map(Buffer::bytes).sum::<usize>();
        self.groups.iter().map(of).sum()
    }
}
