//! The configuration of a run, part by part; a distillation is made of the same parts.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::{Error, Result};
use super::optimizer::{AdamWOptions, Trained};
use super::schedule::Schedule;
use crate::model::config::{BlockKind, Family, ModelConfig, Rope};
use crate::text::arithmetic::{self, Kind, Split};
use crate::text::cache::{Cache, Progress};
use crate::text::documents::Documents;
use crate::text::encode::{Encoder, LossOn, Render};
use crate::text::record::Record;
use crate::text::tokenizer::Tokenizer;

/// `h1 train`: a new model from a shape, or a checkpoint trained further, by cross-entropy.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of the weights and of the order of the data.
    #[serde(default)]
    pub seed: u64,
    /// What is trained.
    pub model: ModelSource,
    /// What it learns.
    pub data: DataConfig,
    /// How the data are cut.
    pub batch: BatchConfig,
    /// How long.
    pub budget: Budget,
    /// The optimiser.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// How often it is scored.
    #[serde(default)]
    pub evaluation: Every,
    /// How often it is kept.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Compute blocks again in backward: less memory, more time.
    #[serde(default)]
    pub recompute: bool,
}

/// Where a model comes from: one of the two.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSource {
    /// A folder in Hugging Face form.
    pub checkpoint: Option<PathBuf>,
    /// The sizes of a new one.
    pub shape: Option<ModelShape>,
    /// The folder whose tokenizer a new one takes; the arithmetic task has one of its own.
    pub tokenizer: Option<PathBuf>,
}

/// The sizes of a new attention model, by the names that `config.json` gives them. The vocabulary is the tokenizer's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelShape {
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The base of the rotary frequencies.
    #[serde(default = "ten_thousand")]
    pub rope_theta: f64,
    /// Added under the root of RMSNorm.
    #[serde(default = "small")]
    pub rms_norm_eps: f64,
    /// Standard deviation of fresh weights.
    #[serde(default = "initializer_range")]
    pub initializer_range: f64,
    /// Longest context.
    #[serde(default = "context")]
    pub max_position_embeddings: usize,
    /// Whether the embedding is the head too.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn ten_thousand() -> f64 {
    1e4
}

fn small() -> f64 {
    1e-5
}

fn initializer_range() -> f64 {
    0.02
}

fn context() -> usize {
    4096
}

impl ModelShape {
    /// A Mistral of this shape for a tokenizer.
    ///
    /// # Errors
    /// When the sizes do not go together.
    pub fn config(&self, tokenizer: &Tokenizer) -> Result<ModelConfig> {
        let config = ModelConfig {
            family: Family::Mistral,
            vocab_size: tokenizer.vocabulary_size(),
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rms_norm_eps: self.rms_norm_eps,
            rope: Rope { theta: self.rope_theta, scaling: None },
            sliding_window: None,
            attention_bias: false,
            tie_word_embeddings: self.tie_word_embeddings,
            max_position_embeddings: self.max_position_embeddings,
            bos_token_id: tokenizer.bos(),
            eos_token_ids: tokenizer.eos().into_iter().collect(),
            initializer_range: self.initializer_range,
            blocks: vec![BlockKind::Attention; self.num_hidden_layers],
            mamba: None,
            extra: serde_json::Map::new(),
        };
        config.validate().map_err(|error| Error::Configuration(format!("model.shape: {error}")))?;
        Ok(config)
    }
}

/// What is learnt and what is held out: the arithmetic task, or files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// The arithmetic task.
    pub arithmetic: Option<ArithmeticData>,
    /// Files of JSON lines, Parquet or text.
    #[serde(default)]
    pub train: Vec<PathBuf>,
    /// Files that are held out.
    #[serde(default)]
    pub test: Vec<PathBuf>,
    /// The share of the records of `train` that is held out, where there is no `test`.
    #[serde(default)]
    pub held_out: f64,
    /// Which tokens count: "response", "all", or a list of roles.
    #[serde(default)]
    pub loss_on: LossOn,
    /// How a question with its answer becomes text: "auto", "chat" or "plain".
    #[serde(default)]
    pub render: Render,
    /// Where tokens are kept; the user's folder of caches unless said.
    pub cache: Option<PathBuf>,
}

/// Problems of the arithmetic task.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArithmeticData {
    /// Seed of the problems.
    #[serde(default)]
    pub seed: u64,
    /// Problems to learn from.
    pub train: usize,
    /// Problems that are held out.
    pub test: usize,
    /// Fewest and most digits of an operand.
    pub digits: [u32; 2],
    /// The kinds of problems; all of them unless said.
    #[serde(default = "all_kinds")]
    pub kinds: Vec<Kind>,
}

fn all_kinds() -> Vec<Kind> {
    Kind::ALL.to_vec()
}

/// What is learnt, and what is held out; that may be nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Data {
    /// To learn from.
    pub train: Documents,
    /// Held out.
    pub test: Documents,
}

impl DataConfig {
    /// The documents, in the tokens of `tokenizer`; a relative path starts at `base`. `progress` hears how far the files
    /// are turned into tokens, where they are not kept from an earlier time.
    ///
    /// # Errors
    /// When files cannot be read, or nothing is to be learnt.
    pub fn load(&self, base: &Path, tokenizer: &Tokenizer, progress: &mut dyn FnMut(Progress)) -> Result<Data> {
        let encoder = Encoder::new(tokenizer, self.render, self.loss_on.clone());
        let [train, test] = match (&self.arithmetic, &self.train[..]) {
            (Some(arithmetic), []) => [
                Documents::encode(&arithmetic.records(Split::Train)?, &encoder)?,
                Documents::encode(&arithmetic.records(Split::Test)?, &encoder)?,
            ],
            (None, [_, ..]) => self.files(base, &encoder, progress)?,
            _ => return Err(Error::Configuration("data: expected either `arithmetic` or files under `train`".into())),
        };
        if train.is_empty() {
            return Err(Error::Configuration("data: there is nothing to learn from".into()));
        }
        Ok(Data { train, test })
    }

    fn files(&self, base: &Path, encoder: &Encoder<'_>, progress: &mut dyn FnMut(Progress)) -> Result<[Documents; 2]> {
        let cache = self.cache.as_ref().map_or_else(Cache::usual, |folder| Cache::at(&base.join(folder)));
        let at_base = |paths: &[PathBuf]| paths.iter().map(|path| base.join(path)).collect::<Vec<_>>();
        let (train, test) = (at_base(&self.train), at_base(&self.test));
        if !test.is_empty() && self.held_out != 0.0 {
            return Err(Error::Configuration("data: expected either `test` or `held_out`, found both".into()));
        }
        let [train, held_out] = cache.documents(&train, self.held_out, encoder, progress)?;
        match &test[..] {
            [] => Ok([train, held_out]),
            test => {
                let [test, _] = cache.documents(test, 0.0, encoder, progress)?;
                Ok([train, test])
            }
        }
    }
}

impl ArithmeticData {
    /// The problems of one half, as records.
    ///
    /// # Errors
    /// When there is no such kind of problem.
    pub fn records(&self, split: Split) -> Result<Vec<Record>> {
        let count = if split == Split::Train { self.train } else { self.test };
        let [fewest, most] = self.digits;
        let problems = arithmetic::generate(self.seed, split, count, &self.kinds, fewest..=most)?;
        Ok(problems
            .map(|problem| Record::Pair { prompt: problem.prompt, between: "", response: problem.completion })
            .collect())
    }
}

/// How data are cut into steps.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Tokens of a row, at most: documents are packed whole.
    pub row_tokens: usize,
    /// Rows of a micro-batch.
    pub rows: usize,
    /// Micro-batches of a step.
    #[serde(default = "one")]
    pub accumulate: usize,
}

fn one() -> usize {
    1
}

impl BatchConfig {
    /// Tokens of a step whose rows are full.
    pub fn tokens_a_step(&self) -> usize {
        self.row_tokens.saturating_mul(self.rows).saturating_mul(self.accumulate.max(1))
    }
}

/// How long training lasts: one of the two.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Steps.
    pub steps: Option<u64>,
    /// Tokens, counting every row as full; rounded up to a step.
    pub tokens: Option<u64>,
}

impl Budget {
    /// The steps of it.
    ///
    /// # Errors
    /// When there is none.
    pub fn steps(&self, batch: &BatchConfig) -> Result<u64> {
        let steps = match (self.steps, self.tokens) {
            (Some(steps), None) => steps,
            (None, Some(tokens)) => tokens.div_ceil(batch.tokens_a_step().max(1) as u64),
            _ => return Err(Error::Configuration("budget: expected either `steps` or `tokens`".into())),
        };
        if steps == 0 {
            return Err(Error::Configuration("budget: expected at least one step".into()));
        }
        Ok(steps)
    }
}

/// AdamW; what is not said is as in Fast-LLM.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of matrices, embeddings and convolutions.
    pub weight_decay: f64,
    /// Whether biases decay too.
    pub decay_biases: bool,
    /// The largest gradient norm; 0 for no clipping.
    pub clip: f64,
    /// What is trained.
    pub trained: Trained,
    /// So many steps in a row without finite numbers end the run.
    pub patience: u64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        let AdamWOptions { betas, eps, weight_decay, decay_biases, max_norm } = AdamWOptions::default();
        let (learning_rate, trained, patience) = (5e-5, Trained::All, 3);
        OptimizerConfig { learning_rate, betas, eps, weight_decay, decay_biases, clip: max_norm, trained, patience }
    }
}

impl OptimizerConfig {
    /// The optimiser's numbers.
    ///
    /// # Errors
    /// Names the first that makes no sense.
    pub fn options(&self) -> Result<AdamWOptions> {
        let OptimizerConfig { betas, eps, weight_decay, decay_biases, clip, learning_rate, .. } = *self;
        let not_negative = |value: f64| value >= 0.0 && value.is_finite();
        for (name, value, holds, expected) in [
            ("learning_rate", learning_rate, not_negative(learning_rate), "a number of at least 0"),
            ("betas", betas[0], (0.0..1.0).contains(&betas[0]), "numbers of at least 0 and less than 1"),
            ("betas", betas[1], (0.0..1.0).contains(&betas[1]), "numbers of at least 0 and less than 1"),
            ("eps", eps, not_negative(eps) && eps > 0.0, "a number over 0"),
            ("weight_decay", weight_decay, not_negative(weight_decay), "a number of at least 0"),
            ("clip", clip, not_negative(clip), "a number of at least 0"),
        ] {
            if !holds {
                return Err(Error::Configuration(format!("optimizer.{name} is {value}; expected {expected}")));
            }
        }
        let max_norm = if clip == 0.0 { f64::INFINITY } else { clip };
        Ok(AdamWOptions { betas, eps, weight_decay, decay_biases, max_norm })
    }
}

/// The course of the learning rate: warm-up, constant, straight down.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Steps of warm-up.
    pub warmup: u64,
    /// The share of all steps at which the decay begins; where the warm-up ends, if that is later.
    pub constant: f64,
    /// The rate of the last step, as a share of the highest.
    pub minimum: f64,
}

impl ScheduleConfig {
    /// The schedule of `steps` steps.
    ///
    /// # Errors
    /// When a share is none.
    pub fn of(&self, steps: u64, base: f64) -> Result<Schedule> {
        for (name, share) in [("constant", self.constant), ("minimum", self.minimum)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::Configuration(format!("schedule.{name} is {share}; expected a share from 0 to 1")));
            }
        }
        let hold = (self.constant * steps as f64) as u64;
        Ok(Schedule { base, minimum: self.minimum * base, warmup: self.warmup, hold, end: steps })
    }
}

/// How often something happens.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Every {
    /// Steps between two times; 0 for the end alone.
    pub every: u64,
}

/// Checkpoints of a run.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between two; 0 for the end alone.
    pub every: u64,
    /// How many are kept.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every: 0, keep: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_of_tokens_is_rounded_up_to_steps() {
        let batch = BatchConfig { row_tokens: 10, rows: 2, accumulate: 3 };
        let steps = |steps, tokens| Budget { steps, tokens }.steps(&batch);
        assert_eq!(steps(None, Some(121)).unwrap(), 3);
        assert_eq!(steps(Some(7), None).unwrap(), 7);
        for (some, tokens) in [(Some(1), Some(1)), (None, None), (Some(0), None)] {
            assert!(steps(some, tokens).is_err());
        }
    }

    #[test]
    fn the_schedule_of_a_run_ends_at_its_last_step() {
        let config = ScheduleConfig { warmup: 10, constant: 0.5, minimum: 0.02 };
        let schedule = config.of(100, 2.0).unwrap();
        assert_eq!([10, 50, 75, 100].map(|step| schedule.rate(step)), [2.0, 2.0, 1.02, 0.04]);
        assert!(ScheduleConfig { minimum: 2.0, ..config }.of(100, 1.0).is_err());
    }

    #[test]
    fn numbers_of_the_optimiser_that_make_no_sense_are_named() {
        let wrong = OptimizerConfig { betas: [0.9, 1.0], ..OptimizerConfig::default() };
        assert!(wrong.options().unwrap_err().to_string().contains("optimizer.betas is 1"));
        let free = OptimizerConfig { clip: 0.0, ..OptimizerConfig::default() };
        assert_eq!(free.options().unwrap().max_norm, f64::INFINITY);
    }
}
