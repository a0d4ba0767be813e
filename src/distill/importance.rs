//! How much each attention layer matters: leave-one-out, and MMR.
//!
//! - **LOO**: the loss that a model loses nothing or much by when a block is replaced by identity.
//! - **MMR**: the attention of one layer becomes a MIL mixer, the model is distilled for a few steps, and the loss at the
//!   end is the score. Every layer's run sees the same batches, and the teacher computes its outputs for them once.
//!
//! A layer's score is a piece of its own, so that a ranking goes on where it was stopped.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::piece::{once, write_text};
use super::{Error, Result};
use crate::eval::{Evaluator, Scores};
use crate::model::{Model, Skip};
use crate::report::plot;
use crate::text::documents::Documents;
use crate::text::packing::Batch;
use crate::train::schedule::Schedule;
use crate::train::teacher::Teacher;
use crate::train::trainer::{Room, Trainer, TrainerOptions};
use crate::train::{self};

/// How layers are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Leave one out.
    Loo,
    /// Replace one mixer and distil for a few steps.
    Mmr,
}

impl Method {
    /// As it is written in a text.
    pub fn name(self) -> &'static str {
        match self {
            Method::Loo => "LOO",
            Method::Mmr => "MMR",
        }
    }
}

impl std::str::FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "loo" => Ok(Method::Loo),
            "mmr" => Ok(Method::Mmr),
            _ => Err(format!("unknown method '{name}': expected loo or mmr")),
        }
    }
}

/// What leave-one-out leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Without {
    /// The whole block, norms and MLP included.
    #[default]
    Block,
    /// The mixer alone.
    Mixer,
}

/// The loss that leave-one-out looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Cross-entropy on the data.
    #[default]
    CrossEntropy,
    /// KL(model ‖ teacher).
    ReverseKl,
}

impl std::str::FromStr for Without {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "block" => Ok(Without::Block),
            "mixer" => Ok(Without::Mixer),
            _ => Err(format!("unknown part '{name}': expected block or mixer")),
        }
    }
}

impl std::str::FromStr for Measure {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "cross-entropy" => Ok(Measure::CrossEntropy),
            "reverse-kl" => Ok(Measure::ReverseKl),
            _ => Err(format!("unknown loss '{name}': expected cross-entropy or reverse-kl")),
        }
    }
}

impl Measure {
    fn of(self, scores: &Scores) -> f64 {
        match (self, &scores.teacher) {
            (Measure::ReverseKl, Some(teacher)) => teacher.reverse_kl,
            _ => scores.cross_entropy,
        }
    }
}

/// Layers by importance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// How.
    pub method: Method,
    /// What a score is.
    pub score: String,
    /// The score of each layer of the model; none for one that was not scored, or whose loss was not finite.
    pub scores: Vec<Option<f64>>,
    /// The scored layers, least important first; of equals, the upper one.
    pub order: Vec<usize>,
}

impl Ranking {
    /// Sorts by score; a layer without one comes last.
    fn new(method: Method, score: &str, layers: usize, scored: Vec<(usize, Option<f64>)>) -> Self {
        let mut scores = vec![None; layers];
        scored.iter().for_each(|(layer, score)| scores[*layer] = score.filter(|score| score.is_finite()));
        let mut order: Vec<usize> = scored.iter().map(|(layer, _)| *layer).collect();
        let key = |layer: usize| scores[layer].unwrap_or(f64::INFINITY);
        order.sort_by(|a, b| key(*a).total_cmp(&key(*b)).then(b.cmp(a)));
        Ranking { method, score: score.to_owned(), scores, order }
    }

    /// The plot, as the text of an SVG file, with the layers `chosen` marked.
    ///
    /// # Errors
    /// When there is no score to show.
    pub fn plot(&self, title: &str, chosen: &[usize]) -> Result<String> {
        let (score, scores, order) = (&self.score, &self.scores[..], &self.order[..]);
        Ok(plot::importance(&plot::Importance { title, score, scores, order, chosen })?)
    }
}

/// A ranking in a folder of its own: `ranking.json`, its plot, and while it is made each layer's score. `rank` is given the
/// folder of the scores.
///
/// # Errors
/// When the folder holds a ranking of other settings, `rank` fails, or a file cannot be written.
pub fn keep(
    folder: &Path,
    settings: &serde_json::Value,
    rank: impl FnOnce(&Path) -> Result<Ranking>,
) -> Result<Ranking> {
    let path = folder.join("settings.json");
    let before: serde_json::Value = once(&path, || Ok(settings.clone()))?;
    if before != *settings {
        return Err(Error::malformed(&path, format!("another ranking was begun here: {before}, now {settings}")));
    }
    let ranking: Ranking = once(&folder.join("ranking.json"), || rank(&folder.join("layers")))?;
    let title = format!("Importance of each layer by {}", ranking.method.name());
    write_text(&folder.join("ranking.svg"), &ranking.plot(&title, &[])?)?;
    Ok(ranking)
}

/// How leave-one-out scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loo {
    /// What is left out.
    pub without: Without,
    /// The loss.
    pub measure: Measure,
}

/// Ranks `layers` of the evaluator's model by what their absence adds to the loss on `documents`. Scores lie in `folder`,
/// one file a layer; `progress` hears of each.
///
/// # Errors
/// When no token counts, the device fails, or a file cannot be written.
pub fn loo(
    evaluator: &mut Evaluator,
    (documents, loo): (&Documents, Loo),
    (layers, all): (&[usize], usize),
    folder: &Path,
    mut progress: impl FnMut(usize, Option<f64>),
) -> Result<Ranking> {
    let mut loss = |skip| Ok(Some(loo.measure.of(&evaluator.run(documents, skip, |_| ())?)));
    let whole: Option<f64> = once(&folder.join("whole.json"), || loss(None))?;
    let mut scored = Vec::new();
    for layer in layers {
        let skip = match loo.without {
            Without::Block => Skip::Block(*layer),
            Without::Mixer => Skip::Mixer(*layer),
        };
        let without: Option<f64> = once(&layer_file(folder, *layer), || loss(Some(skip)))?;
        let score = without.zip(whole).map(|(without, whole)| without - whole);
        progress(*layer, score);
        scored.push((*layer, score));
    }
    let score = match loo.measure {
        Measure::CrossEntropy => "loss added by leaving the layer out (nats a token)",
        Measure::ReverseKl => "KL added by leaving the layer out (nats a token)",
    };
    Ok(Ranking::new(Method::Loo, score, all, scored))
}

fn layer_file(folder: &Path, layer: usize) -> std::path::PathBuf {
    folder.join(format!("layer-{layer:03}.json"))
}

/// How MMR scores.
#[derive(Clone, Copy, Debug)]
pub struct Mmr {
    /// The trainer of each short run.
    pub trainer: TrainerOptions,
    /// The largest batch.
    pub room: Room,
    /// Its learning rate.
    pub schedule: Schedule,
    /// The score is the mean loss of so many steps at the end.
    pub last: usize,
}

/// Ranks `layers` by the loss that the model has after a short distillation with that layer replaced. `student` makes the
/// model with one layer replaced; `steps` are the batches of each step, the same for every layer. Scores lie in `folder`,
/// one file a layer; `progress` hears of each. Gives the teacher back.
///
/// # Errors
/// When the device fails, or a file cannot be written. A run whose loss is not finite is none: its layer ranks last.
pub fn mmr(
    mut student: impl FnMut(usize) -> Result<Model>,
    mut teacher: Teacher,
    (steps, mmr): (&[Vec<Batch>], &Mmr),
    (layers, all): (&[usize], usize),
    folder: &Path,
    mut progress: impl FnMut(usize, Option<f64>),
) -> Result<(Ranking, Teacher)> {
    let mut scored = Vec::new();
    for layer in layers {
        let path = layer_file(folder, *layer);
        if !path.exists() {
            let mut trainer = Trainer::new(student(*layer)?, Some(teacher), mmr.trainer, mmr.room)?;
            let loss = distil(&mut trainer, steps, mmr);
            teacher = match trainer.into_parts() {
                (_, Some(teacher)) => teacher,
                _ => return Err(Error::Configuration("the trainer gave no teacher back".into())),
            };
            let loss = loss?;
            once(&path, || Ok(loss))?;
        }
        let score = once(&path, || Ok(None))?;
        progress(*layer, score);
        scored.push((*layer, score));
    }
    let score = format!("loss after {} steps with the layer replaced", steps.len());
    Ok((Ranking::new(Method::Mmr, &score, all, scored), teacher))
}

/// The mean loss of the last steps; none where the run diverged.
fn distil(trainer: &mut Trainer, steps: &[Vec<Batch>], mmr: &Mmr) -> Result<Option<f64>> {
    let mut losses = Vec::with_capacity(steps.len());
    let mut run = || {
        for (batches, step) in steps.iter().zip(1..) {
            losses.extend(trainer.step(batches, mmr.schedule.rate(step))?.map(|report| report.loss));
        }
        losses.extend(trainer.finish()?.map(|report| report.loss));
        Ok(())
    };
    match run() {
        Err(train::Error::Diverged { .. }) => return Ok(None),
        result => result?,
    }
    let last = &losses[losses.len().saturating_sub(mmr.last.max(1))..];
    let mean = last.iter().sum::<f64>() / last.len() as f64;
    Ok(Some(mean).filter(|mean| mean.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_score_comes_first_and_a_run_that_diverged_last() {
        let scored = vec![(0, Some(2.0)), (2, None), (3, Some(0.5)), (4, Some(2.0)), (5, Some(f64::NAN))];
        let ranking = Ranking::new(Method::Mmr, "loss", 7, scored);
        assert_eq!(ranking.order, [3, 4, 0, 5, 2]);
        assert_eq!(ranking.scores, [Some(2.0), None, None, Some(0.5), Some(2.0), None, None]);
    }
}
