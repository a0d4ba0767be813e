//! `h1 verify DIR`.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::common::{DeviceArguments, print, print_json};
use crate::report::table::{Align, Table};
use crate::verify;

/// Hold a backend to a folder of golden numbers.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The folder, laid out as tests/goldens.
    folder: PathBuf,
    #[command(flatten)]
    device: DeviceArguments,
    /// Every comparison as JSON.
    #[arg(long)]
    json: bool,
    /// Every comparison, not only the worst of each file.
    #[arg(long, conflicts_with = "json")]
    all: bool,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let device = arguments.device.open()?;
    let report = verify::verify(&arguments.folder, &device, |part| eprintln!("{part}"))?;
    let comparisons = report.comparisons();
    let failed = comparisons.iter().filter(|c| !c.passes()).count();
    if arguments.json {
        print_json(&json!({
            "backend": device.info().name,
            "passes": report.passes(),
            "comparisons": comparisons,
        }))?;
    } else {
        let rows = if arguments.all { comparisons.iter().map(|c| (c, 1)).collect() } else { report.worst() };
        let mut table = Table::new(&[
            ("file", Align::Left),
            ("checks", Align::Right),
            ("worst at", Align::Left),
            ("error", Align::Right),
            ("tolerance", Align::Right),
            ("", Align::Left),
        ]);
        for (worst, count) in rows {
            let verdict = if worst.passes() { "ok" } else { "FAILS" };
            table.row([
                worst.file.clone(),
                count.to_string(),
                worst.tensor.clone(),
                format!("{:.1e}", worst.error),
                format!("{:.1e}", worst.tolerance),
                verdict.into(),
            ]);
        }
        print(&table.text())?;
        print(&format!("{}: {} checks, {failed} over their tolerance", device.info().name, comparisons.len()))?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
