//! Perplexity, exact answers, KL and agreement with a teacher, over documents packed into calls.

use serde::Serialize;

use crate::backend::ops::{LossWeights, Scaling};
use crate::backend::{self, DType, Device, Segments};
use crate::model::config::ModelConfig;
use crate::model::{Activations, FinalNorm, Keep, LossHead, LossKind, Model, Skip, Targets};
use crate::text::documents::Documents;
use crate::text::packing::{Batch, PackingError, Rows};

/// What keeps a model from being evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The documents cannot be packed.
    #[error(transparent)]
    Packing(#[from] PackingError),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// No token of the documents counts.
    #[error("the documents have no token to be scored")]
    Nothing,
}

/// Means over the tokens that count, and over documents.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Documents with a token that counts.
    pub documents: usize,
    /// Tokens that count.
    pub tokens: usize,
    /// Mean negative log-likelihood, in nats.
    pub cross_entropy: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Share of documents every counted token of which is the likeliest given those before it: greedy decoding would
    /// give the same answer.
    pub exact: f64,
    /// Against the teacher, where there is one.
    pub teacher: Option<TeacherScores>,
}

/// How far a model is from its teacher.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TeacherScores {
    /// Mean KL(model ‖ teacher), in nats.
    pub reverse_kl: f64,
    /// Mean KL(teacher ‖ model), in nats.
    pub forward_kl: f64,
    /// Share of counted tokens where both find the same token likeliest.
    pub agreement: f64,
}

/// Gets the memory ready for a model of a shape, a teacher beside it if there is one, and an [`Evaluator`] of them.
///
/// # Errors
/// When the device has no room, or the vocabularies differ.
pub fn plan(
    (device, dtype): (&Device, DType),
    (model, teacher): (&ModelConfig, Option<&ModelConfig>),
    tokens: usize,
) -> backend::Result<()> {
    device.plan(|device| {
        let make = |shape: &ModelConfig| Model::new(device, shape.clone(), dtype);
        let (model, teacher) = (make(model)?, teacher.map(make).transpose()?);
        Evaluator::new(&model, teacher.as_ref(), tokens).map(drop)
    })
}

/// The memory to evaluate a model, beside a teacher or alone, with calls of up to a number of tokens.
#[derive(Debug)]
pub struct Evaluator<'a> {
    model: &'a Model,
    activations: Activations,
    head: LossHead,
    teacher: Option<(&'a Model, Activations, FinalNorm)>,
    tokens: usize,
}

#[derive(Default)]
struct Sums {
    tokens: usize,
    losses: [f64; 3],
    agreed: usize,
    /// For each document: whether a token counted, and whether one was missed.
    documents: Vec<(bool, bool)>,
}

impl<'a> Evaluator<'a> {
    /// Memory for calls of up to `tokens` tokens.
    ///
    /// # Errors
    /// When the device has no room, or the vocabularies differ.
    pub fn new(model: &'a Model, teacher: Option<&'a Model>, tokens: usize) -> backend::Result<Self> {
        let room = |model| Activations::new(model, Keep::Nothing, tokens, tokens);
        Ok(Evaluator {
            model,
            activations: room(model)?,
            head: LossHead::new(model, teacher, tokens, true)?,
            teacher: teacher
                .map(|teacher| Ok::<_, backend::Error>((teacher, room(teacher)?, FinalNorm::new(teacher, tokens)?)))
                .transpose()?,
            tokens,
        })
    }

    /// Scores `documents`, those longer than a call cut into several; `skip` leaves a part of the model out, `progress`
    /// hears how many tokens are done.
    ///
    /// # Errors
    /// When no token counts, or the backend fails.
    pub fn run(
        &mut self,
        documents: &Documents,
        skip: Option<Skip>,
        mut progress: impl FnMut(usize),
    ) -> Result<Scores, Error> {
        let rows = Rows::in_order(documents, self.tokens)?;
        let mut sums = Sums { documents: vec![(false, false); documents.len()], ..Sums::default() };
        let mut batch = Batch::default();
        let mut done = 0;
        for row in 0..rows.len() {
            batch.clear();
            rows.append(documents, row..row + 1, &mut batch);
            self.score(&batch, skip, &mut sums)?;
            done += batch.tokens();
            progress(done);
        }
        let scored = sums.documents.iter().filter(|(counted, _)| *counted).count();
        if sums.tokens == 0 {
            return Err(Error::Nothing);
        }
        let missed = sums.documents.iter().filter(|(_, missed)| *missed).count();
        let mean = |sum: f64| sum / sums.tokens as f64;
        let [reverse_kl, forward_kl, cross_entropy] = sums.losses.map(mean);
        Ok(Scores {
            documents: scored,
            tokens: sums.tokens,
            cross_entropy,
            perplexity: cross_entropy.exp(),
            exact: (scored - missed) as f64 / scored as f64,
            teacher: self.teacher.as_ref().map(|_| TeacherScores {
                reverse_kl,
                forward_kl,
                agreement: mean(sums.agreed as f64),
            }),
        })
    }

    fn score(&mut self, batch: &Batch, skip: Option<Skip>, sums: &mut Sums) -> Result<(), Error> {
        let device = self.model.device();
        let segments = Segments::documents(batch.segments.iter().map(|s| s.len))?;
        let rows: Vec<u32> = (0..batch.tokens() as u32).filter(|row| batch.counted[*row as usize]).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let labels: Vec<u32> = rows.iter().map(|row| batch.labels[*row as usize]).collect();
        self.model.forward(&mut self.activations, &batch.ids, &segments, None, skip)?;
        let teacher = match &mut self.teacher {
            Some((teacher, activations, norm)) => {
                teacher.forward(activations, &batch.ids, &segments, None, None)?;
                Some((*teacher, norm.forward(teacher, activations.output()?, &rows)?))
            }
            None => None,
        };
        let weights = vec![0.0; rows.len()];
        let targets = Targets { rows: &rows, labels: &labels, weights: &weights };
        let kind = LossKind {
            weights: LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 0.0 },
            scaling: Scaling::default(),
        };
        self.head.run(self.model, self.activations.output()?, &targets, teacher, kind, None)?;

        let losses = device.read(self.head.losses(rows.len())?)?.wait()?;
        for row in losses.chunks_exact(3) {
            sums.losses.iter_mut().zip(row).for_each(|(sum, loss)| *sum += f64::from(*loss));
        }
        let [chosen, teachers] = self.head.choices(rows.len())?;
        let chosen = device.read(chosen)?.wait()?;
        if self.teacher.is_some() {
            let teachers = device.read(teachers)?.wait()?;
            sums.agreed += chosen.iter().zip(&teachers).filter(|(a, b)| a == b).count();
        }
        sums.tokens += rows.len();
        let mut next = 0;
        for segment in &batch.segments {
            let (counted, missed) = &mut sums.documents[segment.document];
            while next < rows.len() && (rows[next] as usize) < segment.start + segment.len {
                *counted = true;
                *missed |= chosen[next] as u32 != labels[next];
                next += 1;
            }
        }
        Ok(())
    }
}
