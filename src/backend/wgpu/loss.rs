//! The loss over logits, and the choice of a token.

use super::call::Call;
use super::{rows, shaders};
use crate::backend::ops::LossWeights;
use crate::backend::{Out, Result, View, ops};

/// The same rows of an argument that may be absent: of a matrix.
fn rows_of(view: Option<View>, first: usize, count: usize) -> Result<Option<View>> {
    view.map(|view| view.row_range(first, count)).transpose()
}

/// And of a single row with a value for each.
fn cols_of(view: Option<View>, first: usize, count: usize) -> Result<Option<View>> {
    view.map(|view| view.col_range(first, count)).transpose()
}

pub(super) fn head_loss(call: &mut Call, op: &ops::HeadLoss) -> Result<()> {
    call.check([op.student, op.statistics].into_iter().chain(op.teacher).chain(op.labels))?;
    for (first, count) in call.row_blocks(&[op.student, op.teacher.unwrap_or(op.student)]) {
        let kernel = shaders::HEAD_LOSS.kernel("statistics_of_rows", &[]);
        call.dispatch(kernel.with("TEACHER", op.teacher.is_some()).with("LABELS", op.labels.is_some()))
            .read(op.student.row_range(first, count)?)
            .maybe_read(rows_of(op.teacher, first, count)?)
            .maybe_read(cols_of(op.labels, first, count)?)
            .write(op.statistics.row_range(first, count)?)
            .size(count)
            .size(op.student.cols)
            .factor(op.scaling.student())
            .factor(op.scaling.teacher())
            .grid([count, 1, 1])?;
    }
    Ok(())
}

pub(super) fn head_loss_gradient(call: &mut Call, op: &ops::HeadLossGradient) -> Result<()> {
    let views = [op.student, op.statistics, op.row_weights, op.losses];
    call.check(views.into_iter().chain(op.gradient).chain(op.teacher).chain(op.labels))?;
    if let Some(gradient) = op.gradient.filter(|_| op.weights.is_some()) {
        rows::copy(call, &ops::Copy { src: op.student, out: Out::assign(gradient) })?;
    }
    let logits = op.gradient.unwrap_or(op.student);
    let none = LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 0.0 };
    let weights = op.weights.unwrap_or(none);
    for (first, count) in call.row_blocks(&[op.student, op.teacher.unwrap_or(op.student)]) {
        let kernel = shaders::HEAD_LOSS
            .kernel("gradient_of_rows", &[])
            .with("TEACHER", op.teacher.is_some())
            .with("LABELS", op.labels.is_some())
            .with("GRADIENT", op.weights.is_some());
        call.dispatch(kernel)
            .maybe_read(rows_of(op.teacher, first, count)?)
            .maybe_read(cols_of(op.labels, first, count)?)
            .read(op.statistics.row_range(first, count)?)
            .read(op.row_weights.col_range(first, count)?)
            .write(logits.row_range(first, count)?)
            .write(op.losses.row_range(first, count)?)
            .size(count)
            .size(op.student.cols)
            .factor(op.scaling.student())
            .factor(op.scaling.teacher())
            .factor(weights.reverse_kl)
            .factor(weights.forward_kl)
            .factor(weights.cross_entropy)
            .grid([count, 1, 1])?;
    }
    Ok(())
}

pub(super) fn argmax(call: &mut Call, op: &ops::Argmax) -> Result<()> {
    call.check([op.logits, op.out])?;
    for (first, count) in call.row_blocks(&[op.logits]) {
        call.dispatch(shaders::SAMPLE.kernel("argmax", &[op.logits.dtype]))
            .read(op.logits.row_range(first, count)?)
            .write(op.out.col_range(first, count)?)
            .size(count)
            .size(op.logits.cols)
            .grid([count, 1, 1])?;
    }
    Ok(())
}

pub(super) fn sample(call: &mut Call, op: &ops::Sample) -> Result<()> {
    call.check([op.logits, op.temperatures, op.uniforms, op.out])?;
    for (first, count) in call.row_blocks(&[op.logits]) {
        call.dispatch(shaders::SAMPLE.kernel("sample", &[op.logits.dtype]))
            .read(op.logits.row_range(first, count)?)
            .read(op.temperatures.col_range(first, count)?)
            .read(op.uniforms.col_range(first, count)?)
            .write(op.out.col_range(first, count)?)
            .size(count)
            .size(op.logits.cols)
            .grid([count, 1, 1])?;
    }
    Ok(())
}
