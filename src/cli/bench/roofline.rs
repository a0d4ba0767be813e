//! `h1 bench roofline`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde_json::json;

use crate::backend::DType;
use crate::bench::card::{CARDS, Card};
use crate::bench::roofline::{ModelFloors, Roofline};
use crate::bench::shapes::{Shape, hybrid};
use crate::checkpoint::Checkpoint;
use crate::cli::common::{located, print, print_json};
use crate::model::config::{BlockKind, ModelConfig};
use crate::report::table::{Align, Table};

/// The least times that a card needs, by arithmetic alone: kernels, decoding, a prompt, a distillation step.
#[derive(clap::Args)]
pub(super) struct RooflineArguments {
    /// A folder of a model, a GGUF file, or a name such as hub:ORG/NAME; its sizes alone are read.
    model: Option<PathBuf>,
    /// These sizes instead: arithmetic, smollm2-135m or apriel-15b.
    #[arg(long, value_name = "SHAPE", default_value = "apriel-15b", conflicts_with = "model")]
    shape: Shape,
    /// Mamba layers of its hybrids [default: none and half]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    mamba: Vec<usize>,
    /// Tokens of a sequence.
    #[arg(long, value_name = "N", default_value = "16384")]
    context: NonZeroUsize,
    /// The card: h100 or h200.
    #[arg(long, value_name = "CARD", default_value = "h100", value_parser = card)]
    card: Card,
    /// How weights and activations are stored: f32, bf16 or f16.
    #[arg(long, value_name = "DTYPE", default_value = "bf16")]
    dtype: DType,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

fn card(name: &str) -> Result<Card, String> {
    let known = |card: &&Card| card.name.split(' ').nth(1).is_some_and(|known| known.eq_ignore_ascii_case(name));
    CARDS.iter().find(known).copied().ok_or_else(|| format!("unknown card '{name}': expected h100 or h200"))
}

pub(super) fn run(arguments: RooflineArguments) -> anyhow::Result<()> {
    let config = match &arguments.model {
        Some(model) => Checkpoint::open(&located(model)?)?.config().clone(),
        None => arguments.shape.config(),
    };
    let half = config.num_hidden_layers() / 2;
    let counts = if arguments.mamba.is_empty() { vec![0, half] } else { arguments.mamba.clone() };
    let roofline = Roofline { card: arguments.card, dtype: arguments.dtype };
    let context = arguments.context.get();
    // A model that is a hybrid already stays what it is.
    let models = match config.layers_of(BlockKind::Mamba).count() {
        0 => counts.iter().map(|&count| Ok((count, hybrid(&config, count)?))).collect::<anyhow::Result<Vec<_>>>()?,
        mamba => vec![(mamba, config.clone())],
    };
    let models: Vec<(usize, ModelFloors)> =
        models.iter().map(|(count, model)| (*count, roofline.model(&config, model, context))).collect();
    let kernels = roofline.kernels(&config, context)?;
    if arguments.json {
        let models: Vec<_> = models.iter().map(|(mamba, floors)| json!({"mamba": mamba, "floors": floors})).collect();
        return print_json(&json!({
            "card": arguments.card,
            "dtype": arguments.dtype.to_string(),
            "context": context,
            "kernels": kernels,
            "models": models,
        }));
    }
    let mut table = Table::new(&[
        ("kernel", Align::Left),
        ("sizes", Align::Left),
        ("µs at least", Align::Right),
        ("bound by", Align::Left),
    ]);
    for kernel in &kernels {
        let seconds = format!("{:.1}", 1e6 * kernel.seconds);
        table.row([kernel.name.into(), kernel.sizes.clone(), seconds, kernel.bound.name().into()]);
    }
    print(&format!("{}\n\n{}\n{}", heading(&arguments, &config), table.text(), model_table(&config, &models).text()))
}

fn heading(arguments: &RooflineArguments, config: &ModelConfig) -> String {
    let (card, context) = (arguments.card, arguments.context);
    format!(
        "{}, {}: {:.0} TFLOP/s, {:.0} GB/s, {:.2} T exponentials/s, {:.0} GiB\n{} parameters; sequences of {context} tokens",
        card.name,
        arguments.dtype,
        card.gflops(arguments.dtype) / 1e3,
        card.gbytes,
        card.gexponentials / 1e3,
        card.gibibytes,
        config.parameter_count(),
    )
}

fn model_table(config: &ModelConfig, models: &[(usize, ModelFloors)]) -> Table {
    let mut table = Table::new(&[
        ("Mamba layers", Align::Right),
        ("weights, GB", Align::Right),
        ("cache of a sequence, MB", Align::Right),
        ("decode, batch 1", Align::Right),
        ("largest batch", Align::Right),
        ("decode, largest", Align::Right),
        ("× the first", Align::Right),
        ("prompt", Align::Right),
        ("distillation", Align::Right),
        ("with recompute", Align::Right),
    ]);
    let first = models.first().and_then(|(_, floors)| floors.decode);
    for (mamba, floors) in models {
        let words = |number: Option<f64>, decimals: usize| number.map_or("–".into(), |n| format!("{n:.decimals$}"));
        table.row([
            format!("{mamba} of {}", config.num_hidden_layers()),
            format!("{:.2}", floors.weight_bytes / 1e9),
            format!("{:.1}", floors.cache_bytes as f64 / 1e6),
            format!("{:.1}", floors.single_decode),
            floors.largest_batch.to_string(),
            words(floors.decode, 0),
            words(floors.decode.zip(first).map(|(rate, first)| rate / first), 2),
            format!("{:.0}", floors.prefill),
            format!("{:.0}", floors.distillation),
            format!("{:.0}", floors.recomputed_distillation),
        ]);
    }
    table
}
