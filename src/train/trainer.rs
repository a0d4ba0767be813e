//! One step of training after the other: forward, loss, backward over the micro-batches of a step, then the optimiser.

use std::sync::Arc;
use std::time::Instant;

use super::error::{Error, Result};
use super::group::{Alone, Group};
use super::micro_batch::{MicroBatch, filled_up};
use super::optimizer::{AdamW, AdamWOptions, Trained};
use super::recordings::{Recordings, Shape};
use super::state::dtype_of;
use super::teacher::Teacher;
use crate::backend::ops::{Copy, LossWeights};
use crate::backend::{self, Buffer, DType, Device, Out, Readback, Recording, View};
use crate::model::decoder::{Activations, Keep, Model};
use crate::model::head::{LossHead, LossKind};
use crate::model::parameters::Part;
use crate::model::weights::Gradients;
use crate::text::packing::{Batch, Segment};

/// What the summed losses of a step are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Divisor {
    /// The tokens of the whole step whose logits count, as Fast-LLM does today.
    #[default]
    Counted,
    /// All tokens of the step, as Fast-LLM did in 2025.
    All,
}

/// What a trainer does at every step.
#[derive(Clone, Copy, Debug)]
pub struct TrainerOptions {
    /// Which parameters change.
    pub trained: Trained,
    /// The optimiser's numbers.
    pub optimizer: AdamWOptions,
    /// The losses.
    pub loss: LossKind,
    /// What they are divided by.
    pub divisor: Divisor,
    /// Whether backward computes each block again from its input, which takes less memory and more time.
    pub recompute: bool,
    /// So many steps in a row without a finite loss and gradient norm end the run.
    pub patience: u64,
}

/// The sizes of the largest micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Rows. It decides in how many chunks the head is computed, and up to what a device that records has micro-batches
    /// filled, and so, in the last bits, the gradients.
    pub tokens: usize,
    /// Segments. A batch that has more is no error: memory for it is made then.
    pub segments: usize,
}

/// The numbers of a step, read back while the next one runs. Losses are means over the tokens that count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// Its learning rate.
    pub rate: f64,
    /// The weighted sum of the losses, which the gradients are of.
    pub loss: f64,
    /// Reverse KL, forward KL and cross-entropy, not weighted; 0 where there is no teacher or no label.
    pub losses: [f64; 3],
    /// The norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Those of them whose logits count.
    pub counted: usize,
}

impl StepReport {
    /// Whether the update took place.
    pub fn finite(&self) -> bool {
        self.loss.is_finite() && self.gradient_norm.is_finite()
    }
}

/// What a trainer has to remember, beside weights and moments, to go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// How many of the last steps were not finite.
    pub unfinite: u64,
}

/// Where the time of a step went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct PartSeconds {
    /// The teacher's forward pass, up to its normed rows.
    pub teacher: f64,
    /// The student's forward pass.
    pub forward: f64,
    /// Both heads and the loss, with their gradients.
    pub head: f64,
    /// The student's backward pass.
    pub backward: f64,
    /// Gradient norm, clipping and update.
    pub optimizer: f64,
}

/// A clock of the parts of a step, where they are timed.
struct Laps<'a> {
    then: Instant,
    /// A value whose reading waits for all that was launched before.
    touch: Option<(&'a Device, View)>,
}

impl<'a> Laps<'a> {
    fn new(touch: Option<(&'a Device, View)>) -> Self {
        Laps { then: Instant::now(), touch }
    }

    /// Seconds since the last lap.
    fn lap(&mut self) -> backend::Result<f64> {
        let Some((device, view)) = self.touch else { return Ok(0.0) };
        device.read(view)?.wait()?;
        let now = Instant::now();
        Ok(now.duration_since(std::mem::replace(&mut self.then, now)).as_secs_f64())
    }
}

struct Pending {
    report: StepReport,
    /// The factor from a total to a mean over the tokens that count.
    scale: f64,
    numbers: Readback,
}

/// A model with all that changes it. Knows nothing of where batches come from or where results go.
pub struct Trainer {
    model: Model,
    teacher: Option<Teacher>,
    options: TrainerOptions,
    group: Box<dyn Group>,
    room: Room,
    gradients: Gradients,
    optimizer: AdamW,
    activations: Option<Activations>,
    head: LossHead,
    /// `[1, 4]`: the three totals and the norm, to be read at once.
    numbers: Buffer,
    progress: Progress,
    seconds: PartSeconds,
    /// Whether its parts are timed.
    timed: bool,
    pending: Option<Pending>,
    micro_batch: MicroBatch,
    recordings: Recordings,
    /// The optimiser's part of a step.
    update: Recording,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("options", &self.options)
            .field("room", &self.room)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl Trainer {
    /// A trainer of `model` for micro-batches within `room`, at its first step.
    ///
    /// # Errors
    /// When a loss asks for a teacher that is not there, vocabularies differ, nothing trains, or the device has no room.
    pub fn new(model: Model, teacher: Option<Teacher>, options: TrainerOptions, room: Room) -> Result<Self> {
        let LossWeights { reverse_kl, forward_kl, .. } = options.loss.weights;
        if teacher.is_none() && (reverse_kl != 0.0 || forward_kl != 0.0) {
            return Err(Error::Configuration("a KL loss needs a teacher".into()));
        }
        let device = model.device().clone();
        let gradients = Gradients::new(&device, model.weights().table(), |p| options.trained.includes(p))?;
        let mut trainer = Trainer {
            optimizer: AdamW::new(&model, &gradients, options.optimizer)?,
            head: LossHead::new(&model, teacher.as_ref().map(|teacher| &**teacher.model()), room.tokens, false)?,
            numbers: device.alloc(DType::F32, 1, 4)?,
            micro_batch: MicroBatch::new(room.tokens),
            recordings: Recordings::default(),
            update: device.recording(),
            activations: None,
            progress: Progress::default(),
            seconds: PartSeconds::default(),
            timed: false,
            pending: None,
            model,
            teacher,
            options,
            group: Box::new(Alone),
            room,
            gradients,
        };
        // One more for what fills a micro-batch up.
        trainer.reserve(room.segments + usize::from(device.info().records))?;
        Ok(trainer)
    }

    /// From now on one of a group: it begins with the weights of the group's first member, and with an optimiser that has
    /// seen nothing.
    ///
    /// # Errors
    /// When a member was lost.
    pub fn join(&mut self, group: impl Group + 'static) -> Result<()> {
        self.group = Box::new(group);
        for part in [Part::Matrices, Part::Vectors] {
            self.group.broadcast(self.model.device(), self.model.weights().part(part))?;
        }
        // Masters are the weights that there are now.
        self.optimizer = AdamW::new(&self.model, &self.gradients, self.options.optimizer)?;
        self.update = self.model.device().recording();
        Ok(())
    }

    /// Compiles what a step needs, where the device has anything to compile: by a step, without its effect, of a trainer like
    /// this one. `progress` hears how many parts of how many are done.
    ///
    /// # Errors
    /// When the device cannot make a step.
    pub fn compile_ahead(&self, progress: impl FnMut(usize, usize)) -> Result<()> {
        let mut rehearsed = Ok(());
        let step = || {
            rehearsed = self.rehearse();
            Ok(())
        };
        self.device().compile_ahead(step, progress)?;
        rehearsed
    }

    fn rehearse(&self) -> Result<()> {
        let model = Model::new(self.device(), self.model.config().clone(), dtype_of(&self.model))?;
        let teacher = self.teacher.as_ref().map(|teacher| Teacher::live(Arc::clone(teacher.model())));
        let mut trainer = Trainer::new(model, teacher, self.options, self.room)?;
        let len = self.room.tokens;
        let batch = Batch {
            ids: vec![0; len],
            labels: vec![0; len],
            counted: vec![true; len],
            segments: vec![Segment { start: 0, len, document: 0 }],
        };
        trainer.step(&[batch], 0.0)?;
        trainer.finish().map(drop)
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The teacher.
    pub fn teacher(&self) -> Option<&Teacher> {
        self.teacher.as_ref()
    }

    /// The gradients of the last step, before clipping.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// The optimiser.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// What it does at every step.
    pub fn options(&self) -> &TrainerOptions {
        &self.options
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Where the time of the last step went, if its parts are timed ([`Self::time_parts`]).
    pub fn seconds(&self) -> PartSeconds {
        self.seconds
    }

    /// From now on waits for the device after each part of a step, so that [`Self::seconds`] says where its time went.
    /// Its micro-batches are not recorded.
    pub fn time_parts(&mut self) {
        self.timed = true;
    }

    /// Gives the model and the teacher back; what was not yet read of the last step is lost.
    pub fn into_parts(self) -> (Model, Option<Teacher>) {
        (self.model, self.teacher)
    }

    /// Goes on after `progress`; weights and what the optimiser keeps have been written already.
    pub(super) fn set_progress(&mut self, progress: Progress) {
        self.progress = progress;
        self.pending = None;
    }

    /// One step over `batches`, whose gradients add up, with learning rate `rate`. Gives the numbers of the step before
    /// it; [`Self::finish`] gives the last one's.
    ///
    /// # Errors
    /// When a batch is larger than the trainer was made for, the device fails, or too many steps in a row were not
    /// finite.
    pub fn step(&mut self, batches: &[Batch], rate: f64) -> Result<Option<StepReport>> {
        let device = self.model.device().clone();
        let (tokens, counted) = batches
            .iter()
            .fold((0, 0), |(tokens, counted), batch| (tokens + batch.tokens(), counted + batch.counted_tokens()));
        let (tokens, counted) = (self.group.count(tokens)?, self.group.count(counted)?);
        let divisor = match self.options.divisor {
            Divisor::Counted => counted,
            Divisor::All => tokens,
        };
        let touch = self.timed.then(|| (&device, self.numbers.view()));
        let mut clock = Laps::new(touch);
        self.seconds = PartSeconds::default();
        self.optimizer.clear(&self.gradients)?;
        self.head.clear(&device)?;
        self.seconds.optimizer += clock.lap()?;
        for batch in batches.iter().filter(|batch| batch.counted.contains(&true)) {
            self.accumulate(batch, 1.0 / divisor as f32)?;
        }
        self.progress.step += 1;
        clock = Laps::new(touch);
        for gradients in self.optimizer.gradients(&self.gradients) {
            self.group.sum(&device, gradients?)?;
        }
        self.group.sum(&device, self.head.totals())?;
        self.optimizer.prepare(rate, self.progress.step)?;
        let numbers = self.numbers.view();
        self.update.run(|| {
            self.optimizer.launch(self.model.weights(), &self.gradients)?;
            device.copy(&Copy { src: self.head.totals(), out: Out::assign(numbers.col_range(0, 3)?) })?;
            device.copy(&Copy { src: self.optimizer.norm()?, out: Out::assign(numbers.col_range(3, 1)?) })
        })?;
        self.seconds.optimizer += clock.lap()?;
        let (step, losses) = (self.progress.step, [0.0; 3]);
        let report = StepReport { step, rate, loss: 0.0, losses, gradient_norm: 0.0, tokens, counted };
        let scale = if counted == 0 { 0.0 } else { divisor as f64 / counted as f64 };
        let before = self.pending.replace(Pending { report, scale, numbers: device.read(numbers)? });
        before.map(|pending| self.collect(pending)).transpose()
    }

    /// Waits for the numbers of the last step, if they were not given yet.
    ///
    /// # Errors
    /// When the device failed, or too many steps in a row were not finite.
    pub fn finish(&mut self) -> Result<Option<StepReport>> {
        self.pending.take().map(|pending| self.collect(pending)).transpose()
    }

    fn collect(&mut self, Pending { mut report, scale, numbers }: Pending) -> Result<StepReport> {
        let numbers = numbers.wait()?;
        let weights = self.options.loss.weights;
        let weights = [weights.reverse_kl, weights.forward_kl, weights.cross_entropy];
        for (loss, total) in report.losses.iter_mut().zip(&numbers) {
            *loss = f64::from(*total) * scale;
        }
        let used = report.losses.iter().zip(weights).filter(|(_, weight)| *weight != 0.0);
        report.loss = used.map(|(loss, weight)| loss * f64::from(weight)).sum();
        report.gradient_norm = f64::from(numbers.last().copied().unwrap_or(f32::NAN));
        self.progress.unfinite = if report.finite() { 0 } else { self.progress.unfinite + 1 };
        if self.progress.unfinite >= self.options.patience.max(1) {
            return Err(Error::Diverged { step: report.step, in_a_row: self.progress.unfinite });
        }
        Ok(report)
    }

    /// Forward, loss and backward of one micro-batch, each of its rows that count with weight `weight`.
    fn accumulate(&mut self, batch: &Batch, weight: f32) -> Result<()> {
        if batch.tokens() > self.room.tokens {
            let what = format!("a batch of {} tokens; there is room for {}", batch.tokens(), self.room.tokens);
            return Err(Error::Configuration(what));
        }
        let (tokens, rows) = filled_up(self.model.device(), self.room, batch);
        self.micro_batch.fill(batch, (tokens, rows), weight)?;
        let segments = self.micro_batch.segments.list().len();
        if segments > self.room.segments {
            self.reserve(segments + segments / 4)?;
        }
        let Trainer { model, teacher, gradients, activations, head, micro_batch, recordings, seconds, .. } = self;
        let Some(activations) = activations else { return Ok(()) };
        let device = model.device();
        let mut clock = Laps::new(self.timed.then(|| (device, self.numbers.view())));
        // All that is written from the host comes first, so that the rest are launches alone.
        let (MicroBatch { ids, segments, .. }, targets) = (&*micro_batch, micro_batch.targets());
        let outputs = match teacher {
            Some(teacher) => teacher.prepare(ids, segments, targets.rows)?,
            None => None,
        };
        model.prepare(activations, ids, segments, None)?;
        head.prepare(device, &targets)?;
        let (teacher, kind) = (teacher.as_ref(), self.options.loss);
        let mut launch = || {
            let teacher = match teacher {
                Some(teacher) => Some((&**teacher.model(), outputs.map_or_else(|| teacher.launch(rows), Ok)?)),
                None => None,
            };
            seconds.teacher += clock.lap()?;
            model.launch(activations, None, None)?;
            seconds.forward += clock.lap()?;
            let (stream, dstream) = (activations.output()?, activations.doutput()?);
            head.launch(model, (stream, rows), teacher, kind, Some((gradients, dstream)))?;
            seconds.head += clock.lap()?;
            model.backward(activations, gradients)?;
            seconds.backward += clock.lap()?;
            Ok(())
        };
        if self.timed {
            launch()?;
        } else {
            recordings.run(device, Shape { tokens, rows, outputs }, launch)?;
        }
        Ok(())
    }

    /// Makes the memory for up to `segments` segments.
    fn reserve(&mut self, segments: usize) -> Result<()> {
        let Room { tokens, .. } = self.room;
        let keep = if self.options.recompute { Keep::Inputs } else { Keep::Everything };
        self.recordings.clear();
        // The old memory goes before the new comes.
        self.activations = None;
        self.activations = Some(Activations::new(&self.model, keep, tokens, segments)?);
        if let Some(teacher) = &mut self.teacher {
            teacher.reserve(tokens, segments)?;
        }
        self.room.segments = segments;
        Ok(())
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.model.device()
    }
}
