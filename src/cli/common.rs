//! What several verbs share: the choice of a device, the model to run, progress, output that may be cut off.

use std::io::{ErrorKind, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::backend::select::{self, Name};
use crate::backend::{DType, Device};
use crate::checkpoint::{self, Checkpoint};
use crate::model::{Model, compile_ahead};
use crate::text::cache::{Cache, Progress};
use crate::text::documents::Documents;
use crate::text::encode::{Encoder, LossOn, Render};
use crate::text::tokenizer::Tokenizer;

/// Where a verb computes, and how it stores weights.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct DeviceArguments {
    /// Backend; auto takes the fastest that is there.
    #[arg(long, default_value = "auto", value_name = "auto|cuda|wgpu|cpu|reference")]
    backend: Name,
    /// How weights are stored on the device.
    #[arg(long, default_value = "f32", value_name = "f32|bf16|f16")]
    dtype: DType,
    /// Threads of the cpu backend; all cores unless said.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// A token's numbers are the same bits alone, in a batch and in any chunk of its prompt: always so on cpu, slower on wgpu.
    #[arg(long)]
    batch_invariant: bool,
}

impl DeviceArguments {
    /// Opens the device.
    pub(super) fn open(&self) -> anyhow::Result<Device> {
        let open = if self.batch_invariant { select::open_batch_invariant } else { select::open };
        Ok(open(self.backend, self.threads)?)
    }

    /// How weights are stored on it.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Threads that the cpu backend has.
    pub(super) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.threads.map_or_else(cores, NonZeroUsize::get)
    }

    /// The same with another number of threads.
    pub(super) fn with_threads(&self, threads: NonZeroUsize) -> Self {
        DeviceArguments { threads: Some(threads), ..self.clone() }
    }

    /// Loads a model onto it, and compiles what it needs.
    pub(super) fn load(&self, device: &Device, checkpoint: &Checkpoint) -> anyhow::Result<Model> {
        let model = checkpoint.load(device, self.dtype)?;
        compile_ahead(&model, compiling())?;
        Ok(model)
    }
}

/// How texts become tokens.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct TextArguments {
    /// How a question with its answer becomes text: as turns of the chat template, or one after the other; auto takes the
    /// template where there is one.
    #[arg(long, value_name = "auto|chat|plain", default_value = "auto")]
    render: Render,
    /// Score prompts too, not only what answers them.
    #[arg(long)]
    prompts: bool,
}

impl TextArguments {
    /// The documents of a file.
    pub(super) fn documents(&self, path: &Path, tokenizer: &Tokenizer) -> anyhow::Result<Documents> {
        let loss_on = if self.prompts { LossOn::All } else { LossOn::Response };
        let encoder = Encoder::new(tokenizer, self.render, loss_on);
        let [documents, _] = Cache::usual().documents(&[path.to_path_buf()], 0.0, &encoder, &mut tokenising())?;
        Ok(documents)
    }
}

/// A bar over texts that are turned into tokens.
pub(super) fn tokenising() -> impl FnMut(Progress) {
    let mut bar = None;
    move |Progress { done, all }| {
        let bar = bar.get_or_insert_with(|| progress(all as usize, "bytes tokenised"));
        bar.set_length(all);
        bar.set_position(done);
        if done >= all {
            bar.finish_and_clear();
        }
    }
}

/// A bar over kernels that are compiled.
fn compiling() -> impl FnMut(usize, usize) {
    let mut bar = None;
    move |done, all| {
        let bar = bar.get_or_insert_with(|| progress(all, "kernels compiled"));
        bar.set_position(done as u64);
        if done >= all {
            bar.finish_and_clear();
        }
    }
}

/// The folder or file that MODEL stands for, downloaded first if it is on a hub.
pub(super) fn located(model: &Path) -> anyhow::Result<PathBuf> {
    Ok(checkpoint::locate(Path::new(""), model)?)
}

/// Fails before a long computation rather than after it when the output cannot be written: something has its name, or
/// what should hold it is no folder. Folders above it that are not there yet are made later.
pub(super) fn refuse_existing(path: &Path) -> anyhow::Result<()> {
    ensure!(!path.exists(), "{} already exists", path.display());
    if let Some(above) = path.ancestors().skip(1).find(|above| above.exists()) {
        ensure!(above.is_dir(), "{} is not a folder", above.display())
    }
    Ok(())
}

/// As [`refuse_existing`] for a file, whose folder must be there.
pub(super) fn refuse_existing_file(path: &Path) -> anyhow::Result<()> {
    refuse_existing(path)?;
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        ensure!(parent.is_dir(), "{} is not a folder", parent.display())
    }
    Ok(())
}

/// A bar with rate and time left; `unit` is what is counted. Silent where standard error is no terminal.
pub(super) fn progress(total: usize, unit: &'static str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
    let template = format!("{{msg}} {{bar:32}} {{human_pos}}/{{human_len}} {unit} {{per_sec}} {{eta}} left");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Writes text and a line's end to standard output; a reader that went away ends the program quietly.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    print_part(&format!("{text}\n"))
}

/// Writes text to standard output at once.
pub(super) fn print_part(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("cannot write to standard output"),
    }
}

/// Writes a value as JSON.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value).context("cannot write JSON")?)
}
