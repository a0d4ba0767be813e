//! The staged procedure: rank, convert, distil, score, stage after stage.
//!
//! ```text
//! RUN/config.toml, metrics.jsonl, checkpoints/     as in every run of training
//! RUN/device.json                                  what it runs on
//! RUN/tokenizer/                                   the files of a tokenizer that came in a GGUF file
//! RUN/rankings/01.json, 01.svg                     how the layers of a stage were chosen
//! RUN/fits/01.json                                 what mil-fit explains
//! RUN/stages/01/                                   the model of a stage, a Hugging Face folder
//! RUN/evals/teacher.json, stage-01.json, ...       scores
//! RUN/table.json, table.md, loss.svg               what it came to
//! ```
//!
//! Everything is a function of the configuration, the data and the device, and every piece appears whole or not at all:
//! a run that is stopped anywhere and resumed ends in the same bits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::Config;
use super::ground::{CALL_TOKENS, Deaf, Ground, batches, room};
use super::importance::Ranking;
use super::piece::{once, read_json, write_json, write_text};
use super::plan::hybrid;
use super::table::{Row, Summary};
use super::watch::{Event, Watcher};
use super::{Error, Result};
use crate::backend::{DType, Device};
use crate::checkpoint::{self, Checkpoint, SaveOptions, save_model_into};
use crate::eval::Evaluator;
use crate::hybrid::{Init, LayerSet};
use crate::model::Model;
use crate::model::config::{BlockKind, ModelConfig};
use crate::report::metrics::{self, Record};
use crate::report::plot;
use crate::text::documents::Documents;
use crate::text::tokenizer::{self, Tokenizer};
use crate::train::Run;
use crate::train::run::Saved;
use crate::train::session::{self, Observer, Outcome, Plan, SessionState};
use crate::train::teacher::Teacher;
use crate::train::trainer::{StepReport, Trainer};

/// What a distillation starts from.
#[derive(Clone, Debug)]
pub struct Setup<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// Its text, kept in the run.
    pub text: &'a str,
    /// Where its relative paths start.
    pub base: &'a Path,
    /// The run's folder.
    pub folder: &'a Path,
    /// Whether to go on with a run that is there.
    pub resume: bool,
    /// Where it runs.
    pub device: &'a Device,
    /// How weights and activations are stored there.
    pub dtype: DType,
}

/// A distillation under way.
struct Distillation<'a> {
    config: &'a Config,
    ground: Ground<'a>,
    held_out: Documents,
    /// The folder whose tokenizer files go into models and checkpoints.
    tokenizer: PathBuf,
    run: Run,
    /// Tokens of training so far.
    tokens: u64,
}

/// Distils, from the start or from where the run stands. Gives nothing where the watcher asked to stop on the way.
///
/// # Errors
/// When the configuration, the data or the run are not to be had, the device fails, or training diverges.
pub fn distill(setup: Setup<'_>, watcher: &mut dyn Watcher) -> Result<Option<Summary>> {
    let (mut distillation, mut saved) = Distillation::open(setup, watcher)?;
    let Ground { original, device, dtype, .. } = &distillation.ground;
    distillation.score(TEACHER, || Ok(original.load(device, *dtype)?), watcher)?;
    for index in 0..distillation.config.stages.len() {
        if distillation.stage(index, &mut saved, watcher)? == Outcome::Interrupted {
            return Ok(None);
        }
    }
    distillation.finish(watcher).map(Some)
}

/// Makes what the run of a teacher of shape `original` has on a device at a time, from the first stage to the last.
fn make_all(
    config: &Config,
    original: &ModelConfig,
    train: &Arc<Documents>,
    (device, dtype): (&Device, DType),
) -> Result<()> {
    let teacher = Arc::new(Model::new(device, original.clone(), dtype)?);
    let scored = |shape: &ModelConfig| {
        let model = Model::new(device, shape.clone(), dtype)?;
        Evaluator::new(&model, Some(&teacher), CALL_TOKENS)?;
        Ok::<_, Error>(model)
    };
    scored(original)?;
    for (index, mamba) in config.counts(original)?.into_iter().enumerate() {
        let shape = hybrid(config, original, mamba)?;
        let (options, batches) = (config.trainer(config.trained_of(index))?, batches(config, train, &purpose(index))?);
        let live = Teacher::live(Arc::clone(&teacher));
        Trainer::new(scored(&shape)?, Some(live), options, room(&batches))?;
        scored(&shape)?;
    }
    Ok(())
}

/// What a run remembers of its stage in a checkpoint.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Caller {
    stage: usize,
}

/// What a run must find again on the device that goes on with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceFile {
    backend: String,
    dtype: String,
    data: String,
}

impl<'a> Distillation<'a> {
    /// Opens the run and reads what all stages need.
    fn open(setup: Setup<'a>, watcher: &mut dyn Watcher) -> Result<(Self, Option<Saved<SessionState>>)> {
        let Setup { config, base, device, dtype, .. } = setup;
        config.check()?;
        let Some(path) = config.teacher.path.as_ref().map(|path| checkpoint::locate(base, path)).transpose()? else {
            return Err(Error::Configuration("teacher.shape is enough for --plan alone; to distil, give path".into()));
        };
        let Some(data) = &config.data else {
            return Err(Error::Configuration("data: expected `arithmetic` or files under `train`".into()));
        };
        let original = Checkpoint::open(&path)?;
        config.counts(original.config())?;
        config.student.check(original.config(), original.config())?;
        let tokenizer = Tokenizer::open(&path)?;
        let mut data = data.load(base, &tokenizer, &mut |progress| watcher.hear(Event::Tokens(progress)))?;
        if data.test.is_empty() {
            return Err(Error::Configuration("data: nothing is held out to score models on".into()));
        }
        if let Some(most) = config.evaluation.documents {
            data.test = data.test.first(most);
        }
        let (run, saved) = Run::open(setup.folder, setup.text, setup.resume, config.checkpoint.keep)?;
        let tokenizer_folder: PathBuf =
            tokenizer::folder_of(&path, |write| run.publish("tokenizer", |folder| Ok(write(folder)?)))?;
        let now = DeviceFile {
            backend: device.info().name.to_owned(),
            dtype: dtype.to_string(),
            data: format!("{}-{}", data.train.fingerprint(), data.test.fingerprint()),
        };
        let path = run.folder().join("device.json");
        let before: DeviceFile = once(&path, || Ok(now.clone()))?;
        if before != now {
            let what = format!("the run was started with {before:?}, now it is {now:?}: it would end in other bits");
            return Err(Error::malformed(&path, what));
        }
        let tokens = saved.as_ref().map_or(0, |saved: &Saved<SessionState>| saved.state.tokens);
        let train = Arc::new(data.train);
        device.plan(|device| make_all(config, original.config(), &train, (device, dtype)))?;
        let ground = Ground::new(config, (device, dtype), original, train)?;
        Ok((Distillation { config, ground, held_out: data.test, tokenizer: tokenizer_folder, run, tokens }, saved))
    }

    /// A file or folder of the run.
    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.run.folder().join(name)
    }

    fn stage_folder(&self, index: usize) -> PathBuf {
        self.path("stages").join(number(index))
    }

    /// The model that stage `index` starts from.
    fn before(&self, index: usize) -> Result<Checkpoint> {
        match index.checked_sub(1) {
            None => Ok(Checkpoint::open(self.ground.original.path())?),
            Some(index) => Ok(Checkpoint::open(&self.stage_folder(index))?),
        }
    }

    /// Ranks, converts, trains, keeps and scores stage `index`, or what is left of it.
    fn stage(
        &mut self,
        index: usize,
        saved: &mut Option<Saved<SessionState>>,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome> {
        if !self.stage_folder(index).exists() {
            let before = self.before(index)?;
            let mamba: LayerSet = before.config().layers_of(BlockKind::Mamba).collect();
            let new = self.choose(index, &mamba, watcher)?;
            let after = mamba.iter().chain(new.iter()).collect();
            let steps = self.config.steps_of(index);
            watcher.hear(Event::Stage { stage: index + 1, new: &new, mamba: &after, steps });
            if self.distil(index, (&before, &new), saved, watcher)? == Outcome::Interrupted {
                return Ok(Outcome::Interrupted);
            }
        }
        self.score(&stage_name(index), || self.load(&self.stage_folder(index)), watcher)?;
        self.report()?;
        Ok(Outcome::Finished)
    }

    /// The layers that become Mamba in stage `index`.
    fn choose(&mut self, index: usize, mamba: &LayerSet, watcher: &mut dyn Watcher) -> Result<LayerSet> {
        let config = self.config;
        if let Some(text) = &config.stages[index].layers {
            return Ok(LayerSet::parse(text, self.ground.original.config().num_hidden_layers())?);
        }
        let count = config.counts(self.ground.original.config())?[index] - mamba.len();
        let ranking = self.ranking(index, watcher)?;
        let new = config.placement.choose(&ranking.order, mamba, count)?;
        let chosen: Vec<usize> = new.iter().collect();
        let title = format!("Stage {}: importance of each layer", index + 1);
        write_text(&self.path(format!("rankings/{}.svg", number(index))), &ranking.plot(&title, &chosen)?)?;
        Ok(new)
    }

    /// The ranking of stage `index`, on the model that it starts from: made once.
    fn ranking(&self, index: usize, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let Some(method) = self.config.ranking_of(index) else {
            return Err(Error::Configuration(format!("stage {}: its layers are listed", index + 1)));
        };
        once(&self.path(format!("rankings/{}.json", number(index))), || {
            let student = self.before(index)?;
            let layers = student.config().layers_of(BlockKind::Attention).count();
            watcher.hear(Event::Ranking { stage: index + 1, method, layers });
            self.ground.rank(method, &student, &self.path("rankings").join(number(index)), watcher)
        })
    }

    /// Trains stage `index`, from where its checkpoint stands if it has one, and keeps its model.
    fn distil(
        &mut self,
        index: usize,
        (before, new): (&Checkpoint, &LayerSet),
        saved: &mut Option<Saved<SessionState>>,
        watcher: &mut dyn Watcher,
    ) -> Result<Outcome> {
        let (config, device, dtype) = (self.config, self.ground.device, self.ground.dtype);
        let of_stage = |saved: &mut Saved<SessionState>| {
            serde_json::from_value(saved.state.caller.clone()).is_ok_and(|caller: Caller| caller.stage == index)
        };
        let saved = saved.take_if(of_stage);
        let model = match &saved {
            Some(saved) => Checkpoint::open(&saved.folder)?.load(device, dtype)?,
            None => {
                let fits = self.path(format!("fits/{}.json", number(index)));
                let model = self.ground.assemble(before, new, config.init_of(index), Some(&fits), watcher)?;
                if config.evaluation.before {
                    self.row(&before_name(index), &model, watcher)?;
                }
                model
            }
        };
        let mut batches = self.ground.batches(&purpose(index))?;
        let options = config.trainer(config.trained_of(index))?;
        let teacher = Teacher::live(Arc::clone(&self.ground.teacher));
        let mut trainer = Trainer::new(model, Some(teacher), options, room(&batches))?;
        if let Some(Saved { folder, state, .. }) = saved {
            trainer.restore(&folder, state.progress)?;
            batches = batches.resume(&state.position)?;
        }
        let plan = Plan {
            steps: config.steps_of(index),
            schedule: config.schedule_of(index)?,
            accumulate: config.batch.accumulate,
            offset: self.offset(index),
            checkpoint_every: config.checkpoint.every,
            evaluate_every: 0,
            tokenizer: Some(&self.tokenizer),
        };
        let (steps, tokens) = (plan.steps, self.tokens);
        let mut looker = Looker { watcher, stage: index, steps, tokens };
        let outcome = session::train(&mut self.run, &mut trainer, &mut batches, (&plan, tokens), &mut looker)?;
        self.tokens = looker.tokens;
        if outcome == Outcome::Finished {
            let options = SaveOptions { copy_from: Some(&self.tokenizer), ..SaveOptions::new(dtype) };
            let name = format!("stages/{}", number(index));
            self.run.publish(&name, |folder| Ok(save_model_into(folder, trainer.model(), &options)?))?;
        }
        Ok(outcome)
    }

    /// Steps of the run before stage `index`.
    fn offset(&self, index: usize) -> u64 {
        (0..index).map(|before| self.config.steps_of(before)).sum()
    }

    /// The row of a model in the table: scored once.
    fn score(&self, name: &str, model: impl FnOnce() -> Result<Model>, watcher: &mut dyn Watcher) -> Result<Row> {
        match self.eval(name).exists() {
            true => read_json(&self.eval(name)),
            false => self.row(name, &model()?, watcher),
        }
    }

    /// The same of a model that is there.
    fn row(&self, name: &str, model: &Model, watcher: &mut dyn Watcher) -> Result<Row> {
        once(&self.eval(name), || {
            let mut evaluator = Evaluator::new(model, Some(&self.ground.teacher), CALL_TOKENS)?;
            let scores = evaluator.run(&self.held_out, None, |_| ())?;
            watcher.hear(Event::Scored { name, scores: &scores });
            let context = self.config.evaluation.context;
            Ok(Row::new(name, model, &scores, (context, self.tokens)))
        })
    }

    /// Where the scores of a model are kept.
    fn eval(&self, name: &str) -> PathBuf {
        self.path(format!("evals/{name}.json"))
    }

    fn load(&self, folder: &Path) -> Result<Model> {
        Ok(Checkpoint::open(folder)?.load(self.ground.device, self.ground.dtype)?)
    }

    /// Scores the hybrid of the last stage without any training, and writes the whole table.
    fn finish(mut self, watcher: &mut dyn Watcher) -> Result<Summary> {
        let last = self.config.stages.len() - 1;
        let mamba: LayerSet = self.before(last + 1)?.config().layers_of(BlockKind::Mamba).collect();
        let own = self.ground.original.config().layers_of(BlockKind::Mamba).collect::<Vec<_>>();
        let new: LayerSet = mamba.iter().filter(|layer| !own.contains(layer)).collect();
        let inits = [Init::Mil, self.config.init_of(last)];
        let tokens = std::mem::take(&mut self.tokens);
        for init in &inits[..if inits[0] == inits[1] { 1 } else { 2 }] {
            let name = untrained(*init);
            let row = self.score(
                &name,
                || self.ground.assemble(&self.ground.original, &new, *init, None, &mut Deaf),
                watcher,
            )?;
            debug_assert_eq!(row.tokens, 0);
        }
        self.tokens = tokens;
        self.report()
    }

    /// Writes the table of all models that were scored so far, and the plot of the loss.
    fn report(&self) -> Result<Summary> {
        let untrained = Init::ALL.map(untrained);
        let stages = (0..self.config.stages.len()).flat_map(|index| [before_name(index), stage_name(index)]);
        let names = std::iter::once(TEACHER.to_owned()).chain(untrained).chain(stages);
        let paths = names.map(|name| self.eval(&name)).filter(|path| path.exists());
        let summary = Summary {
            context: self.config.evaluation.context,
            layers: self.ground.original.config().num_hidden_layers(),
            documents: self.held_out.len(),
            rows: paths.map(|path| read_json(&path)).collect::<Result<_>>()?,
        };
        write_json(&self.path("table.json"), &summary)?;
        write_text(&self.path("table.md"), &summary.table().markdown())?;
        self.plot_loss()?;
        Ok(summary)
    }

    fn plot_loss(&self) -> Result<()> {
        let records = metrics::read(&self.run.metrics_path())?;
        // A logarithmic axis has no place for a loss of 0.
        let mut points = metrics::series(&records, "loss");
        points.retain(|(_, loss)| *loss > 0.0);
        if points.is_empty() {
            return Ok(());
        }
        let stage =
            |index: usize| plot::Stage { name: format!("stage {}", index + 1), start: self.offset(index) as f64 + 1.0 };
        let reached = points.iter().fold(0.0, |most: f64, (step, _)| most.max(*step));
        let stages: Vec<plot::Stage> =
            (0..self.config.stages.len()).map(stage).filter(|stage| stage.start <= reached).collect();
        let svg = plot::curves(&plot::Curves {
            title: "Distillation loss",
            x: "step",
            y: "loss (nats a token)",
            log: true,
            series: &[plot::Series { name: "loss".into(), points }],
            stages: &stages,
        })?;
        write_text(&self.path("loss.svg"), &svg)
    }
}

const TEACHER: &str = "teacher";

/// The number of a stage as its files have it.
fn number(index: usize) -> String {
    format!("{:02}", index + 1)
}

/// What the batches of a stage are drawn for.
fn purpose(index: usize) -> String {
    format!("batches of stage {}", index + 1)
}

fn stage_name(index: usize) -> String {
    format!("stage-{}", number(index))
}

fn before_name(index: usize) -> String {
    format!("{} before", stage_name(index))
}

fn untrained(init: Init) -> String {
    format!("{init} untrained")
}

/// The session's view of a stage.
struct Looker<'a> {
    watcher: &'a mut dyn Watcher,
    stage: usize,
    steps: u64,
    tokens: u64,
}

impl Observer for Looker<'_> {
    fn interrupted(&self) -> bool {
        self.watcher.interrupted()
    }

    fn label(&self) -> Record {
        Record::from_iter([("stage".to_owned(), json!(self.stage + 1))])
    }

    fn compiled(&mut self, done: usize, all: usize) {
        self.watcher.hear(Event::Compiled { done, all });
    }

    fn stepped(&mut self, report: &StepReport, _seconds: f64) {
        self.tokens += report.tokens as u64;
        self.watcher.hear(Event::Step { report, steps: self.steps });
    }

    fn evaluate(
        &mut self,
        _trainer: &Trainer,
    ) -> std::result::Result<Record, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Record::new())
    }

    fn state(&self) -> Value {
        json!(Caller { stage: self.stage })
    }
}
