//! `h1 convert MODEL --out DIR`.

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, ensure};
use serde_json::json;

use super::common::{located, print, print_json, progress, refuse_existing, tokenising};
use crate::backend::select::{self, Name};
use crate::backend::{DType, Device};
use crate::checkpoint::gguf::GgufFile;
use crate::checkpoint::{Checkpoint, SaveOptions, save};
use crate::distill::student;
use crate::hybrid::{Conversion, FitOptions, Init, LayerFit, LayerSet, MixerShape, fit};
use crate::model::Model;
use crate::report::table::{Align, Table};
use crate::text::cache::Cache;
use crate::text::encode::{Encoder, LossOn, Render};
use crate::text::packing::Batches;
use crate::text::tokenizer::{self, Tokenizer, TokenizerError};

/// Turns attention layers into Mamba layers, or stores a model as another dtype.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME; its Mamba layers, if it has any, stay as they are.
    model: PathBuf,
    /// The new folder; its tokenizer and generation files are the model's.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Layers to turn into Mamba, counted from 0, such as 3,5-8.
    #[arg(long, value_name = "LAYERS", default_value = "")]
    mamba: String,
    /// What new mixers start from.
    #[arg(long, value_name = "mil|mil-fit|mil-aligned|random", default_value = "mil")]
    init: Init,
    /// How the weights are stored; as in MODEL unless said.
    #[arg(long, value_name = "f32|bf16|f16")]
    dtype: Option<DType>,
    /// States a channel of a first Mamba layer [default: 16]
    #[arg(long, value_name = "N")]
    d_state: Option<usize>,
    /// Rank of dt of a first Mamba layer [default: hidden size / 16, rounded up]
    #[arg(long, value_name = "N")]
    dt_rank: Option<usize>,
    /// Taps of the convolution of a first Mamba layer [default: 4]
    #[arg(long, value_name = "N")]
    d_conv: Option<usize>,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The original model, whose attention new mixers are made from, where MODEL was converted and trained already.
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// Texts for mil-fit to fit to.
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Tokens that mil-fit takes.
    #[arg(long, value_name = "N", default_value = "16384")]
    fit_tokens: NonZeroUsize,
    /// Tokens of a call of mil-fit; longer texts are cut.
    #[arg(long, value_name = "N", default_value = "2048")]
    context: NonZeroUsize,
    /// Backend that mil-fit runs on.
    #[arg(long, default_value = "auto", value_name = "auto|cuda|wgpu|cpu|reference")]
    backend: Name,
    /// Threads of the cpu backend; all cores unless said.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    refuse_existing(&arguments.out)?;
    arguments.model = located(&arguments.model)?;
    arguments.teacher = arguments.teacher.as_deref().map(located).transpose()?;
    let model = Checkpoint::open(&arguments.model)?;
    let original = arguments.teacher.as_deref().map(Checkpoint::open).transpose()?;
    let teacher = original.as_ref().unwrap_or(&model);
    let layers = LayerSet::parse(&arguments.mamba, model.config().num_hidden_layers())?;
    let shape = MixerShape { d_state: arguments.d_state, dt_rank: arguments.dt_rank, d_conv: arguments.d_conv };
    let conversion =
        Conversion::new(teacher.config(), model.config(), &layers, (arguments.init, shape, arguments.seed))?;
    ensure!(
        arguments.data.is_some() == (arguments.init == Init::MilFit && !layers.is_empty()),
        "--data goes with --mamba LAYERS --init mil-fit, which needs texts to fit to"
    );

    let fitted = match &arguments.data {
        Some(data) => Some(fitted(&arguments, data, &conversion, (teacher, &model))?),
        None => None,
    };
    let dtype = arguments.dtype.unwrap_or(model.dtype());
    let specs = conversion.config().tensors();
    let bar = progress(specs.len(), "tensors");
    let made = tempfile::tempdir()?;
    let make = |write: &dyn Fn(&Path) -> Result<(), TokenizerError>| {
        write(made.path())?;
        Ok::<_, TokenizerError>(made.path().to_path_buf())
    };
    let tokenizer = match has_tokenizer(&arguments.model)? {
        true => Some(tokenizer::folder_of(&arguments.model, make)?),
        false => None,
    };
    let options = SaveOptions { copy_from: tokenizer.as_deref(), ..SaveOptions::new(dtype) };
    save(&arguments.out, conversion.config(), &options, |spec| {
        bar.inc(1);
        let of_device = fitted.as_ref().filter(|_| conversion.is_new(spec));
        let id = of_device.and_then(|(student, _)| Some((student, student.weights().table().find(&spec.name)?)));
        Ok(Cow::Owned(match id {
            Some((student, id)) => student.weights().read(student.device(), id)?,
            None => student::tensor(&conversion, teacher, &model, spec)?,
        }))
    })?;
    bar.finish_and_clear();
    report(&arguments, &conversion, dtype, fitted.as_ref().map_or(&[], |(_, fits)| fits))?;
    Ok(ExitCode::SUCCESS)
}

/// Whether there is a tokenizer to take along: a GGUF file may have weights alone. A folder has files or has them not.
fn has_tokenizer(model: &Path) -> anyhow::Result<bool> {
    Ok(!model.is_file() || GgufFile::open(model)?.get_str("tokenizer.ggml.model")?.is_some())
}

/// The hybrid on a device with its new mixers fitted.
fn fitted(
    arguments: &Arguments,
    data: &Path,
    conversion: &Conversion,
    (teacher, student): (&Checkpoint, &Checkpoint),
) -> anyhow::Result<(Model, Vec<LayerFit>)> {
    let tokenizer = Tokenizer::open(&arguments.model)?;
    let encoder = Encoder::new(&tokenizer, Render::Auto, LossOn::All);
    let [documents, _] = Cache::usual().documents(&[data.to_path_buf()], 0.0, &encoder, &mut tokenising())?;
    let mut batches = Batches::new(Arc::new(documents), arguments.context.get(), 1, arguments.seed)?;
    let batches = student::fit_batches(&mut batches, arguments.fit_tokens.get())?;
    let device: Device = select::open(arguments.backend, arguments.threads)?;
    let model = student::assemble(&device, conversion, (teacher, student), DType::F32)?;
    let teacher = teacher.load(&device, DType::F32)?;
    let layers = conversion.new_layers();
    let bar = progress(layers.len(), "layers");
    let options = FitOptions { seed: arguments.seed, ..FitOptions::default() };
    let fits = fit(&model, &teacher, layers, (&batches, &options), |_| bar.inc(1)).context("mil-fit")?;
    bar.finish_and_clear();
    Ok((model, fits))
}

fn report(arguments: &Arguments, conversion: &Conversion, dtype: DType, fits: &[LayerFit]) -> anyhow::Result<()> {
    let config = conversion.config();
    let mamba: LayerSet = config.layers_of(crate::model::config::BlockKind::Mamba).collect();
    if arguments.json {
        return print_json(&json!({
            "out": arguments.out.display().to_string(),
            "dtype": dtype.to_string(),
            "parameters": config.parameter_count(),
            "new": conversion.new_layers().iter().collect::<Vec<_>>(),
            "mamba": mamba.iter().collect::<Vec<_>>(),
            "fits": fits,
        }));
    }
    let kinds = match mamba.len() {
        0 => "no Mamba layers".to_owned(),
        count => format!("Mamba in {count} of {} layers: {mamba}", config.num_hidden_layers()),
    };
    let parameters = config.parameter_count();
    print(&format!("{}: {parameters} parameters in {dtype}, {kinds}", arguments.out.display()))?;
    if fits.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&[("layer", Align::Right), ("dt", Align::Left), ("attention explained", Align::Right)]);
    for fit in fits {
        let (least, greatest) = fit.kept.range;
        let explained = format!("{:.1}%", 100.0 * fit.kept.explained);
        table.row([fit.layer.to_string(), format!("{least}..{greatest}"), explained]);
    }
    print(&table.text())
}
