//! `h1 data arithmetic --out FILE`.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use super::common::{print, refuse_existing_file};
use crate::checkpoint::{CheckpointError, write_file};
use crate::text::arithmetic::{self, Kind, Split};

/// Make data sets.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Arithmetic(Arithmetic),
}

/// Problems with worked steps, as JSON lines with `prompt`, `completion` and `kind`.
#[derive(clap::Args)]
struct Arithmetic {
    /// The new file.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Problems.
    #[arg(long, value_name = "N")]
    count: usize,
    /// Seed of what is drawn.
    #[arg(long, value_name = "N", default_value = "0")]
    seed: u64,
    /// The half that they are of: a problem is never in both, whatever the seeds.
    #[arg(long, value_name = "train|test", default_value = "train")]
    split: Split,
    /// Fewest digits of an operand.
    #[arg(long, value_name = "N", default_value = "4")]
    fewest_digits: u32,
    /// Most digits of an operand.
    #[arg(long, value_name = "N", default_value = "6")]
    most_digits: u32,
    /// Kinds of problems, which take turns; all of them unless said.
    #[arg(long, value_name = "add|sub|mul|vars", value_delimiter = ',')]
    kinds: Vec<Kind>,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let What::Arithmetic(Arithmetic { out, count, seed, split, fewest_digits, most_digits, kinds }) = arguments.what;
    refuse_existing_file(&out)?;
    let kinds = if kinds.is_empty() { Kind::ALL.to_vec() } else { kinds };
    let problems = arithmetic::generate(seed, split, count, &kinds, fewest_digits..=most_digits)?;
    write_file(&out, |file| {
        let mut file = BufWriter::new(file);
        let write = || {
            for problem in problems {
                serde_json::to_writer(&mut file, &problem)?;
                file.write_all(b"\n")?;
            }
            file.flush()
        };
        write().map_err(|source| CheckpointError::Io { action: "write", path: out.clone(), source })
    })?;
    print(&format!("{}: {count} problems", out.display()))?;
    Ok(ExitCode::SUCCESS)
}
