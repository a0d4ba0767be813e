//! A piece of a run: a result that is computed once and lies in a file of its own, whole or not at all.
//!
//! A run that goes on finds its finished pieces and computes the others, each from the configuration and from pieces
//! before it. What is computed is read back from its file before it is used, so that a number that loses a bit on its way
//! through the file loses it in a run that was never interrupted too.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, Result};
use crate::checkpoint::{CheckpointError, write_file};

/// The value in the JSON file `path`; computed and written there if there is none.
pub(super) fn once<T: Serialize + DeserializeOwned>(path: &Path, compute: impl FnOnce() -> Result<T>) -> Result<T> {
    if !path.exists() {
        let value = compute()?;
        write_json(path, &value)?;
    }
    read_json(path)
}

/// The value in a JSON file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text).map_err(|error| Error::malformed(path, error))
}

/// Writes a value as JSON, and the folders above it.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|error| Error::malformed(path, error))?;
    text.push('\n');
    write_text(path, &text)
}

/// Writes a text, and the folders above it.
pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    let write = |file: &mut fs::File| {
        let io = |source| CheckpointError::Io { action: "write", path: path.to_owned(), source };
        file.write_all(text.as_bytes()).map_err(io)
    };
    Ok(write_file(path, write)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_computed_once_and_a_failure_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.json");
        let failed = once::<f64>(&path, || Err(Error::Configuration("no".into())));
        assert!(failed.is_err() && !path.exists());
        assert_eq!(once(&path, || Ok(0.1)).unwrap(), 0.1);
        assert_eq!(once(&path, || Ok(0.2)).unwrap(), 0.1);
        fs::write(&path, "{").unwrap();
        assert!(once(&path, || Ok(0.2)).unwrap_err().to_string().contains("b.json"));
    }
}
