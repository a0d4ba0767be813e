//! A step of distillation, and the share of the machine's matrix products that it reaches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::card;
use super::shapes::{hybrid, random_model};
use super::yardstick::Gemm;
use super::{Error, Result, roofline};
use crate::backend::ops::{LossWeights, Scaling};
use crate::backend::{DType, Device};
use crate::model::config::ModelConfig;
use crate::model::{LossKind, Model};
use crate::text::packing::{Batch, NO_LABEL, Segment};
use crate::train::Trainer;
use crate::train::optimizer::{AdamWOptions, Trained};
use crate::train::teacher::Teacher;
use crate::train::trainer::{Divisor, PartSeconds, Room, TrainerOptions};

/// The product that a step is held against: m, k, n.
pub const GEMM: [usize; 3] = [512, 576, 1536];
/// FLOP a parameter and token: 2 for the teacher's forward pass, 2 for the student's, 4 for its backward pass.
const FLOP: f64 = 8.0;
/// How long the product runs before each step.
const STRETCH: Duration = Duration::from_millis(300);
/// Steps whose numbers are not finite do not matter here.
const PATIENCE: u64 = u64::MAX;

/// What a step is.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Mamba layers of the student.
    pub mamba: usize,
    /// Tokens of the one sequence.
    pub tokens: usize,
    /// Whether backward computes each block again.
    pub recompute: bool,
    /// Steps that are timed.
    pub steps: usize,
    /// Threads of the matrix product.
    pub threads: usize,
    /// How weights are stored.
    pub dtype: DType,
}

/// What came out; the step is the best one.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Report {
    /// Mamba layers of the student.
    pub mamba: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Whether backward computed each block again.
    pub recompute: bool,
    /// Parameters of the student.
    pub student_parameters: u64,
    /// Seconds of a step.
    pub seconds: f64,
    /// Where those of one more step went.
    pub parts: PartSeconds,
    /// Tokens over seconds.
    pub tokens_per_second: f64,
    /// 8 FLOP × student parameters × tokens a second, in GFLOP/s.
    pub gflops: f64,
    /// GFLOP/s of the `gemm` crate at [`GEMM`], the best of the stretches between the steps, or the limit of the card.
    pub gemm_gflops: f64,
    /// Threads of it; 0 for a card.
    pub gemm_threads: usize,
    /// The former over the latter.
    pub share_of_gemm: f64,
    /// The time that the products of the step alone ([`roofline::distillation`]) need at that rate, over its own.
    pub share_of_floor: f64,
    /// The most bytes of device buffers at a time.
    pub peak_bytes: usize,
}

/// Distils `config` with random weights into itself with `step.mamba` Mamba layers, by reverse KL, AdamW of everything;
/// `progress` hears of each that counts. Stretches of the matrix product lie between the steps, so that a change of the
/// machine's speed meets both.
///
/// # Errors
/// When the step makes no sense, the device has no room, or it fails.
pub fn measure(device: &Device, config: &ModelConfig, step: Step, mut progress: impl FnMut()) -> Result<Report> {
    if step.tokens == 0 || step.steps == 0 {
        return Err(Error::Options("a training step needs at least one token, and one step is timed at least".into()));
    }
    device.take_peak_bytes();
    device.plan(|device| {
        let shape = |mamba| Ok(Model::new(device, hybrid(config, mamba)?, step.dtype)?);
        trainer(step, shape).map(drop)
    })?;
    let mut trainer = trainer(step, |mamba| random_model(device, config, mamba, step.dtype))?;
    let batch = [batch(config.vocab_size, step.tokens)];
    let mut gemm = if card::on_processor(device) { Some(Gemm::new(GEMM, step.threads)?) } else { None };
    let mut gemm_gflops = match gemm {
        Some(_) => 0.0,
        None => card::limits(device, step.dtype, step.threads, STRETCH)?.gemm_gflops,
    };
    // The first touches all memory for the first time; on a device that records the second is recorded.
    let warm = 1 + usize::from(device.info().records);
    let mut seconds = f64::INFINITY;
    for round in 0..warm + step.steps {
        if let Some(gemm) = &mut gemm {
            gemm_gflops = gemm_gflops.max(gemm.rate(STRETCH));
        }
        let start = Instant::now();
        trainer.step(&batch, 1e-5)?;
        trainer.finish()?;
        if round >= warm {
            seconds = seconds.min(start.elapsed().as_secs_f64());
            progress();
        }
    }
    // A step whose parts are waited for is not one recording: it is one more.
    trainer.time_parts();
    trainer.step(&batch, 1e-5)?;
    trainer.finish()?;
    let student_parameters = trainer.model().config().parameter_count();
    let tokens_per_second = step.tokens as f64 / seconds;
    let floor = roofline::distillation(config, trainer.model().config(), step.tokens).flops / gemm_gflops / 1e9;
    let gflops = FLOP * student_parameters as f64 * tokens_per_second / 1e9;
    Ok(Report {
        mamba: step.mamba,
        tokens: step.tokens,
        recompute: step.recompute,
        student_parameters,
        seconds,
        parts: trainer.seconds(),
        tokens_per_second,
        gflops,
        gemm_gflops,
        gemm_threads: if gemm.is_some() { step.threads } else { 0 },
        share_of_gemm: gflops / gemm_gflops,
        share_of_floor: floor / seconds,
        peak_bytes: device.take_peak_bytes(),
    })
}

/// Of models that `make` makes with so many Mamba layers.
fn trainer(step: Step, make: impl Fn(usize) -> Result<Model>) -> Result<Trainer> {
    let (teacher, student) = (make(0)?, make(step.mamba)?);
    let options = TrainerOptions {
        trained: Trained::All,
        optimizer: AdamWOptions::default(),
        loss: LossKind {
            weights: LossWeights { reverse_kl: 1.0, forward_kl: 0.0, cross_entropy: 0.0 },
            scaling: Scaling::default(),
        },
        divisor: Divisor::Counted,
        recompute: step.recompute,
        patience: PATIENCE,
    };
    let teacher = Teacher::live(Arc::new(teacher));
    Ok(Trainer::new(student, Some(teacher), options, Room { tokens: step.tokens, segments: 1 })?)
}

/// One sequence of any tokens, all of whose logits count.
fn batch(vocabulary: usize, tokens: usize) -> Batch {
    Batch {
        ids: (0..tokens).map(|at| (at * 7919 % vocabulary) as u32).collect(),
        labels: vec![NO_LABEL; tokens],
        counted: vec![true; tokens],
        segments: vec![Segment { start: 0, len: tokens, document: 0 }],
    }
}
