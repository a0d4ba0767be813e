//! The loss over logits, and the choice of a token.

use super::Verdict;
use super::trial::{Arg, Trial};
use crate::backend::{DType, Result, ops};

const VOCABULARY: usize = 1000;

/// Logits of the two models, near each other as they are in distillation, and labels, some of none.
struct Logits {
    rows: usize,
    vocabulary: usize,
    values: Vec<f64>,
    teacher: Option<Arg>,
    labels: Option<Arg>,
    scaling: ops::Scaling,
}

impl Logits {
    fn draw(t: &mut Trial, with_teacher: bool) -> Result<Self> {
        let rows = t.size(33);
        let vocabulary = t.size(VOCABULARY) * t.one_of(&[1, 1, 5]);
        let values: Vec<f64> = (0..rows * vocabulary).map(|_| 2.0 * t.normal()).collect();
        let teacher = if with_teacher {
            Some(t.input_of("teacher", rows, vocabulary, |t, r, c| values[r * vocabulary + c] + 0.5 * t.normal())?)
        } else {
            None
        };
        let labels: Vec<_> = (0..rows).map(|_| t.below(vocabulary + 2)).collect();
        let labels = if t.coin() || !with_teacher { Some(t.ids("labels", 1, rows, &labels)?) } else { None };
        let scaling = ops::Scaling {
            logits_scale: t.one_of(&[1.0, 0.7]),
            temperature: t.one_of(&[1.0, 2.0]),
            spelling: t.one_of(&[ops::Temperature::Both, ops::Temperature::TeacherOnly]),
        };
        Ok(Logits { rows, vocabulary, values, teacher, labels, scaling })
    }
}

pub fn head_loss(t: &mut Trial, with_teacher: bool) -> Verdict {
    let Logits { rows, vocabulary, values, teacher, labels, scaling } = Logits::draw(t, with_teacher)?;
    let student = t.input_of("student", rows, vocabulary, |_, r, c| values[r * vocabulary + c])?;
    let statistics = t.output("statistics", rows, ops::STATISTICS, vocabulary)?;
    t.run(|on| {
        let (student, teacher, labels) = (on.view(student), on.maybe(teacher), on.maybe(labels));
        on.device.head_loss(&ops::HeadLoss { student, teacher, labels, scaling, statistics: on.view(statistics) })
    })
}

/// Where a gradient of logits goes.
#[derive(Clone, Copy, PartialEq)]
pub enum Gradient {
    None,
    InPlace,
    /// To rows of a dtype of their own.
    Beside(DType),
}

pub fn head_loss_gradient(t: &mut Trial, with_teacher: bool, gradient: Gradient) -> Verdict {
    let Logits { rows, vocabulary, values, teacher, labels, scaling } = Logits::draw(t, with_teacher)?;
    // A KL is a difference of logits ten times as large, which a sum of a hundred terms stands for.
    let of_loss = vocabulary + 100;
    let value = |_: &mut Trial, r: usize, c: usize| values[r * vocabulary + c];
    let (student, beside) = match gradient {
        Gradient::None => (t.input_of("student", rows, vocabulary, value)?, None),
        Gradient::InPlace => (t.changed_of("student", rows, vocabulary, of_loss, value)?, None),
        Gradient::Beside(dtype) => {
            let student = t.input_of("student", rows, vocabulary, value)?;
            (student, Some(t.output_as("gradient", dtype, rows, vocabulary, of_loss)?))
        }
    };
    let statistics = t.kept("statistics", rows, ops::STATISTICS)?;
    t.prepare(|on| {
        let (student, teacher, labels) = (on.view(student), on.maybe(teacher), on.maybe(labels));
        on.device.head_loss(&ops::HeadLoss { student, teacher, labels, scaling, statistics: on.view(statistics) })
    })?;
    let row_weights = t.input_of("row_weights", 1, rows, |t, _, _| if t.coin() { t.number(0.5, 2.0) } else { 0.0 })?;
    let (one, two) = (t.one_of(&[0.0, 1.0]), t.one_of(&[0.0, 0.3]));
    let weights = ops::LossWeights { reverse_kl: 1.0, forward_kl: two, cross_entropy: one };
    let weights = (gradient != Gradient::None).then_some(weights);
    let losses = t.output("losses", rows, 3, of_loss)?;
    t.run(|on| {
        on.device.head_loss_gradient(&ops::HeadLossGradient {
            student: on.view(student),
            gradient: on.maybe(beside),
            teacher: on.maybe(teacher),
            labels: on.maybe(labels),
            scaling,
            statistics: on.view(statistics),
            row_weights: on.view(row_weights),
            weights,
            losses: on.view(losses),
        })
    })
}

pub fn argmax(t: &mut Trial) -> Verdict {
    let (rows, vocabulary) = (t.size(33), t.size(VOCABULARY) * t.one_of(&[1, 5]));
    // Few different values, so that several are the largest.
    let logits = t.input_of("logits", rows, vocabulary, |t, _, _| t.below(7) as f64 - 9.0)?;
    let out = t.output_ids("out", rows)?;
    t.run(|on| on.device.argmax(&ops::Argmax { logits: on.view(logits), out: on.view(out) }))
}

pub fn sample(t: &mut Trial) -> Verdict {
    let (rows, vocabulary) = (t.size(33), t.size(VOCABULARY));
    let logits = t.input_of("logits", rows, vocabulary, |t, _, _| 2.0 * t.normal())?;
    let temperatures = t.input_of("temperatures", 1, rows, |t, _, _| t.one_of(&[0.0, 0.5, 1.0, 3.0]))?;
    let uniforms = t.input_of("uniforms", 1, rows, |t, _, _| t.number(0.0, 1.0))?;
    let out = t.output_ids("out", rows)?;
    t.run(|on| {
        let (logits, temperatures, uniforms) = (on.view(logits), on.view(temperatures), on.view(uniforms));
        on.device.sample(&ops::Sample { logits, temperatures, uniforms, out: on.view(out) })
    })
}
