//! `h1 eval MODEL --data FILE`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::common::{DeviceArguments, TextArguments, located, print, print_json, progress};
use crate::checkpoint::Checkpoint;
use crate::eval::{self, Evaluator};
use crate::report::table::{Align, Table};
use crate::text::tokenizer::Tokenizer;

/// Perplexity and exact answers on data; with a teacher, KL and agreement too.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME.
    model: PathBuf,
    /// JSON lines or Parquet with `text`, `messages`, `prompt`/`completion` or `question`/`answer`, or a .txt; several are
    /// scored apart.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Compare with this model.
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    #[command(flatten)]
    text: TextArguments,
    /// At most this many documents of each file.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Tokens of a call; longer documents are cut.
    #[arg(long, value_name = "N", default_value = "2048")]
    context: std::num::NonZeroUsize,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    arguments.model = located(&arguments.model)?;
    arguments.teacher = arguments.teacher.as_deref().map(located).transpose()?;
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let teacher = arguments.teacher.as_deref().map(Checkpoint::open).transpose()?;
    let tokenizer = Tokenizer::open(&arguments.model)?;
    let mut sets = Vec::new();
    for path in &arguments.data {
        let documents = arguments.text.documents(path, &tokenizer)?;
        sets.push((path, documents.first(arguments.limit.unwrap_or(usize::MAX))));
    }
    let device = arguments.device.open()?;
    let shapes = (checkpoint.config(), teacher.as_ref().map(Checkpoint::config));
    eval::plan((&device, arguments.device.dtype()), shapes, arguments.context.get())?;
    let model = arguments.device.load(&device, &checkpoint)?;
    let teacher = teacher.map(|checkpoint| arguments.device.load(&device, &checkpoint)).transpose()?;
    let mut evaluator = Evaluator::new(&model, teacher.as_ref(), arguments.context.get())?;
    let mut results = Vec::new();
    for (path, documents) in &sets {
        let bar = progress(documents.tokens(), "tokens");
        let scores = evaluator.run(documents, None, |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        results.push((path, scores));
    }
    if arguments.json {
        let results: Vec<_> = results
            .iter()
            .map(|(path, scores)| json!({"data": path.display().to_string(), "scores": scores}))
            .collect();
        print_json(&results)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut columns = vec![("data", Align::Left)];
    let numbers =
        ["documents", "tokens", "loss", "perplexity", "exact", "KL to teacher", "KL from teacher", "agreement"];
    columns.extend(numbers.iter().take(if teacher.is_some() { 8 } else { 5 }).map(|name| (*name, Align::Right)));
    let mut table = Table::new(&columns);
    for (path, scores) in results {
        let mut row = vec![
            path.display().to_string(),
            scores.documents.to_string(),
            scores.tokens.to_string(),
            format!("{:.4}", scores.cross_entropy),
            format!("{:.3}", scores.perplexity),
            format!("{:.1}%", 100.0 * scores.exact),
        ];
        if let Some(teacher) = scores.teacher {
            row.push(format!("{:.5}", teacher.reverse_kl));
            row.push(format!("{:.5}", teacher.forward_kl));
            row.push(format!("{:.1}%", 100.0 * teacher.agreement));
        }
        table.row(row);
    }
    print(&table.text())?;
    Ok(ExitCode::SUCCESS)
}
