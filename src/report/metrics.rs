//! The numbers of a run as it goes: JSON lines, one object a step or event, each with its `step`.
//!
//! Steps never fall from line to line. A line is written whole, by one call; what a kill leaves of a last line is no
//! line, since it has no newline.

use serde::Serialize;
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The key of the number that orders the lines.
const STEP: &str = "step";

/// Why metrics could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A whole line is not what this module writes.
    #[error("{}:{line}: expected a JSON object with a whole number `step`: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What was found.
        problem: String,
    },
    /// Lines are missing that were there.
    #[error("{} has {found} bytes; when the checkpoint was written it had {expected}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it had.
        expected: u64,
    },
    /// The values to write are no object of named numbers.
    #[error("metrics of step {step} are not an object with named values: {problem}")]
    Values {
        /// The step.
        step: u64,
        /// What was found.
        problem: String,
    },
}

/// One line.
pub type Record = Map<String, Value>;

/// Appends lines to a file.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    line: Vec<u8>,
}

impl MetricsWriter {
    /// A new file; one that is there is emptied.
    pub fn create(path: &Path) -> Result<MetricsWriter, MetricsError> {
        MetricsWriter::open(path, 0)
    }

    /// Goes on after the lines at or before `step`: the file is cut before the first line beyond it, and before a
    /// half-written last line. A file that is not there is created.
    pub fn resume(path: &Path, step: u64) -> Result<MetricsWriter, MetricsError> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            result => result.map_err(|source| io_error(path, source))?,
        };
        let mut kept = 0;
        for record in records(path, &bytes) {
            let (end, at, _) = record?;
            if at > step {
                break;
            }
            kept = end;
        }
        MetricsWriter::open(path, kept as u64)
    }

    /// Goes on after the first `length` bytes, as [`Self::length`] gave them; what follows them is cut off. A file that is
    /// not there is created.
    pub fn resume_at(path: &Path, length: u64) -> Result<MetricsWriter, MetricsError> {
        let found = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            result => result.map_err(|source| io_error(path, source))?.len(),
        };
        if found < length {
            return Err(MetricsError::Short { path: path.to_path_buf(), found, expected: length });
        }
        MetricsWriter::open(path, length)
    }

    /// Bytes of the lines so far.
    pub fn length(&self) -> Result<u64, MetricsError> {
        self.file.metadata().map(|file| file.len()).map_err(|source| io_error(&self.path, source))
    }

    fn open(path: &Path, length: u64) -> Result<MetricsWriter, MetricsError> {
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            file.set_len(length)?;
            Ok(file)
        };
        let file = open().map_err(|source| io_error(path, source))?;
        Ok(MetricsWriter { path: path.to_path_buf(), file, line: Vec::new() })
    }

    /// Appends `{"step": step, ...values}` as a line. A number that is not finite is written as `null`.
    pub fn write(&mut self, step: u64, values: &impl Serialize) -> Result<(), MetricsError> {
        let wrong = |problem| MetricsError::Values { step, problem };
        let values = serde_json::to_value(values).map_err(|error| wrong(error.to_string()))?;
        let Value::Object(values) = values else {
            return Err(wrong(format!("found {values}")));
        };
        let mut record = Record::from_iter([(STEP.to_string(), step.into())]);
        record.extend(values.into_iter().filter(|(key, _)| key != STEP));
        self.line.clear();
        serde_json::to_writer(&mut self.line, &record).map_err(|error| wrong(error.to_string()))?;
        self.line.push(b'\n');
        self.file.write_all(&self.line).map_err(|source| io_error(&self.path, source))
    }

    /// Waits until all lines are on the disk, as a checkpoint that counts on them must.
    pub fn sync(&self) -> Result<(), MetricsError> {
        self.file.sync_data().map_err(|source| io_error(&self.path, source))
    }
}

/// The lines of a file, without a half-written last one.
pub fn read(path: &Path) -> Result<Vec<Record>, MetricsError> {
    let bytes = std::fs::read(path).map_err(|source| io_error(path, source))?;
    records(path, &bytes).map(|record| record.map(|(_, _, record)| record)).collect()
}

/// The points `(step, value)` of the records that have a number under `key`.
pub fn series(records: &[Record], key: &str) -> Vec<(f64, f64)> {
    let number = |record: &Record, key: &str| record.get(key).and_then(Value::as_f64);
    records.iter().filter_map(|record| Some((number(record, STEP)?, number(record, key)?))).collect()
}

/// Where each whole line ends, its step, and the line.
fn records<'a>(
    path: &'a Path,
    bytes: &'a [u8],
) -> impl Iterator<Item = Result<(usize, u64, Record), MetricsError>> + use<'a> {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let mut end = 0;
    lines.enumerate().map(move |(index, line)| {
        end += line.len();
        let wrong = |problem| MetricsError::Line { path: path.to_path_buf(), line: index + 1, problem };
        let record: Record = serde_json::from_slice(line).map_err(|error| wrong(error.to_string()))?;
        match record.get(STEP).and_then(Value::as_u64) {
            Some(step) => Ok((end, step, record)),
            None => Err(wrong(format!("found {}", Value::Object(record)))),
        }
    })
}

fn io_error(path: &Path, source: io::Error) -> MetricsError {
    MetricsError::Io { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn write(path: &Path, steps: std::ops::Range<u64>) -> String {
        let mut writer = MetricsWriter::resume(path, steps.start.saturating_sub(1)).unwrap();
        for step in steps {
            writer.write(step, &json!({ "loss": step as f64 / 8.0 })).unwrap();
        }
        writer.sync().unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    proptest! {
        #[test]
        fn a_run_killed_anywhere_ends_in_the_same_file(cut in 0..400_usize, checkpoint in 1..12_u64) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("metrics.jsonl");
            let whole = write(&path, 1..20);
            // The checkpoint's own lines were synced before it was written; the kill takes what came after.
            let safe: usize = whole.lines().take(checkpoint as usize).map(|line| line.len() + 1).sum();
            let end = (safe + cut).min(whole.len());
            std::fs::write(&path, &whole[..end]).unwrap();
            prop_assert_eq!(read(&path).unwrap().len(), whole[..end].matches('\n').count());
            prop_assert_eq!(write(&path, checkpoint + 1..20), whole);
        }
    }

    #[test]
    fn lines_come_back_as_series() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::create(&path).unwrap();
        writer.write(1, &json!({ "loss": 2.5, "stage": "a", "step": 9 })).unwrap();
        writer.write(2, &json!({ "loss": f64::NAN, "tokens": 7 })).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":2.5,\"stage\":\"a\"}\n{\"step\":2,\"loss\":null,\"tokens\":7}\n");
        let records = read(&path).unwrap();
        assert_eq!(series(&records, "loss"), [(1.0, 2.5)]);
        assert_eq!(series(&records, "tokens"), [(2.0, 7.0)]);
        MetricsWriter::create(&path).unwrap();
        assert_eq!(read(&path).unwrap(), Vec::<Record>::new());
    }

    #[test]
    fn a_file_is_cut_back_to_the_length_that_it_had_and_never_stretched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::resume_at(&path, 0).unwrap();
        writer.write(1, &json!({ "loss": 1 })).unwrap();
        let length = writer.length().unwrap();
        writer.write(1, &json!({ "event": "after" })).unwrap();
        assert_eq!(MetricsWriter::resume_at(&path, length).unwrap().length().unwrap(), length);
        assert_eq!(read(&path).unwrap().len(), 1);
        assert!(matches!(MetricsWriter::resume_at(&path, length + 1), Err(MetricsError::Short { .. })));
    }

    #[test]
    fn what_is_no_line_of_metrics_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        for (text, words) in
            [("{\"step\":1}\nno\n", ":2: expected"), ("{\"loss\":1}\n", "found {\"loss\":1}"), ("[]\n", ":1:")]
        {
            std::fs::write(&path, text).unwrap();
            for error in [read(&path).unwrap_err(), MetricsWriter::resume(&path, 9).unwrap_err()] {
                assert!(error.to_string().contains(words), "{error}");
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert!(matches!(read(&folder.path().join("absent")), Err(MetricsError::Io { .. })));
        let error = MetricsWriter::create(&path).unwrap().write(3, &[1]).unwrap_err();
        assert_eq!(error.to_string(), "metrics of step 3 are not an object with named values: found [1]");
    }
}
