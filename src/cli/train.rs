//! `h1 train CONFIG`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::common::{DeviceArguments, print, print_json, tokenising};
use super::interrupt;
use crate::eval::Scores;
use crate::train::config::TrainConfig;
use crate::train::job::{Job, Watcher};
use crate::train::session::Outcome;
use crate::train::settings;
use crate::train::trainer::StepReport;

/// How often a step is told of where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Train a new model from a shape, or a checkpoint further, by cross-entropy.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A TOML file; its relative paths start at its own folder.
    config: PathBuf,
    /// The run's folder [default: runs/ and the configuration's name]
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Go on after the latest checkpoint of the run, if there is one.
    #[arg(long)]
    resume: bool,
    /// A value on top of the configuration, such as optimizer.learning_rate=1e-3; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    #[command(flatten)]
    device: DeviceArguments,
    /// The result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let settings = settings::load::<TrainConfig>(&arguments.config, &arguments.sets)?;
    let base = arguments.config.parent().unwrap_or(Path::new("."));
    let stem = arguments.config.file_stem().unwrap_or_default();
    let out = arguments.out.unwrap_or_else(|| Path::new("runs").join(stem));
    let device = arguments.device.open()?;
    let mut job =
        Job::open(settings, (base, &out), arguments.resume, (&device, arguments.device.dtype()), &mut tokenising())?;
    eprintln!(
        "{} parameters, {} documents of {} tokens in all, {} held out; steps {} to {} on {}",
        job.model().config().parameter_count(),
        job.data().train.len(),
        job.data().train.tokens(),
        job.data().test.len(),
        job.done() + 1,
        job.steps(),
        device.info().name
    );
    interrupt::listen();
    let mut watch = Progress::new(job.done(), job.steps());
    let outcome = job.run(&mut watch);
    watch.bar.finish_and_clear();
    if outcome? == Outcome::Interrupted {
        eprintln!("stopped after step {}; the same command with --resume goes on from there", job.done());
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    let (folder, scores) = (job.publish()?, job.last_scores()?);
    if arguments.json {
        print_json(&json!({ "model": folder, "steps": job.steps(), "scores": scores }))?;
    } else {
        let number = |key: &str| scores.as_ref().and_then(|scores| scores[key].as_f64());
        let held_out = match (number("cross_entropy"), number("exact")) {
            (Some(loss), Some(exact)) => format!("; held out: loss {loss:.4}, exact {:.1}%", 100.0 * exact),
            _ => String::new(),
        };
        print(&format!("{} after {} steps{held_out}", folder.display(), job.steps()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A bar on a terminal, otherwise a line now and then.
struct Progress {
    bar: ProgressBar,
    steps: u64,
    told: Instant,
    tokens: usize,
    seconds: f64,
}

impl Progress {
    fn new(done: u64, steps: u64) -> Self {
        let bar = ProgressBar::new(steps).with_position(done).with_elapsed(Duration::ZERO);
        if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} steps, {eta} left{msg}") {
            bar.set_style(style);
        }
        bar.reset_eta();
        bar.enable_steady_tick(Duration::from_millis(500));
        Progress { bar, steps, told: Instant::now(), tokens: 0, seconds: 0.0 }
    }

    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }
}

impl Watcher for Progress {
    fn interrupted(&self) -> bool {
        interrupt::asked()
    }

    fn compiled(&mut self, done: usize, all: usize) {
        self.bar.set_message(format!(", {done} of {all} kernels compiled"));
    }

    fn stepped(&mut self, report: &StepReport, seconds: f64) {
        self.tokens += report.tokens;
        self.seconds += seconds;
        let rate = self.tokens as f64 / self.seconds;
        self.bar.set_position(report.step);
        self.bar.set_message(format!(", loss {:.4}, {rate:.0} tokens/s", report.loss));
        if !report.finite() {
            self.line(&format!("step {}: loss or gradient norm is not finite, the update was left out", report.step));
        }
        if self.bar.is_hidden() && (self.told.elapsed() >= LINE_EVERY || report.step == self.steps) {
            self.told = Instant::now();
            let left = (self.steps - report.step) as f64 * self.seconds * report.tokens as f64 / self.tokens as f64;
            let (step, steps, loss, norm) = (report.step, self.steps, report.loss, report.gradient_norm);
            eprintln!(
                "step {step}/{steps}: loss {loss:.4}, gradient norm {norm:.3}, {rate:.0} tokens/s, {left:.0} s left"
            );
        }
    }

    fn evaluated(&mut self, step: u64, scores: &Scores) {
        let (loss, exact) = (scores.cross_entropy, 100.0 * scores.exact);
        self.line(&format!("step {step}: held out: loss {loss:.4}, exact {exact:.1}% of {}", scores.documents));
    }
}
