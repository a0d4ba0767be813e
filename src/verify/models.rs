//! Forward passes: logits, hidden states, mixers, packed documents, leave-one-out.

use std::path::PathBuf;

use super::goldens::swap;
use super::{Error, Report, Result};
use crate::backend::{DType, Device, Segments};
use crate::checkpoint::Checkpoint;
use crate::model::config::{MambaConfig, ModelConfig};
use crate::model::{Activations, FinalNorm, Keep, Logits, Model, Rows, Skip};

/// A model with the memory to run one call and see all of it.
pub(super) struct Run<'a> {
    pub(super) model: &'a Model,
    pub(super) activations: Activations,
    norm: FinalNorm,
    logits: Logits,
    tokens: usize,
}

impl<'a> Run<'a> {
    pub(super) fn new(model: &'a Model, keep: Keep, tokens: usize, segments: usize) -> Result<Self> {
        Ok(Run {
            model,
            activations: Activations::new(model, keep, tokens, segments)?,
            norm: FinalNorm::new(model, tokens)?,
            logits: Logits::new(model, tokens)?,
            tokens: 0,
        })
    }

    fn forward(&mut self, ids: &[u32], lengths: &[usize], skip: Option<Skip>) -> Result<()> {
        self.tokens = ids.len();
        let segments = Segments::documents(lengths.iter().copied())?;
        Ok(self.model.forward(&mut self.activations, ids, &segments, None, skip)?)
    }

    /// The normed rows and the logits of the rows `chosen` of the last call.
    pub(super) fn head(&self, chosen: &[u32]) -> Result<(Vec<f32>, Vec<f32>)> {
        let (device, stream) = (self.model.device(), self.activations.output()?);
        let normed = self.norm.forward(self.model, stream, chosen)?;
        let logits = self.logits.forward(self.model, normed)?;
        Ok((device.read(normed)?.wait()?, device.read(logits)?.wait()?))
    }

    fn whole_head(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        self.head(&(0..self.tokens as u32).collect::<Vec<_>>())
    }
}

/// Every `config*.json` of a model's folder: the same model in other spellings.
fn spellings(report: &Report, folder: &str) -> Result<Vec<(String, ModelConfig)>> {
    let root: PathBuf = report.goldens.path(folder);
    let broken = |why: String| Error::File { file: folder.into(), why };
    let mut configs = Vec::new();
    for entry in std::fs::read_dir(&root).map_err(|e| broken(e.to_string()))? {
        let name = entry.map_err(|e| broken(e.to_string()))?.file_name().to_string_lossy().into_owned();
        if name.starts_with("config") && name.ends_with(".json") {
            let text = std::fs::read_to_string(root.join(&name)).map_err(|e| broken(format!("{name}: {e}")))?;
            configs.push((name.clone(), ModelConfig::from_json(&text).map_err(|e| broken(format!("{name}: {e}")))?));
        }
    }
    configs.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(configs)
}

/// `FOLDER/io.safetensors`.
pub(super) fn forward(report: &mut Report, device: &Device, folder: &str) -> Result<()> {
    let file = format!("{folder}/io.safetensors");
    let io = report.goldens.tensors(&file)?;
    let input = io.get("input_ids")?;
    let (ids, batch, length) = (input.ids(), input.size(0), input.size(1));
    let checkpoint = Checkpoint::open(&report.goldens.path(folder))?;
    let model = checkpoint.load(device, DType::F32)?;
    let layers = model.config().num_hidden_layers();
    let mut run = Run::new(&model, Keep::Everything, ids.len().max(length), ids.len())?;

    run.forward(&ids, &vec![length; batch], None)?;
    let (normed, logits) = run.whole_head()?;
    report.compare(&file, "logits", &io.get("logits")?.values, &logits);
    report.compare(&file, "final_norm", &io.get("final_norm")?.values, &normed);
    for layer in 0..=layers {
        let name = format!("hidden.{layer}");
        let found = device.read(run.activations.input_of(layer)?)?.wait()?;
        report.compare(&file, &name, &io.get(&name)?.values, &found);
    }
    for layer in 0..layers {
        if let (Some(mamba), Some(_)) = (&model.config().mamba, io.find(&format!("mixer.{layer}.input"))) {
            mixer(report, (&file, &io), &run, (layer, mamba), (batch, length))?;
        }
    }
    if let Some(expected) = io.find("rope_inv_freq") {
        report.compare(&file, "rope_inv_freq", &expected.values, &model.config().inv_freq());
    }
    if let Some(packed) = io.find("packed_input_ids") {
        let lengths: Vec<usize> = io.get("packed_lengths")?.ids().into_iter().map(|n| n as usize).collect();
        run.forward(&packed.ids(), &lengths, None)?;
        report.compare(&file, "packed_logits", &io.get("packed_logits")?.values, &run.whole_head()?.1);
    }
    for layer in 0..layers {
        let name = format!("loo.{layer}.logits");
        if let Some(expected) = io.find(&name) {
            run.forward(&ids[..length], &[length], Some(Skip::Block(layer)))?;
            report.compare(&file, &name, &expected.values, &run.whole_head()?.1);
        }
    }
    for (name, mut config) in spellings(report, folder)?.into_iter().filter(|(name, _)| name != "config.json") {
        // The rank of dt is the tensors', whatever "auto" gives.
        if let (Some(other), Some(read)) = (&mut config.mamba, &model.config().mamba) {
            other.dt_rank = read.dt_rank;
        }
        let other = Model::new(device, config, DType::F32)?;
        checkpoint.fill(&other)?;
        let mut run = Run::new(&other, Keep::Nothing, ids.len(), batch)?;
        run.forward(&ids, &vec![length; batch], None)?;
        report.exact(&format!("{folder}/{name}"), "logits are those of config.json", run.whole_head()?.1 == logits);
    }
    Ok(())
}

fn mixer(
    report: &mut Report,
    (file, io): (&str, &super::goldens::Tensors),
    run: &Run,
    (layer, mamba): (usize, &MambaConfig),
    (batch, length): (usize, usize),
) -> Result<()> {
    let (device, tokens) = (run.model.device(), batch * length);
    let saved = run.activations.saved(layer);
    let mut compare = |tensor: &str, found: &[f32]| -> Result<()> {
        let name = format!("mixer.{layer}.{tensor}");
        report.compare(file, &name, &io.get(&name)?.values, found);
        Ok(())
    };
    compare("input", &device.read(saved.normed(tokens)?)?.wait()?)?;
    if let Some(states) = saved.mamba() {
        compare("dt_lowrank", &device.read(states.low(mamba, tokens)?)?.wait()?)?;
        let rows = device.read(states.conv_input(mamba, tokens)?)?.wait()?;
        let channels = mamba.conv_channels();
        let repeated: Vec<f32> = rows.chunks_exact(mamba.d_xb).flat_map(|row| repeat(mamba, row, 1)).collect();
        compare("conv_input", &swap([batch, length, channels, 1], &repeated))?;
    }
    let output = Rows::new(device, DType::F32, tokens, run.model.config().hidden_size)?;
    run.model.mixer_output(&run.activations, layer, output.of(tokens)?)?;
    compare("output", &device.read(output.of(tokens)?)?.wait()?)
}

/// `[d_xb, width]` with each head repeated, as it stands before the convolution; unchanged where the repeat comes after.
pub(super) fn repeat(mamba: &MambaConfig, channels: &[f32], width: usize) -> Vec<f32> {
    let (shape, head) = (mamba.conv_shape(), mamba.d_state * width);
    let times = if shape.repeat_first { shape.repeat } else { 1 };
    channels.chunks_exact(head).flat_map(|head| head.iter().copied().cycle().take(head.len() * times)).collect()
}
