//! What a distillation would take, from its configuration alone: tokens and steps, memory, FLOP, disk, hours.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::Result;
use super::config::Config;
use super::cost::{self, Memory, StepShape};
use super::importance::Method;
use crate::backend::ops::Linear;
use crate::backend::{CHUNK_VALUES, DType, Device, Order, Out, padded_rows};
use crate::hybrid::{Conversion, Init, LayerSet};
use crate::model::config::{BlockKind, ModelConfig};
use crate::report::table::{Align, Table};

/// Tokens between two states that the scan keeps, where no device says.
const SCAN_CHUNK: usize = 64;

/// Share of the rate of a plain product that a step of training is taken to reach.
const SHARE_OF_PRODUCT: f64 = 0.5;

/// FLOP/s that training is taken to reach on a device: half of what a product of 512×576×1536 in f32 reaches now.
///
/// # Errors
/// When the device fails.
pub fn measured_flops(device: &Device) -> Result<f64> {
    let (tokens, width, rows) = (512, 576, 1536);
    let (x, out) = (device.alloc(DType::F32, tokens, width)?, device.alloc(DType::F32, tokens, rows)?);
    let weight = device.alloc(DType::F32, 1, padded_rows(rows) * width)?;
    let weight = weight.view().matrix(0, rows, width, Order::Weight)?;
    let product = || device.linear(&Linear { x: x.view(), weight, bias: None, out: Out::assign(out.view()) });
    let finished = || Ok::<_, super::Error>(device.read(out.view().row_range(0, 1)?)?.wait()?);
    product()?;
    finished()?;
    let (start, mut products) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(200) {
        product()?;
        finished()?;
        products += 1;
    }
    let flop = 2.0 * (tokens * width * rows * products) as f64;
    Ok(SHARE_OF_PRODUCT * flop / start.elapsed().as_secs_f64())
}

/// What one stage takes.
#[derive(Clone, Debug, Serialize)]
pub struct StagePlan {
    /// Mamba layers at its end.
    pub mamba: usize,
    /// Layers that become Mamba in it, where they are listed.
    pub layers: Option<String>,
    /// How they are ranked otherwise.
    pub ranking: Option<Method>,
    /// What new mixers start from.
    pub init: Init,
    /// Parameters of the student.
    pub parameters: u64,
    /// Steps of training.
    pub steps: u64,
    /// Tokens of training.
    pub tokens: u64,
    /// FLOP of a token of training.
    pub flop_a_token: f64,
    /// FLOP of training.
    pub training_flop: f64,
    /// FLOP of the ranking and of a fit.
    pub importance_flop: f64,
    /// Bytes of a device while it trains.
    pub memory: Memory,
    /// Bytes of the stage's folder.
    pub folder_bytes: u64,
    /// Bytes of a checkpoint within it.
    pub checkpoint_bytes: u64,
    /// Bytes of the teacher's outputs, kept while layers are ranked by MMR.
    pub teacher_bytes: u64,
    /// Bytes of a sequence's cache at the evaluation's context.
    pub cache_bytes: u64,
    /// Hours, ranking and training.
    pub hours: f64,
}

/// What a whole distillation takes.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Parameters of the teacher.
    pub teacher_parameters: u64,
    /// Bytes of a sequence's cache of the teacher.
    pub teacher_cache_bytes: u64,
    /// Tokens of a step.
    pub step_tokens: u64,
    /// The stages.
    pub stages: Vec<StagePlan>,
    /// Tokens of training in all.
    pub tokens: u64,
    /// FLOP in all.
    pub flop: f64,
    /// Bytes of device memory at the stage that needs most, on one device.
    pub device_bytes: u64,
    /// The same on each of several devices that share out weights, gradients and moments.
    pub shared_bytes: u64,
    /// Bytes that the host holds of a checkpoint at a time.
    pub host_bytes: u64,
    /// Bytes of the disk at the end, with the checkpoints and the teacher's outputs that there are on the way.
    pub disk_bytes: u64,
    /// Devices that share a step.
    pub devices: usize,
    /// FLOP/s of a device.
    pub device_flops: f64,
    /// Hours in all.
    pub hours: f64,
}

impl Plan {
    /// Reckons; a relative path starts at `base`, `dtypes` are how weights are stored and how activations are beside them,
    /// `device_flops` is what a device reaches while it trains.
    ///
    /// # Errors
    /// When the teacher's shape cannot be read, or a stage is impossible.
    pub fn new(config: &Config, base: &Path, dtypes: (DType, DType), device_flops: f64) -> Result<Self> {
        let teacher = config.teacher_shape(base)?;
        let counts = config.counts(&teacher)?;
        let devices = config.plan.devices.unwrap_or(1);
        let rate = device_flops * devices as f64;
        let mut before = teacher.layers_of(BlockKind::Mamba).count();
        let mut stages = Vec::new();
        for (index, mamba) in counts.into_iter().enumerate() {
            stages.push(stage(config, &teacher, dtypes, (index, before, mamba), rate)?);
            before = mamba;
        }
        let sum = |of: fn(&StagePlan) -> f64| stages.iter().map(of).sum::<f64>();
        let most = |of: fn(&StagePlan) -> u64| stages.iter().map(of).max().unwrap_or_default();
        let folders: u64 = stages.iter().map(|stage| stage.folder_bytes).sum();
        Ok(Plan {
            teacher_parameters: teacher.parameter_count(),
            teacher_cache_bytes: teacher.cache_bytes(config.evaluation.context, dtypes.1.size()),
            step_tokens: (config.batch.tokens_a_step() as u64),
            tokens: stages.iter().map(|stage| stage.tokens).sum(),
            flop: sum(|stage| stage.training_flop + stage.importance_flop),
            device_bytes: most(|stage| stage.memory.total()),
            shared_bytes: stages.iter().map(|stage| stage.memory.shared(devices)).max().unwrap_or_default(),
            host_bytes: cost::largest_tensor(&teacher),
            // A new checkpoint is whole before the older of two goes.
            disk_bytes: folders + 3 * most(|stage| stage.checkpoint_bytes) + most(|stage| stage.teacher_bytes),
            devices,
            device_flops,
            hours: sum(|stage| stage.hours),
            stages,
        })
    }

    /// The plan for a terminal.
    pub fn text(&self) -> String {
        let right = Align::Right;
        let mut table = Table::new(&[
            ("stage", right),
            ("Mamba", right),
            ("layers by", Align::Left),
            ("init", Align::Left),
            ("parameters", right),
            ("tokens", right),
            ("steps", right),
            ("FLOP a token", right),
            ("FLOP", right),
            ("memory", right),
            ("cache", right),
            ("hours", right),
        ]);
        for (stage, number) in self.stages.iter().zip(1..) {
            let by = match (&stage.layers, stage.ranking) {
                (Some(layers), _) => layers.clone(),
                (None, ranking) => ranking.map_or(String::new(), |method| method.name().into()),
            };
            table.row([
                number.to_string(),
                stage.mamba.to_string(),
                by,
                stage.init.to_string(),
                count(stage.parameters as f64),
                count(stage.tokens as f64),
                stage.steps.to_string(),
                count(stage.flop_a_token),
                format!("{:.2e}", stage.training_flop + stage.importance_flop),
                bytes(stage.memory.total()),
                bytes(stage.cache_bytes),
                hours(stage.hours),
            ]);
        }
        let mut text = table.text();
        let Some(largest) = self.stages.iter().max_by_key(|stage| stage.memory.total()) else { return text };
        let Memory { teacher, student, gradients, moments, activations, head } = largest.memory;
        let checkpoint = self.stages.iter().map(|stage| stage.checkpoint_bytes).max().unwrap_or_default();
        let outputs = self.stages.iter().map(|stage| stage.teacher_bytes).max().unwrap_or_default();
        let folders: u64 = self.stages.iter().map(|stage| stage.folder_bytes).sum();
        let devices = if self.devices == 1 { "1 device".to_owned() } else { format!("{} devices", self.devices) };
        let lines = [
            format!(
                "teacher     {} parameters, {} of cache a sequence",
                count(self.teacher_parameters as f64),
                bytes(self.teacher_cache_bytes)
            ),
            format!("step        {} tokens", count(self.step_tokens as f64)),
            format!(
                "memory      {} at most: teacher {}, student {}, gradients {}, moments {}, activations {}, logits {}",
                bytes(self.device_bytes),
                bytes(teacher),
                bytes(student),
                bytes(gradients),
                bytes(moments),
                bytes(activations),
                bytes(head)
            ),
            format!("each device {} if {} share weights, gradients and moments", bytes(self.shared_bytes), devices),
            format!("host        {} at a time", bytes(self.host_bytes)),
            format!(
                "disk        {} at most: stages {}, a checkpoint {}, the teacher's outputs for MMR {}",
                bytes(self.disk_bytes),
                bytes(folders),
                bytes(checkpoint),
                bytes(outputs)
            ),
            format!("compute     {} tokens, {:.2e} FLOP", count(self.tokens as f64), self.flop),
            format!("time        {} on {} of {:.3e} FLOP/s each", hours(self.hours), devices, self.device_flops),
        ];
        text.push('\n');
        text.push_str(&lines.join("\n"));
        text
    }
}

fn stage(
    config: &Config,
    teacher: &ModelConfig,
    (dtype, activations): (DType, DType),
    (index, before, mamba): (usize, usize, usize),
    rate: f64,
) -> Result<StagePlan> {
    // Which layers they are is not known yet, and makes no difference to a sum.
    let student = hybrid(config, teacher, mamba)?;
    let tokens = config.steps_of(index) * (config.batch.tokens_a_step() as u64);
    let keys = config.batch.row_tokens as f64 / 2.0;
    let flop_a_token = cost::distillation_flop(teacher, &student, keys, config.recompute);
    let ranking = config.ranking_of(index);
    let (forward, of_teacher) = (cost::forward_flop(&student, keys), cost::forward_flop(teacher, keys));
    let candidates = teacher.num_hidden_layers() - before;
    let mmr_tokens = (config.importance.mmr.steps * (config.batch.tokens_a_step() as u64)) as f64;
    let fit = match config.init_of(index) {
        // The student up to each layer once, and its mixer again for every range.
        Init::MilFit => 2.0 * forward * config.student.fit_tokens as f64,
        _ => 0.0,
    };
    let importance_flop = fit
        + match ranking {
            Some(Method::Loo) => forward * (config.importance.loo.tokens * (candidates + 1)) as f64,
            Some(Method::Mmr) => mmr_tokens * ((flop_a_token - of_teacher) * candidates as f64 + of_teacher),
            None => 0.0,
        };
    let training_flop = flop_a_token * tokens as f64;
    let parameters = student.parameter_count();
    let step = StepShape {
        tokens: config.batch.row_tokens * config.batch.rows,
        dtype,
        activations,
        recompute: config.recompute,
        trained: config.trained_of(index),
        scan_chunk: SCAN_CHUNK,
        chunk_values: CHUNK_VALUES,
    };
    let memory = cost::memory(teacher, &student, step);
    let masters = if dtype == DType::F32 { 0 } else { 4 * parameters };
    Ok(StagePlan {
        mamba,
        layers: config.stages[index].layers.clone(),
        ranking,
        init: config.init_of(index),
        parameters,
        steps: config.steps_of(index),
        tokens,
        flop_a_token,
        training_flop,
        importance_flop,
        memory,
        folder_bytes: parameters * dtype.size() as u64,
        checkpoint_bytes: parameters * dtype.size() as u64 + masters + memory.moments,
        teacher_bytes: match ranking {
            Some(Method::Mmr) => mmr_tokens as u64 * teacher.hidden_size as u64 * 4,
            _ => 0,
        },
        cache_bytes: student.cache_bytes(config.evaluation.context, activations.size()),
        hours: (training_flop + importance_flop) / rate / 3600.0,
    })
}

/// The teacher's shape with so many Mamba layers.
pub(super) fn hybrid(config: &Config, teacher: &ModelConfig, mamba: usize) -> Result<ModelConfig> {
    let more = mamba - teacher.layers_of(BlockKind::Mamba).count();
    let layers: LayerSet = teacher.layers_of(BlockKind::Attention).take(more).collect();
    Ok(Conversion::new(teacher, teacher, &layers, (Init::Mil, config.student.shape(), 0))?.config().clone())
}

/// A number with a thousand's letter.
fn count(value: f64) -> String {
    let (value, unit) = scaled(value, 1000.0, &["", " k", " M", " G", " T", " P"]);
    format!("{value}{unit}")
}

/// Bytes, in powers of 1024.
fn bytes(value: u64) -> String {
    let (value, unit) = scaled(value as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB"]);
    format!("{value}{unit}")
}

fn scaled<'a>(mut value: f64, base: f64, units: &[&'a str]) -> (String, &'a str) {
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 { 0 } else { 1 };
    (format!("{value:.digits$}"), units.get(unit).copied().unwrap_or_default())
}

fn hours(hours: f64) -> String {
    match hours {
        _ if hours < 1.0 / 60.0 => format!("{:.0} s", hours * 3600.0),
        _ if hours < 2.0 => format!("{:.1} min", hours * 60.0),
        _ => format!("{hours:.0} h"),
    }
}
