//! The losses at the head and the choice of a token: launches of their kernels, a block a row.

use super::call::{Call, blocks};
use super::driver::Arguments;
use super::source;
use crate::backend::{Result, ops};

/// Threads of a block.
const THREADS: u32 = 1024;

pub(super) fn head_loss(c: &mut Call, op: &ops::HeadLoss) -> Result<()> {
    let (student, teacher) = (c.f32("student", op.student)?, c.maybe_f32("teacher", op.teacher)?);
    let labels = op.labels.map(|labels| c.ids("labels", labels)).transpose()?;
    let statistics = c.f32("statistics", op.statistics)?;
    let arguments = Arguments::new().place(&student).maybe_place(teacher).maybe(labels);
    let arguments = arguments.float(op.scaling.student()).float(op.scaling.teacher()).place(&statistics);
    let arguments = arguments.size(student.cols);
    c.launch((&source::HEAD_LOSS, "head_loss"), &[("T_OUT", student.of())], blocks(student.rows, THREADS), &arguments)
}

pub(super) fn head_loss_gradient(c: &mut Call, op: &ops::HeadLossGradient) -> Result<()> {
    let (student, teacher) = (c.f32("student", op.student)?, c.maybe_f32("teacher", op.teacher)?);
    let labels = op.labels.map(|labels| c.ids("labels", labels)).transpose()?;
    let (statistics, row_weights) = (c.f32("statistics", op.statistics)?, c.f32("row_weights", op.row_weights)?);
    let losses = c.f32("losses", op.losses)?;
    let none = ops::LossWeights { reverse_kl: 0.0, forward_kl: 0.0, cross_entropy: 0.0 };
    let weights = op.weights.unwrap_or(none);
    let gradient = c.maybe_floats("gradient", op.gradient)?.unwrap_or(student);
    let arguments = Arguments::new().place(&student).place(&gradient).maybe_place(teacher).maybe(labels);
    let arguments = arguments.float(op.scaling.student()).float(op.scaling.teacher()).place(&statistics);
    let arguments = arguments.pointer(row_weights.start).int(op.weights.is_some().into()).float(weights.reverse_kl);
    let arguments = arguments.float(weights.forward_kl).float(weights.cross_entropy).place(&losses);
    let arguments = arguments.size(student.cols);
    let defines = [("T_OUT", gradient.of())];
    c.launch((&source::HEAD_LOSS, "head_loss_gradient"), &defines, blocks(student.rows, THREADS), &arguments)
}

pub(super) fn argmax(c: &mut Call, op: &ops::Argmax) -> Result<()> {
    let (logits, out) = (c.floats("logits", op.logits)?, c.ids("out", op.out)?);
    let arguments = Arguments::new().place(&logits).int(c.int("vocabulary", logits.cols)?).pointer(out.start);
    c.launch((&source::CHOOSE, "argmax"), &[("T_X", logits.of())], blocks(logits.rows, THREADS), &arguments)
}

pub(super) fn sample(c: &mut Call, op: &ops::Sample) -> Result<()> {
    let (logits, out) = (c.floats("logits", op.logits)?, c.ids("out", op.out)?);
    let (temperatures, uniforms) = (c.f32("temperatures", op.temperatures)?, c.f32("uniforms", op.uniforms)?);
    let arguments = Arguments::new().place(&logits).int(c.int("vocabulary", logits.cols)?);
    let arguments = arguments.pointer(temperatures.start).pointer(uniforms.start).pointer(out.start);
    c.launch((&source::CHOOSE, "sample"), &[("T_X", logits.of())], blocks(logits.rows, THREADS), &arguments)
}
