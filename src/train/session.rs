//! A stretch of training in a run: from a position in the data to the last step of a schedule, with metrics,
//! evaluations and checkpoints, so that however often it is stopped, it ends in the same bits.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::{Error, Result};
use super::run::Run;
use super::schedule::Schedule;
use super::state::dtype_of;
use super::trainer::{Progress, StepReport, Trainer};
use crate::backend::DType;
use crate::report::metrics::Record;
use crate::text::packing::{Batch, Batches, Position};

/// The keys of a step's line of metrics that differ from run to run.
pub const WALL_CLOCK: [&str; 2] = ["seconds", "tokens_per_second"];

/// What a stretch of training is.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The trainer's last step.
    pub steps: u64,
    /// The learning rate.
    pub schedule: Schedule,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Steps of the run before the trainer's first.
    pub offset: u64,
    /// Steps between two checkpoints; 0 for the last step's alone.
    pub checkpoint_every: u64,
    /// Steps between two evaluations; 0 for the last step's alone.
    pub evaluate_every: u64,
    /// The folder whose tokenizer files go into checkpoints.
    pub tokenizer: Option<&'a Path>,
}

/// How a stretch of training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// At its last step.
    Finished,
    /// After a step, because it was asked to; a checkpoint was written.
    Interrupted,
}

/// Where a stretch of training stands; `caller` is what whoever runs it has to remember.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    /// The trainer's part.
    pub progress: Progress,
    /// Where the next batch begins.
    pub position: Position,
    /// Tokens so far.
    pub tokens: u64,
    /// How the weights are stored on the device.
    pub dtype: String,
    /// The caller's part.
    pub caller: Value,
}

/// Who looks on, and says what only the caller knows.
pub trait Observer {
    /// Whether to stop after the present step.
    fn interrupted(&self) -> bool {
        false
    }

    /// So many parts of so many that the device compiles before the first step are done.
    fn compiled(&mut self, _done: usize, _all: usize) {}

    /// What every line of metrics says beside its numbers, such as the stage.
    fn label(&self) -> Record {
        Record::new()
    }

    /// The numbers of a step came back; `seconds` is how long it took.
    fn stepped(&mut self, _report: &StepReport, _seconds: f64) {}

    /// The model's scores after a step, for the metrics.
    ///
    /// # Errors
    /// When they cannot be had.
    fn evaluate(&mut self, trainer: &Trainer) -> std::result::Result<Record, Box<dyn std::error::Error + Send + Sync>>;

    /// What the caller has to remember in a checkpoint.
    fn state(&self) -> Value {
        Value::Null
    }
}

/// Trains up to the last step of `plan`. `tokens` is the number of tokens so far, as the state has it.
///
/// # Errors
/// When a step, an evaluation or a checkpoint fails; the earlier checkpoints are still there then.
pub fn train(
    run: &mut Run,
    trainer: &mut Trainer,
    batches: &mut Batches,
    (plan, tokens): (&Plan<'_>, u64),
    observer: &mut dyn Observer,
) -> Result<Outcome> {
    if dtype_of(trainer.model()) == DType::F64 {
        return Err(Error::Configuration("a run of training cannot keep f64 weights; train with --dtype f32".into()));
    }
    trainer.compile_ahead(|done, all| observer.compiled(done, all))?;
    let mut stretch = Stretch { run, plan, observer, tokens };
    let mut seconds = 0.0;
    let mut micro_batches = vec![Batch::default(); plan.accumulate.max(1)];
    while trainer.progress().step < plan.steps {
        let clock = Instant::now();
        micro_batches.iter_mut().for_each(|batch| batches.next_into(batch));
        let step = trainer.progress().step + 1;
        let before = trainer.step(&micro_batches, plan.schedule.rate(step))?;
        stretch.record(before, seconds)?;
        seconds = clock.elapsed().as_secs_f64();
        let last = step == plan.steps;
        let due = |every: u64| last || (every > 0 && step.is_multiple_of(every));
        let interrupted = stretch.observer.interrupted();
        let (evaluate, checkpoint) = (due(plan.evaluate_every), due(plan.checkpoint_every) || interrupted);
        if evaluate || checkpoint {
            let report = trainer.finish()?;
            stretch.record(report, clock.elapsed().as_secs_f64())?;
        }
        if evaluate {
            stretch.evaluate(trainer)?;
        }
        if checkpoint {
            stretch.save(trainer, batches)?;
        }
        if interrupted && !last {
            return Ok(Outcome::Interrupted);
        }
    }
    Ok(Outcome::Finished)
}

struct Stretch<'a> {
    run: &'a mut Run,
    plan: &'a Plan<'a>,
    observer: &'a mut dyn Observer,
    tokens: u64,
}

impl Stretch<'_> {
    fn record(&mut self, report: Option<StepReport>, seconds: f64) -> Result<()> {
        let Some(report) = report else { return Ok(()) };
        self.tokens += report.tokens as u64;
        let [reverse_kl, forward_kl, cross_entropy] = report.losses;
        let mut line = self.observer.label();
        line.extend([
            ("loss".into(), json!(report.loss)),
            ("reverse_kl".into(), json!(reverse_kl)),
            ("forward_kl".into(), json!(forward_kl)),
            ("cross_entropy".into(), json!(cross_entropy)),
            ("gradient_norm".into(), json!(report.gradient_norm)),
            ("learning_rate".into(), json!(report.rate)),
            ("tokens".into(), json!(self.tokens)),
            ("counted".into(), json!(report.counted)),
            (WALL_CLOCK[0].into(), json!(seconds)),
            (WALL_CLOCK[1].into(), json!(report.tokens as f64 / seconds)),
        ]);
        self.run.metrics().write(self.plan.offset + report.step, &line)?;
        self.observer.stepped(&report, seconds);
        Ok(())
    }

    fn evaluate(&mut self, trainer: &Trainer) -> Result<()> {
        let scores = self.observer.evaluate(trainer).map_err(Error::Observer)?;
        if !scores.is_empty() {
            let mut line = self.observer.label();
            line.insert("tokens".into(), json!(self.tokens));
            line.insert("evaluation".into(), Value::Object(scores));
            self.run.metrics().write(self.plan.offset + trainer.progress().step, &line)?;
        }
        Ok(())
    }

    fn save(&mut self, trainer: &Trainer, batches: &Batches) -> Result<()> {
        let state = SessionState {
            progress: trainer.progress(),
            position: batches.position().clone(),
            tokens: self.tokens,
            dtype: dtype_of(trainer.model()).to_string(),
            caller: self.observer.state(),
        };
        let step = self.plan.offset + trainer.progress().step;
        self.run.save(step, &state, |folder| trainer.save_into(folder, self.plan.tokenizer))
    }
}
