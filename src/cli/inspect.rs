//! `h1 inspect MODEL`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::common::{print, print_json};
use crate::checkpoint::Checkpoint;
use crate::model::config::{BlockKind, ModelConfig};
use crate::text::tokenizer::Tokenizer;

/// What a model is: sizes, layout of layers, parameters, bytes, tokenizer.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The model's folder.
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

fn list(config: &ModelConfig, kind: BlockKind) -> Vec<usize> {
    config.layers_of(kind).collect()
}

fn words(layers: &[usize]) -> String {
    if layers.is_empty() {
        return "none".into();
    }
    layers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
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

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    if arguments.values {
        checkpoint.check_finite()?;
    }
    let config = checkpoint.config();
    let tokenizer = Tokenizer::open(&arguments.model);
    let (attention, mamba) = (list(config, BlockKind::Attention), list(config, BlockKind::Mamba));
    let parameters = config.parameter_count();
    let bytes = parameters * checkpoint.dtype().size() as u64;
    let cache = config.cache_bytes(arguments.context, 4);
    if arguments.json {
        print_json(&json!({
            "family": format!("{:?}", config.family),
            "config": config.to_json(checkpoint.dtype()),
            "layers": config.num_hidden_layers(),
            "attention_layers": attention,
            "mamba_layers": mamba,
            "identity_layers": list(config, BlockKind::Identity),
            "parameters": parameters,
            "dtype": checkpoint.dtype().to_string(),
            "bytes": bytes,
            "context": arguments.context,
            "cache_bytes": cache,
            "tokenizer": tokenizer.as_ref().ok().map(Tokenizer::vocabulary_size),
            "template": tokenizer.as_ref().is_ok_and(|tokenizer| tokenizer.template().is_some()),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines = vec![
        format!("family      {:?}, {} layers", config.family, config.num_hidden_layers()),
        format!(
            "sizes       hidden {}, MLP {}, vocabulary {}{}",
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            if config.tie_word_embeddings { ", tied embedding" } else { "" }
        ),
        format!(
            "attention   {} query and {} key heads of {}; layers {}",
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            words(&attention)
        ),
    ];
    if let Some(sizes) = config.mamba.as_ref().filter(|_| !mamba.is_empty()) {
        lines.push(format!(
            "mamba       inner {}, xB {}, state {}, dt rank {}, convolution {}; layers {}",
            sizes.d_inner,
            sizes.d_xb,
            sizes.d_state,
            sizes.dt_rank,
            sizes.d_conv,
            words(&mamba)
        ));
    }
    lines.push(format!("parameters  {parameters}, {bytes} bytes as {}", checkpoint.dtype()));
    lines.push(format!("cache       {cache} bytes a sequence of {} tokens, in f32", arguments.context));
    lines.push(match &tokenizer {
        Ok(tokenizer) => format!("tokenizer   {} tokens{}", tokenizer.vocabulary_size(), lacking(tokenizer)),
        Err(error) => format!("tokenizer   none: {error}"),
    });
    if let Ok(tokenizer) = &tokenizer {
        let template = if tokenizer.template().is_some() { "with its template" } else { "no template" };
        lines.push(format!("chat        {template}"));
    }
    let uses = if mamba.is_empty() { "distil, train, evaluate, generate" } else { "train, evaluate, generate" };
    lines.push(format!("h1 can      {uses}"));
    print(&lines.join("\n"))?;
    Ok(ExitCode::SUCCESS)
}
