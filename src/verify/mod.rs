//! Holds a backend to a folder of golden numbers: ops, forward passes, packed documents, leave-one-out, decoding with
//! states, initialisation from attention, and steps of training.

mod decode;
mod goldens;
mod mil;
mod models;
mod ops;
mod train;

use std::path::Path;

use crate::backend::Device;
use goldens::Goldens;

/// What keeps a folder from being verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is missing or not understood.
    #[error("{file}: {why}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing in the folder could be compared.
    #[error("{0} holds no golden numbers")]
    Empty(String),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] crate::backend::Error),
    /// A checkpoint of the folder could not be read.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    /// A conversion failed.
    #[error(transparent)]
    Hybrid(#[from] crate::hybrid::HybridError),
    /// A step of training failed.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
}

/// The result of a part.
pub type Result<T> = std::result::Result<T, Error>;

/// One comparison.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Comparison {
    /// File of the folder.
    pub file: String,
    /// Tensor, or what else was compared.
    pub tensor: String,
    /// Largest absolute difference; infinite where a value is not a number or shapes differ.
    pub error: f64,
    /// What it may be.
    pub tolerance: f64,
}

impl Comparison {
    /// Whether the error is within the tolerance.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }

    /// Error over tolerance; 0 for an exact value that is exact.
    pub fn ratio(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance }
    }
}

/// Everything that was compared.
#[derive(Debug)]
pub struct Report {
    goldens: Goldens,
    comparisons: Vec<Comparison>,
}

impl Report {
    /// All comparisons, file after file.
    pub fn comparisons(&self) -> &[Comparison] {
        &self.comparisons
    }

    /// The worst comparison of each file and the number of its comparisons.
    pub fn worst(&self) -> Vec<(&Comparison, usize)> {
        let mut files: Vec<(&Comparison, usize)> = Vec::new();
        for comparison in &self.comparisons {
            match files.iter_mut().find(|(worst, _)| worst.file == comparison.file) {
                None => files.push((comparison, 1)),
                Some((worst, count)) => {
                    *count += 1;
                    if comparison.ratio() > worst.ratio() {
                        *worst = comparison;
                    }
                }
            }
        }
        files
    }

    /// Whether every comparison passes.
    pub fn passes(&self) -> bool {
        self.comparisons.iter().all(Comparison::passes)
    }

    fn compare(&mut self, file: &str, tensor: &str, expected: &[f32], found: &[f32]) {
        let tolerance = self.goldens.tolerance(file, tensor, largest(expected));
        self.push(file, tensor, difference(expected, found), tolerance);
    }

    fn exact(&mut self, file: &str, what: &str, holds: bool) {
        self.push(file, what, if holds { 0.0 } else { f64::INFINITY }, 0.0);
    }

    fn push(&mut self, file: &str, tensor: &str, error: f64, tolerance: f64) {
        self.comparisons.push(Comparison { file: file.into(), tensor: tensor.into(), error, tolerance });
    }
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |most: f64, v| most.max(f64::from(v.abs())))
}

fn difference(expected: &[f32], found: &[f32]) -> f64 {
    if expected.len() != found.len() {
        return f64::INFINITY;
    }
    let gap = |(a, b): (&f32, &f32)| {
        let gap = (f64::from(*a) - f64::from(*b)).abs();
        if gap.is_nan() { f64::INFINITY } else { gap }
    };
    expected.iter().zip(found).map(gap).fold(0.0, f64::max)
}

/// Runs everything in `folder` on `device`; `progress` hears what comes next.
///
/// # Errors
/// When a file is not understood, or the backend fails; a number that is off is not an error but in the report.
pub fn verify(folder: &Path, device: &Device, mut progress: impl FnMut(&str)) -> Result<Report> {
    let mut report = Report { goldens: Goldens::open(folder)?, comparisons: Vec::new() };
    for (file, run) in [
        ("scan", ops::scan as fn(&mut Report, &Device) -> Result<()>),
        ("attention", ops::attention),
        ("kl", ops::head_loss),
    ] {
        if report.goldens.has(&format!("{file}.safetensors")) {
            progress(file);
            run(&mut report, device)?;
        }
    }
    for folder in report.goldens.folders_with("io.safetensors")? {
        progress(&folder);
        models::forward(&mut report, device, &folder)?;
    }
    for folder in report.goldens.folders_with("decode.safetensors")? {
        progress(&format!("{folder}, decoding"));
        decode::decode(&mut report, device, &folder)?;
    }
    for folder in report.goldens.folders_with("train.json")? {
        progress(&folder);
        mil::initialisation(&mut report, &folder)?;
        train::steps(&mut report, device, &folder)?;
    }
    if report.comparisons.is_empty() {
        return Err(Error::Empty(folder.display().to_string()));
    }
    Ok(report)
}
