//! Data sets: files of texts, of questions with their answers and of conversations, read as records, row by row.

mod parquet;

use super::record::{Record, kind};
use serde_json::Value;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// How many bad rows an error quotes.
const QUOTED_ROWS: usize = 10;

/// Why a data set could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The name does not say what is in the file.
    #[error("{}: expected .jsonl or .ndjson (one JSON object a line), .parquet, or .txt (one text)", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what its name says.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file has no text in it.
    #[error("{}: the file holds no text", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Rows that are no record, one sentence each.
    #[error("{}", quote(path, lines, *more))]
    Lines {
        /// The file.
        path: PathBuf,
        /// The number of each of the first bad rows, from 1, and what was expected there.
        lines: Vec<(usize, String)>,
        /// How many bad rows there are beyond these.
        more: usize,
    },
    /// A share is no share.
    #[error("a validation share of {0} was asked for; expected at least 0 and less than 1")]
    Share(f64),
}

fn quote(path: &Path, lines: &[(usize, String)], more: usize) -> String {
    let sentences: Vec<String> =
        lines.iter().map(|(line, problem)| format!("{}:{line}: {problem}", path.display())).collect();
    let mut text = sentences.join("\n");
    if more > 0 {
        text += &format!("\nand {more} more bad lines");
    }
    text
}

/// What is in a file, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One text.
    Text,
    /// A JSON object a line.
    Lines,
    /// A table.
    Parquet,
}

impl Format {
    /// What the ending of a name says.
    ///
    /// # Errors
    /// When it says nothing that h1 reads.
    pub fn of(path: &Path) -> Result<Format, DatasetError> {
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        match ending.to_ascii_lowercase().as_str() {
            "txt" => Ok(Format::Text),
            "jsonl" | "ndjson" => Ok(Format::Lines),
            "parquet" => Ok(Format::Parquet),
            _ => Err(DatasetError::UnknownFormat { path: path.to_path_buf() }),
        }
    }
}

/// A row of a data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its number in the file, from 1.
    pub number: usize,
    /// What it says.
    pub record: Record,
    /// About how many bytes of the file it takes.
    pub bytes: u64,
}

/// Gives the rows of a file to `each`, in its order.
///
/// A line of `.jsonl` or `.ndjson` and a row of `.parquet` are records by their keys, see [`Record::of_row`]. Blank lines
/// mean nothing. A `.txt` is one text.
///
/// # Errors
/// When the file cannot be read, is of no known kind or holds no text; all its bad rows together; what `each` says.
pub fn read<E: From<DatasetError>>(path: &Path, mut each: impl FnMut(Row) -> Result<(), E>) -> Result<(), E> {
    let format = Format::of(path)?;
    let mut rows = Rows { each: &mut each, good: 0, bad: Vec::new(), more: 0 };
    match format {
        Format::Text => rows.text(path)?,
        Format::Lines => rows.lines(path)?,
        Format::Parquet => parquet::read(path, &mut rows)?,
    }
    match (rows.bad.is_empty(), rows.good) {
        (false, _) => Err(DatasetError::Lines { path: path.to_path_buf(), lines: rows.bad, more: rows.more }.into()),
        (true, 0) => Err(DatasetError::Empty { path: path.to_path_buf() }.into()),
        (true, _) => Ok(()),
    }
}

/// The records of a file, in its order.
///
/// # Errors
/// As [`read`].
pub fn read_records(path: &Path) -> Result<Vec<Record>, DatasetError> {
    let mut records = Vec::new();
    read(path, |row| {
        records.push(row.record);
        Ok::<_, DatasetError>(())
    })?;
    Ok(records)
}

/// What became of the rows so far.
struct Rows<'a, E> {
    each: &'a mut dyn FnMut(Row) -> Result<(), E>,
    good: usize,
    bad: Vec<(usize, String)>,
    more: usize,
}

impl<E: From<DatasetError>> Rows<'_, E> {
    fn add(&mut self, number: usize, bytes: u64, record: Result<Option<Record>, String>) -> Result<(), E> {
        match record {
            Ok(None) => Ok(()),
            // After a bad row only more of them are looked for.
            Ok(Some(record)) => {
                self.good += 1;
                if self.bad.is_empty() { (self.each)(Row { number, record, bytes }) } else { Ok(()) }
            }
            Err(_) if self.bad.len() == QUOTED_ROWS => {
                self.more += 1;
                Ok(())
            }
            Err(problem) => {
                self.bad.push((number, problem));
                Ok(())
            }
        }
    }

    fn text(&mut self, path: &Path) -> Result<(), E> {
        let mut bytes = Vec::new();
        let io = |source| DatasetError::Io { path: path.to_path_buf(), source };
        File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(io)?;
        let text = utf8(without_mark(&bytes));
        let record = text.map(|text| (!text.is_empty()).then(|| Record::Text(text.to_owned())));
        self.add(1, bytes.len() as u64, record)
    }

    fn lines(&mut self, path: &Path) -> Result<(), E> {
        let io = |source| DatasetError::Io { path: path.to_path_buf(), source };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            if file.read_until(b'\n', &mut bytes).map_err(io)? == 0 {
                break;
            }
            let line = if number == 1 { without_mark(&bytes) } else { &bytes };
            self.add(number, bytes.len() as u64, json_line(line))?;
        }
        Ok(())
    }
}

/// What follows the mark that some programs put before UTF-8.
fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes)
        .map_err(|error| format!("expected UTF-8 text, found other bytes from byte {} on", error.valid_up_to() + 1))
}

/// The record of a line of JSON; nothing for a blank one.
pub(super) fn json_line(bytes: &[u8]) -> Result<Option<Record>, String> {
    let line = utf8(bytes)?;
    if line.trim().is_empty() {
        return Ok(None);
    }
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("expected a JSON object, found no JSON: {error}"))?;
    match value {
        Value::Object(row) => Record::of_row(&row).map(Some),
        other => Err(format!("expected a JSON object, found {}", kind(&other))),
    }
}

/// Which side of a split by `share` a record is on: whether it is held out.
///
/// That depends on nothing but its text and the share, so a text that comes twice is on one side.
///
/// # Errors
/// When the share is none.
pub fn held_out(record: &Record, share: f64) -> Result<bool, DatasetError> {
    if !(0.0..1.0).contains(&share) {
        return Err(DatasetError::Share(share));
    }
    let held_out = (share * 2_f64.powi(64)) as u64;
    Ok(super::text_hash("validation split", record.content().as_bytes()) < held_out)
}

#[cfg(test)]
mod tests;
