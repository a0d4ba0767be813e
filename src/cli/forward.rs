//! `h1 forward MODEL --tokens FILE --out FILE`.

use std::borrow::Cow;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};

use super::common::{DeviceArguments, located, progress, refuse_existing_file};
use crate::backend::{DType, Segments, View};
use crate::checkpoint::{Checkpoint, NewTensor, TensorFile, write_tensors};
use crate::model::{Activations, FinalNorm, Keep, Logits};

/// Logits, and hidden states if wanted, of given tokens.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME.
    model: PathBuf,
    /// A safetensors file with `input_ids` [rows, length].
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// The safetensors file to write: `logits` [rows, length, vocabulary], and `hidden.0` to `hidden.n`.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write the residual stream before each block and after the last one too.
    #[arg(long)]
    hidden: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    refuse_existing_file(&arguments.out)?;
    arguments.model = located(&arguments.model)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let file = TensorFile::open(&arguments.tokens)?;
    let input = file.tensor("input_ids")?.to_u32()?;
    let [rows, length] = input.shape[..] else {
        anyhow::bail!("{}: input_ids has shape {:?}, expected [rows, length]", arguments.tokens.display(), input.shape);
    };
    ensure!(rows > 0 && length > 0, "{}: input_ids holds no token", arguments.tokens.display());
    let device = arguments.device.open()?;
    let model = arguments.device.load(&device, &checkpoint)?;
    let config = model.config();
    let keep = if arguments.hidden { Keep::Inputs } else { Keep::Nothing };
    let mut activations = Activations::new(&model, keep, length, 1)?;
    let (norm, head) = (FinalNorm::new(&model, length)?, Logits::new(&model, length)?);
    let (segments, all) = (Segments::documents([length])?, (0..length as u32).collect::<Vec<_>>());

    let hidden_names: Vec<String> = if arguments.hidden {
        (0..=config.num_hidden_layers()).map(|layer| format!("hidden.{layer}")).collect()
    } else {
        Vec::new()
    };
    let mut tensors =
        vec![NewTensor { name: "logits".into(), shape: vec![rows, length, config.vocab_size], dtype: DType::F32 }];
    tensors.extend(hidden_names.iter().map(|name| NewTensor {
        name: name.clone(),
        shape: vec![rows, length, config.hidden_size],
        dtype: DType::F32,
    }));
    let mut values: Vec<Vec<f32>> = tensors.iter().map(|tensor| Vec::with_capacity(tensor.len())).collect();
    let bar = progress(rows, "rows");
    for ids in input.values.chunks_exact(length) {
        model.forward(&mut activations, ids, &segments, None, None)?;
        let read = |view: View| device.read(view)?.wait();
        let normed = norm.forward(&model, activations.output()?, &all)?;
        values[0].extend(read(head.forward(&model, normed)?)?);
        for layer in 0..hidden_names.len() {
            values[layer + 1].extend(read(activations.input_of(layer)?)?);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut values = values.into_iter();
    write_tensors(&arguments.out, &tensors, |_| Ok(Cow::Owned(values.next().unwrap_or_default())))
        .context("the result was not written")?;
    Ok(ExitCode::SUCCESS)
}
