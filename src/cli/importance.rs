//! `h1 importance MODEL --method loo|mmr --data FILE`.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use serde_json::json;

use super::common::{DeviceArguments, TextArguments, located, print, print_json, progress};
use crate::checkpoint::Checkpoint;
use crate::distill::config::{Config, ImportanceConfig, LooConfig, MmrConfig, StudentConfig, TeacherConfig};
use crate::distill::ground::Ground;
use crate::distill::importance::{Measure, Method, Without, keep};
use crate::distill::watch::{Event, Watcher};
use crate::hybrid::Init;
use crate::model::config::BlockKind;
use crate::report::table::{Align, Table};
use crate::text::tokenizer::Tokenizer;
use crate::train::config::{BatchConfig, OptimizerConfig};

/// Ranks the attention layers of a model, least important first.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A model's folder, a GGUF file, or hub:ORG/NAME.
    model: PathBuf,
    /// Leave one layer out (loo), or replace one mixer and distil for a few steps (mmr).
    #[arg(long, value_name = "loo|mmr")]
    method: Method,
    /// JSON lines or Parquet with `text`, `messages`, `prompt`/`completion` or `question`/`answer`, or a .txt.
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// The folder of the ranking, its plot and each layer's score [default: runs/importance-METHOD]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the layers that have no score yet.
    #[arg(long)]
    resume: bool,
    /// The original model, where MODEL is a hybrid already.
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// What loo leaves out.
    #[arg(long, value_name = "block|mixer", default_value = "block")]
    without: Without,
    /// The loss that loo looks at.
    #[arg(long, value_name = "cross-entropy|reverse-kl", default_value = "cross-entropy")]
    measure: Measure,
    /// Tokens that loo takes the loss over.
    #[arg(long, value_name = "N", default_value = "16384")]
    tokens: NonZeroUsize,
    /// Steps of mmr for each layer.
    #[arg(long, value_name = "N", default_value = "100")]
    steps: NonZeroU64,
    /// Highest learning rate of mmr.
    #[arg(long, value_name = "RATE", default_value_t = 5e-5, allow_negative_numbers = true)]
    learning_rate: f64,
    /// Tokens of a row of mmr's batches.
    #[arg(long, value_name = "N", default_value = "2048")]
    row_tokens: NonZeroUsize,
    /// Rows of a step of mmr.
    #[arg(long, value_name = "N", default_value = "1")]
    rows: NonZeroUsize,
    /// What the mixer that mmr puts in starts from.
    #[arg(long, value_name = "mil|mil-fit|mil-aligned|random", default_value = "mil")]
    init: Init,
    /// States a channel of that mixer [default: 16]
    #[arg(long, value_name = "N")]
    d_state: Option<usize>,
    #[command(flatten)]
    text: TextArguments,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(mut arguments: Arguments) -> anyhow::Result<ExitCode> {
    let method = arguments.method;
    let name = format!("runs/importance-{}", method.name().to_lowercase());
    let out = arguments.out.clone().unwrap_or_else(|| name.into());
    ensure!(arguments.resume || !out.exists(), "{} already exists; --resume goes on with it", out.display());
    arguments.model = located(&arguments.model)?;
    arguments.teacher = arguments.teacher.as_deref().map(located).transpose()?;
    let student = Checkpoint::open(&arguments.model)?;
    let original = Checkpoint::open(arguments.teacher.as_ref().unwrap_or(&arguments.model))?;
    let tokenizer = Tokenizer::open(&arguments.model)?;
    let documents = arguments.text.documents(&arguments.data, &tokenizer)?;
    let config = config(&arguments);
    config.check()?;
    if method == Method::Mmr {
        config.student.check(original.config(), student.config())?;
    }

    let device = arguments.device.open()?;
    let settings = json!({
        "model": arguments.model, "teacher": arguments.teacher, "data": documents.fingerprint(), "method": method,
        "without": arguments.without, "measure": arguments.measure, "tokens": arguments.tokens,
        "steps": arguments.steps, "learning_rate": arguments.learning_rate, "row_tokens": arguments.row_tokens,
        "rows": arguments.rows, "init": arguments.init, "d_state": arguments.d_state, "seed": arguments.seed,
        "backend": device.info().name, "dtype": arguments.device.dtype().to_string(),
    });
    let layers = student.config().layers_of(BlockKind::Attention).count();
    let (on, documents) = ((&device, arguments.device.dtype()), documents.into());
    Ground::plan_ranking(&config, method, on, (original.config(), student.config()), &documents)?;
    let ground = Ground::new(&config, on, original, documents)?;
    let mut watch = Bar(progress(layers, "layers"));
    let ranking = keep(&out, &settings, |folder| ground.rank(method, &student, folder, &mut watch))?;
    watch.0.finish_and_clear();
    if arguments.json {
        print_json(&ranking)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[("rank", Align::Right), ("layer", Align::Right), (&ranking.score, Align::Right)]);
    for (layer, rank) in ranking.order.iter().zip(1..) {
        let score = ranking.scores.get(*layer).copied().flatten();
        table.row([
            rank.to_string(),
            layer.to_string(),
            score.map_or("diverged".into(), |score| format!("{score:.5}")),
        ]);
    }
    print(&table.text())?;
    print(&format!("the ranking and its plot lie in {}", out.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The parts of a distillation's configuration that a ranking needs.
fn config(arguments: &Arguments) -> Config {
    let (row_tokens, rows) = (arguments.row_tokens.get(), arguments.rows.get());
    Config {
        seed: arguments.seed,
        teacher: TeacherConfig { path: Some(arguments.model.clone()), shape: None },
        batch: BatchConfig { row_tokens, rows, accumulate: 1 },
        student: StudentConfig { d_state: arguments.d_state, ..StudentConfig::default() },
        optimizer: OptimizerConfig { learning_rate: arguments.learning_rate, ..OptimizerConfig::default() },
        importance: ImportanceConfig {
            loo: LooConfig { tokens: arguments.tokens.get(), without: arguments.without, measure: arguments.measure },
            mmr: MmrConfig { steps: arguments.steps.get(), init: arguments.init, ..MmrConfig::default() },
        },
        ..Config::default()
    }
}

/// A bar over the layers; where there is no terminal, a line for each.
struct Bar(indicatif::ProgressBar);

impl Watcher for Bar {
    fn hear(&mut self, event: Event<'_>) {
        let line = match event {
            Event::Layer { layer, score } => {
                self.0.inc(1);
                format!("layer {layer}: {}", score.map_or("diverged".into(), |score| format!("{score:.5}")))
            }
            Event::TeacherKept { bytes } => format!("the teacher's outputs take {bytes} bytes of disk"),
            _ => return,
        };
        if self.0.is_hidden() {
            eprintln!("{line}");
        } else {
            self.0.println(line);
        }
    }
}
