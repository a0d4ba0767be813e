//! Steps of training: losses, norms, the gradients of the first step, the parameters after the last.

use std::sync::Arc;

use serde::Deserialize;

use super::goldens::Tensors;
use super::{Error, Report, Result, difference, largest};
use crate::backend::ops::{LossWeights, Scaling, Temperature};
use crate::backend::{DType, Device};
use crate::checkpoint;
use crate::model::{LossKind, Model, Space};
use crate::text::packing::{Batch, NO_LABEL, Segment};
use crate::train::Trainer;
use crate::train::optimizer::{AdamWOptions, Trained};
use crate::train::teacher::Teacher;
use crate::train::trainer::{Divisor, Room, TrainerOptions};

/// `train.json`: what was trained, and how.
#[derive(Deserialize)]
pub(super) struct Recipe {
    pub(super) student: String,
    pub(super) teacher: String,
    loss: String,
    temperature: f32,
    optimizer: String,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    lr_per_step: Vec<f64>,
    grad_clip: f64,
    no_decay_tensors: Vec<String>,
    losses: Vec<f64>,
    global_grad_norm_before_clip: Vec<f64>,
}

impl Recipe {
    fn options(&self, file: &str, trained: Trained) -> Result<TrainerOptions> {
        let only = |kind: &str| if self.loss == kind { 1.0 } else { 0.0 };
        let known = ["reverse_kl", "forward_kl"].contains(&self.loss.as_str()) && self.optimizer == "adamw";
        if !known {
            let why = format!("loss {} with optimizer {} is not one that h1 trains with", self.loss, self.optimizer);
            return Err(Error::File { file: file.into(), why });
        }
        Ok(TrainerOptions {
            trained,
            optimizer: AdamWOptions {
                betas: self.betas,
                eps: self.eps,
                weight_decay: self.weight_decay,
                max_norm: self.grad_clip,
                ..AdamWOptions::default()
            },
            loss: LossKind {
                weights: LossWeights {
                    reverse_kl: only("reverse_kl"),
                    forward_kl: only("forward_kl"),
                    cross_entropy: 0.0,
                },
                scaling: Scaling { logits_scale: 1.0, temperature: self.temperature, spelling: Temperature::Both },
            },
            divisor: Divisor::Counted,
            recompute: true,
            patience: 1,
        })
    }
}

/// The batches of each step: rows of tokens, those under the mask counted.
fn batches(stored: &Tensors) -> Result<Vec<Batch>> {
    let (ids, mask) = (stored.get("input_ids")?, stored.get("loss_mask")?);
    let (rows, length) = (ids.size(1), ids.size(2));
    let tokens = (rows * length).max(1);
    let batch = |(ids, mask): (&[u32], &[f32])| Batch {
        ids: ids.to_vec(),
        labels: vec![NO_LABEL; tokens],
        counted: mask.iter().map(|counts| *counts != 0.0).collect(),
        segments: (0..rows).map(|row| Segment { start: row * length, len: length, document: row }).collect(),
    };
    Ok(ids.ids().chunks_exact(tokens).zip(mask.values.chunks_exact(tokens)).map(batch).collect())
}

/// `FOLDER/train.json` and what lies beside it.
pub(super) fn steps(report: &mut Report, device: &Device, folder: &str) -> Result<()> {
    let file = format!("{folder}/train.json");
    let recipe: Recipe = report.goldens.json(&file)?;
    let batches = batches(&report.goldens.tensors(&format!("{folder}/batches.safetensors"))?)?;
    let after_file = format!("{folder}/params_after_{}.safetensors", recipe.lr_per_step.len());
    let after = report.goldens.tensors(&after_file)?;
    let load =
        |folder: &str| -> Result<Model> { Ok(checkpoint::load(device, &report.goldens.path(folder), DType::F32)?) };
    let (student, teacher) = (load(&recipe.student)?, load(&recipe.teacher)?);
    let all = student.weights().table().iter().all(|(_, p)| after.find(&p.spec.name).is_some());
    let trained = if all { Trained::All } else { Trained::Mixers };
    let undecayed = |name: &str| recipe.no_decay_tensors.iter().any(|other| other == name);
    let follows = |name: &str, decayed: bool| after.find(name).is_none() || decayed != undecayed(name);
    let same_rule = student.weights().table().iter().all(|(_, p)| follows(&p.spec.name, p.spec.decayed));
    let before: Vec<Vec<f32>> = student
        .weights()
        .table()
        .iter()
        .map(|(id, _)| student.weights().read(device, id))
        .collect::<std::result::Result<_, _>>()?;

    let room = Room {
        tokens: batches.first().map_or(0, Batch::tokens),
        segments: batches.first().map_or(0, |batch| batch.segments.len()),
    };
    let teacher = Teacher::live(Arc::new(teacher));
    let mut trainer = Trainer::new(student, Some(teacher), recipe.options(&file, trained)?, room)?;
    let mut steps = Vec::new();
    for (at, (batch, rate)) in batches.iter().zip(&recipe.lr_per_step).enumerate() {
        steps.extend(trainer.step(std::slice::from_ref(batch), *rate)?);
        if at == 0 {
            gradients(report, device, folder, trainer.gradients().space())?;
        }
    }
    steps.extend(trainer.finish()?);

    report.exact(&file, "weight decay's rule", same_rule);
    report.exact(&file, "steps", steps.len() == recipe.losses.len());
    for (at, step) in steps.iter().enumerate() {
        let expected = [("losses", &recipe.losses, step.loss)];
        let norms = [("global_grad_norm_before_clip", &recipe.global_grad_norm_before_clip, step.gradient_norm)];
        for (name, values, found) in expected.into_iter().chain(norms) {
            let expected = values.get(at).copied().unwrap_or(f64::NAN) as f32;
            report.compare(&file, &format!("{name}[{at}]"), &[expected], &[found as f32]);
        }
    }
    let weights = trainer.model().weights();
    for ((id, parameter), before) in weights.table().iter().zip(before) {
        let (name, found) = (&parameter.spec.name, weights.read(device, id)?);
        match after.find(name) {
            Some(expected) => {
                let tolerance = report.goldens.file_tolerance(&after_file, largest(&expected.values));
                report.push(&after_file, name, difference(&expected.values, &found), tolerance);
            }
            None => report.exact(&after_file, &format!("{name} is as it was"), found == before),
        }
    }
    Ok(())
}

fn gradients(report: &mut Report, device: &Device, folder: &str, found: &Space) -> Result<()> {
    let file = format!("{folder}/grads_step1.safetensors");
    if !report.goldens.has(&file) {
        return Ok(());
    }
    let stored = report.goldens.tensors(&file)?;
    for (id, parameter) in found.table().iter() {
        let name = &parameter.spec.name;
        if let Some(expected) = stored.find(name) {
            report.compare(&file, name, &expected.values, &found.read(device, id)?);
        }
    }
    Ok(())
}
