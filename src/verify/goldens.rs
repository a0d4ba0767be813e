//! A folder of golden numbers: tensors to compute from and to compare with, and the tolerance of each.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Error, Result};
use crate::checkpoint::TensorFile;

/// A stored f32 differs from the f64 value by its rounding, and sums by theirs: this share of a tensor's largest value
/// is always allowed.
const RELATIVE: f64 = 2e-6;
/// How many times the difference that a peer's f32 run showed.
const TIMES_PEER: f64 = 20.0;

/// A tensor of a golden file.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values in row-major order; integers as the f32 of the same number.
    pub values: Vec<f32>,
}

impl Tensor {
    /// The size of axis `axis`; 1 past the last.
    pub fn size(&self, axis: usize) -> usize {
        self.shape.get(axis).copied().unwrap_or(1)
    }

    /// The values as token ids.
    pub fn ids(&self) -> Vec<u32> {
        self.values.iter().map(|v| *v as u32).collect()
    }

    /// The values with axes 0 and 2 of `[a, b, c, d]` kept in front: `[a, c, b, d]`; missing axes count as 1 at the end.
    pub fn swapped(&self) -> Vec<f32> {
        swap([self.size(0), self.size(1), self.size(2), self.size(3)], &self.values)
    }
}

/// `[a, b, c, d]` to `[a, c, b, d]`.
pub fn swap([a, b, c, d]: [usize; 4], values: &[f32]) -> Vec<f32> {
    let mut swapped = Vec::with_capacity(values.len());
    for i in 0..a {
        for k in 0..c {
            for j in 0..b {
                let first = ((i * b + j) * c + k) * d;
                swapped.extend_from_slice(&values[first..first + d]);
            }
        }
    }
    swapped
}

/// The tensors of a file by name.
#[derive(Debug)]
pub struct Tensors {
    file: String,
    list: HashMap<String, Tensor>,
}

impl Tensors {
    fn read(path: &Path, file: &str) -> Result<Self> {
        let stored = TensorFile::open(path)?;
        let mut list = HashMap::new();
        for name in stored.names() {
            let tensor = stored.tensor(name)?;
            let values = if tensor.storage.is_float() {
                tensor.to_f32()?.values
            } else {
                tensor.to_u32()?.values.into_iter().map(|value| value as f32).collect()
            };
            list.insert(name.to_string(), Tensor { shape: tensor.shape.to_vec(), values });
        }
        Ok(Tensors { file: file.into(), list })
    }

    /// A tensor, if it is there.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.list.get(name)
    }

    /// A tensor that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| Error::File { file: self.file.clone(), why: format!("there is no {name}") })
    }
}

#[derive(Deserialize)]
struct Manifest {
    tolerances: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    file: String,
    tensor: String,
    max_abs_diff: f64,
    max_abs_value: f64,
}

/// The folder.
#[derive(Debug)]
pub struct Goldens {
    root: PathBuf,
    peers: HashMap<(String, String), f64>,
    worst: HashMap<String, Worst>,
}

/// The worst difference of a file's tensors, and the worst share of a tensor's largest value.
#[derive(Debug, Default)]
struct Worst {
    difference: f64,
    share: f64,
}

impl Goldens {
    /// Reads the folder's manifest.
    ///
    /// # Errors
    /// When there is none, or it is not understood.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            let why = if root.exists() { "not a folder" } else { "no such folder" };
            return Err(Error::File { file: root.display().to_string(), why: why.into() });
        }
        let manifest: Manifest = parse(&root.join("MANIFEST.json"), "MANIFEST.json")?;
        let mut worst: HashMap<String, Worst> = HashMap::new();
        for entry in manifest.tolerances.iter().filter(|entry| entry.max_abs_value > 0.0) {
            let most = worst.entry(entry.file.clone()).or_default();
            most.difference = most.difference.max(entry.max_abs_diff);
            most.share = most.share.max(entry.max_abs_diff / entry.max_abs_value);
        }
        let peers = manifest.tolerances.into_iter().map(|e| ((e.file, e.tensor), e.max_abs_diff)).collect();
        Ok(Goldens { root: root.into(), peers, worst })
    }

    /// The path of a file.
    pub fn path(&self, file: &str) -> PathBuf {
        self.root.join(file)
    }

    /// Whether a file is there.
    pub fn has(&self, file: &str) -> bool {
        self.path(file).is_file()
    }

    /// The subfolders that hold `file`, in order.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn folders_with(&self, file: &str) -> Result<Vec<String>> {
        let listing = |why: std::io::Error| Error::File { file: self.root.display().to_string(), why: why.to_string() };
        let mut folders = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(listing)? {
            let entry = entry.map_err(listing)?;
            if entry.path().join(file).is_file() {
                folders.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        folders.sort_unstable();
        Ok(folders)
    }

    /// The tensors of a file.
    ///
    /// # Errors
    /// When it is not there or cut off.
    pub fn tensors(&self, file: &str) -> Result<Tensors> {
        Tensors::read(&self.path(file), file)
    }

    /// A JSON file.
    ///
    /// # Errors
    /// When it is not there or not understood.
    pub fn json<T: for<'a> Deserialize<'a>>(&self, file: &str) -> Result<T> {
        parse(&self.path(file), file)
    }

    /// What a tensor of a file may differ by: the greater of 20 times what a peer's f32 run showed and 2e-6 of its
    /// largest value. Where the manifest is silent, a peer's difference is the worst share that the file's other tensors
    /// showed.
    pub fn tolerance(&self, file: &str, tensor: &str, largest: f64) -> f64 {
        let share = || self.worst.get(file).map_or(0.0, |worst| worst.share * largest);
        let peer = self.peers.get(&(file.to_string(), tensor.to_string())).copied().unwrap_or_else(share);
        (TIMES_PEER * peer).max(RELATIVE * largest)
    }

    /// The same with the worst difference of the whole file: AdamW magnifies noise where a gradient is near zero, so a
    /// single tensor's difference says little.
    pub fn file_tolerance(&self, file: &str, largest: f64) -> f64 {
        let worst = self.worst.get(file).map_or(0.0, |worst| worst.difference);
        (TIMES_PEER * worst).max(RELATIVE * largest)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::File { file: path.display().to_string(), why: error.to_string() })
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path, file: &str) -> Result<T> {
    serde_json::from_slice(&read(path)?).map_err(|error| Error::File { file: file.into(), why: error.to_string() })
}
