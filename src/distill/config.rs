//! The configuration of a distillation: TOML, every key known, any key overridden from the command line.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::importance::{Loo, Measure, Method, Without};
use super::placement::Placement;
use super::{Error, Result};
use crate::backend::DType;
use crate::backend::ops::{LossWeights, Scaling, Temperature};
use crate::checkpoint;
use crate::hybrid::{Conversion, DT_RANGES, Init, LayerSet, MixerShape};
use crate::model::LossKind;
use crate::model::config::{BlockKind, ModelConfig};
use crate::train::config::{BatchConfig, CheckpointConfig, DataConfig, OptimizerConfig, ScheduleConfig};
use crate::train::optimizer::Trained;
use crate::train::schedule::Schedule;
use crate::train::trainer::{Divisor, TrainerOptions};

/// A distillation, from its teacher to its last stage.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seed of everything that is drawn.
    #[serde(default)]
    pub seed: u64,
    /// How weights and activations are stored on the device: f32, bf16 or f16. Where it is left out, whoever runs it says.
    pub dtype: Option<String>,
    /// The original model.
    pub teacher: TeacherConfig,
    /// What is read; not needed for `--plan`.
    pub data: Option<DataConfig>,
    /// How the data are cut.
    pub batch: BatchConfig,
    /// What new mixers look like and start from.
    #[serde(default)]
    pub student: StudentConfig,
    /// What is minimised.
    #[serde(default)]
    pub loss: LossConfig,
    /// The optimiser.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// The learning rate of a stage.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// How layers are ranked.
    #[serde(default)]
    pub importance: ImportanceConfig,
    /// Which of the ranked layers are taken.
    #[serde(default)]
    pub placement: Placement,
    /// How models are scored.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// How often the run is kept, counted over all stages.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Compute blocks again in backward: less memory, more time.
    #[serde(default)]
    pub recompute: bool,
    /// What `--plan` reckons with.
    #[serde(default)]
    pub plan: PlanConfig,
    /// The stages, in order.
    pub stages: Vec<StageConfig>,
}

/// The original model: a folder, or its shape alone, which is enough for `--plan`. Exactly one is given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TeacherConfig {
    /// A folder in Hugging Face form, a GGUF file, or hub:ORG/NAME.
    pub path: Option<PathBuf>,
    /// The keys of a `config.json`.
    pub shape: Option<toml::Table>,
}

/// New mixers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StudentConfig {
    /// What they start from.
    pub init: Init,
    /// States a channel.
    pub d_state: Option<usize>,
    /// Rank of dt.
    pub dt_rank: Option<usize>,
    /// Taps of the convolution.
    pub d_conv: Option<usize>,
    /// Tokens that mil-fit takes.
    pub fit_tokens: usize,
    /// Ranges of dt that mil-fit tries.
    pub fit_ranges: Vec<(f64, f64)>,
}

impl Default for StudentConfig {
    fn default() -> Self {
        let (d_state, dt_rank, d_conv) = (None, None, None);
        StudentConfig { init: Init::Mil, d_state, dt_rank, d_conv, fit_tokens: 16384, fit_ranges: DT_RANGES.to_vec() }
    }
}

impl StudentConfig {
    /// The sizes.
    pub fn shape(&self) -> MixerShape {
        MixerShape { d_state: self.d_state, dt_rank: self.dt_rank, d_conv: self.d_conv }
    }

    /// Looks whether attention layers of `student` can become mixers of these sizes.
    ///
    /// # Errors
    /// When they cannot: the first one shows it.
    pub fn check(&self, teacher: &ModelConfig, student: &ModelConfig) -> Result<()> {
        let first = student.layers_of(BlockKind::Attention).take(1).collect();
        Conversion::new(teacher, student, &first, (self.init, self.shape(), 0))?;
        Ok(())
    }
}

/// Whose logits the temperature divides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemperatureOf {
    /// Both models', as in the paper.
    #[default]
    Both,
    /// The teacher's alone, as in Fast-LLM.
    Teacher,
}

/// The loss: a weighted sum.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Weight of KL(student ‖ teacher).
    pub reverse_kl: f32,
    /// Weight of KL(teacher ‖ student).
    pub forward_kl: f32,
    /// Weight of the cross-entropy on the data.
    pub cross_entropy: f32,
    /// Divides logits.
    pub temperature: f32,
    /// Whose.
    pub temperature_of: TemperatureOf,
    /// What the sum is divided by.
    pub divisor: Divisor,
}

impl Default for LossConfig {
    fn default() -> Self {
        LossConfig {
            reverse_kl: 1.0,
            forward_kl: 0.0,
            cross_entropy: 0.0,
            temperature: 1.0,
            temperature_of: TemperatureOf::Both,
            divisor: Divisor::Counted,
        }
    }
}

/// The two rankings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImportanceConfig {
    /// Leave-one-out.
    pub loo: LooConfig,
    /// MMR.
    pub mmr: MmrConfig,
}

/// Leave-one-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LooConfig {
    /// Tokens of the training documents that losses are taken over.
    pub tokens: usize,
    /// What is left out.
    pub without: Without,
    /// The loss.
    pub measure: Measure,
}

impl Default for LooConfig {
    fn default() -> Self {
        LooConfig { tokens: 16384, without: Without::default(), measure: Measure::default() }
    }
}

impl LooConfig {
    /// What it measures.
    pub fn loo(&self) -> Loo {
        Loo { without: self.without, measure: self.measure }
    }
}

/// MMR.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MmrConfig {
    /// Steps for each layer.
    pub steps: u64,
    /// The highest learning rate; the optimiser's if left out.
    pub learning_rate: Option<f64>,
    /// Steps of warm-up.
    pub warmup: u64,
    /// The score is the mean loss of so many steps at the end.
    pub last: usize,
    /// What the mixer of the layer starts from.
    pub init: Init,
}

impl Default for MmrConfig {
    fn default() -> Self {
        MmrConfig { steps: 100, learning_rate: None, warmup: 0, last: 5, init: Init::Mil }
    }
}

/// How models are scored for the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Held-out documents; all of them if left out.
    pub documents: Option<usize>,
    /// Tokens of a sequence whose cache the table says the bytes of.
    pub context: usize,
    /// Whether each stage's hybrid is scored before its training too.
    pub before: bool,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        EvaluationConfig { documents: None, context: 16384, before: false }
    }
}

/// The machine that a plan is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// Devices that share a step; 1 if left out.
    pub devices: Option<usize>,
    /// FLOP/s that a device reaches while it trains; measured on the backend if left out.
    pub flops: Option<f64>,
}

/// A stage; what it leaves out is as the whole configuration has it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StageConfig {
    /// Mamba layers at its end, chosen by its ranking.
    pub mamba: Option<usize>,
    /// The layers that become Mamba in it, such as `3,5-8`, instead of a ranking.
    pub layers: Option<String>,
    /// How layers are ranked: leave-one-out at the first stage and MMR at the others if left out.
    pub ranking: Option<Method>,
    /// What new mixers start from.
    pub init: Option<Init>,
    /// Tokens, counting every row as full; rounded up to a step.
    pub tokens: u64,
    /// The highest learning rate.
    pub learning_rate: Option<f64>,
    /// Steps of warm-up.
    pub warmup: Option<u64>,
    /// The share of the stage's steps at which the decay begins.
    pub constant: Option<f64>,
    /// The rate of the last step, as a share of the highest.
    pub minimum: Option<f64>,
    /// What is trained.
    pub trained: Option<Trained>,
}

impl Default for Config {
    /// No teacher, no stages, and the defaults of everything else.
    fn default() -> Self {
        Config {
            seed: 0,
            dtype: None,
            teacher: TeacherConfig::default(),
            data: None,
            batch: BatchConfig { row_tokens: 2048, rows: 1, accumulate: 1 },
            student: StudentConfig::default(),
            loss: LossConfig::default(),
            optimizer: OptimizerConfig::default(),
            schedule: ScheduleConfig::default(),
            importance: ImportanceConfig::default(),
            placement: Placement::default(),
            evaluation: EvaluationConfig::default(),
            checkpoint: CheckpointConfig::default(),
            recompute: false,
            plan: PlanConfig::default(),
            stages: Vec::new(),
        }
    }
}

impl Config {
    /// Holds the values against each other; reading has held the keys.
    ///
    /// # Errors
    /// Names the first that makes no sense.
    pub fn check(&self) -> Result<()> {
        let loss = &self.loss;
        let weights = [loss.reverse_kl, loss.forward_kl, loss.cross_entropy];
        let laws = [
            (self.teacher.path.is_some() != self.teacher.shape.is_some(), "teacher: expected either `path` or `shape`"),
            (self.batch.row_tokens > 0, "batch.row_tokens: expected at least 1"),
            (self.batch.rows > 0, "batch.rows: expected at least 1"),
            (weights.iter().all(|weight| *weight >= 0.0 && weight.is_finite()), "loss: expected weights of 0 or more"),
            (weights.iter().any(|weight| *weight > 0.0), "loss: expected a weight above 0"),
            (loss.temperature > 0.0 && loss.temperature.is_finite(), "loss.temperature: expected a number above 0"),
            (self.student.fit_tokens > 0, "student.fit_tokens: expected at least 1"),
            (self.importance.loo.tokens > 0, "importance.loo.tokens: expected at least 1"),
            (self.importance.mmr.steps > 0, "importance.mmr.steps: expected at least 1"),
            (self.importance.mmr.last > 0, "importance.mmr.last: expected at least 1"),
            (self.evaluation.documents != Some(0), "evaluation.documents: expected at least 1"),
            (
                self.plan.flops.is_none_or(|flops| flops > 0.0 && flops.is_finite()),
                "plan.flops: expected a number above 0",
            ),
            (self.plan.devices != Some(0), "plan.devices: expected at least 1"),
        ];
        if let Some((_, what)) = laws.iter().find(|(holds, _)| !holds) {
            return Err(Error::Configuration((*what).to_owned()));
        }
        self.optimizer.options()?;
        self.dtype()?;
        for (index, stage) in self.stages.iter().enumerate() {
            let wrong = |what: &str| Err(Error::Configuration(format!("stage {}: {what}", index + 1)));
            if stage.mamba.is_some() == stage.layers.is_some() {
                return wrong("expected either `mamba`, a number of layers, or `layers`, a list such as \"3,5-8\"");
            }
            if stage.layers.is_some() && stage.ranking.is_some() {
                return wrong("layers that are listed need no `ranking`");
            }
            if stage.tokens == 0 {
                return wrong("tokens: expected at least 1");
            }
            self.schedule_of(index).map_err(|error| Error::Configuration(format!("stage {}: {error}", index + 1)))?;
        }
        Ok(())
    }

    /// How weights and activations are stored, if it says.
    ///
    /// # Errors
    /// When there is no such dtype.
    pub fn dtype(&self) -> Result<Option<DType>> {
        let parsed = self.dtype.as_deref().map(str::parse).transpose();
        let known = |dtype: &DType| matches!(dtype, DType::F32 | DType::Bf16 | DType::F16);
        let dtype = parsed.map_err(|error: String| Error::Configuration(format!("dtype: {error}")))?;
        match dtype.filter(|dtype| !known(dtype)) {
            None => Ok(dtype),
            Some(dtype) => Err(Error::Configuration(format!("dtype is {dtype}; expected f32, bf16 or f16"))),
        }
    }

    /// The shape of the teacher, from its folder or as given; a relative path starts at `base`.
    ///
    /// # Errors
    /// When it cannot be read, or makes no sense.
    pub fn teacher_shape(&self, base: &Path) -> Result<ModelConfig> {
        match (&self.teacher.path, &self.teacher.shape) {
            (Some(path), _) => Ok(checkpoint::read_config(&checkpoint::locate(base, path)?)?),
            (None, shape) => {
                let wrong = |what: String| Error::Configuration(format!("teacher.shape: {what}"));
                let value = serde_json::to_value(shape).map_err(|error| wrong(error.to_string()))?;
                ModelConfig::from_value(value).map_err(|error| wrong(error.to_string()))
            }
        }
    }

    /// How the layers of stage `index`, counted from 0, are ranked; none where they are listed.
    pub fn ranking_of(&self, index: usize) -> Option<Method> {
        let stage = &self.stages[index];
        let usual = if index == 0 { Method::Loo } else { Method::Mmr };
        stage.layers.is_none().then(|| stage.ranking.unwrap_or(usual))
    }

    /// What new mixers of stage `index` start from.
    pub fn init_of(&self, index: usize) -> Init {
        self.stages[index].init.unwrap_or(self.student.init)
    }

    /// Mamba layers after each stage.
    ///
    /// # Errors
    /// When a stage does not add any, or asks for more than there are.
    pub fn counts(&self, teacher: &ModelConfig) -> Result<Vec<usize>> {
        if self.stages.is_empty() {
            return Err(Error::Configuration("stages: expected at least one".into()));
        }
        let mut count = teacher.layers_of(BlockKind::Mamba).count();
        let most = count + teacher.layers_of(BlockKind::Attention).count();
        let mut counts = Vec::new();
        for (stage, number) in self.stages.iter().zip(1..) {
            let after = match (&stage.mamba, &stage.layers) {
                (Some(mamba), _) => *mamba,
                (None, layers) => {
                    let text = layers.as_deref().unwrap_or_default();
                    count + LayerSet::parse(text, teacher.num_hidden_layers())?.len()
                }
            };
            if after <= count || after > most {
                let what =
                    format!("stage {number}: {after} Mamba layers, expected more than {count} and at most {most}");
                return Err(Error::Configuration(what));
            }
            count = after;
            counts.push(after);
        }
        Ok(counts)
    }

    /// Steps of stage `index`.
    pub fn steps_of(&self, index: usize) -> u64 {
        self.stages[index].tokens.div_ceil(self.batch.tokens_a_step().max(1) as u64)
    }

    /// Which parameters stage `index` trains.
    pub fn trained_of(&self, index: usize) -> Trained {
        self.stages[index].trained.unwrap_or(self.optimizer.trained)
    }

    /// The learning rate of stage `index`.
    ///
    /// # Errors
    /// When a share is none, or the rate is no number.
    pub fn schedule_of(&self, index: usize) -> Result<Schedule> {
        let (stage, steps) = (&self.stages[index], self.steps_of(index));
        let schedule = ScheduleConfig {
            warmup: stage.warmup.unwrap_or(self.schedule.warmup).min(steps),
            constant: stage.constant.unwrap_or(self.schedule.constant),
            minimum: stage.minimum.unwrap_or(self.schedule.minimum),
        };
        let rate = stage.learning_rate.unwrap_or(self.optimizer.learning_rate);
        OptimizerConfig { learning_rate: rate, ..self.optimizer }.options()?;
        Ok(schedule.of(steps, rate)?)
    }

    /// The learning rate of MMR's short runs.
    ///
    /// # Errors
    /// When a share is none.
    pub fn mmr_schedule(&self) -> Result<Schedule> {
        let MmrConfig { steps, learning_rate, warmup, .. } = self.importance.mmr;
        let schedule = ScheduleConfig { warmup: warmup.min(steps), ..self.schedule };
        Ok(schedule.of(steps, learning_rate.unwrap_or(self.optimizer.learning_rate))?)
    }

    /// The losses.
    pub fn loss_kind(&self) -> LossKind {
        let LossConfig { reverse_kl, forward_kl, cross_entropy, temperature, temperature_of, .. } = self.loss;
        let spelling = match temperature_of {
            TemperatureOf::Both => Temperature::Both,
            TemperatureOf::Teacher => Temperature::TeacherOnly,
        };
        LossKind {
            weights: LossWeights { reverse_kl, forward_kl, cross_entropy },
            scaling: Scaling { logits_scale: 1.0, temperature, spelling },
        }
    }

    /// What a trainer does that trains these parameters.
    ///
    /// # Errors
    /// When a number of the optimiser makes no sense.
    pub fn trainer(&self, trained: Trained) -> Result<TrainerOptions> {
        Ok(TrainerOptions {
            trained,
            optimizer: self.optimizer.options()?,
            loss: self.loss_kind(),
            divisor: self.loss.divisor,
            recompute: self.recompute,
            patience: self.optimizer.patience,
        })
    }
}
