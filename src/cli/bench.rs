//! `h1 bench throughput|train|kernels|roofline`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

mod roofline;

use clap::Subcommand;
use clap::builder::PossibleValuesParser;
use serde_json::json;

use super::common::{DeviceArguments, located, print, print_json, progress};
use crate::backend::Device;
use crate::bench::card;
use crate::bench::kernels::{self, GROUPS, Kernel, Options};
use crate::bench::shapes::{Shape, hybrid, random_model};
use crate::bench::throughput::{self, Load, Throughput};
use crate::bench::train::{self, Step};
use crate::bench::yardstick::{Limits, Whose};
use crate::checkpoint::Checkpoint;
use crate::model::Model;
use crate::model::config::BlockKind;
use crate::report::table::{Align, Table};

/// How long a limit of the machine is measured.
const BUDGET: Duration = Duration::from_millis(400);

/// Speed, beside what the machine could do.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Throughput(ThroughputArguments),
    Train(TrainArguments),
    Kernels(KernelArguments),
    Roofline(roofline::RooflineArguments),
}

/// Tokens a second of prefill and decoding, and the memory of a sequence.
#[derive(clap::Args)]
struct ThroughputArguments {
    /// Folders of models, GGUF files, or names such as hub:ORG/NAME; the first is what the others are compared with.
    models: Vec<PathBuf>,
    /// Random weights of these sizes instead: arithmetic, smollm2-135m or apriel-15b.
    #[arg(long, value_name = "SHAPE", conflicts_with = "models")]
    shape: Option<Shape>,
    /// Mamba layers of the models of a shape [default: none, and half]
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "shape")]
    mamba: Vec<usize>,
    /// Tokens that each sequence is taken to have behind it already, keys, values and states all 0.
    #[arg(long, value_name = "N", default_value = "0")]
    past: usize,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value = "1")]
    prompt: NonZeroUsize,
    /// New tokens of a sequence.
    #[arg(long, value_name = "N", default_value = "64")]
    new_tokens: NonZeroUsize,
    /// Sequences at a time.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    batch: Vec<NonZeroUsize>,
    /// Tokens of a call, at most; longer prompts come in pieces.
    #[arg(long, value_name = "N", default_value = "2048")]
    call: NonZeroUsize,
    /// Times that each is run; the best counts.
    #[arg(long, value_name = "N", default_value = "3")]
    repeats: NonZeroUsize,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

/// A step of distillation of a shape with random weights.
#[derive(clap::Args)]
struct TrainArguments {
    /// arithmetic, smollm2-135m or apriel-15b.
    #[arg(long, value_name = "SHAPE", default_value = "smollm2-135m")]
    shape: Shape,
    /// Layers, where they are not to be the shape's.
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,
    /// Mamba layers of the student [default: half]
    #[arg(long, value_name = "N")]
    mamba: Option<usize>,
    /// Tokens of a step, in one sequence.
    #[arg(long, value_name = "N", default_value = "512")]
    tokens: NonZeroUsize,
    /// Compute blocks again in backward: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// Steps; the best counts.
    #[arg(long, value_name = "N", default_value = "5")]
    steps: NonZeroUsize,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

/// Every op of a shape, forward and backward.
#[derive(clap::Args)]
struct KernelArguments {
    /// arithmetic, smollm2-135m or apriel-15b.
    #[arg(long, value_name = "SHAPE", default_value = "smollm2-135m")]
    shape: Shape,
    /// Tokens of a call.
    #[arg(long, value_name = "N", default_value = "512")]
    tokens: NonZeroUsize,
    /// Milliseconds to spend on each.
    #[arg(long, value_name = "N", default_value = "400")]
    budget: u64,
    /// Only these groups of ops.
    #[arg(long, value_name = "GROUP,...", value_delimiter = ',', value_parser = PossibleValuesParser::new(GROUPS), default_values = GROUPS)]
    only: Vec<String>,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    match arguments.what {
        What::Throughput(arguments) => run_throughput(arguments),
        What::Train(arguments) => run_train(arguments),
        What::Kernels(arguments) => run_kernels(arguments),
        What::Roofline(arguments) => roofline::run(arguments),
    }?;
    Ok(ExitCode::SUCCESS)
}

struct Measured {
    name: String,
    layers: usize,
    mamba: usize,
    numbers: Throughput,
}

fn run_throughput(arguments: ThroughputArguments) -> anyhow::Result<()> {
    let device = arguments.device.open()?;
    let mut measured = Vec::new();
    if arguments.models.is_empty() {
        let shape = arguments.shape.unwrap_or(Shape::SmolLm2);
        let config = shape.config();
        let counts =
            if arguments.mamba.is_empty() { vec![0, config.num_hidden_layers() / 2] } else { arguments.mamba.clone() };
        let limits = limits(&arguments.device, &device)?;
        let (dtype, loads) = (arguments.device.dtype(), loads(&arguments));
        for count in counts {
            throughput::plan((&device, dtype), &hybrid(&config, count)?, &loads)?;
            let model = random_model(&device, &config, count, dtype)?;
            measured.extend(decode(&arguments, shape.name().to_owned(), &model, &limits)?);
        }
        return report_throughput(&arguments, &device, &limits, &measured);
    }
    let checkpoints = arguments.models.iter().map(|path| Ok((path, Checkpoint::open(&located(path)?)?)));
    let checkpoints = checkpoints.collect::<anyhow::Result<Vec<_>>>()?;
    let limits = limits(&arguments.device, &device)?;
    for (path, checkpoint) in checkpoints {
        throughput::plan((&device, arguments.device.dtype()), checkpoint.config(), &loads(&arguments))?;
        let model = arguments.device.load(&device, &checkpoint)?;
        measured.extend(decode(&arguments, path.display().to_string(), &model, &limits)?);
    }
    report_throughput(&arguments, &device, &limits, &measured)
}

/// What is run at each batch.
fn loads(arguments: &ThroughputArguments) -> Vec<Load> {
    let load = |batch: &NonZeroUsize| Load {
        past: arguments.past,
        prompt: arguments.prompt.get(),
        new_tokens: arguments.new_tokens.get(),
        batch: batch.get(),
        call: arguments.call.get(),
        repeats: arguments.repeats.get(),
    };
    arguments.batch.iter().map(load).collect()
}

/// One model at every batch.
fn decode(
    arguments: &ThroughputArguments,
    name: String,
    model: &Model,
    limits: &Limits,
) -> anyhow::Result<Vec<Measured>> {
    let config = model.config();
    let (layers, mamba) = (config.num_hidden_layers(), config.layers_of(BlockKind::Mamba).count());
    let mut measured = Vec::new();
    for load in loads(arguments) {
        let numbers = throughput::measure(model, load, limits)?;
        measured.push(Measured { name: name.clone(), layers, mamba, numbers });
    }
    Ok(measured)
}

fn report_throughput(
    arguments: &ThroughputArguments,
    device: &Device,
    limits: &Limits,
    measured: &[Measured],
) -> anyhow::Result<()> {
    if arguments.json {
        let results: Vec<_> = measured
            .iter()
            .map(|one| json!({"model": one.name, "layers": one.layers, "mamba": one.mamba, "numbers": one.numbers}))
            .collect();
        return print_json(&json!({
            "backend": device.info().name,
            "device": device.info().device,
            "dtype": arguments.device.dtype().to_string(),
            "past": arguments.past,
            "prompt": arguments.prompt,
            "new_tokens": arguments.new_tokens,
            "limits": limits,
            "results": results,
        }));
    }
    let mut table = Table::new(&[
        ("model", Align::Left),
        ("Mamba layers", Align::Right),
        ("batch", Align::Right),
        ("prefill tokens/s", Align::Right),
        ("decode tokens/s", Align::Right),
        ("of the floor", Align::Right),
        ("× the first", Align::Right),
        ("cache bytes a sequence", Align::Right),
        ("peak bytes", Align::Right),
    ]);
    for one in measured {
        let first = measured.iter().find(|first| first.numbers.batch == one.numbers.batch);
        let rate = |one: &Measured| one.numbers.decode_tokens_per_second;
        let times = first.and_then(|first| Some(rate(one)? / rate(first)?));
        let words = |number: Option<f64>, form: fn(f64) -> String| number.map_or("–".into(), form);
        table.row([
            one.name.clone(),
            format!("{} of {}", one.mamba, one.layers),
            one.numbers.batch.to_string(),
            format!("{:.1}", one.numbers.prefill_tokens_per_second),
            words(rate(one), |rate| format!("{rate:.1}")),
            words(one.numbers.share_of_floor, |share| format!("{:.0}%", 100.0 * share)),
            words(times, |times| format!("{times:.2}")),
            one.numbers.cache_bytes.to_string(),
            one.numbers.peak_bytes.to_string(),
        ]);
    }
    print(&format!("{}\n{}", heading(device, limits), table.text()))
}

/// What a device is held against.
fn limits(arguments: &DeviceArguments, device: &Device) -> anyhow::Result<Limits> {
    Ok(card::limits(device, arguments.dtype(), arguments.threads(), BUDGET)?)
}

fn heading(device: &Device, limits: &Limits) -> String {
    let Limits { whose, threads, gemm_gflops, copy_gbytes, read_gbytes } = limits;
    let held_against = match whose {
        Whose::Processor => format!(
            "this machine on {threads} threads: {gemm_gflops:.0} GFLOP/s by the gemm crate, {copy_gbytes:.1} GB/s \
             copied, {read_gbytes:.1} GB/s read"
        ),
        Whose::Card => format!("this card: {gemm_gflops:.0} GFLOP/s of a square product, {copy_gbytes:.1} GB/s copied"),
        Whose::Known => format!("a card of this kind: {gemm_gflops:.0} GFLOP/s, {copy_gbytes:.0} GB/s of memory"),
    };
    format!("{} ({})\n{held_against}\n", device.info().name, device.info().device)
}

fn run_train(arguments: TrainArguments) -> anyhow::Result<()> {
    let mut config = arguments.shape.config();
    if let Some(layers) = arguments.layers {
        config.blocks = vec![BlockKind::Attention; layers.get()];
    }
    let device = arguments.device.open()?;
    let step = Step {
        mamba: arguments.mamba.unwrap_or(config.num_hidden_layers() / 2),
        tokens: arguments.tokens.get(),
        recompute: arguments.recompute,
        steps: arguments.steps.get(),
        threads: arguments.device.threads(),
        dtype: arguments.device.dtype(),
    };
    let bar = progress(step.steps, "steps");
    let report = train::measure(&device, &config, step, || bar.inc(1))?;
    bar.finish_and_clear();
    if arguments.json {
        return print_json(&json!({
            "backend": device.info().name,
            "device": device.info().device,
            "shape": arguments.shape.name(),
            "layers": config.num_hidden_layers(),
            "gemm": train::GEMM,
            "tokens_per_second": report.tokens_per_second,
            "share_of_gemm": report.share_of_gemm,
            "step": report,
        }));
    }
    let mut table = Table::new(&[("part", Align::Left), ("seconds", Align::Right), ("share", Align::Right)]);
    let parts = report.parts;
    for (name, seconds) in [
        ("teacher forward", parts.teacher),
        ("student forward", parts.forward),
        ("heads and loss", parts.head),
        ("student backward", parts.backward),
        ("optimiser", parts.optimizer),
        ("step", report.seconds),
    ] {
        table.row([name.into(), format!("{seconds:.3}"), format!("{:.0}%", 100.0 * seconds / report.seconds)]);
    }
    let [m, k, n] = train::GEMM;
    let held_against = match report.gemm_threads {
        0 => format!("the card's {:.0}", report.gemm_gflops),
        threads => format!("the gemm crate's {:.1} at {m}×{k}×{n} on {threads} threads", report.gemm_gflops),
    };
    print(&format!(
        "{} ({})\n{}, {} of {} layers Mamba, {} parameters, {} tokens, recompute {}\n\n{}\n{:.1} tokens/s: 8 FLOP a \
         parameter and token make {:.1} GFLOP/s, {:.1}% of {held_against}; \
         {:.1}% of it by the products that there are",
        device.info().name,
        device.info().device,
        arguments.shape.name(),
        report.mamba,
        config.num_hidden_layers(),
        report.student_parameters,
        report.tokens,
        if report.recompute { "on" } else { "off" },
        table.text(),
        report.tokens_per_second,
        report.gflops,
        100.0 * report.share_of_gemm,
        100.0 * report.share_of_floor,
    ))
}

fn run_kernels(arguments: KernelArguments) -> anyhow::Result<()> {
    let (config, tokens) = (arguments.shape.config(), arguments.tokens.get());
    let budget = Duration::from_millis(arguments.budget);
    let device = arguments.device.open()?;
    let limits = limits(&arguments.device, &device)?;
    let options = Options { tokens, dtype: arguments.device.dtype(), budget };
    let told = |kernel: &Kernel| eprintln!("{} {}: {:.3} ms", kernel.name, kernel.sizes, 1e3 * kernel.seconds);
    let mut kernels = Vec::new();
    let groups: Vec<&str> = arguments.only.iter().map(String::as_str).collect();
    if device.info().name == "cpu" && limits.threads > 1 && groups.contains(&"layers") {
        let single = arguments.device.with_threads(NonZeroUsize::MIN);
        let limits = Limits::measure(1, BUDGET)?;
        kernels.extend(kernels::measure(&single.open()?, &config, (options, &["layers"]), limits, told)?);
    }
    kernels.extend(kernels::measure(&device, &config, (options, &groups), limits, told)?);
    if arguments.json {
        return print_json(&json!({
            "backend": device.info().name,
            "device": device.info().device,
            "shape": arguments.shape.name(),
            "tokens": tokens,
            "limits": limits,
            "kernels": kernels,
        }));
    }
    let mut table = Table::new(&[
        ("op", Align::Left),
        ("sizes", Align::Left),
        ("threads", Align::Right),
        ("ms", Align::Right),
        ("GFLOP/s", Align::Right),
        ("gemm crate", Align::Right),
        ("GB/s", Align::Right),
        ("of the machine", Align::Right),
    ]);
    for kernel in &kernels {
        let rate = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!("{rate:.1}"));
        table.row([
            kernel.name.into(),
            kernel.sizes.clone(),
            if kernel.threads > 0 { kernel.threads.to_string() } else { "–".into() },
            format!("{:.3}", 1e3 * kernel.seconds),
            rate(kernel.gflops),
            rate(kernel.gemm_gflops),
            format!("{:.1}", kernel.gbytes),
            format!("{:.0}%", 100.0 * kernel.share),
        ]);
    }
    print(&format!("{}\n{}", heading(&device, &limits), table.text()))
}
