//! What every stage stands on: the teacher, the training documents, and how students and rankings are made of them.

use std::path::Path;
use std::sync::Arc;

use rand::RngExt;

use super::config::Config;
use super::importance::{self, Measure, Method, Mmr, Ranking};
use super::piece::write_json;
use super::watch::{Event, Watcher};
use super::{Error, Result, student};
use crate::backend::{DType, Device};
use crate::checkpoint::Checkpoint;
use crate::eval::Evaluator;
use crate::hybrid::{Conversion, FitOptions, Init, LayerSet, fit};
use crate::model::Model;
use crate::model::config::{BlockKind, ModelConfig};
use crate::random;
use crate::text::documents::Documents;
use crate::text::packing::{Batch, Batches};
use crate::train::filled_up;
use crate::train::teacher::Teacher;
use crate::train::trainer::{Room, Trainer};

/// Tokens of a call of an evaluation.
pub(super) const CALL_TOKENS: usize = 2048;

/// The first documents that have `tokens` tokens, or all of them.
fn first(documents: &Documents, tokens: usize) -> Documents {
    let enough = |count: &usize| documents.first(*count).tokens() >= tokens;
    documents.first((1..documents.len()).find(enough).unwrap_or(documents.len()))
}

/// Room for a batch like the first one; more is made where one has more segments.
pub(super) fn room(batches: &Batches) -> Room {
    let mut first = Batch::default();
    batches.clone().next_into(&mut first);
    Room { tokens: batches.most_tokens(), segments: first.segments.len() + first.segments.len() / 4 }
}

/// Batches of the training documents, in an order of `purpose`'s own.
pub(super) fn batches(config: &Config, documents: &Arc<Documents>, purpose: &str) -> Result<Batches> {
    let seed = random::stream(config.seed, purpose).random();
    Ok(Batches::new(Arc::clone(documents), config.batch.row_tokens, config.batch.rows, seed)?)
}

/// The purpose of the batches that every layer's short run sees.
const MMR_BATCHES: &str = "batches of MMR";

/// Hears nothing.
pub(super) struct Deaf;

impl Watcher for Deaf {
    fn hear(&mut self, _event: Event<'_>) {}
}

/// What rankings and students are made from.
#[derive(Debug)]
pub struct Ground<'a> {
    config: &'a Config,
    pub(super) device: &'a Device,
    pub(super) dtype: DType,
    /// The teacher as it lies on the disk.
    pub(super) original: Checkpoint,
    /// The teacher on the device.
    pub(super) teacher: Arc<Model>,
    train: Arc<Documents>,
}

impl<'a> Ground<'a> {
    /// Puts the teacher on the device, its weights stored as `dtype`.
    ///
    /// # Errors
    /// When it cannot be read, or the device has no room.
    pub fn new(
        config: &'a Config,
        (device, dtype): (&'a Device, DType),
        original: Checkpoint,
        train: Arc<Documents>,
    ) -> Result<Self> {
        let teacher = Arc::new(original.load(device, dtype)?);
        Ok(Ground { config, device, dtype, original, teacher, train })
    }

    /// Gets the memory ready for a ranking of `student` beside the teacher `original`, the teacher's included.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn plan_ranking(
        config: &Config,
        method: Method,
        (device, dtype): (&Device, DType),
        (original, student): (&ModelConfig, &ModelConfig),
        train: &Arc<Documents>,
    ) -> Result<()> {
        device.plan(|device| {
            let make = |shape: &ModelConfig| Model::new(device, shape.clone(), dtype);
            let teacher = Arc::new(make(original)?);
            match method {
                Method::Loo => {
                    let teacher = (config.importance.loo.measure == Measure::ReverseKl).then_some(&*teacher);
                    Evaluator::new(&make(student)?, teacher, CALL_TOKENS)?;
                }
                Method::Mmr => {
                    let init = (config.importance.mmr.init, config.student.shape(), config.seed);
                    let (trainer, room) =
                        (config.trainer(config.optimizer.trained)?, room(&batches(config, train, MMR_BATCHES)?));
                    let mut teacher = Some(Teacher::remembering(teacher, &std::env::temp_dir(), 0)?);
                    // Each takes the same, but where memory is free depends on those before it.
                    for layer in student.layers_of(BlockKind::Attention) {
                        let replaced = Conversion::new(original, student, &LayerSet::from_iter([layer]), init)?;
                        teacher = Trainer::new(make(replaced.config())?, teacher, trainer, room)?.into_parts().1;
                    }
                }
            }
            Ok(())
        })
    }

    /// See [`batches`].
    pub(super) fn batches(&self, purpose: &str) -> Result<Batches> {
        batches(self.config, &self.train, purpose)
    }

    /// The hybrid of `student` with new mixers in the layers `new`. What mil-fit finds is heard and kept in the file
    /// `fits`, if there is one.
    pub(super) fn assemble(
        &self,
        student: &Checkpoint,
        new: &LayerSet,
        init: Init,
        fits: Option<&Path>,
        watcher: &mut dyn Watcher,
    ) -> Result<Model> {
        let Config { seed, student: shape, .. } = self.config;
        let conversion = Conversion::new(self.original.config(), student.config(), new, (init, shape.shape(), *seed))?;
        let model = student::assemble(self.device, &conversion, (&self.original, student), self.dtype)?;
        if init == Init::MilFit {
            let batches = student::fit_batches(&mut self.batches("batches of mil-fit")?, shape.fit_tokens)?;
            let options = FitOptions { ranges: shape.fit_ranges.clone(), seed: *seed, ..FitOptions::default() };
            let progress = |layer: &_| {
                if fits.is_some() {
                    watcher.hear(Event::Fitted(layer))
                }
            };
            let result = fit(&model, &self.teacher, new, (&batches, &options), progress)?;
            if let Some(path) = fits {
                write_json(path, &result)?;
            }
        }
        Ok(model)
    }

    /// Ranks the attention layers of `student`; every layer's score is kept in a file of its own in `folder`.
    ///
    /// # Errors
    /// When the device fails, or a file cannot be written.
    pub fn rank(
        &self,
        method: Method,
        student: &Checkpoint,
        folder: &Path,
        watcher: &mut dyn Watcher,
    ) -> Result<Ranking> {
        let layers: Vec<usize> = student.config().layers_of(BlockKind::Attention).collect();
        match method {
            Method::Loo => self.loo(student, &layers, folder, watcher),
            Method::Mmr => self.mmr(student, &layers, folder, watcher),
        }
    }

    fn loo(&self, student: &Checkpoint, layers: &[usize], folder: &Path, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let config = self.config.importance.loo;
        let model = student.load(self.device, self.dtype)?;
        let teacher = (config.measure == Measure::ReverseKl).then_some(&*self.teacher);
        let documents = first(&self.train, config.tokens);
        let mut evaluator = Evaluator::new(&model, teacher, CALL_TOKENS)?;
        let all = student.config().num_hidden_layers();
        let progress = |layer, score| watcher.hear(Event::Layer { layer, score });
        importance::loo(&mut evaluator, (&documents, config.loo()), (layers, all), folder, progress)
    }

    fn mmr(&self, student: &Checkpoint, layers: &[usize], folder: &Path, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let config = self.config;
        let mmr = config.importance.mmr;
        let mut batches = self.batches(MMR_BATCHES)?;
        let room = room(&batches);
        let mut next = || {
            let mut batch = Batch::default();
            batches.next_into(&mut batch);
            batch
        };
        let steps: Vec<Vec<Batch>> =
            (0..mmr.steps).map(|_| (0..config.batch.accumulate.max(1)).map(|_| next()).collect()).collect();
        let rows = steps.iter().flatten().map(|batch| filled_up(self.device, room, batch).1 as u64).sum();
        watcher.hear(Event::TeacherKept { bytes: Teacher::bytes(&self.teacher, rows) });
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let teacher = Teacher::remembering(Arc::clone(&self.teacher), folder, rows)?;
        let options = Mmr {
            trainer: config.trainer(config.optimizer.trained)?,
            room,
            schedule: config.mmr_schedule()?,
            last: mmr.last,
        };
        let replaced = |layer| self.assemble(student, &LayerSet::from_iter([layer]), mmr.init, None, &mut Deaf);
        let all = student.config().num_hidden_layers();
        let progress = |layer, score| watcher.hear(Event::Layer { layer, score });
        Ok(importance::mmr(replaced, teacher, (&steps, &options), (layers, all), folder, progress)?.0)
    }
}
