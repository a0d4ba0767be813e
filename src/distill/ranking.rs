//! The ranking of a stage's layers, on the model that the stage starts from.

use std::path::Path;
use std::sync::Arc;

use super::Result;
use super::importance::{self, Measure, Method, Mmr, Ranking};
use super::piece::once;
use super::stages::{Deaf, Distillation, number, room};
use super::watch::{Event, Watcher};
use crate::checkpoint::Checkpoint;
use crate::eval::Evaluator;
use crate::hybrid::LayerSet;
use crate::model::config::BlockKind;
use crate::text::dataset::Documents;
use crate::text::packing::Batch;
use crate::train::teacher::Teacher;

/// Tokens of a call of an evaluation.
pub(super) const CALL_TOKENS: usize = 2048;

/// The first documents, until `enough` holds.
pub(super) fn first(documents: &Documents, enough: impl Fn(&Documents) -> bool) -> Documents {
    let mut taken = Documents::default();
    for document in (0..documents.len()).map_while(|index| documents.get(index)) {
        if enough(&taken) {
            break;
        }
        let given = document.counts.iter().position(|counts| *counts).unwrap_or(document.counts.len());
        taken.push(document.ids, given);
    }
    taken
}

impl Distillation<'_> {
    /// The ranking of stage `index`: scored layer by layer, each once.
    pub(super) fn ranking(&self, index: usize, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let Some(method) = self.setup.config.ranking_of(index) else {
            return Err(super::Error::Configuration(format!("stage {}: its layers are listed", index + 1)));
        };
        once(&self.path(format!("rankings/{}.json", number(index))), || {
            let student = self.before(index)?;
            let layers: Vec<usize> = student.config().layers_of(BlockKind::Attention).collect();
            watcher.hear(Event::Ranking { stage: index + 1, method, layers: layers.len() });
            let folder = self.path("rankings").join(number(index));
            match method {
                Method::Loo => self.loo(&student, &layers, &folder, watcher),
                Method::Mmr => self.mmr(&student, &layers, &folder, watcher),
            }
        })
    }

    fn loo(&self, student: &Checkpoint, layers: &[usize], folder: &Path, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let config = self.setup.config.importance.loo;
        let model = student.load(self.setup.device, self.setup.dtype)?;
        let teacher = (config.measure == Measure::ReverseKl).then_some(&*self.teacher);
        let documents = first(&self.train, |documents| documents.tokens() >= config.tokens);
        let mut evaluator = Evaluator::new(&model, teacher, CALL_TOKENS)?;
        let all = student.config().num_hidden_layers();
        let progress = |layer, score| watcher.hear(Event::Layer { layer, score });
        importance::loo(&mut evaluator, (&documents, config.loo()), (layers, all), folder, progress)
    }

    fn mmr(&self, student: &Checkpoint, layers: &[usize], folder: &Path, watcher: &mut dyn Watcher) -> Result<Ranking> {
        let (config, dtype) = (self.setup.config, self.setup.dtype);
        let mmr = config.importance.mmr;
        let mut batches = self.batches("batches of MMR")?;
        let room = room(&batches);
        let mut next = || {
            let mut batch = Batch::default();
            batches.next_into(&mut batch);
            batch
        };
        let steps: Vec<Vec<Batch>> =
            (0..mmr.steps).map(|_| (0..config.batch.accumulate.max(1)).map(|_| next()).collect()).collect();
        let rows = steps.iter().flatten().map(|batch| batch.counted_tokens() as u64).sum();
        watcher.hear(Event::TeacherKept { bytes: Teacher::bytes(&self.teacher, rows) });
        let teacher = Teacher::remembering(Arc::clone(&self.teacher), dtype, &self.path(""), rows)?;
        let options = Mmr {
            trainer: config.trainer(config.optimizer.trained, dtype)?,
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
