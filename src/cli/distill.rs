//! `h1 distill CONFIG`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::common::{DeviceArguments, print, print_json, tokenising};
use super::interrupt;
use crate::distill::config::Config;
use crate::distill::plan::{Plan, measured_flops};
use crate::distill::watch::{Event, Watcher};
use crate::distill::{Setup, distill};
use crate::text::cache;
use crate::train::settings;

/// How often a step is told of where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Turn a teacher into a hybrid, stage after stage: rank layers, replace some, distil, score.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// A TOML file; its relative paths start at its own folder.
    config: PathBuf,
    /// The run's folder [default: runs/ and the configuration's name]
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Go on where the run stopped, if there is one.
    #[arg(long)]
    resume: bool,
    /// Only say what it would take: tokens, FLOP, memory, disk, hours.
    #[arg(long, conflicts_with = "resume")]
    plan: bool,
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
    let settings = settings::load::<Config>(&arguments.config, &arguments.sets)?;
    let (config, base) = (&settings.values, arguments.config.parent().unwrap_or(Path::new(".")));
    config.check()?;
    let dtype = config.dtype()?.unwrap_or(arguments.device.dtype());
    if arguments.plan {
        let (flops, activations) = match config.plan.flops {
            // Of a device that is not here, which is taken for a card that stores activations as weights.
            Some(flops) => (flops, dtype),
            None => {
                let device = arguments.device.open()?;
                (measured_flops(&device)?, device.info().activations_beside(dtype))
            }
        };
        let plan = Plan::new(config, base, (dtype, activations), flops)?;
        if arguments.json {
            print_json(&plan)?
        } else {
            print(&plan.text())?
        }
        return Ok(ExitCode::SUCCESS);
    }
    let stem = arguments.config.file_stem().unwrap_or_default();
    let folder = arguments.out.unwrap_or_else(|| Path::new("runs").join(stem));
    let device = arguments.device.open()?;
    let text = &settings.text;
    let setup = Setup { config, text, base, folder: &folder, resume: arguments.resume, device: &device, dtype };
    interrupt::listen();
    let mut watch = Progress::new();
    let result = distill(setup, &mut watch);
    watch.bar.finish_and_clear();
    let Some(summary) = result? else {
        eprintln!("stopped; the same command with --resume goes on from there");
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    };
    if arguments.json {
        print_json(&summary)?;
    } else {
        print(&summary.table().text())?;
        print(&format!(
            "{} held-out documents; models, plots and metrics lie in {}",
            summary.documents,
            folder.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A bar for what is counted, lines for what is found.
struct Progress {
    bar: ProgressBar,
    told: Instant,
    tokens: usize,
    since: Instant,
    tokenising: Box<dyn FnMut(cache::Progress)>,
}

impl Progress {
    fn new() -> Self {
        let now = Instant::now();
        Progress { bar: ProgressBar::new(0), told: now, tokens: 0, since: now, tokenising: Box::new(tokenising()) }
    }

    /// A bar of `length` from now on.
    fn count(&mut self, length: u64, unit: &str) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::new(length);
        if let Ok(style) =
            ProgressStyle::with_template(&format!("{{bar:32}} {{pos}}/{{len}} {unit}, {{eta}} left{{msg}}"))
        {
            self.bar.set_style(style);
        }
        self.bar.enable_steady_tick(Duration::from_millis(500));
        (self.tokens, self.since, self.told) = (0, Instant::now(), Instant::now());
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

    fn hear(&mut self, event: Event<'_>) {
        match event {
            Event::Tokens(progress) => (self.tokenising)(progress),
            Event::Compiled { done, all } => self.bar.set_message(format!(", {done} of {all} kernels compiled")),
            Event::Scored { name, scores } => {
                let kl = scores.teacher.as_ref().map_or(0.0, |teacher| teacher.reverse_kl);
                let (loss, exact) = (scores.cross_entropy, 100.0 * scores.exact);
                self.line(&format!("{name}: loss {loss:.4}, KL to the teacher {kl:.4}, exact {exact:.1}%"));
            }
            Event::Ranking { stage, method, layers } => {
                self.line(&format!("stage {stage}: ranking {layers} layers by {}", method.name()));
                self.count(layers as u64, "layers");
            }
            Event::TeacherKept { bytes } => self.line(&format!("the teacher's outputs take {bytes} bytes of disk")),
            Event::Layer { layer, score } => {
                let score = score.map_or("diverged".to_owned(), |score| format!("{score:.4}"));
                self.line(&format!("  layer {layer}: {score}"));
                self.bar.inc(1);
            }
            Event::Stage { stage, new, mamba, steps } => {
                self.line(&format!("stage {stage}: layers {new} become Mamba, {} in all: {mamba}", mamba.len()));
                self.count(steps, "steps");
            }
            Event::Fitted(fit) => {
                let ((least, greatest), explained) = (fit.kept.range, 100.0 * fit.kept.explained);
                self.line(&format!(
                    "  layer {}: a fit explains {explained:.1}% of its attention, dt {least}..{greatest}",
                    fit.layer
                ));
            }
            Event::Step { report, steps } => {
                self.tokens += report.tokens;
                let rate = self.tokens as f64 / self.since.elapsed().as_secs_f64();
                self.bar.set_position(report.step);
                self.bar.set_message(format!(", loss {:.4}, {rate:.0} tokens/s", report.loss));
                if !report.finite() {
                    self.line(&format!("step {}: not finite, its update was left out", report.step));
                }
                if self.bar.is_hidden() && (self.told.elapsed() >= LINE_EVERY || report.step == steps) {
                    self.told = Instant::now();
                    let (step, loss, norm) = (report.step, report.loss, report.gradient_norm);
                    eprintln!("step {step}/{steps}: loss {loss:.4}, gradient norm {norm:.3}, {rate:.0} tokens/s");
                }
            }
        }
    }
}
