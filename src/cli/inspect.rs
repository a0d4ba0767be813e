//! `h1 inspect MODEL`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::common::{located, print, print_json};
use crate::checkpoint::{Checkpoint, Storage};
use crate::hybrid::LayerSet;
use crate::model::config::{BlockKind, Family, ModelConfig, RopeScaling};
use crate::text::tokenizer::{Tokenizer, TokenizerError};

/// What a model is: architecture, sizes, layout of layers, parameters, bytes, tokenizer, template, and what h1 can do with it.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME.
    model: PathBuf,
    /// Tokens of a sequence for the size of its cache.
    #[arg(long, value_name = "N", default_value = "16384")]
    context: usize,
    /// Look at every value too, and name the first that is infinite or no number.
    #[arg(long)]
    values: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    arguments.model = located(&arguments.model)?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    if arguments.values {
        checkpoint.check_finite()?;
    }
    let tokenizer = Tokenizer::open(&arguments.model);
    if arguments.json {
        print_json(&facts(&checkpoint, &tokenizer, arguments.context)?)?;
    } else {
        print(&words(&checkpoint, &tokenizer, arguments.context)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn layers(config: &ModelConfig, kind: BlockKind) -> LayerSet {
    config.layers_of(kind).collect()
}

fn bytes(storages: &[(Storage, u64)]) -> u64 {
    storages.iter().map(|(_, bytes)| bytes).sum()
}

/// Why no published class loads the model, where none does.
fn unpublished(config: &ModelConfig) -> Option<&'static str> {
    let mamba = config.blocks.contains(&BlockKind::Mamba);
    (mamba && config.attention_bias).then_some("that of the hybrid has no biases on queries, keys and values")
}

fn facts(
    checkpoint: &Checkpoint,
    tokenizer: &Result<Tokenizer, TokenizerError>,
    context: usize,
) -> anyhow::Result<serde_json::Value> {
    let config = checkpoint.config();
    let storages = checkpoint.storages()?;
    let list = |kind| config.layers_of(kind).collect::<Vec<_>>();
    Ok(json!({
        "family": format!("{:?}", config.family),
        "config": config.to_json(checkpoint.dtype()),
        "layers": config.num_hidden_layers(),
        "attention_layers": list(BlockKind::Attention),
        "mamba_layers": list(BlockKind::Mamba),
        "identity_layers": list(BlockKind::Identity),
        "parameters": config.parameter_count(),
        "dtype": checkpoint.dtype().to_string(),
        "stored": storages.iter().map(|(storage, bytes)| (storage.name(), *bytes)).collect::<std::collections::BTreeMap<_, _>>(),
        "bytes": bytes(&storages),
        "context": context,
        "cache_bytes": config.cache_bytes(context, 4),
        "tokenizer": tokenizer.as_ref().ok().map(Tokenizer::vocabulary_size),
        "template": tokenizer.as_ref().is_ok_and(|tokenizer| tokenizer.template().is_some()),
        "unpublished": unpublished(config),
    }))
}

fn words(
    checkpoint: &Checkpoint,
    tokenizer: &Result<Tokenizer, TokenizerError>,
    context: usize,
) -> anyhow::Result<String> {
    let config = checkpoint.config();
    let mut lines = vec![
        format!("model       {}, {}", checkpoint.form(), checkpoint.path().display()),
        format!("family      {}", family(config)),
        format!(
            "sizes       hidden {}, MLP {}, vocabulary {}{}, context {}",
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            if config.tie_word_embeddings { " (tied embedding)" } else { "" },
            config.max_position_embeddings
        ),
        format!("layout      {}", layout(config)),
        format!("attention   {}", attention(config)),
    ];
    let mamba = layers(config, BlockKind::Mamba);
    if let Some(sizes) = config.mamba.as_ref().filter(|_| !mamba.is_empty()) {
        lines.push(format!(
            "mamba       inner {}, xB {}, state {}, dt rank {}, convolution {}{}; layers {mamba}",
            sizes.d_inner,
            sizes.d_xb,
            sizes.d_state,
            sizes.dt_rank,
            sizes.d_conv,
            if sizes.bias { ", biases" } else { "" },
        ));
    }
    let storages = checkpoint.storages()?;
    let shares: Vec<String> =
        storages.iter().map(|(storage, bytes)| format!("{bytes} as {}", storage.name())).collect();
    lines.push(format!("parameters  {}", config.parameter_count()));
    lines.push(format!("bytes       {}: {}", bytes(&storages), shares.join(", ")));
    lines.push(format!("cache       {} bytes a sequence of {context} tokens, in f32", config.cache_bytes(context, 4)));
    match tokenizer {
        Err(error) => lines.push(format!("tokenizer   none: {error}")),
        Ok(tokenizer) => {
            lines.push(format!("tokenizer   {} tokens{}", tokenizer.vocabulary_size(), lacking(tokenizer)));
            let template = if tokenizer.template().is_some() { "the model's own" } else { "none" };
            lines.push(format!("template    {template}"));
        }
    }
    let teaches = if mamba.is_empty() { "distil, " } else { "" };
    let text = if tokenizer.is_ok() { "train, evaluate, generate, " } else { "" };
    lines.push(format!("h1 can      {teaches}{text}convert"));
    if let Some(why) = unpublished(config) {
        lines.push(format!("elsewhere   no published class loads it: {why}"));
    }
    Ok(lines.join("\n"))
}

fn family(config: &ModelConfig) -> &'static str {
    match config.family {
        Family::Mistral => "Mistral",
        Family::Llama => "Llama",
        Family::Qwen2 => "Qwen2",
        Family::AprielH => "Apriel-H, a hybrid of attention and Mamba",
    }
}

/// A letter a layer.
fn layout(config: &ModelConfig) -> String {
    let letter = |kind: &BlockKind| match kind {
        BlockKind::Attention => 'A',
        BlockKind::Mamba => 'M',
        BlockKind::Identity => '-',
    };
    let letters: String = config.blocks.iter().map(letter).collect();
    let identity = layers(config, BlockKind::Identity);
    let left_out = if identity.is_empty() { String::new() } else { format!("; {identity} are left out") };
    format!("{letters}, {} layers{left_out}", config.num_hidden_layers())
}

fn attention(config: &ModelConfig) -> String {
    let mut text = format!(
        "{} query and {} key heads of {}{}, RoPE base {}",
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        if config.attention_bias { ", biases on queries, keys and values" } else { "" },
        config.rope.theta
    );
    match &config.rope.scaling {
        None => {}
        Some(RopeScaling::Linear(factor)) => text += &format!(", stretched {factor} times"),
        Some(RopeScaling::Factors(_)) => text += ", each frequency stretched by a factor of its own",
        Some(RopeScaling::Llama3(scaling)) => text += &format!(", stretched {} times as Llama 3's", scaling.factor),
    }
    if let Some(window) = config.sliding_window {
        text += &format!(", window {window}");
    }
    let attention = layers(config, BlockKind::Attention);
    if attention.is_empty() { text + "; no layers" } else { format!("{text}; layers {attention}") }
}

/// The bytes that a byte-level vocabulary has no tokens for.
fn lacking(tokenizer: &Tokenizer) -> String {
    let missing = tokenizer.missing_bytes();
    match &missing[..] {
        [] => String::new(),
        bytes => {
            let list: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!(", none for {} of the 256 bytes: {}", bytes.len(), list.join(" "))
        }
    }
}
