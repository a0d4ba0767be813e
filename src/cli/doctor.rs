//! `h1 doctor`.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;

use super::common::{print, print_json, progress};
use crate::backend::cases::CASES;
use crate::backend::select::{self, Name};
use crate::backend::{DType, Device, cpu, wgpu};
use crate::bench::kernels::{self, Options, Rates};
use crate::bench::yardstick::{Limits, memory_bytes};
use crate::report::table::{Align, Table};

/// What this machine can do: every backend, whether it is right, and how fast it is.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Fewer sizes of each op, and shorter measurements.
    #[arg(long)]
    quick: bool,
    /// Threads of the cpu backend; all cores unless said.
    #[arg(long, value_name = "N")]
    threads: Option<std::num::NonZeroUsize>,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

/// A backend that can be used; on wgpu, an adapter of this machine.
#[derive(Serialize)]
struct Found {
    device: String,
    /// Cases of the differential suite that agree with the reference, of how many.
    passed: usize,
    cases: usize,
    failures: Vec<String>,
    rates: Rates,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let threads = arguments.threads.map_or_else(cores, std::num::NonZeroUsize::get);
    let budget = Duration::from_millis(if arguments.quick { 40 } else { 500 });
    let limits = Limits::measure(threads, budget)?;
    let mut backends = Vec::new();
    for (name, found) in select::list(arguments.threads) {
        let opened = match (name, found) {
            (Name::Wgpu, Ok(_)) => {
                let device = |adapter: wgpu::Adapter| Ok(adapter.open(&wgpu::Options::default())?.0);
                wgpu::adapters().into_iter().map(device).collect()
            }
            (_, Ok(_)) => vec![select::open(name, arguments.threads)],
            (_, Err(reason)) => vec![Err(reason)],
        };
        for device in opened {
            backends.push((name, device.map(|device| examine(&arguments, name, &device, budget))));
        }
    }
    let backends: Vec<(Name, Result<Found, String>)> = backends
        .into_iter()
        .map(|(name, found)| match found {
            Ok(found) => found.map(|found| (name, Ok(found))),
            Err(reason) => Ok((name, Err(reason.to_string()))),
        })
        .collect::<anyhow::Result<_>>()?;
    let right = backends.iter().all(|(_, found)| found.as_ref().map_or(true, |found| found.failures.is_empty()));
    report(&arguments, &limits, &backends)?;
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Holds a backend to the reference, and times it.
fn examine(arguments: &Arguments, name: Name, device: &Device, budget: Duration) -> anyhow::Result<Found> {
    let rounds = if arguments.quick { 1 } else { 8 };
    let bar = progress(CASES.len(), "cases");
    bar.set_message(name.to_string());
    let mut failures = Vec::new();
    for case in CASES {
        if let Some(failure) = (0..rounds).find_map(|seed| case.run(device, seed).err()) {
            failures.push(format!("{}: {failure}", case.name));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    // The reference computes the plain formulas, slowly.
    let (tokens, values) = if name == Name::Reference || arguments.quick { (128, 1 << 20) } else { (1024, 1 << 26) };
    Ok(Found {
        device: device.info().device.clone(),
        passed: CASES.len() - failures.len(),
        cases: CASES.len(),
        failures,
        rates: kernels::rates(device, values, Options { tokens, dtype: DType::F32, budget })?,
    })
}

fn report(arguments: &Arguments, limits: &Limits, backends: &[(Name, Result<Found, String>)]) -> anyhow::Result<()> {
    let processor = cpu::describe(arguments.threads);
    let memory = memory_bytes();
    if arguments.json {
        let backends: Vec<_> = backends
            .iter()
            .map(|(name, found)| match found {
                Ok(found) => json!({"name": name.to_string(), "usable": true, "found": found}),
                Err(reason) => json!({"name": name.to_string(), "usable": false, "reason": reason}),
            })
            .collect();
        return print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "processor": processor,
            "memory_bytes": memory,
            "limits": limits,
            "backends": backends,
        }));
    }
    let gibibytes = memory.map_or("unknown".into(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
    let mut lines = vec![
        format!("h1          {}", env!("CARGO_PKG_VERSION")),
        format!("processor   {processor}"),
        format!("memory      {gibibytes}; {:.1} GB/s copied, {:.1} GB/s read", limits.copy_gbytes, limits.read_gbytes),
        format!("products    {:.0} GFLOP/s by the gemm crate on {} threads, f32", limits.gemm_gflops, limits.threads),
    ];
    lines.push(String::new());
    let mut table = Table::new(&[
        ("backend", Align::Left),
        ("ops right", Align::Right),
        ("GFLOP/s", Align::Right),
        ("GB/s copied", Align::Right),
        ("device, or why not", Align::Left),
    ]);
    for (name, found) in backends {
        match found {
            Ok(found) => table.row([
                name.to_string(),
                format!("{} of {}", found.passed, found.cases),
                format!("{:.1}", found.rates.gemm_gflops),
                format!("{:.1}", found.rates.copy_gbytes),
                found.device.clone(),
            ]),
            Err(reason) => table.row([name.to_string(), "–".into(), "–".into(), "–".into(), reason.clone()]),
        }
    }
    lines.push(table.text());
    for (name, found) in backends {
        lines.extend(found.iter().flat_map(|found| &found.failures).map(|failure| format!("{name}: {failure}")));
    }
    print(lines.join("\n").trim_end())
}
