//! What `h1 train` does: a configuration becomes a run, and a run a model.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::config::{Data, TrainConfig};
use super::error::{Error, Result};
use super::fresh::fresh;
use super::run::{Run, Saved};
use super::session::{self, Observer, Outcome, Plan, SessionState};
use super::settings::Settings;
use super::state::dtype_of;
use super::trainer::{Divisor, Room, StepReport, Trainer, TrainerOptions};
use crate::backend::ops::{LossWeights, Scaling};
use crate::backend::{DType, Device};
use crate::checkpoint::{self, Checkpoint, SaveOptions};
use crate::eval::{Evaluator, Scores};
use crate::model::config::ModelConfig;
use crate::model::{LossKind, Model};
use crate::report::metrics::{self, Record};
use crate::text::arithmetic::ALPHABET;
use crate::text::cache::Progress;
use crate::text::characters::write_character_tokenizer;
use crate::text::documents::Documents;
use crate::text::packing::{Batch, Batches};
use crate::text::tokenizer::{self, Tokenizer};

/// Tokens of a call of an evaluation.
const EVALUATION_TOKENS: usize = 2048;
/// The result's folder in a run.
const MODEL: &str = "model";

/// Who looks on at a job.
pub trait Watcher {
    /// Whether to stop after the present step.
    fn interrupted(&self) -> bool;
    /// So many parts of so many that the device compiles before the first step are done.
    fn compiled(&mut self, done: usize, all: usize);
    /// The numbers of a step came back; `seconds` is how long it took.
    fn stepped(&mut self, report: &StepReport, seconds: f64);
    /// The held-out documents were scored after `step`.
    fn evaluated(&mut self, step: u64, scores: &Scores);
}

/// A run of `h1 train`, ready to go on.
#[derive(Debug)]
pub struct Job {
    run: Run,
    trainer: Trainer,
    batches: Batches,
    data: Data,
    config: TrainConfig,
    tokenizer: PathBuf,
    steps: u64,
    tokens: u64,
}

impl Job {
    /// Opens the run in `out`: from the start, or, if `resume`, after its latest checkpoint. Relative paths in the
    /// configuration start at `base`. `progress` hears how far texts are turned into tokens.
    ///
    /// # Errors
    /// When the configuration makes no sense, the run is not to be had, data or model cannot be read, or the device has
    /// no room.
    pub fn open(
        settings: Settings<TrainConfig>,
        (base, out): (&Path, &Path),
        resume: bool,
        (device, dtype): (&Device, DType),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Job> {
        let config = settings.values;
        let steps = config.budget.steps(&config.batch)?;
        let options = TrainerOptions {
            trained: config.optimizer.trained,
            optimizer: config.optimizer.options()?,
            loss: LossKind {
                weights: LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 1.0 },
                scaling: Scaling::default(),
            },
            divisor: Divisor::Counted,
            recompute: config.recompute,
            patience: config.optimizer.patience,
        };
        config.schedule.of(steps, config.optimizer.learning_rate)?;
        let (run, saved) = Run::open::<SessionState>(out, &settings.text, resume, config.checkpoint.keep)?;
        match Parts::new(&config, (base, &run), saved, options, (device, dtype), progress) {
            Ok(Parts { trainer, batches, data, tokenizer, tokens }) => {
                Ok(Job { run, trainer, batches, data, config, tokenizer, steps, tokens })
            }
            Err(error) => {
                run.abandon();
                Err(error)
            }
        }
    }

    /// The trainer's last step.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The steps that were done before this process.
    pub fn done(&self) -> u64 {
        self.trainer.progress().step
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        self.trainer.model()
    }

    /// What it learns from and is scored on.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The run's folder.
    pub fn folder(&self) -> &Path {
        self.run.folder()
    }

    /// Trains to the end, or until it is interrupted.
    ///
    /// # Errors
    /// As [`session::train`].
    pub fn run(&mut self, watcher: &mut dyn Watcher) -> Result<Outcome> {
        let plan = Plan {
            steps: self.steps,
            schedule: self.config.schedule.of(self.steps, self.config.optimizer.learning_rate)?,
            accumulate: self.config.batch.accumulate,
            offset: 0,
            checkpoint_every: self.config.checkpoint.every,
            evaluate_every: self.config.evaluation.every,
            tokenizer: Some(&self.tokenizer),
        };
        let mut observer = Scoring { watcher, documents: &self.data.test };
        session::train(&mut self.run, &mut self.trainer, &mut self.batches, (&plan, self.tokens), &mut observer)
    }

    /// The last scores of the held-out documents in the run's metrics.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub fn last_scores(&self) -> Result<Option<Value>> {
        let records = metrics::read(&self.run.metrics_path())?;
        Ok(records.into_iter().rev().find_map(|mut record| record.remove("evaluation")))
    }

    /// Writes the model as a Hugging Face folder into the run, if it is not there yet, and gives its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn publish(&self) -> Result<PathBuf> {
        let model = self.trainer.model();
        let options = SaveOptions { copy_from: Some(&self.tokenizer), ..SaveOptions::new(dtype_of(model)) };
        self.run.publish(MODEL, |folder| Ok(checkpoint::save_model_into(folder, model, &options)?))
    }
}

/// What a job is made of, at the start or as a checkpoint left it.
struct Parts {
    trainer: Trainer,
    batches: Batches,
    data: Data,
    tokenizer: PathBuf,
    tokens: u64,
}

impl Parts {
    fn new(
        config: &TrainConfig,
        (base, run): (&Path, &Run),
        saved: Option<Saved<SessionState>>,
        options: TrainerOptions,
        (device, dtype): (&Device, DType),
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Parts> {
        let tokenizer_folder = tokenizer_folder(config, base, run)?;
        let tokenizer = Tokenizer::open(&tokenizer_folder)?;
        let data = config.data.load(base, &tokenizer, progress)?;
        let batch = config.batch;
        let mut batches = Batches::new(data.train.clone().into(), batch.row_tokens, batch.rows, config.seed)?;
        let origin = Origin::new(config, (base, &tokenizer), saved.as_ref())?;
        let (tokens, rows) = (tokenizer.vocabulary_size(), origin.config().vocab_size);
        if tokens > rows {
            return Err(Error::Configuration(format!("the tokenizer has {tokens} tokens, the model only {rows}")));
        }
        let room = Room { tokens: batches.most_tokens(), segments: first_segments(&batches) };
        device.plan(|device| {
            let trainer = Trainer::new(Model::new(device, origin.config().clone(), dtype)?, None, options, room)?;
            if !data.test.is_empty() {
                Evaluator::new(trainer.model(), None, EVALUATION_TOKENS)?;
            }
            Ok::<_, Error>(())
        })?;
        let mut trainer = Trainer::new(origin.model((device, dtype), config.seed)?, None, options, room)?;
        let mut tokens = 0;
        if let Some(Saved { folder, state, .. }) = saved {
            if state.dtype != dtype_of(trainer.model()).to_string() {
                let what = format!("the run stores its weights as {}; give --dtype {0}", state.dtype);
                return Err(Error::Configuration(what));
            }
            trainer.restore(&folder, state.progress)?;
            batches = batches.resume(&state.position)?;
            tokens = state.tokens;
        }
        Ok(Parts { trainer, batches, data, tokenizer: tokenizer_folder, tokens })
    }
}

/// The folder of the tokenizer; that of the arithmetic task is written into the run.
fn tokenizer_folder(config: &TrainConfig, base: &Path, run: &Run) -> Result<PathBuf> {
    match (&config.model.checkpoint, &config.model.tokenizer, &config.data.arithmetic) {
        (Some(_), Some(_), _) => {
            Err(Error::Configuration("model: a checkpoint brings its own tokenizer; leave `tokenizer` out".into()))
        }
        (Some(model), ..) | (None, Some(model), _) => {
            tokenizer::folder_of(&checkpoint::locate(base, model)?, |write| {
                run.publish("tokenizer", |folder| Ok(write(folder)?))
            })
        }
        (None, None, Some(_)) => run.publish("tokenizer", |folder| Ok(write_character_tokenizer(folder, ALPHABET)?)),
        _ => Err(Error::Configuration("model: a new model for files needs a folder under `tokenizer`".into())),
    }
}

/// What a model comes from.
enum Origin {
    Checkpoint(Checkpoint),
    Shape(ModelConfig),
}

impl Origin {
    fn new(
        config: &TrainConfig,
        (base, tokenizer): (&Path, &Tokenizer),
        saved: Option<&Saved<SessionState>>,
    ) -> Result<Self> {
        match (saved, &config.model.checkpoint, &config.model.shape) {
            (_, Some(_), Some(_)) | (_, None, None) => {
                Err(Error::Configuration("model: expected either `checkpoint` or `shape`".into()))
            }
            (Some(saved), ..) => Ok(Origin::Checkpoint(Checkpoint::open(&saved.folder)?)),
            (None, Some(folder), _) => Ok(Origin::Checkpoint(Checkpoint::open(&checkpoint::locate(base, folder)?)?)),
            (None, None, Some(shape)) => Ok(Origin::Shape(shape.config(tokenizer)?)),
        }
    }

    fn config(&self) -> &ModelConfig {
        match self {
            Origin::Checkpoint(checkpoint) => checkpoint.config(),
            Origin::Shape(config) => config,
        }
    }

    fn model(self, (device, dtype): (&Device, DType), seed: u64) -> Result<Model> {
        match self {
            Origin::Checkpoint(checkpoint) => Ok(checkpoint.load(device, dtype)?),
            Origin::Shape(config) => fresh(device, config, dtype, seed),
        }
    }
}

/// Room for the segments of a batch like the first one; more is made where one has more.
fn first_segments(batches: &Batches) -> usize {
    let mut first = Batch::default();
    batches.clone().next_into(&mut first);
    first.segments.len() + first.segments.len() / 4
}

struct Scoring<'a> {
    watcher: &'a mut dyn Watcher,
    documents: &'a Documents,
}

impl Observer for Scoring<'_> {
    fn interrupted(&self) -> bool {
        self.watcher.interrupted()
    }

    fn compiled(&mut self, done: usize, all: usize) {
        self.watcher.compiled(done, all);
    }

    fn stepped(&mut self, report: &StepReport, seconds: f64) {
        self.watcher.stepped(report, seconds);
    }

    fn evaluate(&mut self, trainer: &Trainer) -> std::result::Result<Record, Box<dyn std::error::Error + Send + Sync>> {
        if self.documents.is_empty() {
            return Ok(Record::new());
        }
        let scores = Evaluator::new(trainer.model(), None, EVALUATION_TOKENS)?.run(self.documents, None, |_| {})?;
        self.watcher.evaluated(trainer.progress().step, &scores);
        match serde_json::to_value(&scores)? {
            Value::Object(record) => Ok(record),
            _ => Ok(Record::new()),
        }
    }
}
